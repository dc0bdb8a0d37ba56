"""The glue of the routed GEMM on Hopper: what it says no to, and what it hands to `_C`."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import extended_gemm_cuda
from citi_kernels.ops import routed_gemm_cuda as op
from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.skinny_cuda import Sizes

BF16 = torch.bfloat16
SIZES = Sizes(200, 3, 15)  # P 16, G 4, Z 24
SETTINGS = Settings(3, 0.5, None, False, None, 0, 0.0, None)


def _zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """What reaches `_C`, which does nothing."""
    seen: list[tuple[str, dict]] = []

    made: list[weakref.ref] = []
    counts_of = op._counts

    def counted(left: Tensor) -> Tensor:
        counts = counts_of(left)
        made.append(weakref.ref(counts))
        return counts

    def kernel(name: str):
        def launch(**arguments) -> None:
            assert made[-1]() is not None, "counts whose memory was given back before the launch"
            seen.append((name, arguments))

        return launch

    monkeypatch.setattr(op, "_counts", counted)

    names = ("routed_linear_cuda", "routed_input_gradient_cuda")
    fake = SimpleNamespace(**{name: kernel(name) for name in names})
    monkeypatch.setattr(compiled, "extension", lambda: fake)
    monkeypatch.setattr(compiled, "_codes", lambda: {torch.float32: 0, BF16: 1})
    monkeypatch.setattr(compiled, "launch_place", lambda tensor: {"device": 0, "stream": 7})
    return seen


REFUSED = {
    "top-k": (SIZES, SETTINGS._replace(top_k=2), "keeps every expert"),
    "dropout": (SIZES, SETTINGS._replace(dropout_p=0.1), "no dropout"),
    "ranks and gates": (Sizes(200, 4, 60), SETTINGS, "at most 64 together, got 72"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_taken_is_said(case: tuple) -> None:
    sizes, settings, message = case
    assert message in op.why_not(_zeros(200, 16), _zeros(8, 16), None, sizes, settings)


def test_the_rest_is_up_to_the_extended_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    left, weight, bias = _zeros(200, 16), _zeros(8, 16), _zeros(8)
    monkeypatch.setattr(extended_gemm_cuda, "why_not", lambda *given: given)
    assert op.why_not(left, weight, bias, SIZES, SETTINGS) == (left, weight, bias)
    every = SETTINGS._replace(top_k=3)
    assert op.why_not(left, weight, bias, SIZES, every) == (left, weight, bias)


def _counts_of(given: dict) -> int:
    address, num_bytes, size = given.pop("counts")
    assert address % 4 == 0
    assert num_bytes >= 4 * size
    return size


def test_a_linear_layer_reaches_the_kernel(calls: list[tuple[str, dict]]) -> None:
    x, weight, bias = _zeros(200, 24), _zeros(11, 24), _zeros(11)
    stack, b = _zeros(24, 24), extended_gemm_cuda.aligned_rows(_zeros(11, 15))
    y, h, u, probs = op.routed_linear(x, weight, bias, stack, b, SIZES, SETTINGS)
    assert (y.shape, y.stride()) == ((200, 11), (16, 1))
    assert (h.shape, u.shape) == ((200, 15), (200, 16))
    assert (probs.shape, probs.dtype) == ((200, 4), torch.float32)
    ((name, given),) = calls
    assert name == "routed_linear_cuda"
    assert _counts_of(given) == 2
    assert given.pop("shape") == (200, 3, 5, 24, 11)
    assert given.pop("scaling") == 0.5
    assert given.pop("order") == (0, False)
    assert (given.pop("device"), given.pop("stream")) == (0, 7)
    tensors = {"x": x, "weight": weight, "bias": bias, "stack": stack, "b": b, "y": y, "h": h}
    tensors |= {"u": u, "probs": probs}
    assert {key: numbers[0] for key, numbers in given.items()} == {
        key: tensor.data_ptr() for key, tensor in tensors.items()
    }


def test_an_input_gradient_reaches_the_kernel(calls: list[tuple[str, dict]]) -> None:
    dy, weight, b = _zeros(200, 16), _zeros(16, 24), _zeros(16, 16)[:, :15]
    h, probs = _zeros(200, 15), _zeros(200, 4, dtype=torch.float32)
    dgate, stack = _zeros(200, 4, dtype=torch.float32), _zeros(24, 24)
    operands = dy, weight, b, h, probs
    dx, dz = op.routed_input_gradient(*operands, dgate, stack, SIZES, SETTINGS)
    assert (dx.shape, dz.shape) == ((200, 24), (200, 24))
    ((name, given),) = calls
    assert name == "routed_input_gradient_cuda"
    assert _counts_of(given) == 2
    assert given.pop("shape") == (200, 3, 5, 24, 16)
    assert given.pop("fits_narrow") is True
    assert given.pop("scaling") == 0.5
    assert given.pop("order") == (0, False)
    assert (given.pop("device"), given.pop("stream")) == (0, 7)
    tensors = {"dy": dy, "weight": weight, "b": b, "h": h, "probs": probs, "dgate": dgate}
    tensors |= {"stack": stack, "dx": dx, "dz": dz}
    assert {key: numbers[0] for key, numbers in given.items()} == {
        key: tensor.data_ptr() for key, tensor in tensors.items()
    }
    op.routed_input_gradient(*operands, None, stack, SIZES, SETTINGS)
    assert calls[1][1]["dgate"] is None
