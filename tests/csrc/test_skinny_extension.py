"""What the skinny passes of `citi_kernels._C` refuse, and that a launch without a driver raises."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled

# 300 tokens of 64 inputs, 3 experts of rank 4 : R 12, padded to 16; G 4, padded to 8
T, K, E, R, P, G, Z = 300, 64, 3, 12, 16, 4, 24
PLACE = {"device": 0, "stream": 0}
DROPOUT = (1, 2, 3, 2.0)
_kept: list[Tensor] = []


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    _kept.append(torch.zeros(shape, dtype=dtype))
    return _kept[-1]


def vector(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, ...]:
    return compiled.vector(new(*shape, dtype=dtype))


def fp32(*shape: int) -> tuple[int, ...]:
    return vector(*shape, dtype=torch.float32)


def matrix(*shape: int) -> tuple[int, ...]:
    return compiled.matrix(new(*shape))


def numbers(size: int) -> tuple[int, ...]:
    return compiled.indices(new(size, dtype=torch.int32))


def arguments_of(extension: ModuleType, name: str) -> dict:
    """Valid ones, but for the memory they lie in."""
    splits = extension.shrink_cuda_splits(num_tokens=T, num_inputs=K)
    tiles, shares = extension.factor_gradients_cuda_parts(
        num_tokens=T, num_columns=K, num_narrow=P, gives_ranks=True
    )
    return (
        PLACE
        | {
            "pack_rows_cuda": lambda: {
                "shape": (Z, K),
                "sources": [(matrix(R, K), 0, R, K), (matrix(G, K), P, G, K)],
                "out": vector(Z, K),
                "zeros": numbers(3),
            },
            "shrink_cuda": lambda: {
                "shape": (T, E, R // E),
                "num_inputs": K,
                "x": matrix(T, K),
                "stack": vector(Z, K),
                "h": vector(T, R),
                "u": vector(T, P),
                "probs": fp32(T, G),
                "parts": fp32(splits, T, Z) if splits > 1 else None,
                "top_k": 2,
                "renormalizes": True,
                "scaling": 0.5,
                "dropout": DROPOUT,
            },
            "row_product_cuda": lambda: {
                "shape": (T, K, P),
                "wide": matrix(T, K),
                "rows": vector(P, K),
                "parts": fp32(splits, T, P),
            },
            "factor_gradients_cuda": lambda: {
                "shape": (T, K, P),
                "wide": matrix(T, K),
                "narrow": matrix(T, P),
                "num_ranks": R,
                "b": vector(K, R),
                "du": fp32(tiles, T, P),
                "parts": fp32(shares, K, P),
                "rank_columns": 0,
                "dropout": None,
                "counts": numbers(2),
                "done": numbers(tiles * shares),
                "fits_narrow": True,
            },
            "scale_ranks_cuda": lambda: {
                "shape": (T, E, R // E),
                "h": vector(T, R),
                "probs": fp32(T, G),
                "u": vector(T, P),
                "scaling": 0.5,
            },
            "rank_gradients_cuda": lambda: {
                "shape": (T, E, R // E),
                "num_parts": 2,
                "du": fp32(2, T, P),
                "h": vector(T, R),
                "probs": fp32(T, G),
                "dgate": fp32(T, G),
                "dz": vector(T, Z),
                "scaling": 0.5,
            },
            "sum_shares_cuda": lambda: {
                "shape": (3, K, Z),
                "parts": fp32(3, K, Z),
                "outputs": [(vector(R, K), 0, R, True), (fp32(K, G), P, G, False)],
            },
            "update_input_gradient_cuda": lambda: {
                "shape": (T, E, R // E),
                "num_inputs": K,
                "dx": matrix(T, K),
                "dz": vector(T, Z),
                "stack": vector(Z, K),
                "has_base": True,
                "dropout": DROPOUT,
            },
            "add_non_finite_cuda": lambda: {
                "shape": (T, E, R // E),
                "num_columns": K,
                "out": vector(T, K),
                "left": matrix(T, R),
                "right": matrix(R, K),
                "probs": fp32(T, G),
                "dropout": None,
            },
        }[name]()
    )


FUNCTIONS = (
    "pack_rows_cuda",
    "shrink_cuda",
    "row_product_cuda",
    "factor_gradients_cuda",
    "scale_ranks_cuda",
    "rank_gradients_cuda",
    "sum_shares_cuda",
    "update_input_gradient_cuda",
    "add_non_finite_cuda",
)


@pytest.fixture(autouse=True)
def tensors_live_as_long_as_the_test() -> None:
    _kept.clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_launch_without_a_driver_raises(cuda_extension: ModuleType, name: str) -> None:
    arguments = arguments_of(cuda_extension, name)
    with pytest.raises(RuntimeError, match=r"could not launch on CUDA: cudaError\w+, \w+"):
        getattr(cuda_extension, name)(**arguments)


TYPE = "incompatible function arguments"
# function, argument, entry of its tuple or None, value, error, message
WRONG = {
    "no token": ("shrink_cuda", "shape", 0, 0, ValueError, "num_tokens: must be in"),
    "too many experts": ("shrink_cuda", "shape", 1, 64, ValueError, "num_experts: must be in"),
    "no rank": ("shrink_cuda", "shape", 2, 0, ValueError, "expert_rank: must be in"),
    "too much rank": ("shrink_cuda", "shape", 2, 43, ValueError, "shape: num_experts \\* expert"),
    "another rank": ("shrink_cuda", "shape", 2, 3, ValueError, "stack: must have|h: must have"),
    "tokens beyond int64": ("shrink_cuda", "shape", 0, 2**63, TypeError, TYPE),
    "ragged inputs": (
        "shrink_cuda",
        "num_inputs",
        None,
        63,
        ValueError,
        "x: columns must be a mul",
    ),
    "more inputs": ("shrink_cuda", "num_inputs", None, 72, ValueError, "x: shape and strides must"),
    "endless inputs": ("shrink_cuda", "num_inputs", None, 2**62, ValueError, "num_inputs: must be"),
    "x in fp32": ("shrink_cuda", "x", 2, 0, ValueError, "x: dtype must be bf16 or fp16"),
    "x in fp16": ("shrink_cuda", "x", 2, 2, ValueError, "stack: dtype must be that of the others"),
    "an unknown dtype": ("shrink_cuda", "x", 2, 9, ValueError, "x: dtype must be one of DTYPES"),
    "a null x": ("shrink_cuda", "x", 0, 0, ValueError, "x: data must not be null"),
    "rows not aligned": ("shrink_cuda", "x", 3, 65, ValueError, "x: rows must be aligned to 16"),
    "columns apart": ("shrink_cuda", "x", 4, 2, ValueError, "x: columns must be contiguous"),
    "a negative stride": ("shrink_cuda", "x", 3, -64, ValueError, "x: strides must not be neg"),
    "x a byte short": ("shrink_cuda", "x", 1, 2 * T * K - 1, ValueError, "x: shape and strides"),
    "a stack too short": ("shrink_cuda", "stack", 3, 24, ValueError, "stack: must have 1536 ent"),
    "h in fp32": ("shrink_cuda", "h", 2, 0, ValueError, "h: dtype must be that of the others"),
    "h without padding": ("shrink_cuda", "u", 3, T * R, ValueError, "u: must have 4800 entries"),
    "probs in bf16": ("shrink_cuda", "probs", 2, 1, ValueError, "probs: dtype must be fp32"),
    "probs a byte short": ("shrink_cuda", "probs", 1, 4799, ValueError, "probs: must stay within"),
    "too many kept": ("shrink_cuda", "top_k", None, 4, ValueError, r"top_k: must be in \[0, 3\]"),
    "fewer than none": ("shrink_cuda", "top_k", None, -1, ValueError, r"top_k: must be in \[0, 3"),
    "an int for a bool": ("shrink_cuda", "renormalizes", None, 1, TypeError, TYPE),
    "a negative seed": ("shrink_cuda", "dropout", 0, -1, TypeError, TYPE),
    "a wide seed": ("shrink_cuda", "dropout", 1, 2**32, TypeError, TYPE),
    "a scale below 1": ("shrink_cuda", "dropout", 3, 0.5, ValueError, "dropout: 1 / "),
    "ragged rows": ("row_product_cuda", "shape", 2, 12, ValueError, "num_rows: must be a multiple"),
    "too many rows": ("row_product_cuda", "shape", 2, 136, ValueError, "num_rows: must be in"),
    "other rows": ("row_product_cuda", "rows", 3, 16, ValueError, "rows: must have 1024 entries"),
    "parts in bf16": ("row_product_cuda", "parts", 2, 1, ValueError, "parts: dtype must be fp32"),
    "narrow beyond 32": ("factor_gradients_cuda", "shape", 2, 40, ValueError, "num_narrow: must"),
    "a ragged narrow": ("factor_gradients_cuda", "shape", 2, 12, ValueError, "num_narrow: must be"),
    "ranks of others": (
        "factor_gradients_cuda",
        "num_ranks",
        None,
        17,
        ValueError,
        "num_ranks: mu",
    ),
    "negative ranks": ("factor_gradients_cuda", "num_ranks", None, -1, ValueError, "num_ranks: mu"),
    "no b": ("factor_gradients_cuda", "b", None, None, ValueError, "b: data must not be null"),
    "no du": ("factor_gradients_cuda", "du", None, None, ValueError, "du: data must not be null"),
    "narrow in fp16": (
        "factor_gradients_cuda",
        "narrow",
        2,
        2,
        ValueError,
        "narrow: dtype must be",
    ),
    "narrow not aligned": (
        "factor_gradients_cuda",
        "narrow",
        3,
        12,
        ValueError,
        "narrow: rows mus",
    ),
    "rank columns": ("factor_gradients_cuda", "rank_columns", None, 4, ValueError, "rank_columns:"),
    "dropout of dy": (
        "factor_gradients_cuda",
        "dropout",
        None,
        DROPOUT,
        ValueError,
        "dropout: b m",
    ),
    "few done": ("factor_gradients_cuda", "done", 2, 1, ValueError, "done: must have"),
    "counts alone": ("factor_gradients_cuda", "done", None, None, ValueError, "counts: come with"),
    "no count": ("factor_gradients_cuda", "counts", 2, 0, ValueError, "counts: must stay within"),
    "zeros beyond": ("pack_rows_cuda", "zeros", 1, 11, ValueError, "zeros: must stay within"),
    "fewer parts": ("factor_gradients_cuda", "parts", 3, 64, ValueError, "parts: must have"),
    "h of another size": ("scale_ranks_cuda", "h", 3, 5, ValueError, "h: must have 3600 entries"),
    "scaling by text": ("scale_ranks_cuda", "scaling", None, "1", TypeError, TYPE),
    "no part": ("rank_gradients_cuda", "num_parts", None, 0, ValueError, "num_parts: must be in"),
    "more parts": ("rank_gradients_cuda", "num_parts", None, 3, ValueError, "du: must have 14400"),
    "dz too short": ("rank_gradients_cuda", "dz", 3, T * P, ValueError, "dz: must have 7200 ent"),
    "dgate in bf16": (
        "rank_gradients_cuda",
        "dgate",
        2,
        1,
        ValueError,
        "dgate: dtype must be fp32",
    ),
    "no output": ("sum_shares_cuda", "outputs", None, [], ValueError, "outputs: must be in"),
    "no part of a sum": ("sum_shares_cuda", "shape", 0, 0, ValueError, "num_parts: must be in"),
    "no dropout": ("update_input_gradient_cuda", "dropout", None, None, TypeError, TYPE),
    "dx on itself": ("update_input_gradient_cuda", "dx", 3, 0, ValueError, "dx: rows must not ov"),
    "dx ragged": ("update_input_gradient_cuda", "num_inputs", None, 60, ValueError, "dx: columns"),
    "another stack": ("update_input_gradient_cuda", "stack", 2, 2, ValueError, "stack: dtype must"),
    "out in fp32": ("add_non_finite_cuda", "out", 2, 0, ValueError, "out: dtype must be bf16"),
    "left apart": ("add_non_finite_cuda", "left", 4, 2, ValueError, "left: columns must be contig"),
    "right beyond": ("add_non_finite_cuda", "right", 3, 65, ValueError, "right: shape and strides"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_named(cuda_extension: ModuleType, case: tuple) -> None:
    function, name, entry, value, error, message = case
    arguments = arguments_of(cuda_extension, function)
    if entry is not None:
        numbers = list(arguments[name])
        numbers[entry] = value
        value = tuple(numbers)
    with pytest.raises(error, match=message):
        getattr(cuda_extension, function)(**(arguments | {name: value}))


WRITTEN = {
    "shrink_cuda": ("h", "u", "probs"),
    "row_product_cuda": ("parts",),
    "factor_gradients_cuda": ("parts", "du", "done"),
    "scale_ranks_cuda": ("u",),
    "rank_gradients_cuda": ("dz",),
    "update_input_gradient_cuda": ("dx",),
    "add_non_finite_cuda": ("out",),
}
READ = {
    "shrink_cuda": "stack",
    "row_product_cuda": "wide",
    "factor_gradients_cuda": "narrow",
    "scale_ranks_cuda": "h",
    "rank_gradients_cuda": "du",
    "update_input_gradient_cuda": "dz",
    "add_non_finite_cuda": "left",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_output_that_overlaps_an_input_or_is_misaligned_is_refused(
    cuda_extension: ModuleType, name: str
) -> None:
    call = getattr(cuda_extension, name)
    shared = vector(T * K * 4, dtype=torch.float32)
    for output in WRITTEN[name]:
        arguments = arguments_of(cuda_extension, name)
        inputs = arguments[READ[name]]
        same = {
            output: (shared[0], shared[1], *arguments[output][2:]),
            READ[name]: (shared[0], shared[1], *inputs[2:]),
        }
        with pytest.raises(ValueError, match=f"^{output}: must not overlap {READ[name]}"):
            call(**(arguments | same))
        address, *rest = arguments[output]
        with pytest.raises(ValueError, match=f"^{output}: (data|rows) must be aligned"):
            call(**(arguments | {output: (address + 1, *rest)}))


def test_what_is_packed_stays_within_it_and_apart(cuda_extension: ModuleType) -> None:
    arguments = arguments_of(cuda_extension, "pack_rows_cuda")
    source, out = arguments["sources"][0][0], arguments["out"]
    inside = (*out[:3], K, 1)
    for wrong, message in (
        ({"sources": [(source, P, R, K)]}, "sources: must lie within"),
        ({"sources": [(source, -1, R, K)]}, "sources: must lie within"),
        ({"sources": [(source, 0, 0, K)]}, "sources: must lie within"),
        ({"sources": [(source, 0, R, K + 8)]}, "sources: must lie within"),
        ({"sources": [(source, 0, R + 1, K)]}, "sources: shape and strides"),
        ({"sources": [(source, 0, R, K)] * 3}, "sources: must be in"),
        ({"sources": []}, "sources: must be in"),
        ({"sources": [((*source[:2], 3, *source[3:]), 0, R, K)]}, "sources: dtype must be fp32"),
        ({"sources": [(inside, 0, R, K)]}, "out: must not overlap sources"),
        ({"shape": (Z, K + 4)}, "num_columns: must be a multiple of 8"),
        ({"shape": (0, K)}, "num_rows: must be in"),
        ({"shape": (Z + 8, K)}, "out: must have 2048 entries"),
        ({"out": (out[0] + 2, *out[1:])}, "out: data must be aligned"),
        ({"out": (*out[:2], 0, out[3])}, "out: dtype must be bf16 or fp16"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            cuda_extension.pack_rows_cuda(**(arguments | wrong))


def test_columns_of_a_sum_stay_within_it_and_apart(cuda_extension: ModuleType) -> None:
    arguments = arguments_of(cuda_extension, "sum_shares_cuda")
    out = arguments["outputs"][0][0]
    for wrong, message in (
        ([(out, P, R, True)], "columns must lie within the 24"),
        ([(out, -1, R, True)], "columns must lie within"),
        ([(out, 0, 0, True)], "columns must lie within"),
        ([(out, 0, P, True)], "must have 1024 entries"),
        ([(out, 0, R, True)] * 3, "must be in"),
        ([(out, 0, R, True)] * 2, "must not overlap outputs"),
        ([((*out[:2], 4, out[3]), 0, R, True)], "dtype must be fp32, bf16 or fp16"),
    ):
        with pytest.raises(ValueError, match=f"^outputs: {message}"):
            cuda_extension.sum_shares_cuda(**(arguments | {"outputs": wrong}))


def test_sizes_of_workspaces_are_checked_before_they_are_divided_by(
    cuda_extension: ModuleType,
) -> None:
    with pytest.raises(ValueError, match="num_inputs: must be in"):
        cuda_extension.shrink_cuda_splits(num_tokens=1, num_inputs=0)
    with pytest.raises(ValueError, match="num_narrow: must be in"):
        cuda_extension.factor_gradients_cuda_parts(
            num_tokens=1, num_columns=8, num_narrow=200, gives_ranks=False
        )
