"""The extended GEMM as Python sees it: what is refused by which name, a launch without a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled

NUM_TOKENS, NUM_IN, NUM_OUT, WIDTH = 6, 24, 16, 5

_KEPT: list[Tensor] = []


def _matrix(num_rows: int, num_columns: int) -> Tensor:
    """In rows of 8 elements more than are needed."""
    padded = -(-num_columns // 8) * 8 + 8
    _KEPT.append(torch.zeros(num_rows, padded, dtype=torch.bfloat16))
    return _KEPT[-1][:, :num_columns]


def _arguments(problem: str) -> dict:
    """Valid ones, but for the memory, which no GPU has."""
    _KEPT.clear()
    names = {
        "linear": {
            "x": (NUM_TOKENS, NUM_IN),
            "weight": (NUM_OUT, NUM_IN),
            "u": (NUM_TOKENS, WIDTH),
            "b": (NUM_OUT, WIDTH),
            "y": (NUM_TOKENS, NUM_OUT),
        },
        "input_gradient": {
            "dy": (NUM_TOKENS, NUM_OUT),
            "weight": (NUM_OUT, NUM_IN),
            "dz": (NUM_TOKENS, WIDTH),
            "stack": (WIDTH, NUM_IN),
            "dx": (NUM_TOKENS, NUM_IN),
        },
    }[problem]
    arguments = {name: compiled.matrix(_matrix(*shape)) for name, shape in names.items()}
    if problem == "linear":
        _KEPT.append(torch.zeros(NUM_OUT, dtype=torch.bfloat16))
        arguments["bias"] = compiled.vector(_KEPT[-1])
    return arguments | {
        "shape": (NUM_TOKENS, NUM_IN, NUM_OUT, WIDTH),
        "device": 0,
        "stream": 0,
    }


def _call(extension: ModuleType, problem: str, arguments: dict) -> None:
    getattr(extension, f"extended_{problem}_cuda")(**arguments)


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
    without = {name: None for name in ("bias", "u", "b", "dz", "stack") if name in arguments}
    shape = (NUM_TOKENS, NUM_IN, NUM_OUT, 0)
    with pytest.raises(RuntimeError, match=message):
        _call(cuda_extension, problem, arguments | without | {"shape": shape})


MISMATCH = "dtype must be that of the other operands"
CONVERSION = "incompatible function arguments"
# problem, name, entry of its tuple, value, error, message
WRONG = {
    "no token": ("linear", "shape", 0, 0, ValueError, r"^shape: sizes must be in \[1, 21"),
    "tokens beyond int32": ("linear", "shape", 0, 2**31, ValueError, "^shape: sizes must be in"),
    "more tokens": ("linear", "shape", 0, 7, ValueError, "^x: shape and strides must stay within"),
    "more rows of weight": ("linear", "shape", 2, 17, ValueError, "^weight: shape and strides"),
    "too many tiles": ("linear", "shape", slice(0, 4, 2), None, ValueError, "too many tiles"),
    "a wide extension": ("linear", "shape", 3, 257, ValueError, r"extension must be in \[0, 256\]"),
    "a negative extension": ("linear", "shape", 3, -1, ValueError, "^shape: the extension must be"),
    "wider than u": ("linear", "shape", 3, 17, ValueError, "^u: rows must not overlap"),
    "sizes of floats": ("linear", "shape", 1, 24.0, TypeError, CONVERSION),
    "x in fp32": ("linear", "x", 2, 0, ValueError, "^x: dtype must be bf16 or fp16"),
    "weight in fp16": ("linear", "weight", 2, 2, ValueError, f"^weight: {MISMATCH}"),
    "b in fp16": ("linear", "b", 2, 2, ValueError, f"^b: {MISMATCH}"),
    "y in fp32": ("linear", "y", 2, 0, ValueError, f"^y: {MISMATCH}"),
    "bias in fp32": ("linear", "bias", 2, 0, ValueError, f"^bias: {MISMATCH}"),
    "an unknown dtype": ("linear", "x", 2, 9, ValueError, "^x: dtype must be one of DTYPES, got 9"),
    "a null": ("linear", "x", 0, 0, ValueError, "^x: data must not be null"),
    "rows 4 bytes apart": ("linear", "x", 3, 26, ValueError, "^x: rows must be a multiple of 16"),
    "rows that overlap": ("linear", "y", 3, 8, ValueError, "^y: rows must not overlap"),
    "rows at one place": ("linear", "x", 3, 0, ValueError, "^x: rows must not overlap"),
    "an enormous stride": ("linear", "u", 3, 2**62, ValueError, "^u: rows are too far apart"),
    "columns apart": ("linear", "x", 4, 2, ValueError, "^x: columns must be contiguous"),
    "u a byte short": ("linear", "u", 1, 169, ValueError, "^u: shape and strides must stay within"),
    "a short bias": ("linear", "bias", 3, 15, ValueError, "^bias: must have 16 entries, got 15"),
    "a bias beyond": ("linear", "bias", 1, 31, ValueError, "^bias: must stay within the 31 bytes"),
    "no u": ("linear", "u", None, None, ValueError, "^u: must be given with an extension of 5"),
    "no x": ("linear", "x", None, None, TypeError, CONVERSION),
    "a tensor": ("linear", "x", None, torch.ones(6, 24), TypeError, CONVERSION),
    "u in vain": ("linear", "shape", 3, 0, ValueError, "^u: must be None without an extension"),
    "dy in fp64": ("input_gradient", "dy", 2, 3, ValueError, "^dy: dtype must be bf16 or fp16"),
    "stack of few rows": ("input_gradient", "shape", 3, 6, ValueError, "^stack: shape and strides"),
    "narrow rows": (
        "input_gradient",
        "weight",
        3,
        16,
        ValueError,
        "^weight: rows must not overlap",
    ),
    "more inputs": ("input_gradient", "shape", 1, 33, ValueError, "^weight: rows must not"),
    "no stack": ("input_gradient", "stack", None, None, ValueError, "^stack: must be given with"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_named(cuda_extension: ModuleType, case: tuple) -> None:
    problem, name, entry, value, error, message = case
    if isinstance(entry, slice):
        arguments = _arguments(problem) | {"shape": (2**30, NUM_IN, 2**30, WIDTH)}
    else:
        arguments = _changed(_arguments(problem), name, entry, value)
    with pytest.raises(error, match=message):
        _call(cuda_extension, problem, arguments)


@pytest.mark.parametrize("name", ["x", "weight", "u", "b", "y"])
def test_data_that_tma_cannot_read_is_refused(cuda_extension: ModuleType, name: str) -> None:
    arguments = _arguments("linear")
    for offset in (2, 8):
        misaligned = _changed(arguments, name, 0, arguments[name][0] + offset)
        with pytest.raises(ValueError, match=f"^{name}: data must be aligned to 16 bytes"):
            _call(cuda_extension, "linear", misaligned)
    misaligned = _changed(arguments, "bias", 0, arguments["bias"][0] + 2)
    with pytest.raises(ValueError, match=r"^bias: data must be aligned to 4 bytes"):
        _call(cuda_extension, "linear", misaligned)


@pytest.mark.parametrize("name", ["x", "weight", "u", "b", "bias"])
def test_an_output_over_an_input_is_refused(cuda_extension: ModuleType, name: str) -> None:
    arguments = _arguments("linear")
    storage = torch.zeros(4096, dtype=torch.bfloat16)
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes
    for shift in (0, 16):
        there = _changed(_changed(arguments, "y", 0, start), "y", 1, end - start)
        there = _changed(_changed(there, name, 0, start + shift), name, 1, end - start - shift)
        with pytest.raises(ValueError, match=f"^y: must not overlap {name}"):
            _call(cuda_extension, "linear", there)
