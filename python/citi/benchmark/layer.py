"""Suite "layer": one MOLoRA layer on a frozen linear layer, forward and backward, and its peers.

x has a gradient everywhere, the frozen weight nowhere; adapters have theirs. Suite "scaling" asks
how the cost grows with tokens, experts and rank.

Shapes: T tokens, K in-features, N out-features.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from citi.benchmark.group import DTYPES, Group, Pass, Settings
from citi.benchmark.peers.addmm_lora import addmm_lora
from citi.benchmark.peers.einsum_experts import einsum_experts
from citi.benchmark.peers.expert_loop import expert_loop
from citi.benchmark.peers.peft_lora import peft_lora
from citi_kernels import molora_linear
from citi_kernels.testing import (
    MoLoRACase,
    check_molora_linear,
    random_case,
    stacked_molora_linear,
)

NUM_EXPERTS, RANK = 4, 8
CHECKED_TOKENS = {"cpu": 128, "cuda": 4096}
DROPOUT = 0.1
FROZEN, OURS, LOOP = "frozen linear", "MOLoRA", "expert loop"

STANDS_FOR = {
    FROZEN: "nn.Linear, the floor of any adapter",
    OURS: "citi_kernels.molora_linear, 4 experts of rank 8 and a router",
    "MOLoRA, gate sums": "the same with 8 samples, their gate sums in the loss",
    "MOLoRA, dropout": f"the same with dropout {DROPOUT}",
    "stacked": "the same algebra in PyTorch calls, differentiated by autograd",
    "stacked, compiled": "the same under torch.compile(mode='max-autotune')",
    LOOP: "MOLoRA as its authors released it",
    "expert loop, dropout": f"the same with dropout {DROPOUT}, a mask for each expert",
    "einsum": "experts by einsum, as PEFT's Arrow",
    "PEFT LoRA": "PEFT, one adapter of rank 8, no router",
    "PEFT LoRA x 4": "PEFT, four adapters of rank 8 added up, no router",
    "addmm LoRA": "Unsloth's sequence, one adapter of rank 32, no router",
}


class Shape(NamedTuple):
    """Tokens, in-features, out-features."""

    T: int
    K: int
    N: int


CPU_SHAPES = tuple(Shape(T, D, D) for D in (1024, 2048, 4096) for T in (512, 1024))
GPU_SIZES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
GPU_SHAPES = (
    *(Shape(8192, *size) for size in GPU_SIZES),
    *(Shape(T, 4096, 4096) for T in (512, 2048, 16384)),
    Shape(2048, 4096, 14336),
)
SHAPES = {"cpu": CPU_SHAPES, "cuda": GPU_SHAPES}
QUICK_SHAPES = {
    "cpu": (Shape(512, 1024, 1024), Shape(512, 2048, 2048)),
    "cuda": (Shape(8192, 4096, 4096), Shape(8192, 4096, 14336)),
}

# (device, dtype, in- and out-features) -> (gate, goal) of ours over the frozen linear
LIMITS = {
    ("cpu", "bf16", 4096, 4096): (1.13, 1.06),
    ("cpu", "bf16", 2048, 2048): (1.15, 1.10),
    ("cpu", "bf16", 1024, 1024): (1.5, 1.20),
    ("cpu", "fp32", 4096, 4096): (1.08, 1.04),
    ("cpu", "fp32", 2048, 2048): (1.12, 1.07),
    ("cuda", "bf16", 4096, 4096): (1.12, 1.06),
    ("cuda", "bf16", 4096, 14336): (1.07, 1.035),
    ("cuda", "bf16", 14336, 4096): (1.07, 1.035),
}
SCALED = {
    "T": (64, 256, 1024, 4096),
    "experts": (1, 2, 4, 8, 16),
    "rank": (4, 8, 16, 32),
}
_SCALED_SIZE = {"cpu": (512, 1024, 1024), "cuda": (8192, 4096, 4096)}
_SCALED_ROWS = (FROZEN, OURS, "stacked", LOOP)


def layer_suite(settings: Settings) -> Iterator[Group]:
    """Every shape in every dtype."""
    shapes = (QUICK_SHAPES if settings.is_quick else SHAPES)[settings.device]
    for dtype in settings.dtypes:
        for shape in shapes:
            yield layer_group(shape, dtype, settings)


def scaling_suite(settings: Settings) -> Iterator[Group]:
    """Tokens, experts and rank in turn, the others as in the paper; one dtype."""
    dtype = settings.dtypes[0]
    for axis, values in SCALED.items():
        for value in values[::2] if settings.is_quick else values:
            size = Shape(*_SCALED_SIZE[settings.device])
            options = {"experts": NUM_EXPERTS, "rank": RANK}
            if axis == "T":
                size = size._replace(T=value)
            else:
                options[axis] = value
            yield layer_group(
                size,
                dtype,
                settings,
                suite="scaling",
                num_experts=options["experts"],
                r=options["rank"],
                rows=_SCALED_ROWS,
                axis=axis,
            )


def layer_group(
    shape: Shape,
    dtype: str,
    settings: Settings,
    *,
    suite: str = "layer",
    num_experts: int = NUM_EXPERTS,
    r: int = RANK,
    rows: tuple[str, ...] | None = None,
    axis: str | None = None,
) -> Group:
    """One shape; `rows` chooses among the peers, None takes all that run here."""
    skipped = {}
    if not settings.compiles:
        skipped["stacked, compiled"] = "not asked for: it compiles for minutes (--compile)"
    chosen = [name for name in rows or STANDS_FOR if name not in skipped]
    chosen = [name for name in chosen if settings.wants(name, FROZEN)]
    T, K, N = shape
    element = torch.finfo(DTYPES[dtype]).bits // 8
    experts = {"E": num_experts, "r": r} if suite == "scaling" else {}
    return Group(
        suite=suite,
        settings={**shape._asdict(), **experts, "dtype": dtype} | ({"axis": axis} if axis else {}),
        baseline=FROZEN,
        make=lambda: _make(shape, DTYPES[dtype], settings.device, num_experts, r, chosen),
        check=partial(check_layer, shape, DTYPES[dtype], settings.device, num_experts, r),
        stands_for=STANDS_FOR,
        tokens=T,
        limits=_limits(suite, settings.device, dtype, shape),
        skipped={} if rows else skipped,
        flops=4.0 * T * K * N,
        bytes=float(element * 2 * (T * K + K * N + T * N)),
    )


def check_layer(
    shape: Shape, dtype: torch.dtype, device: str, num_experts: int, r: int, **options: Any
) -> float:
    """Largest share of the allowance used on this shape: plain, with gate sums, with dropout.

    At the shape's tokens, or at so many of them that the code for many tokens is what runs.

    Raises:
        AssertionError: an output or gradient breaks the accuracy rule.
    """
    most = CHECKED_TOKENS[device]
    variants: list[dict[str, Any]] = [{"num_segments": None}, {"num_segments": 3}]
    if "top_k" not in options:
        variants.append({"dropout_p": DROPOUT, "dropout_seed": torch.tensor(1)})
    used = []
    for variant in variants:
        case = random_case(
            min(shape.T, most) if shape.T else most,
            shape.K,
            shape.N,
            num_experts=num_experts,
            r=r,
            dtype=dtype,
            bias=False,
            device=device,
            drawn_on=device,
            **options,
            **variant,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            accuracies = check_molora_linear(molora_linear, case)
        used += [max(each) for each in accuracies.values()]
    return max(used)


def trained_pass(
    forward: Callable[[], Tensor | tuple[Tensor, ...]],
    trained: list[Tensor],
    incoming: list[Tensor],
) -> Pass:
    """Forward, and the gradients of `trained` for these incoming ones."""

    def backward(made: Any) -> None:
        outputs = (
            [made] if isinstance(made, Tensor) else [each for each in made if each is not None]
        )
        torch.autograd.grad(outputs, trained, incoming)

    return Pass(forward, backward)


def _make(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    num_experts: int,
    r: int,
    chosen: list[str],
) -> dict[str, Pass]:
    case = random_case(
        *shape,
        num_experts=num_experts,
        r=r,
        dtype=dtype,
        bias=False,
        num_segments=8,
        device=device,
        drawn_on=device,
    )
    # as in a model: what is kept of parameters is no memory of the layer's
    frozen = nn.Parameter(case.weight, requires_grad=False)
    trained = {name: nn.Parameter(getattr(case, name)) for name in ("a", "b", "router")}
    case = replace(case, x=case.x.requires_grad_(), weight=frozen, **trained)
    makers = _ours(case) | _peers(case)
    return {name: makers[name]() for name in chosen}


def _ours(case: MoLoRACase) -> dict[str, Callable[[], Pass]]:
    x, weight, _, a, b, router = case.operands
    trained = [x, a, b, router]
    experts = {name: case.options[name] for name in ("num_experts", "scaling")}
    segments = {name: case.options[name] for name in ("segment_ids", "num_segments")}
    dropout = {"dropout_p": DROPOUT, "dropout_seed": torch.tensor(1)}

    def layer(function: Callable, **options: Any) -> Pass:
        incoming = [case.dy, case.dgate_sums] if "segment_ids" in options else [case.dy]
        call = partial(function, x, weight, None, a, b, router, **experts, **options)
        return trained_pass(call, trained, incoming)

    def compiled() -> Pass:
        return layer(torch.compile(stacked_molora_linear, mode="max-autotune"))

    return {
        FROZEN: lambda: trained_pass(lambda: F.linear(x, weight), [x], [case.dy]),
        OURS: lambda: layer(molora_linear),
        "MOLoRA, gate sums": lambda: layer(molora_linear, **segments),
        "MOLoRA, dropout": lambda: layer(molora_linear, **dropout),
        "stacked": lambda: layer(stacked_molora_linear),
        "stacked, compiled": compiled,
    }


def _peers(case: MoLoRACase) -> dict[str, Callable[[], Pass]]:
    x, weight, _, a, b, router = case.operands
    experts = {name: case.options[name] for name in ("num_experts", "scaling")}
    trained = [x, a, b, router]

    def routed(function: Callable, **options: Any) -> Pass:
        call = partial(function, x, weight, a, b, router, **experts, **options)
        return trained_pass(call, trained, [case.dy])

    def peft(num_adapters: int) -> Pass:
        lora = peft_lora(weight, num_adapters=num_adapters)
        adapters = [each for each in lora.parameters() if each.requires_grad]
        return trained_pass(lambda: lora(x), [x, *adapters], [case.dy])

    def addmm() -> Pass:
        call = partial(addmm_lora, x, weight, a, b, scaling=experts["scaling"])
        return trained_pass(call, [x, a, b], [case.dy])

    return {
        LOOP: lambda: routed(expert_loop),
        "expert loop, dropout": lambda: routed(expert_loop, dropout_p=DROPOUT),
        "einsum": lambda: routed(einsum_experts),
        "PEFT LoRA": lambda: peft(1),
        "PEFT LoRA x 4": lambda: peft(4),
        "addmm LoRA": addmm,
    }


def _limits(suite: str, device: str, dtype: str, shape: Shape) -> dict[str, tuple[float, float]]:
    limit = LIMITS.get((device, dtype, shape.K, shape.N))
    # those of a GPU are set for many tokens
    applies = suite == "layer" and limit and (device == "cpu" or shape.T >= 8192)
    return {OURS: limit} if applies else {}
