"""The glue of the backend "cuda" on the CPU: a double of `_C` reads the memory that it is told."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import importance_cuda, importance_torch
from importance_inputs import LAYOUTS, every_third_is_padding, parameter_case

SHAPES = {"component": (1, 1), "heads": (19, 1), "columns": (1, 130), "elements": (38, 130)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool)
NUM_PARTS = 7


def at(numbers: tuple, shape: tuple[int, ...]) -> Tensor:
    """The tensor that these numbers describe, without the tensor that they came from."""
    address, num_bytes, code, *strides = numbers
    memory = (ctypes.c_char * num_bytes).from_address(address)
    flat = torch.frombuffer(memory, dtype=DTYPES[code])
    if len(shape) == 1:
        assert strides == list(shape)
        strides = [1]
    return flat.as_strided(shape, strides)


class Double:
    """`_C` with the two functions; what it computes is the torch backend's."""

    def __init__(self) -> None:
        names = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
        self.DTYPES = {name: code for code, name in enumerate(names)}
        self.calls: list[dict] = []

    def parameter_scores_cuda_parts(self, shape: tuple, scores_shape: tuple) -> int:
        return 0 if shape[1:] == scores_shape else NUM_PARTS

    def accumulate_parameter_scores_cuda(self, **numbers: object) -> None:
        self.calls.append(numbers)
        num_tokens, num_out, num_in = numbers["shape"]
        scores_shape = numbers["scores_shape"]
        scores = at(numbers["scores"], (scores_shape[0] * scores_shape[1],)).view(scores_shape)
        if numbers["parts"] is not None:
            parts = at(numbers["parts"], (NUM_PARTS,))
            assert parts.dtype == torch.float32
            parts.fill_(torch.nan)
        importance_torch.accumulate_parameter_scores_(
            scores,
            at(numbers["weight"], (num_out, num_in)),
            at(numbers["x"], (num_tokens, num_in)),
            at(numbers["g"], (num_tokens, num_out)),
            None if numbers["valid"] is None else at(numbers["valid"], (num_tokens,)),
            numbers["is_per_token"],
            numbers["scale"],
            numbers["seed"],
        )


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    double = Double()
    compiled._codes.cache_clear()
    monkeypatch.setattr(compiled, "extension", lambda: double)
    # a torch without CUDA has none
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: 2**63 + 5, raising=False
    )
    yield double
    compiled._codes.cache_clear()


@pytest.mark.parametrize("layout", [Tensor.contiguous, *LAYOUTS])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_kernel_is_told_where_everything_is(
    double: Double, shape: tuple[int, int], masked: bool, layout: object
) -> None:
    weight, x, g = parameter_case()
    g = g.bfloat16()
    # not contiguous, so that a copy must outlive the call
    valid = every_third_is_padding(74)[::2] if masked else None
    dtype = torch.bfloat16 if shape == SHAPES["elements"] else torch.float64
    scores, expected = torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    options = (valid, masked, 0.25, 2**64 - 3)
    importance_torch.accumulate_parameter_scores_(expected, weight, x, g, *options)
    inputs = (layout(weight), layout(x), layout(g))
    importance_cuda.accumulate_parameter_scores_(scores, *inputs, *options)
    assert torch.equal(scores, expected)
    (call,) = double.calls
    assert (call["parts"] is None) == (shape == SHAPES["elements"])
    assert (call["device"], call["stream"]) == (x.device.index, 2**63 + 5)


@pytest.mark.parametrize(
    ("shape", "widened"), [((2, 5), ""), ((1, 1), "weight"), ((1, 1), "x"), ((1, 1), "g")], ids=str
)
def test_blocks_and_fp64_run_on_the_torch_backend(
    double: Double, shape: tuple[int, int], widened: str
) -> None:
    inputs = dict(zip(("weight", "x", "g"), parameter_case(), strict=True))
    if widened:
        inputs[widened] = inputs[widened].double()
    scores, expected = torch.ones(2, *shape, dtype=torch.float64)
    options = (None, False, 1.0, 0)
    importance_torch.accumulate_parameter_scores_(expected, *inputs.values(), *options)
    importance_cuda.accumulate_parameter_scores_(scores, *inputs.values(), *options)
    assert torch.equal(scores, expected)
    assert double.calls == []
