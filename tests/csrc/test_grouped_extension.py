"""The grouped functions of `citi_kernels._C` as Python sees them: what they refuse, by name.

The problems themselves are refused by C++, whose test is test_grouped_arguments.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled

T, E, C, RANK, FEATURES = 6, 4, 2, 8, 16
S, P = C * T, C * E
_KEPT: list[Tensor] = []


def _keep(tensor: Tensor) -> Tensor:
    _KEPT.append(tensor)
    return tensor


def _bf16(*shape: int) -> tuple:
    return compiled.matrix(_keep(torch.ones(shape, dtype=torch.bfloat16)))


def _int32(size: int) -> tuple:
    return compiled.indices(_keep(torch.zeros(size, dtype=torch.int32)))


def _product() -> dict:
    """Valid arguments of a gradient in rank space, but for the memory, which is not a GPU's."""
    _KEPT.clear()
    return {
        "routing": (T, E, C),
        "choices": (0, C),
        "features": (FEATURES, RANK),
        "order": _int32(S),
        "offsets": _int32(P + 1),
        "rows": _bf16(T, FEATURES),
        "rows_are_slots": False,
        "weight": _bf16(FEATURES, E * RANK),
        "weight_is_out_in": False,
        "experts_in_rows": False,
        "out": _bf16(S, RANK),
        "out_is_slots": True,
        "adds": False,
        "gates": compiled.matrix(_keep(torch.ones(T, E + 1))),
        "scaling": 0.5,
        "factors": _bf16(S, RANK),
        "dots": compiled.vector(_keep(torch.zeros(S))),
        "device": 0,
        "stream": 0,
    }


def _gradient() -> dict:
    _KEPT.clear()
    return {
        "routing": (T, E, C),
        "features": (RANK, FEATURES),
        "order": _int32(S),
        "offsets": _int32(P + 1),
        "left": _bf16(S, RANK),
        "left_is_slots": True,
        "right": _bf16(T, FEATURES),
        "right_is_slots": False,
        "out": _bf16(E * RANK, FEATURES),
        "experts_in_rows": True,
        "device": 0,
        "stream": 0,
    }


def _changed(arguments: dict, name: str, entry: int | None, value: object) -> dict:
    if entry is None:
        return arguments | {name: value}
    numbers = list(arguments[name])
    numbers[entry] = value
    return arguments | {name: tuple(numbers)}


# name, entry of its tuple, value, error, message
WRONG = {
    "no token": ("routing", 0, 0, ValueError, "num_tokens: must be in"),
    "more tokens": ("routing", 0, T + 1, ValueError, "order: must have 14 entries, got 12"),
    "tokens of a float": ("routing", 0, 6.0, TypeError, "incompatible function arguments"),
    "no expert": ("routing", 1, 0, ValueError, "num_experts: must be in"),
    "more experts": ("routing", 1, E + 1, ValueError, "offsets: must have 11 entries, got 9"),
    "more choices than experts": ("routing", 2, E + 1, ValueError, "top_k: must not exceed"),
    "features beyond int32": ("features", 0, 2**31, ValueError, "must be in"),
    "features beyond int64": ("features", 1, 2**63, TypeError, "incompatible function arguments"),
    "order a byte short": ("order", 1, 4 * S - 1, ValueError, "order: must stay within the 47"),
    "order of null": ("order", 0, 0, ValueError, "order: data must not be null"),
    "offsets of nothing": ("offsets", None, None, TypeError, "incompatible function arguments"),
    "offsets with an odd address": ("offsets", 0, 2, ValueError, "offsets: data must be aligned"),
    "out of null": ("out", 0, 0, ValueError, "out: data must not be null"),
    "out of an unknown dtype": ("out", 2, 9, ValueError, "out: dtype must be one of DTYPES, got 9"),
    "out in fp64": ("out", 2, 3, ValueError, "out: dtype must be that of the inputs or fp32"),
    "out in fp32": ("out", 2, 0, ValueError, "out: shape and strides must stay within"),
    "an integer for a bool": ("experts_in_rows", None, 1, TypeError, "incompatible function"),
    "a stream of a float": ("stream", None, 0.0, TypeError, "incompatible function arguments"),
}
WRONG_PRODUCT = {
    "no choice": ("choices", 1, 0, ValueError, "choices: must be a range within the 2, got 0 to 0"),
    "choices beyond": ("choices", 1, 3, ValueError, "choices: must be a range within the 2"),
    "several choices by token": ("out_is_slots", None, False, ValueError, "choices: must be one"),
    "no column": ("features", 1, 0, ValueError, "num_out: must be in"),
    "rows in fp32": ("rows", 2, 0, ValueError, "rows: dtype must be bf16 or fp16"),
    "rows of columns": ("rows", 4, 2, ValueError, "rows: shape and strides must stay within"),
    "weight in fp16": ("weight", 2, 2, ValueError, "weight: dtype must be that of the other"),
    "weight a byte short": ("weight", 1, 1023, ValueError, "weight: shape and strides must stay"),
    "gates in bf16": ("gates", 2, 1, ValueError, "gates: dtype must be fp32"),
    "gates of null": ("gates", 0, 0, ValueError, "gates: data must not be null"),
    "dots without factors": ("factors", None, None, ValueError, "dots: come with factors"),
    "factors without dots": ("dots", None, None, ValueError, "dots: come with factors"),
    "dots of another size": ("dots", 3, S - 1, ValueError, "dots: must have 12 entries, got 11"),
    "a word to scale by": ("scaling", None, "1", TypeError, "incompatible function arguments"),
}
WRONG_GRADIENT = {
    "no row": ("features", 0, 0, ValueError, "num_rows: must be in"),
    "left in fp32": ("left", 2, 0, ValueError, "left: dtype must be bf16 or fp16"),
    "right of slots": ("right_is_slots", None, True, ValueError, "right: shape and strides"),
    "right in fp16": ("right", 2, 2, ValueError, "right: dtype must be that of the other inputs"),
    "rows of out that overlap": ("out", 3, FEATURES - 1, ValueError, "out: rows must not overlap"),
}


def _check(call: Callable, arguments: dict, case: tuple) -> None:
    name, entry, value, error, message = case
    with pytest.raises(error, match=message):
        call(**_changed(arguments, name, entry, value))


@pytest.mark.parametrize("case", (WRONG | WRONG_PRODUCT).values(), ids=WRONG | WRONG_PRODUCT)
def test_wrong_numbers_of_a_product_are_named(cuda_extension: ModuleType, case: tuple) -> None:
    _check(cuda_extension.grouped_product_cuda, _product(), case)


@pytest.mark.parametrize("case", (WRONG | WRONG_GRADIENT).values(), ids=WRONG | WRONG_GRADIENT)
def test_wrong_numbers_of_a_gradient_are_named(cuda_extension: ModuleType, case: tuple) -> None:
    _check(cuda_extension.grouped_gradient_cuda, _gradient(), case)


@pytest.mark.parametrize("other", ["rows", "weight", "gates", "factors"])
def test_out_must_not_overlap_an_input(cuda_extension: ModuleType, other: str) -> None:
    arguments = _product()
    overlapping = _changed(arguments, "out", 0, arguments[other][0])
    overlapping = _changed(overlapping, "out", 1, 10**6)
    with pytest.raises(ValueError, match=f"^out: must not overlap {other}"):
        cuda_extension.grouped_product_cuda(**overlapping)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["product", "gradient"])
def test_a_launch_without_a_driver_raises(cuda_extension: ModuleType, name: str) -> None:
    arguments = {"product": _product, "gradient": _gradient}[name]()
    with pytest.raises(RuntimeError, match=r"could not launch on CUDA: cudaError\w+, \w+"):
        getattr(cuda_extension, f"grouped_{name}_cuda")(**arguments)


@pytest.mark.parametrize("num_columns", [0, -1, 2**31])
def test_tiles_of_no_columns_are_refused(cuda_extension: ModuleType, num_columns: int) -> None:
    with pytest.raises(ValueError, match=r"num_columns: must be in \[1, 2\^31\)"):
        cuda_extension.grouped_column_tiles(num_columns)
