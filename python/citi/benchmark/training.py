"""Suites "training" (one step of a whole model) and "generation" (greedy decoding).

A step is forward, backward and AdamW on the trained parameters. The floor is the frozen model with
a gradient to its embedded tokens, which trains nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from citi.adapters import MoLoraConfig
from citi.benchmark.group import DTYPES, Group, Pass, Settings
from citi.benchmark.layer import Shape, check_layer
from citi.benchmark.models import (
    SIZES,
    draw_updates,
    loss_of,
    loss_of_frozen,
    random_batch,
    random_model,
    twin_of,
)
from citi.benchmark.peers import liger
from citi.components import find_components
from citi.stages import MI, ROUTER, RP, UCO, Stage, apply_stage
from citi_kernels import RoutingContext, router_loss

FROZEN, BASE = "frozen model", "base model"
_ON_LIGER = "PEFT LoRA + Liger"
# model, sequences, tokens of each
_TRAINED = {
    "cpu": (("tiny", 8, 128), ("smollm2-135m", 4, 128)),
    "cuda": (("smollm2-135m", 8, 1024), ("llama-1b", 4, 2048), ("llama-8b", 1, 2048)),
}
_GENERATED = {"cpu": "smollm2-135m", "cuda": "llama-1b"}
_NEW_TOKENS = {"cpu": 16, "cuda": 128}
_IMPORTANT, _UNIMPORTANT = 0.20, 0.10
_TOO_LARGE_TO_TRAIN = {"llama-8b": "gradients and AdamW's moments of all weights need over 80 GB"}
_LEARNING_RATE, _ROUTER_LOSS_WEIGHT = 1e-5, 0.01

_STANDS_FOR = {
    FROZEN: "forward and backward to the embedded tokens, nothing trained",
    "full fine-tuning": "all parameters trained",
    "PEFT LoRA": "PEFT, rank 8 on all linear components",
    _ON_LIGER: "PEFT LoRA, Liger's kernels in the loss and between the components",
    "MOLoRA everywhere": "4 experts of rank 8 and a router on all linear components, stage MI",
    "CITI stage RP": "MOLoRA on the 20 % important components, routers trained",
    "CITI stage MI": "the same, routers and experts trained",
    "CITI stage UCO": "the same, the 10 % unimportant components trained",
}
_GENERATES = {
    BASE: "model.generate, greedy, cached",
    "PEFT LoRA": "the same with PEFT's adapter of rank 8 on all linear components",
    "MOLoRA everywhere": "the same with 4 experts of rank 8 on all linear components",
    "CITI": "the same with MOLoRA on the 20 % important components",
}


def training_suite(settings: Settings) -> Iterator[Group]:
    """Steps of every model in the first dtype; quick: the smallest model."""
    sizes = _TRAINED[settings.device]
    for name, num_sequences, num_tokens in sizes[:1] if settings.is_quick else sizes:
        dtype = settings.dtypes[0]
        reasons = {
            "full fine-tuning": _TOO_LARGE_TO_TRAIN.get(name),
            _ON_LIGER: liger.why_not(settings.device),
        }
        yield Group(
            suite="training",
            settings={"model": name, "batch": num_sequences, "tokens": num_tokens, "dtype": dtype},
            baseline=FROZEN,
            make=partial(_make_steps, name, (num_sequences, num_tokens), dtype, settings),
            check=partial(_check, name, dtype, settings.device),
            stands_for=_STANDS_FOR,
            tokens=num_sequences * num_tokens,
            skipped={row: reason for row, reason in reasons.items() if reason is not None},
            is_cold=False,
        )


def generation_suite(settings: Settings) -> Iterator[Group]:
    """Tokens one after the other, for a batch of one."""
    name, dtype = _GENERATED[settings.device], settings.dtypes[0]
    if settings.is_quick:
        name = "tiny"
    yield Group(
        suite="generation",
        settings={"model": name, "new tokens": _NEW_TOKENS[settings.device], "dtype": dtype},
        baseline=BASE,
        make=partial(_make_generation, name, dtype, settings),
        check=partial(_check, name, dtype, settings.device, num_tokens=8),
        stands_for=_GENERATES,
        tokens=_NEW_TOKENS[settings.device],
        is_cold=False,
    )


def _check(name: str, dtype: str, device: str, *, num_tokens: int = 32) -> float:
    hidden = SIZES[name].hidden
    return check_layer(Shape(num_tokens, hidden, hidden), DTYPES[dtype], device, 4, 8)


def _make_steps(
    name: str, shape: tuple[int, int], dtype: str, settings: Settings
) -> dict[str, Pass]:
    """All rows on one base model: the weights of an 8B model fill a fifth of a large GPU."""
    device = settings.device
    base, batch = random_model(name, DTYPES[dtype], device), random_batch(name, shape, device)

    def staged(stage: Stage, important: float) -> Pass:
        return _routed_step(molora_model(twin_of(base), important), batch, stage)

    makers = {
        FROZEN: lambda: Pass(partial(loss_of_frozen, base, batch), lambda loss: loss.backward()),
        "PEFT LoRA": lambda: _step(lora_model(twin_of(base)), batch),
        "MOLoRA everywhere": lambda: staged(MI, 1.0),
        "full fine-tuning": lambda: _step(copy.deepcopy(base).requires_grad_(True), batch),
    } | {
        f"CITI stage {stage.name.upper()}": partial(staged, stage, _IMPORTANT)
        for stage in (RP, MI, UCO)
    }
    if liger.why_not(device) is None:
        makers[_ON_LIGER] = lambda: _step(lora_model(liger.liger(twin_of(base))), batch)
    if name in _TOO_LARGE_TO_TRAIN:
        del makers["full fine-tuning"]
    return _asked_for(makers, settings, FROZEN)


def _asked_for(
    makers: dict[str, Callable[[], Pass]], settings: Settings, baseline: str
) -> dict[str, Pass]:
    """An adapted model takes seconds to make, and its optimizer memory."""
    return {row: make() for row, make in makers.items() if settings.wants(row, baseline)}


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Pass:
    return Pass(partial(loss_of, model.train(), batch), _update(model))


def _routed_step(model: nn.Module, batch: dict[str, Tensor], stage: Stage) -> Pass:
    """With the router loss where routers are trained, as `citi train` adds it."""
    apply_stage(model, stage)
    model.train()
    if ROUTER not in stage.trains:
        return _step(model, batch)
    mask = torch.ones_like(batch["input_ids"])
    types = torch.arange(len(mask), device=mask.device) % 2

    def forward() -> Tensor:
        context = RoutingContext.from_attention_mask(mask, task_types=types)
        with context:
            loss = loss_of(model, batch)
        for gate_sums_LBG in context.stacked():
            losses_L = router_loss(gate_sums_LBG, context.token_counts, context.task_types)
            loss = loss + _ROUTER_LOSS_WEIGHT * losses_L.sum()
        return loss

    return Pass(forward, _update(model))


def _update(model: nn.Module) -> Callable[[Tensor], None]:
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE)

    def backward(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return backward


def lora_model(model: PreTrainedModel) -> nn.Module:
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def molora_model(model: PreTrainedModel, important: float) -> nn.Module:
    """Adapters on a share of the components, the first tenth of the others set free."""
    names = [component.name for component in find_components(model)[0]]
    # spread over the depth of the model
    step = round(1 / important)
    targets = names[::step]
    others = [name for name in names if name not in targets]
    saved = others[: round(_UNIMPORTANT * len(names))] or None
    config = MoLoraConfig(target_modules=targets, modules_to_save=saved, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _make_generation(name: str, dtype: str, settings: Settings) -> dict[str, Pass]:
    device = settings.device
    base = random_model(name, DTYPES[dtype], device)
    prompt = random_batch(name, (1, 16), device)["input_ids"]
    models = {
        BASE: lambda: base,
        "PEFT LoRA": lambda: lora_model(twin_of(base)),
        "MOLoRA everywhere": lambda: molora_model(twin_of(base), 1.0),
        "CITI": lambda: molora_model(twin_of(base), _IMPORTANT),
    }
    # of random weights, whose logits larger updates would only scatter
    std = 0.01
    number = _NEW_TOKENS[device]

    @torch.no_grad()
    def generate(model: nn.Module) -> Tensor:
        return model.eval().generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=number,
            max_new_tokens=number,
        )

    makers = {
        row: lambda make=make: Pass(partial(generate, draw_updates(make(), std=std)))
        for row, make in models.items()
    }
    return _asked_for(makers, settings, BASE)
