"""Random inputs of the importance ops, their layouts, and what a backend allocates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from citi_kernels import backends
from under_test import BACKEND, DEVICE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp64 is as wide as the truth, so that the accuracy rule cannot judge it
EVERY_DTYPE = DTYPES if BACKEND in ("triton", "cuda") else DTYPES | {"fp64": torch.float64}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(dtype).to(DEVICE)


def parameter_case(
    num_tokens: int = 37,
    num_out: int = 38,
    num_in: int = 130,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight, x, g; g so small that sums in fp16 stay finite."""
    return (
        draw(num_out, num_in, dtype=dtype),
        draw(num_tokens, num_in, dtype=dtype, seed=1),
        draw(num_tokens, num_out, dtype=dtype, seed=2) / 16,
    )


def every_third_is_padding(num_tokens: int) -> Tensor:
    return torch.arange(num_tokens) % 3 != 0


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def sliced(tensor: Tensor) -> Tensor:
    """Every second column of a wider one, full of NaN between them."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def apart(tensor: Tensor) -> Tensor:
    """Rows that lie apart, with NaN between them."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 3), float("nan"))
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [transposed, sliced, apart]


def assert_unchanged_by_layout(scores: Tensor, expected: Tensor) -> None:
    """Bitwise; on a GPU, where lanes sum in an order that follows the strides, to fp32 rounding."""
    if DEVICE == "cpu":
        assert torch.equal(scores, expected)
    else:
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


def guarded_zeros(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[], bool]]:
    """Contiguous zeros between NaN, and whether the NaN is still all around them."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 10,), float("nan"), dtype=dtype)
    buffer[5:-5] = 0
    return buffer[5:-5].view(shape), lambda: bool(
        buffer[:5].isnan().all() & buffer[-5:].isnan().all()
    )


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None:
            self.sizes.append(out.numel())
        return out


def allocated_sizes(op: str, *arguments: object) -> list[int]:
    """Elements of every tensor that the backend under test makes for `op`.

    Kernels of ours are not launched, since the interpreter works with copies.
    """
    with contextlib.ExitStack() as stack:
        if BACKEND == "triton":
            from citi_kernels.triton_kernels.launch import recorded_launches

            stack.enter_context(recorded_launches())
        record = stack.enter_context(_Allocations())
        # not the op itself, which is one call to a mode
        getattr(backends.find(op, BACKEND), op)(*arguments)
    return record.sizes
