"""The importance GEMM of `citi_kernels._C` as Python sees it: what it refuses."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled

SHAPE = NUM_TOKENS, NUM_OUT, NUM_IN = 6, 10, 8
_KEPT: list[Tensor] = []


def arguments_of(
    extension: ModuleType,
    scores_shape: tuple[int, int] = (5, 1),
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Valid ones, but for the memory, which is not a GPU's."""
    num_parts = extension.parameter_scores_cuda_parts(SHAPE, scores_shape)
    scores = torch.zeros(scores_shape, dtype=dtype)
    parts = torch.full((num_parts,), torch.nan) if num_parts else None
    valid = torch.ones(NUM_TOKENS, dtype=torch.bool)
    shapes = {"weight": (NUM_OUT, NUM_IN), "x": (NUM_TOKENS, NUM_IN), "g": (NUM_TOKENS, NUM_OUT)}
    matrices = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    _KEPT[:] = [scores, valid, *matrices.values()] + ([] if parts is None else [parts])
    return {
        "shape": SHAPE,
        "scores_shape": scores_shape,
        "scores": compiled.vector(scores),
        **{name: compiled.matrix(each) for name, each in matrices.items()},
        "valid": compiled.vector(valid),
        "is_per_token": False,
        "scale": 1.0,
        "seed": 2**64 - 1,
        "parts": compiled.vector(parts),
        "device": 0,
        "stream": 0,
    }


def changed(arguments: dict, name: str, entry: int | None, value: object) -> dict:
    if entry is None:
        return arguments | {name: value}
    numbers = list(arguments[name])
    numbers[entry] = value
    return arguments | {name: tuple(numbers)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("scores_shape", "dtype"),
    [((1, 1), torch.float32), ((10, 1), torch.float64), ((1, 4), torch.float64)]
    + [((10, 8), dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)],
    ids=str,
)
def test_a_launch_without_a_driver_raises(
    cuda_extension: ModuleType, scores_shape: tuple[int, int], dtype: torch.dtype
) -> None:
    arguments = arguments_of(cuda_extension, scores_shape, dtype)
    with pytest.raises(RuntimeError, match=r"could not launch on CUDA: cudaError\w+, \w+"):
        cuda_extension.accumulate_parameter_scores_cuda(**arguments)


def test_parts_follow_from_the_shape_alone(cuda_extension: ModuleType) -> None:
    parts = cuda_extension.parameter_scores_cuda_parts
    # 9 x 24 small tiles; 32 x 12 large ones
    for shape, tiles in (((2048, 576, 1536), (9, 24)), ((1, 4096, 1536), (32, 12))):
        _, num_out, num_in = shape
        assert parts(shape, (1, 1)) == tiles[0] * tiles[1]
        assert parts(shape, (num_out, 1)) == parts(shape, (num_out // 64, 1)) == tiles[1] * num_out
        assert parts(shape, (1, num_in)) == tiles[0] * num_in
        assert parts(shape, (num_out, num_in)) == 0
    assert parts((3, 1, 1), (1, 1)) == 0


# name, entry of its tuple, value, error, message
INCOMPATIBLE = "incompatible function arguments"
WRONG = {
    "no token": ("shape", 0, 0, ValueError, "shape: tokens must be positive"),
    "too many tokens": ("shape", 0, 2**60, ValueError, "shape: tokens must be"),
    "more tokens": ("shape", 0, 7, ValueError, "x: shape and strides must stay within the 96"),
    "no row": ("shape", 1, 0, ValueError, "shape: out-features must be positive"),
    "a negative size": ("shape", 2, -8, ValueError, "shape: in-features must be positive"),
    "a weight without end": ("shape", 1, 10 * 2**50, ValueError, "shape: weight must have at most"),
    "features beyond int64": ("shape", 1, 2**63, TypeError, INCOMPATIBLE),
    "features of a float": ("shape", 1, 8.0, TypeError, INCOMPATIBLE),
    "three segments": (
        "scores_shape",
        0,
        3,
        ValueError,
        "scores_shape: must have a number of rows",
    ),
    "no segment": ("scores_shape", 1, 0, ValueError, "scores_shape: must have a number of columns"),
    "blocks": (
        "scores_shape",
        1,
        2,
        ValueError,
        r"scores_shape: must be \(1, 1\), .* got \(5, 2\)",
    ),
    "scores in bf16": ("scores", 2, 1, ValueError, "scores: dtype must be fp32 or fp64, or bf16"),
    "scores in fp16": ("scores", 2, 2, ValueError, "scores: dtype must be fp32 or fp64, or bf16"),
    "scores too short": ("scores", 1, 39, ValueError, "scores: must stay within the 39 bytes"),
    "four scores": ("scores", 3, 4, ValueError, "scores: must have 5 entries, got 4"),
    "weight null": ("weight", 0, 0, ValueError, "weight: data must not be null"),
    "weight in fp64": ("weight", 2, 3, ValueError, "weight: dtype must be fp32, bf16 or fp16"),
    "weight beyond": ("weight", 3, 9, ValueError, "weight: shape and strides must stay within"),
    "x in fp64": ("x", 2, 3, ValueError, "x: dtype must be fp32, bf16 or fp16"),
    "x of bool": ("x", 2, 4, ValueError, "x: dtype must be floating"),
    "x in fp32": ("x", 2, 0, ValueError, "x: shape and strides must stay within"),
    "an unknown dtype": ("x", 2, 9, ValueError, "x: dtype must be one of DTYPES, got 9"),
    "an enormous stride": ("x", 4, 2**63 - 1, ValueError, "x: shape and strides must stay"),
    "g in fp64": ("g", 2, 3, ValueError, "g: dtype must be fp32, bf16 or fp16"),
    "a negative stride": ("g", 3, -1, ValueError, "g: strides must not be negative"),
    "g a byte short": ("g", 1, 119, ValueError, "g: shape and strides must stay within the 119"),
    "an address of a float": ("g", 0, 1e9, TypeError, INCOMPATIBLE),
    "no valid": ("valid", 0, 0, ValueError, "valid: data must not be null"),
    "valid of floats": ("valid", 2, 0, ValueError, "valid: dtype must be bool"),
    "too few valid": ("valid", 3, 5, ValueError, "valid: must have 6 entries, got 5"),
    "an integer for a bool": ("is_per_token", None, 1, TypeError, INCOMPATIBLE),
    "a scale of text": ("scale", None, "1", TypeError, INCOMPATIBLE),
    "a negative seed": ("seed", None, -1, TypeError, INCOMPATIBLE),
    "a seed beyond": ("seed", None, 2**64, TypeError, INCOMPATIBLE),
    "parts left out": ("parts", None, None, ValueError, "parts: must be given"),
    "parts of another size": ("parts", 3, 9, ValueError, "parts: must have 10 entries, got 9"),
    "parts in fp64": ("parts", 2, 3, ValueError, "parts: dtype must be fp32"),
    "a tensor": ("g", None, torch.ones(6, 10), TypeError, INCOMPATIBLE),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_named(cuda_extension: ModuleType, case: tuple) -> None:
    name, entry, value, error, message = case
    arguments = changed(arguments_of(cuda_extension), name, entry, value)
    with pytest.raises(error, match=message):
        cuda_extension.accumulate_parameter_scores_cuda(**arguments)


def test_misaligned_data_and_overlapping_or_needless_workspace_are_refused(
    cuda_extension: ModuleType,
) -> None:
    accumulate = cuda_extension.accumulate_parameter_scores_cuda
    arguments = arguments_of(cuda_extension)
    for name in ("scores", "weight", "x", "g", "parts"):
        with pytest.raises(ValueError, match=f"^{name}: data must be aligned"):
            accumulate(**changed(arguments, name, 0, arguments[name][0] + 1))
    with pytest.raises(ValueError, match=r"^parts: must not overlap scores"):
        accumulate(**changed(arguments, "parts", 0, arguments["scores"][0]))
    for output, other in (("scores", "weight"), ("scores", "x"), ("parts", "g")):
        with pytest.raises(ValueError, match=f"^{output}: must not overlap {other}"):
            accumulate(**changed(arguments, output, 0, arguments[other][0]))
    elements = arguments_of(cuda_extension, (NUM_OUT, NUM_IN))
    with pytest.raises(ValueError, match=r"^parts: must be left out"):
        accumulate(**elements | {"parts": elements["scores"]})
