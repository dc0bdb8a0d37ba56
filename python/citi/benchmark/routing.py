"""Suites "top-k" (few of many experts, forward and backward) and "decode" (few tokens, forward).

Decoding on a GPU is timed as replays of a CUDA graph, without the launches of Python. On a CPU it
goes through more layers than a cache holds: weights come from memory, as in a model, and what
Python touches does not.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from citi.benchmark.group import DTYPES, Group, Pass, Settings
from citi.benchmark.layer import (
    FROZEN,
    NUM_EXPERTS,
    OURS,
    RANK,
    Shape,
    check_layer,
    trained_pass,
)
from citi.benchmark.peers import grouped_experts, scattermoe_experts
from citi_kernels import molora_linear, use_backend
from citi_kernels.testing import MoLoRACase, random_case

TOP_K = 2
# shape, experts, rank: more ranks than are computed for every token, and as many as are
TOP_K_SIZES = {
    "cuda": ((Shape(8192, 4096, 4096), 64, 64), (Shape(8192, 4096, 4096), 8, 8)),
    "cpu": ((Shape(512, 1024, 1024), 16, 16), (Shape(512, 1024, 1024), 8, 8)),
}
DECODED_TOKENS = (1, 4, 16, 64)
DECODED_SIZE = {"cuda": (4096, 4096), "cpu": (1024, 1024)}
_BYTES_OF_LAYERS = 2**27
_WAYS = ("update", "few", "decode")
_OF_A_LAYER = ("weight", "a", "b", "router")
_LOOP, _GROUPED, _SCATTERED = "expert by expert", "grouped_mm", "ScatterMoE"

_STANDS_FOR = {
    FROZEN: "nn.Linear",
    OURS: f"citi_kernels.molora_linear(top_k={TOP_K})",
    "all experts": "the same without top_k",
    _LOOP: "the torch backend: each expert on its own tokens",
    _GROUPED: "torch.nn.functional.grouped_mm, two products and an index_add",
    _SCATTERED: "scattermoe.parallel_linear, twice",
}


def top_k_suite(settings: Settings) -> Iterator[Group]:
    """Many experts of which each token keeps two."""
    for dtype, size in itertools.product(settings.dtypes, TOP_K_SIZES[settings.device]):
        shape, num_experts, r = size
        reasons = {
            _GROUPED: grouped_experts.why_not(),
            _SCATTERED: scattermoe_experts.why_not(settings.device),
        }
        skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        yield Group(
            suite="top-k",
            settings={**shape._asdict(), "E": num_experts, "r": r, "k": TOP_K, "dtype": dtype},
            baseline=FROZEN,
            make=partial(_make_top_k, size, dtype, settings.device, tuple(skipped)),
            check=partial(
                check_layer, shape, DTYPES[dtype], settings.device, num_experts, r, top_k=TOP_K
            ),
            stands_for=_STANDS_FOR,
            tokens=shape.T,
            skipped=skipped,
        )


def decode_suite(settings: Settings) -> Iterator[Group]:
    """A frozen linear layer and ours on 1 to 64 tokens."""
    num_in, num_out = DECODED_SIZE[settings.device]
    is_on_gpu = settings.device == "cuda"
    for dtype in settings.dtypes:
        for num_tokens in DECODED_TOKENS[::2] if settings.is_quick else DECODED_TOKENS:
            shape = Shape(num_tokens, num_in, num_out)
            ways = [f"{OURS}, {way}" for way in _WAYS] if is_on_gpu else [OURS]
            num_layers = 1 if is_on_gpu else _num_layers(shape, DTYPES[dtype])
            yield Group(
                suite="decode",
                settings={**shape._asdict(), "dtype": dtype},
                baseline=FROZEN,
                make=partial(_make_decode, shape, dtype, settings.device, num_layers),
                check=partial(
                    check_layer, shape, DTYPES[dtype], settings.device, NUM_EXPERTS, RANK
                ),
                stands_for={FROZEN: _STANDS_FOR[FROZEN]}
                | dict.fromkeys(ways, "citi_kernels.molora_linear, 4 experts of rank 8"),
                tokens=num_tokens * num_layers,
                limits=dict.fromkeys(ways, (1.25, 1.10)) if is_on_gpu and num_tokens <= 16 else {},
                is_cold=is_on_gpu,
            )


def _make_top_k(
    size: tuple[Shape, int, int], dtype: str, device: str, skipped: tuple[str, ...]
) -> dict[str, Pass]:
    shape, num_experts, r = size
    case = random_case(
        *shape,
        num_experts=num_experts,
        r=r,
        dtype=DTYPES[dtype],
        bias=False,
        num_segments=None,
        device=device,
        drawn_on=device,
    )
    x, weight, _, a, b, router = (
        None if each is None else nn.Parameter(each) for each in case.operands
    )
    weight.requires_grad_(False)
    trained = [x, a, b, router]

    def ours(top_k: int | None) -> Pass:
        call = partial(molora_linear, x, weight, None, a, b, router, **case.options, top_k=top_k)
        return trained_pass(call, trained, [case.dy])

    rows = {
        FROZEN: trained_pass(lambda: F.linear(x, weight), [x], [case.dy]),
        OURS: ours(TOP_K),
        "all experts": ours(None),
        _LOOP: _on_backend("torch", ours(TOP_K)),
    }
    peers = {
        _GROUPED: grouped_experts.grouped_experts,
        _SCATTERED: scattermoe_experts.scattermoe_experts,
    }
    for name, peer in peers.items():
        if name not in skipped:
            call = partial(peer, x, weight, a, b, router, **case.options, top_k=TOP_K)
            rows[name] = trained_pass(call, trained, [case.dy])
    return rows


def _on_backend(name: str, each: Pass) -> Pass:
    def forward() -> object:
        with use_backend(name):
            return each.forward()

    return Pass(forward, each.backward)


def _num_layers(shape: Shape, dtype: torch.dtype) -> int:
    return -(-_BYTES_OF_LAYERS // (shape.K * shape.N * dtype.itemsize))


def _make_decode(shape: Shape, dtype: str, device: str, num_layers: int) -> dict[str, Pass]:
    case = random_case(
        *shape,
        dtype=DTYPES[dtype],
        bias=False,
        num_segments=None,
        device=device,
        drawn_on=device,
    )
    if device == "cpu":
        layers = [
            replace(case, **{name: getattr(case, name).clone() for name in _OF_A_LAYER})
            for _ in range(num_layers)
        ]
        return {FROZEN: Pass(partial(_frozen, layers)), OURS: Pass(partial(_decoded, layers, None))}
    rows = {FROZEN: partial(_frozen, [case])}
    rows |= {f"{OURS}, {way}": partial(_decoded, [case], way) for way in _WAYS}
    return {name: Pass(_as_graph(each)) for name, each in rows.items()}


def _frozen(layers: list[MoLoRACase]) -> object:
    return [F.linear(each.x, each.weight) for each in layers]


@torch.no_grad()
def _decoded(layers: list[MoLoRACase], way: str | None) -> object:
    forced: contextlib.AbstractContextManager = contextlib.nullcontext()
    if way is not None:
        from citi_kernels.triton_kernels.base_product import forced_base_product

        forced = forced_base_product(way)
    with forced:
        return [molora_linear(*each.operands, **each.options) for each in layers]


def _as_graph(call: Callable[[], object]) -> Callable[[], None]:
    """Replays of the call, captured once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
