"""The K-extended GEMM against fp64 truth, in Triton's interpreter."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.molora_linear_reference import dropout_scale
from citi_kernels.testing import assert_accurate, embed, poisoned_memory
from citi_kernels.triton_kernels import extended_gemm, persistent
from citi_kernels.triton_kernels.extended_gemm import (
    extended_input_gradient,
    extended_linear,
    linear_launch_meta,
    takes,
)
from citi_kernels.triton_kernels.launch import recorded_launches
from under_test import DEVICE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEED = torch.tensor(2**40 + 7)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# T, K, N, E, r: one tile, edges on all sides, several tiles on both sides, odd ranks
SHAPES = [(1, 8, 8, 1, 1), (129, 72, 264, 4, 8), (300, 200, 520, 3, 11), (140, 64, 128, 2, 64)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Case(NamedTuple):
    """What the two functions take; shapes as in their signatures."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    h: Tensor
    probs: Tensor
    dh: Tensor
    dlogits: Tensor
    a: Tensor
    b: Tensor
    router: Tensor

    def linear(self, settings: Settings) -> Tensor:
        return extended_linear(self.x, self.weight, self.bias, self.h, self.probs, self.b, settings)

    def gradient(self, settings: Settings) -> Tensor:
        return extended_input_gradient(
            self.dy,
            self.weight,
            self.dh,
            self.a,
            self.dlogits,
            self.router,
            settings,
        )


def make_case(shape: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype) -> Case:
    T, K, N, E, r = shape
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(DEVICE, dtype)

    return Case(
        x=draw(T, K),
        dy=draw(T, N),
        weight=draw(N, K) / 8,
        bias=draw(N),
        h=draw(T, E * r),
        probs=draw(T, E + 1, dtype=torch.float32).softmax(1),
        dh=draw(T, E * r),
        dlogits=draw(T, E + 1),
        a=draw(E * r, K, dtype=parameters),
        b=draw(N, E * r, dtype=parameters),
        router=draw(E + 1, K, dtype=parameters),
    )


def settings_of(shape: tuple[int, ...], dropout_p: float = 0.0) -> Settings:
    return Settings(shape[3], 0.25, None, False, None, 0, dropout_p, SEED if dropout_p else None)


def linear_ref(case: Case, settings: Settings, dtype: torch.dtype) -> Tensor:
    x, weight, bias, h, b = (
        each.to(case.x.dtype).to(dtype) for each in (case.x, case.weight, case.bias, case.h, case.b)
    )
    wide = torch.promote_types(dtype, torch.float32)
    gate = case.probs[:, 1:].to(wide).repeat_interleave(h.shape[1] // settings.num_experts, 1)
    u = (settings.scaling * gate * h.to(wide)).to(dtype)
    return torch.nn.functional.linear(x, weight, bias) + u @ b.T


def gradient_ref(case: Case, settings: Settings, dtype: torch.dtype) -> Tensor:
    dy, weight, dh, a, dlogits, router = (
        each.to(case.x.dtype).to(dtype)
        for each in (
            case.dy, case.weight, case.dh, case.a, case.dlogits, case.router
        )
    )  # fmt: skip
    update = dh @ a
    if settings.dropout_p:
        update = update * dropout_scale(
            update.shape, settings.dropout_p, SEED, dtype=dtype, device=update.device
        )
    return dy @ weight + update + dlogits @ router


@pytest.fixture
def three_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU so small that a program walks over several tiles."""
    for module in (extended_gemm, persistent):
        monkeypatch.setattr(module, "num_multiprocessors", lambda device: 3)


@each_dtype
@each_shape
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["fp32_parameters", "same"])
def test_linear_follows_the_accuracy_rule(
    shape: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype | None
) -> None:
    case, settings = make_case(shape, dtype, parameters or dtype), settings_of(shape)
    assert takes(case.x, case.weight)
    with poisoned_memory():
        y = case.linear(settings)
    assert_accurate(
        y, linear_ref(case, settings, torch.float64), linear_ref(case, settings, dtype), name="y"
    )


@each_dtype
@each_shape
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_input_gradient_follows_the_accuracy_rule(
    shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float
) -> None:
    case, settings = make_case(shape, dtype, torch.float32), settings_of(shape, dropout_p)
    assert takes(case.dy, case.weight)
    with poisoned_memory():
        dx = case.gradient(settings)
    truth, baseline = (gradient_ref(case, settings, each) for each in (torch.float64, dtype))
    assert_accurate(dx, truth, baseline, kind="backward", name="dx")


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_form_for_other_architectures_follows_the_accuracy_rule(shape: tuple[int, ...]) -> None:
    case, settings = make_case(shape, torch.bfloat16, torch.float32), settings_of(shape)
    with persistent.assumed_capability(80), poisoned_memory():
        y, dx = case.linear(settings), case.gradient(settings)
    truth, baseline = (linear_ref(case, settings, each) for each in (torch.float64, torch.bfloat16))
    assert_accurate(y, truth, baseline, name="y")
    truth, baseline = (
        gradient_ref(case, settings, each) for each in (torch.float64, torch.bfloat16)
    )
    assert_accurate(dx, truth, baseline, kind="backward", name="dx")


def test_what_a_program_computes_does_not_depend_on_how_many_there_are(
    request: pytest.FixtureRequest,
) -> None:
    shape = (1300, 40, 392, 2, 8)
    case, settings = make_case(shape, torch.float16, torch.float32), settings_of(shape, 0.3)
    y, dx = case.linear(settings), case.gradient(settings)
    request.getfixturevalue("three_programs")
    assert torch.equal(case.linear(settings), y)
    assert torch.equal(case.gradient(settings), dx)


def test_without_bias() -> None:
    shape = SHAPES[1]
    case, settings = make_case(shape, torch.bfloat16, torch.float32), settings_of(shape)
    zero = case._replace(bias=torch.zeros_like(case.bias))
    assert torch.equal(case._replace(bias=None).linear(settings), zero.linear(settings))


def test_a_transposed_weight_gives_the_same_bits() -> None:
    shape = SHAPES[2]
    case, settings = make_case(shape, torch.bfloat16, torch.float32), settings_of(shape)
    transposed = case._replace(weight=case.weight.T.contiguous().T)
    assert takes(case.x, transposed.weight)
    assert torch.equal(transposed.linear(settings), case.linear(settings))
    assert torch.equal(transposed.gradient(settings), case.gradient(settings))


def test_rows_that_lie_apart_give_the_same_bits_and_are_not_written() -> None:
    shape = SHAPES[1]
    case, settings = make_case(shape, torch.bfloat16, torch.float32), settings_of(shape)
    buffers, apart = [], []
    for tensor in (case.x, case.dy):
        buffers.append(tensor.new_full((shape[0], tensor.shape[1] + 16), float("nan")))
        apart.append(buffers[-1][:, 8:-8].copy_(tensor))
    sliced = case._replace(x=apart[0], dy=apart[1])
    assert takes(sliced.x, case.weight)
    assert torch.equal(sliced.linear(settings), case.linear(settings))
    assert torch.equal(sliced.gradient(settings), case.gradient(settings))
    for buffer in buffers:
        assert buffer[:, :8].isnan().all()
        assert buffer[:, -8:].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_case_11_what_is_not_finite_in_a_row_stays_there(value: float) -> None:
    shape = SHAPES[1]
    case, settings = make_case(shape, torch.bfloat16, torch.float32), settings_of(shape, 0.4)
    y, dx = case.linear(settings), case.gradient(settings)
    for tensor in (case.x, case.h, case.dy, case.dh, case.dlogits):
        tensor[5, 3] = value
    others = torch.arange(shape[0], device=DEVICE) != 5
    bad_y, bad_dx = case.linear(settings), case.gradient(settings)
    assert not torch.isfinite(bad_y[5]).any()
    assert not torch.isfinite(bad_dx[5]).any()
    assert torch.equal(bad_y[others], y[others])
    assert torch.equal(bad_dx[others], dx[others])


def test_case_11_a_dropped_input_takes_nothing_from_a_nan_in_dh() -> None:
    shape = SHAPES[1]
    case, settings = make_case(shape, torch.bfloat16, torch.float32), settings_of(shape, 0.4)
    case.dh[5] = float("nan")
    kept = dropout_scale(shape[:2], 0.4, SEED, dtype=torch.float32, device=case.x.device)
    assert torch.equal(case.gradient(settings)[5].isnan(), kept[5] > 0)


def test_case_7_nothing_around_the_rank_operands_is_read() -> None:
    shape = (130, 72, 136, 3, 7)
    case, settings = make_case(shape, torch.bfloat16, torch.float32), settings_of(shape)
    rank_sized = ("h", "probs", "dh", "dlogits", "a", "b", "router")
    guarded = {}
    for name in rank_sized:
        flat = embed(getattr(case, name).reshape(1, -1)).view
        guarded[name] = flat.reshape(getattr(case, name).shape)
        assert guarded[name].data_ptr() == flat.data_ptr()
    guarded_case = case._replace(**guarded)
    assert torch.equal(guarded_case.linear(settings), case.linear(settings))
    assert torch.equal(guarded_case.gradient(settings), case.gradient(settings))


def test_takes_refuses_what_a_descriptor_cannot_read() -> None:
    def bf16(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)

    x, weight = bf16(16, 64), bf16(32, 64)
    assert takes(x, weight)
    assert takes(x, bf16(64, 32).T)
    assert takes(x.half(), weight.half())
    assert not takes(x.float(), weight.float())
    assert not takes(x, weight.half())
    assert not takes(x[:0], weight)
    assert not takes(bf16(16, 60), bf16(32, 60))
    assert not takes(x, bf16(36, 64))
    assert not takes(bf16(16, 128)[:, ::2], weight)
    assert not takes(bf16(1, 64).expand(16, 64), weight)
    assert not takes(x, bf16(32, 128)[:, ::2])
    assert not takes(bf16(16 * 64 + 1)[1:].view(16, 64), weight)
    assert not takes(bf16(16, 65)[:, :64], weight)


def test_tiles_are_wide_where_they_fill_the_gpu_and_on_sm_90_alone() -> None:
    def width(T: int, N: int, architecture: int = 90) -> int:
        meta = linear_launch_meta(T, N, 32, architecture=architecture, num_programs=132)
        return meta.constants["BLOCK_WIDE"]

    assert [width(8192, N) for N in (1024, 4096, 14336)] == [256, 256, 256]
    assert width(512, 4096) == 128
    assert width(8192, 4096, 80) == width(8192, 4096, 100) == 128


def test_one_launch_each() -> None:
    case = Case(*(each.to("meta") for each in make_case(SHAPES[1], torch.bfloat16, torch.float32)))
    settings = settings_of(SHAPES[1], 0.5)
    with recorded_launches() as launches:
        assert case.linear(settings).shape == case.dy.shape
        assert case.gradient(settings).shape == case.x.shape
    assert [len(each.grid) for each in launches] == [1, 1]
