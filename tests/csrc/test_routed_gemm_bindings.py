"""The routed GEMM as Python sees it: what is refused by which name, a launch without a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled

T, E, RANK, K, N = 200, 3, 5, 24, 16
R, P, G, Z = 15, 16, 4, 24

_KEPT: list[Tensor] = []


def _kept(tensor: Tensor) -> Tensor:
    _KEPT.append(tensor)
    return tensor


def _matrix(num_rows: int, num_columns: int) -> tuple:
    """In rows of 8 elements more than are needed."""
    padded = -(-num_columns // 8) * 8 + 8
    rows = _kept(torch.zeros(num_rows, padded, dtype=torch.bfloat16))
    return compiled.matrix(rows[:, :num_columns])


def _vector(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    return compiled.vector(_kept(torch.zeros(*shape, dtype=dtype)))


def _arguments(problem: str) -> dict:
    """Valid ones, but for the memory, which no GPU has."""
    _KEPT.clear()
    own = {
        "linear": lambda: {
            "x": _matrix(T, K),
            "bias": _vector(N),
            "y": _matrix(T, N),
            "u": _vector(T, P),
        },
        "input_gradient": lambda: {
            "dy": _matrix(T, N),
            "dgate": _vector(T, G, dtype=torch.float32),
            "dx": _matrix(T, K),
            "dz": _vector(T, Z),
            "fits_narrow": True,
        },
    }[problem]()
    return own | {
        "shape": (T, E, RANK, K, N),
        "weight": _matrix(N, K),
        "stack": _matrix(Z, K),
        "b": _matrix(N, R),
        "h": _vector(T, R),
        "probs": _vector(T, G, dtype=torch.float32),
        "counts": compiled.indices(_kept(torch.zeros(2, dtype=torch.int32))),
        "scaling": 0.5,
        "order": (0, False),
        "device": 0,
        "stream": 0,
    }


def _call(extension: ModuleType, problem: str, arguments: dict) -> None:
    getattr(extension, f"routed_{problem}_cuda")(**arguments)


def _changed(arguments: dict, name: str, entry: int | None, value: object) -> dict:
    if entry is None:
        return arguments | {name: value}
    numbers = list(arguments[name])
    numbers[entry] = value
    return arguments | {name: tuple(numbers)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("problem", ["linear", "input_gradient"])
def test_a_launch_without_a_driver_raises(cuda_extension: ModuleType, problem: str) -> None:
    arguments = _arguments(problem)
    message = r"could not launch on CUDA: cudaError\w+, \w+"
    with pytest.raises(RuntimeError, match=message):
        _call(cuda_extension, problem, arguments)
    without = {name: None for name in ("bias", "dgate") if name in arguments}
    with pytest.raises(RuntimeError, match=message):
        _call(cuda_extension, problem, arguments | without)


MISMATCH = "dtype must be that of the other operands"
STORAGE = "shape and strides must stay within"
CONVERSION = "incompatible function arguments"
# problem, name, entry of its tuple, value, error, message
WRONG = {
    "a negative group": ("linear", "order", 0, -1, ValueError, "^order: groups must have 0 to"),
    "a huge group": ("linear", "order", 0, 1025, ValueError, "^order: groups must have 0 to"),
    "no token": ("linear", "shape", 0, 0, ValueError, r"^num_tokens: must be in \[1, "),
    "no expert": ("linear", "shape", 1, 0, ValueError, "^num_experts: must be in"),
    "tokens beyond int32": ("linear", "shape", 0, 2**31, ValueError, "^shape: sizes must be in"),
    "many ranks": ("linear", "shape", 2, 20, ValueError, "at most 64 together, got 72"),
    "enormous ranks": ("linear", "shape", 2, 2**40, ValueError, "^expert_rank: must be in"),
    "more tokens": ("linear", "shape", 0, 201, ValueError, f"^x: {STORAGE}"),
    "more rank": ("linear", "shape", 2, 6, ValueError, f"^u: {STORAGE}"),
    "no K": ("linear", "shape", 3, 0, ValueError, "^shape: sizes must be in"),
    "x in fp32": ("linear", "x", 2, 0, ValueError, "^x: dtype must be bf16 or fp16"),
    "u in fp16": ("linear", "u", 2, 2, ValueError, f"^u: {MISMATCH}"),
    "a short u": ("linear", "u", 3, T * P - 1, ValueError, f"^u: {STORAGE}"),
    "u a byte short": ("linear", "u", 1, T * P * 2 - 1, ValueError, f"^u: {STORAGE}"),
    "h in fp16": ("linear", "h", 2, 2, ValueError, f"^h: {MISMATCH}"),
    "a short h": ("linear", "h", 3, T * R - 1, ValueError, f"^h: must have {T * R} entries"),
    "h beyond": ("linear", "h", 1, T * R * 2 - 1, ValueError, "^h: must stay within the"),
    "a null h": ("linear", "h", 0, 0, ValueError, "^h: data must not be null"),
    "probs in bf16": ("linear", "probs", 2, 1, ValueError, "^probs: dtype must be fp32"),
    "stack in fp16": ("linear", "stack", 2, 2, ValueError, f"^stack: {MISMATCH}"),
    "stack of few rows": ("linear", "stack", 1, 1000, ValueError, f"^stack: {STORAGE}"),
    "stack rows of 52 bytes": ("linear", "stack", 3, 26, ValueError, "^stack: rows must not"),
    "stack rows at one place": ("linear", "stack", 3, 0, ValueError, "^stack: rows must not"),
    "an enormous stride": ("linear", "stack", 3, 2**62, ValueError, "^stack: rows must not"),
    "columns apart": ("linear", "stack", 4, 2, ValueError, "^stack: columns must be contiguous"),
    "few counts": ("linear", "counts", 2, 1, ValueError, "^counts: must have 2 entries"),
    "counts beyond": ("linear", "counts", 1, 7, ValueError, "^counts: must have 2 entries"),
    "no counts": ("linear", "counts", 0, 0, ValueError, "^counts: data must not be null"),
    "no x": ("linear", "x", None, None, TypeError, CONVERSION),
    "a tensor": ("linear", "u", None, torch.ones(6, 24), TypeError, CONVERSION),
    "dz in fp16": ("input_gradient", "dz", 2, 2, ValueError, f"^dz: {MISMATCH}"),
    "a short dz": ("input_gradient", "dz", 3, T * Z - 1, ValueError, f"^dz: {STORAGE}"),
    "b of few rows": ("input_gradient", "b", 1, 700, ValueError, f"^b: {STORAGE}"),
    "b in fp16": ("input_gradient", "b", 2, 2, ValueError, f"^b: {MISMATCH}"),
    "dgate in bf16": ("input_gradient", "dgate", 2, 1, ValueError, "^dgate: dtype must be fp32"),
    "a short dgate": ("input_gradient", "dgate", 3, 5, ValueError, "^dgate: must have 800"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_named(cuda_extension: ModuleType, case: tuple) -> None:
    problem, name, entry, value, error, message = case
    arguments = _changed(_arguments(problem), name, entry, value)
    with pytest.raises(error, match=message):
        _call(cuda_extension, problem, arguments)


@pytest.mark.parametrize("name", ["stack", "h", "u", "probs"])
def test_data_that_is_not_aligned_is_refused(cuda_extension: ModuleType, name: str) -> None:
    arguments = _arguments("linear")
    misaligned = _changed(arguments, name, 0, arguments[name][0] + 8)
    with pytest.raises(ValueError, match=f"^{name}: data must be aligned to 16 bytes"):
        _call(cuda_extension, "linear", misaligned)


@pytest.mark.parametrize("written", ["u", "h", "probs", "counts", "y"])
@pytest.mark.parametrize("other", ["x", "weight", "stack", "b", "bias"])
def test_what_is_written_overlaps_nothing(
    cuda_extension: ModuleType, written: str, other: str
) -> None:
    arguments = _arguments("linear")
    storage = _kept(torch.zeros(16384, dtype=torch.bfloat16))
    for name in (written, other):
        there = _changed(arguments, name, 0, storage.data_ptr())
        arguments = _changed(there, name, 1, storage.nbytes)
    with pytest.raises(ValueError, match="must not overlap"):
        _call(cuda_extension, "linear", arguments)
