"""Forward + backward of one MOLoRA layer over the frozen linear it sits on, beside its peers.

One process, random data, all cases in turn in every round. A ratio is the median over the rounds of
(time of the case / time of the frozen linear in the same round): shared machines drift, neighbours
in time drift together. x has a gradient everywhere, the weight nowhere.

    frozen linear    nn.Linear
    molora           citi_kernels.molora_linear, 4 experts of rank 8
    + gate sums      the same with 8 segments, their sums in the loss
    stacked eager    the stacked expression, differentiated by PyTorch
    expert loop      the authors' way
    PEFT LoRA r 8    one adapter, no router
    compiled         --compile: the stacked expression under torch.compile(max-autotune)

Usage: python benchmarks/molora_linear.py [--quick] [--dtype bf16] [--device cuda] [--json out.json]
Other processes on the machine: --threads 1 --clock cpu counts this process's CPU time alone.
On a GPU: written for it, not yet run on one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from peers.expert_loop import expert_loop
from peers.peft_lora import peft_lora

from citi.environment_record import environment_record
from citi_kernels import molora_linear
from citi_kernels.backends import choose
from citi_kernels.testing import check_molora_linear, random_case, stacked_molora_linear

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
EXPERTS = {"num_experts": 4, "scaling": 0.25}


class Shape(NamedTuple):
    """Tokens, in-features, out-features of one layer."""

    T: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"T {self.T}, {self.K} -> {self.N}"


CPU_SHAPES = [Shape(T, D, D) for D in (1024, 2048, 4096) for T in (512, 1024)]
GPU_SIZES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
GPU_SHAPES = [Shape(T, K, N) for T in (8192, 512, 2048, 16384) for K, N in GPU_SIZES]
SHAPES = {"cpu": CPU_SHAPES, "cuda": GPU_SHAPES}
QUICK_SHAPES = {"cpu": [Shape(512, 1024, 1024), Shape(512, 2048, 2048)], "cuda": GPU_SHAPES[:1]}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

# (device, dtype, in- and out-features) -> (gate, goal) of molora / frozen linear
OVERHEAD = {
    ("cpu", "bf16", 4096, 4096): (1.13, 1.06),
    ("cpu", "bf16", 2048, 2048): (1.15, 1.10),
    ("cpu", "bf16", 1024, 1024): (1.5, 1.20),
    ("cpu", "fp32", 4096, 4096): (1.08, 1.04),
    ("cpu", "fp32", 2048, 2048): (1.12, 1.07),
    ("cuda", "bf16", 4096, 4096): (1.12, 1.06),
    ("cuda", "bf16", 4096, 14336): (1.07, 1.035),
    ("cuda", "bf16", 14336, 4096): (1.07, 1.035),
}
# the same key -> (gate, goal) of expert loop / molora
TIMES_FASTER = {
    ("cpu", "bf16", 4096, 4096): (2.0, 2.4),
    ("cpu", "bf16", 2048, 2048): (3.5, 4.2),
    ("cpu", "bf16", 1024, 1024): (4.0, 5.5),
    ("cuda", "bf16", 4096, 4096): (3.6, 4.0),
    ("cuda", "bf16", 4096, 14336): (3.2, 3.4),
    ("cuda", "bf16", 14336, 4096): (3.2, 3.4),
}


def make_cases(
    shape: Shape, dtype: torch.dtype, device: str, compiled: bool
) -> dict[str, Callable[[], None]]:
    """Each case runs one forward and backward."""
    case = random_case(*shape, dtype=dtype, bias=False, num_segments=8, device=device)
    x, weight, _, a, b, router = case.operands
    trained = [each.requires_grad_() for each in (x, a, b, router)]
    segments = {name: case.options[name] for name in ("segment_ids", "num_segments")}
    lora = peft_lora(weight)
    lora_trained = [x, *(each for each in lora.parameters() if each.requires_grad)]
    compiled_stacked = torch.compile(stacked_molora_linear, mode="max-autotune")

    def molora(function: Callable = molora_linear, **options: object) -> None:
        y, gate_sums = function(x, weight, None, a, b, router, **EXPERTS, **options)
        if gate_sums is None:
            torch.autograd.grad(y, trained, case.dy)
        else:
            torch.autograd.grad([y, gate_sums], trained, [case.dy, case.dgate_sums])

    def loop() -> None:
        y = expert_loop(x, weight, a, b, router, **EXPERTS)
        torch.autograd.grad(y, trained, case.dy)

    cases = {
        "frozen linear": lambda: torch.autograd.grad(F.linear(x, weight), x, case.dy),
        "molora": molora,
        "+ gate sums": lambda: molora(**segments),
        "stacked eager": lambda: molora(stacked_molora_linear),
        "expert loop": loop,
        "PEFT LoRA r 8": lambda: torch.autograd.grad(lora(x), lora_trained, case.dy),
    }
    return cases | ({"compiled": lambda: molora(compiled_stacked)} if compiled else {})


def timed(case: Callable[[], None], arguments: argparse.Namespace) -> float:
    """Seconds of one call."""
    if arguments.device == "cpu":
        clock = CLOCKS[arguments.clock]
        start = clock()
        case()
        return clock() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # what another case or round left in the L2 cache is pushed out
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
    start.record()
    case()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    cases: dict[str, Callable[[], None]], arguments: argparse.Namespace
) -> list[dict[str, float]]:
    """Seconds of every case, per round; 5 to 200 rounds, as many as the seconds asked for allow."""
    budget = 1.0 if arguments.quick else arguments.seconds
    for _ in range(2):
        start = time.perf_counter()
        for case in cases.values():
            timed(case, arguments)
        one_round = time.perf_counter() - start
    num_rounds = min(200, max(5, int(budget / one_round)))
    return [
        {name: timed(case, arguments) for name, case in cases.items()} for _ in range(num_rounds)
    ]


def assert_accurate(shape: Shape, dtype: torch.dtype, device: str) -> float:
    """Largest share of the allowance used on this shape at 32 tokens; raises above 1."""
    case = random_case(32, shape.K, shape.N, dtype=dtype, bias=False, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        accuracies = check_molora_linear(molora_linear, case)
    return max(max(each) for each in accuracies.values())


def run_shape(shape: Shape, dtype: str, arguments: argparse.Namespace) -> dict:
    used = assert_accurate(shape, DTYPES[dtype], arguments.device)
    torch.manual_seed(0)
    cases = make_cases(shape, DTYPES[dtype], arguments.device, arguments.compile)
    rounds = measure(cases, arguments)
    row = {
        "shape": shape._asdict(),
        "dtype": dtype,
        "rounds": len(rounds),
        "accuracy_used": used,
        "milliseconds": {},
        "ratio_to_frozen_linear": {},
        "ratio_to_molora": {},
    }
    for name in cases:
        row["milliseconds"][name] = 1e3 * statistics.median(each[name] for each in rounds)
        for key, base in (("frozen_linear", "frozen linear"), ("molora", "molora")):
            ratios = [each[name] / each[base] for each in rounds]
            row[f"ratio_to_{key}"][name] = statistics.median(ratios)
    key = (arguments.device, dtype, shape.K, shape.N)
    row["gate_goal_overhead"] = OVERHEAD.get(key)
    row["gate_goal_times_faster_than_loop"] = TIMES_FASTER.get(key)
    return row


def print_row(row: dict) -> None:
    title = f"{Shape(**row['shape'])}, {row['dtype']}"
    print(f"\n{title}: {row['rounds']} rounds, accuracy used {row['accuracy_used']:.2f} of 1")
    for name, milliseconds in row["milliseconds"].items():
        over, slower = row["ratio_to_frozen_linear"][name], row["ratio_to_molora"][name]
        line = f"  {name:14} {milliseconds:9.2f} ms   {over:6.3f} x frozen   {slower:6.3f} x molora"
        if name == "molora":
            line += verdict(over, row["gate_goal_overhead"], at_most=True)
        if name == "expert loop":
            line += verdict(slower, row["gate_goal_times_faster_than_loop"], at_most=False)
        print(line, flush=True)


def verdict(value: float, gate_goal: tuple[float, float] | None, *, at_most: bool) -> str:
    if gate_goal is None:
        return ""
    gate, goal = gate_goal
    met = [value <= bound if at_most else value >= bound for bound in (gate, goal)]
    word = "goal met" if met[1] else "gate met" if met[0] else "GATE MISSED"
    return f"   gate {gate:g}, goal {goal:g}: {word}"


def machine(device: str) -> dict[str, object]:
    """What the numbers were measured on: the record of a run, the day, what the CPU multiplies."""
    info = environment_record() | {
        "date": datetime.date.today().isoformat(),
        "backend": choose("molora_linear", torch.empty(1, device=device)),
        "cpu_flags": [],
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        known = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
        info["cpu_flags"] = sorted(known & set(flags[1].split())) if flags else []
    if device != "cpu":
        info |= {"device_name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="1024 and 2048 at T 512, a second each"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: bf16 and fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured per shape")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: own CPU time")
    parser.add_argument("--compile", action="store_true", help="the compiled peer too")
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes = (QUICK_SHAPES if arguments.quick else SHAPES)[arguments.device]
    info = machine(arguments.device) | {"clock": arguments.clock}
    print(f"{info['device_name']}, {info['num_threads']} threads, torch {torch.__version__}")
    if arguments.device == "cpu" and "amx_bf16" not in info["cpu_flags"]:
        print("Gates and goals are those of 2 cores with AMX, which this CPU does not show.")
    rows = []
    for dtype in arguments.dtype or ["bf16", "fp32"]:
        for shape in shapes:
            rows.append(run_shape(shape, dtype, arguments))
            print_row(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": info, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
