"""The glue of the extended GEMM on Hopper: what it says no to, and what it hands to `_C`."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled, environment
from citi_kernels.ops import extended_gemm_cuda as op

BF16, GPU = torch.bfloat16, torch.device("cuda", 0)


def _zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every tensor were on an H100 and `_C` built for it."""
    monkeypatch.setattr(op, "why_not_on", lambda device: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """What reaches `_C`, which does nothing."""
    seen: list[tuple[str, dict]] = []

    def kernel(name: str):
        return lambda **arguments: seen.append((name, arguments))

    names = ("extended_linear_cuda", "extended_input_gradient_cuda")
    dtypes = {"bfloat16": 1, "float16": 2}
    fake = SimpleNamespace(DTYPES=dtypes, **{name: kernel(name) for name in names})
    monkeypatch.setattr(compiled, "extension", lambda: fake)
    monkeypatch.setattr(compiled, "_codes", lambda: {BF16: 1, torch.float16: 2})
    monkeypatch.setattr(compiled, "launch_place", lambda tensor: {"device": 0, "stream": 7})
    return seen


REFUSED = {
    "fp32": ((_zeros(4, 16, dtype=torch.float32), _zeros(8, 16)), "computes in bf16 and fp16"),
    "two dtypes": ((_zeros(4, 16), _zeros(8, 16, dtype=torch.float16)), "must be torch.bfloat16"),
    "a bias of fp32": (
        (_zeros(4, 16), _zeros(8, 16), _zeros(8, dtype=torch.float32)),
        "must be torch.bfloat16",
    ),
    "no token": ((_zeros(0, 16), _zeros(8, 16)), "at least one element"),
    "three dimensions": ((_zeros(2, 4, 16), _zeros(8, 16)), "matrices"),
    "rows of 18 bytes": ((_zeros(4, 9), _zeros(8, 9)), "multiples of 16 bytes, got shape"),
    "a start within 16 bytes": ((_zeros(4, 24)[:, 4:20], _zeros(8, 16)), "multiples of 16 bytes"),
    "a transposed weight": ((_zeros(4, 16), _zeros(16, 8).t()), "columns must be contiguous"),
    "an expanded input": ((_zeros(1, 16).expand(4, 16), _zeros(8, 16)), "rows apart"),
    "an odd bias": ((_zeros(4, 16), _zeros(8, 16), _zeros(9)[1:]), "bias must be contiguous and"),
    "a wide extension": (
        (_zeros(4, 16), _zeros(8, 16), None, (_zeros(4, 264), _zeros(8, 264))),
        "at most 256 wide, got 264",
    ),
    "ranks of 74 bytes": (
        (_zeros(4, 16), _zeros(8, 16), None, (_zeros(4, 37), _zeros(8, 37))),
        "multiples of 16 bytes",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_taken_is_said(on_hopper: None, case: tuple) -> None:
    arguments, message = case
    assert message in op.why_not(*arguments)


def test_what_can_be_taken_is_not_refused(on_hopper: None) -> None:
    x, weight, bias = _zeros(5, 24)[:, :20], _zeros(8, 24)[:, :20], _zeros(8)
    ranks = op.aligned_rows(_zeros(5, 37)), op.aligned_rows(_zeros(8, 37))
    assert op.why_not(x, weight, bias, ranks) is None
    assert op.why_not(x[:1], weight) is None


def test_without_a_hopper_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = _zeros(4, 16), _zeros(8, 16)
    monkeypatch.setattr(compiled, "why_missing", lambda backend: "no nvcc" * (backend == "cuda"))
    assert op.why_not_on(GPU) == "no nvcc"
    monkeypatch.setattr(compiled, "why_missing", lambda backend: None)
    built = SimpleNamespace(built_with={"cuda_archs": "sm_80 compute_80"})
    monkeypatch.setattr(compiled, "extension", lambda: built)
    assert "built without sm_90a (sm_80 compute_80)" in op.why_not_on(GPU)
    built.built_with["cuda_archs"] = "sm_80 sm_90a"
    assert op.why_not(*matrices) == "it runs on a GPU of compute capability 9.0, got cpu"
    monkeypatch.setattr(op, "_capability_of", lambda index: (10, 0))
    assert op.why_not_on(GPU).endswith("capability 9.0, got 10.0")
    monkeypatch.setattr(op, "_capability_of", lambda index: (9, 0))
    assert op.why_not_on(GPU) is None


@pytest.mark.parametrize(("value", "is_on"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_it_is_on_unless_turned_off(
    monkeypatch: pytest.MonkeyPatch, value: str | None, is_on: bool
) -> None:
    monkeypatch.delenv("CITI_EXTENDED_GEMM", raising=False)
    if value is not None:
        monkeypatch.setenv("CITI_EXTENDED_GEMM", value)
    assert runpy.run_path(environment.__file__)["EXTENDED_GEMM"] is is_on


def test_a_linear_layer_reaches_the_kernel(calls: list[tuple[str, dict]]) -> None:
    x, weight, bias = _zeros(5, 24), _zeros(11, 24), _zeros(11)
    u, b = op.aligned_rows(_zeros(5, 37)), op.aligned_rows(_zeros(11, 37))
    y = op.extended_linear(x, weight, bias, u, b)
    assert (y.shape, y.stride(), y.dtype) == ((5, 11), (16, 1), BF16)
    ((name, given),) = calls
    assert name == "extended_linear_cuda"
    assert given == {
        "shape": (5, 24, 11, 37),
        "x": (x.data_ptr(), 240, 1, 24, 1),
        "weight": (weight.data_ptr(), 528, 1, 24, 1),
        "bias": (bias.data_ptr(), 22, 1, 11),
        "u": (u.data_ptr(), 400, 1, 40, 1),
        "b": (b.data_ptr(), 880, 1, 40, 1),
        "y": (y.data_ptr(), 160, 1, 16, 1),
        "device": 0,
        "stream": 7,
    }
    assert op.extended_linear(x, weight[:8]).is_contiguous()
    plain = calls[1][1]
    assert plain["shape"] == (5, 24, 8, 0)
    assert plain["bias"] is plain["u"] is plain["b"] is None


def test_an_input_gradient_reaches_the_kernel(calls: list[tuple[str, dict]]) -> None:
    dy, weight = _zeros(5, 16), _zeros(16, 24)
    dz, stack = op.aligned_rows(_zeros(5, 37)), _zeros(37, 24)
    dx = op.extended_input_gradient(dy, weight, dz, stack)
    assert (dx.shape, dx.stride()) == ((5, 24), (24, 1))
    ((name, given),) = calls
    assert name == "extended_input_gradient_cuda"
    assert given["shape"] == (5, 24, 16, 37)
    wanted = {"dy": dy, "weight": weight, "dz": dz, "stack": stack, "dx": dx}
    assert {key: given[key][0] for key in wanted} == {k: t.data_ptr() for k, t in wanted.items()}
    op.extended_input_gradient(dy, weight)
    plain = calls[1][1]
    assert plain["shape"] == (5, 24, 16, 0)
    assert plain["dz"] is plain["stack"] is None


def test_aligned_rows_copies_only_what_it_must() -> None:
    ranks = torch.arange(3 * 37.0).reshape(3, 37).to(BF16)
    copy = op.aligned_rows(ranks)
    assert copy.stride() == (40, 1)
    assert torch.equal(copy, ranks)
    wide = ranks[:, :24].contiguous()
    assert op.aligned_rows(wide) is wide
