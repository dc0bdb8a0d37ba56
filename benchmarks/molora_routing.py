"""Routing to few of many experts, and decoding of few tokens, beside what they replace.

    top-k      64 experts of rank 64, 2 kept, forward and backward
                 grouped        citi_kernels.molora_linear(top_k=2)
                 all experts    the same without top_k
                 expert loop    the torch backend: each expert on its own tokens
    decode     forward alone of 1 to 64 tokens, 4 experts of rank 8; on a GPU as CUDA-graph replays
                 update, few, decode: the ways of citi_kernels.triton_kernels.base_product

Ratios to the frozen linear, all in one process and in turn, medians.

Usage: python benchmarks/molora_routing.py [--device cuda] [--seconds 3] [--json out.json]
On the CPU: a smaller layer, and the torch backend alone. On a GPU: written for it, not yet run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from molora_linear import DTYPES, Shape, machine, measure, verdict

from citi_kernels import molora_linear, use_backend
from citi_kernels.testing import MoLoRACase, check_molora_linear, random_case

TOP_K = {"cuda": (Shape(8192, 4096, 4096), 64, 64), "cpu": (Shape(512, 1024, 1024), 16, 16)}
DECODED_TOKENS = (1, 4, 16, 64)
DECODED_SIZE = {"cuda": (4096, 4096), "cpu": (1024, 1024)}


def top_k_cases(device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    shape, num_experts, r = TOP_K[device]
    case = random_case(
        *shape, num_experts=num_experts, r=r, dtype=dtype, num_segments=None, device=device
    )
    x, weight, bias, a, b, router = case.operands
    trained = [each.requires_grad_() for each in (x, a, b, router)]

    def layer(top_k: int | None) -> None:
        options = case.options | {"top_k": top_k}
        y, _ = molora_linear(x, weight, bias, a, b, router, **options)
        torch.autograd.grad(y, trained, case.dy)

    def loop() -> None:
        with use_backend("torch"):
            layer(2)

    cases = {
        "frozen linear": lambda: torch.autograd.grad(F.linear(x, weight), x, case.dy),
        "all experts": lambda: layer(None),
        "expert loop": loop,
    }
    return cases | ({"grouped": lambda: layer(2)} if device == "cuda" else {})


def decode_cases(num_tokens: int, device: str, dtype: torch.dtype) -> dict[str, Callable]:
    num_in, num_out = DECODED_SIZE[device]
    case = random_case(
        num_tokens, num_in, num_out, dtype=dtype, num_segments=None, bias=False, device=device
    )
    cases = {"frozen linear": lambda: F.linear(case.x, case.weight)}
    for way in ("update", "few", "decode") if device == "cuda" else ("update",):
        cases[way] = lambda way=way: decoded(case, way)
    return {name: as_graph(each) if device == "cuda" else each for name, each in cases.items()}


@torch.no_grad()
def decoded(case: MoLoRACase, way: str) -> None:
    forced = contextlib.nullcontext()
    if case.x.is_cuda:
        from citi_kernels.triton_kernels.base_product import forced_base_product

        forced = forced_base_product(way)
    with forced:
        molora_linear(*case.operands, **case.options)


def as_graph(case: Callable[[], object]) -> Callable[[], None]:
    """Replays of the case, captured once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            case()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case()
    return graph.replay


def run(title: str, cases: dict[str, Callable], arguments: argparse.Namespace) -> dict:
    rounds = measure(cases, arguments)
    ratios = {
        name: statistics.median(each[name] / each["frozen linear"] for each in rounds)
        for name in cases
    }
    milliseconds = {name: 1e3 * statistics.median(each[name] for each in rounds) for name in cases}
    print(f"\n{title}: {len(rounds)} rounds")
    for name in cases:
        line = f"  {name:14} {milliseconds[name]:9.3f} ms   {ratios[name]:6.3f} x frozen"
        if title.startswith("decode") and name != "frozen linear" and arguments.device == "cuda":
            line += verdict(ratios[name], (1.25, 1.10), at_most=True)
        for other, gates in (("all experts", (2, 4)), ("expert loop", (5, 10))):
            if name == other and arguments.device == "cuda":
                faster = statistics.median(each[other] / each["grouped"] for each in rounds)
                line += f"   {faster:.2f} x grouped" + verdict(faster, gates, at_most=False)
        print(line, flush=True)
    return {"title": title, "rounds": len(rounds), "ratios": ratios, "milliseconds": milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured per row")
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    arguments = parser.parse_args()
    arguments.quick, arguments.clock = False, "wall"
    dtype = DTYPES[arguments.dtype]
    small = random_case(40, 64, 48, num_experts=8, r=16, dtype=dtype, top_k=2)
    with contextlib.redirect_stdout(None):
        check_molora_linear(molora_linear, small)
    shape, num_experts, r = TOP_K[arguments.device]
    title = f"top-k: {shape}, {num_experts} experts of rank {r}, 2 kept, {arguments.dtype}"
    rows = [run(title, top_k_cases(arguments.device, dtype), arguments)]
    for num_tokens in DECODED_TOKENS:
        title = f"decode: T {num_tokens}, {DECODED_SIZE[arguments.device]}, {arguments.dtype}"
        rows.append(run(title, decode_cases(num_tokens, arguments.device, dtype), arguments))
    if arguments.json:
        content = {"machine": machine(arguments.device), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
