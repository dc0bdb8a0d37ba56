"""Suite "importance": scoring all components of a model, beside a plain backward and the peers.

Before anything is timed, `token` must agree with the authors' hooks and `parameter` with stored
gradients, on the first layers of the model and a few hundred tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from citi.benchmark.group import DTYPES, Group, Pass, Settings
from citi.benchmark.models import loss_of_frozen, random_batch, random_model
from citi.benchmark.peers.hooks import hooks, hooks_per_sequence
from citi.benchmark.peers.naive_gradient import (
    full_backward,
    naive_gradient,
    naive_gradient_per_sequence,
)
from citi.components import find_components
from citi.importance import ImportanceRecorder, component_importance
from citi.importance.scoring_pass import score_batches

FROZEN, FULL = "frozen", "full backward"
CHECKED_LAYERS, CHECKED_SEQUENCES, CHECKED_TOKENS = 4, 2, 256
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
# model, sequences, tokens of each, share of tokens in answers, whether activations are recomputed
_SCORED = {
    "cpu": (
        ("smollm2-135m", 8, 256, 1.0, False),
        ("smollm2-135m", 1, 128, 0.2, False),
    ),
    "cuda": (("smollm2-135m", 8, 1024, 1.0, False), ("llama-8b", 1, 2048, 1.0, True)),
}
_QUICK = {"cpu": (("tiny", 4, 128, 1.0, False),), "cuda": _SCORED["cuda"][:1]}

_STANDS_FOR = {
    FROZEN: "forward and backward with frozen weights, the floor of any score",
    FULL: "forward and backward with all weight gradients",
    "token": "citi importance --estimator token",
    "batch": "citi importance --estimator batch",
    "parameter": "citi importance --estimator parameter",
    "parameter by row": "the same, --granularity row",
    "elements in bf16": "the same, --granularity element, one batch of a longer pass",
    "stored gradients": "full backward, then |p * p.grad| summed: scores of `parameter`",
    "stored gradients, each sequence": "the same sequence by sequence",
    "hooks": "the authors' way: outputs and their gradients kept by hooks: scores of `token`",
    "hooks, each sequence": "the same sequence by sequence, as the authors ran it",
}
# weights, gradients and outputs of these do not fit beside an 8B model
_OF_LARGE_MODELS = (FROZEN, "token", "batch", "parameter")


def importance_suite(settings: Settings) -> Iterator[Group]:
    """Every model in every dtype; the paper's own setting is a batch of one short sample."""
    scored = (_QUICK if settings.is_quick else _SCORED)[settings.device]
    for dtype in settings.dtypes:
        for name, num_sequences, num_tokens, answers, recomputes in scored:
            yield importance_group(
                name,
                (num_sequences, num_tokens),
                dtype,
                settings.device,
                answers=answers,
                recomputes=recomputes,
            )


def importance_group(
    name: str,
    shape: tuple[int, int],
    dtype: str,
    device: str,
    *,
    answers: float = 1.0,
    recomputes: bool = False,
) -> Group:
    """One model on one batch of random tokens."""
    settings = {"model": name, "batch": shape[0], "tokens": shape[1], "answers": answers}
    settings |= {"recomputes": True} if recomputes else {}
    batch = partial(random_batch, name, shape, device, answers=answers)
    few = min(shape[0], CHECKED_SEQUENCES), min(shape[1], CHECKED_TOKENS)
    return Group(
        suite="importance",
        settings=settings | {"dtype": dtype},
        baseline=FROZEN,
        make=lambda: _make(random_model(name, DTYPES[dtype], device), batch(), recomputes),
        check=lambda: _check(name, dtype, device, random_batch(name, few, device, answers=answers)),
        stands_for=_STANDS_FOR,
        tokens=shape[0] * shape[1],
        limits={"token": (1.10, 1.03), "batch": (1.10, 1.03)},
        is_cold=False,
    )


def _make(model: PreTrainedModel, batch: dict[str, Tensor], recomputes: bool) -> dict[str, Pass]:
    if recomputes:
        # transformers recomputes in train mode only; there is no dropout
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    names = [component.name for component in find_components(model)[0]]

    def frozen() -> None:
        loss_of_frozen(model, batch).backward()

    def full() -> None:
        full_backward(model.requires_grad_(True), batch)
        model.zero_grad(set_to_none=True)

    def scored(estimator: str, granularity: str = "component") -> Callable[[], object]:
        return partial(
            component_importance, model, [batch], estimator=estimator, granularity=granularity
        )

    def peer(function: Callable) -> Callable[[], object]:
        return lambda: function(model.requires_grad_(True), batch, names)

    calls = {
        FROZEN: frozen,
        FULL: full,
        "token": scored("token"),
        "batch": scored("batch"),
        "parameter": scored("parameter"),
        "parameter by row": scored("parameter", "row"),
        "elements in bf16": _elements(model, batch),
        "stored gradients": peer(naive_gradient),
        "hooks": peer(hooks),
    }
    if len(batch["input_ids"]) > 1:
        calls["stored gradients, each sequence"] = peer(naive_gradient_per_sequence)
        calls["hooks, each sequence"] = peer(hooks_per_sequence)
    is_large = sum(each.nbytes for each in model.parameters()) > 8 * 2**30
    kept = _OF_LARGE_MODELS if is_large else tuple(calls)
    return {name: Pass(calls[name]) for name in kept}


def _elements(model: PreTrainedModel, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One more batch of the same pass at every call; the first makes the buffers."""
    recorder = ImportanceRecorder(
        model, estimator="parameter", granularity="element", element_dtype=torch.bfloat16
    )
    return lambda: score_batches(recorder, [batch])


def _check(name: str, dtype: str, device: str, batch: dict[str, Tensor]) -> float:
    """Largest share of the tolerance used by the difference to peers that compute the same.

    Raises:
        AssertionError: the scores differ by more.
    """
    model = random_model(name, DTYPES[dtype], device, max_layers=CHECKED_LAYERS)
    names = [component.name for component in find_components(model)[0]]
    ours = component_importance(model, [batch], estimator="token").by_batch[0].tolist()
    # the loss of `token` is the sum of the sequences' means, here that of equal sequences
    theirs = hooks(model.requires_grad_(True), batch, names)
    used = {"token": _difference(ours, theirs, len(batch["input_ids"]))}
    ours = component_importance(model, [batch], estimator="parameter")
    theirs = naive_gradient(model.requires_grad_(True), batch, names)
    used["parameter"] = _difference(list(ours.values()), theirs, 1)
    for estimator, difference in used.items():
        assert difference <= TOLERANCE[dtype], (
            f"{estimator}: scores differ by {difference:.2g}, want at most {TOLERANCE[dtype]:g}"
        )
    return max(used.values()) / TOLERANCE[dtype]


def _difference(ours: list[float], theirs: dict[str, float], factor: int) -> float:
    """The largest over the components, relative."""
    pairs = zip(ours, theirs.values(), strict=True)
    return max(abs(mine / (factor * other) - 1) for mine, other in pairs)
