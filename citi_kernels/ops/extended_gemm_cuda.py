"""The base product with its K dimension longer by the rank, in CUDA C++ for Hopper.

    extended_linear           y  = x weightᵀ + bias + u bᵀ
    extended_input_gradient   dx = dy weight + dz stack     stack: rows of a, then of the router

One persistent kernel (TMA, wgmma), in `citi_kernels._C`; sums in fp32, one rounding at the store.
The backend "cuda" of `citi::molora_linear` takes it where `why_not` has nothing against it.

A matrix is read by TMA, 16 bytes at a time: it starts at a multiple of 16 bytes, its rows lie a
multiple of 16 bytes (8 elements) apart, its columns side by side. So a rank-sized matrix whose
width is no multiple of 8, such as dz with Z = 37, is kept as the first columns of wider rows;
what lies beyond is never read. `aligned_rows` gives such a copy.

Shapes: T tokens, K in-features, N out-features, R stacked rank (E·r), Z rank and gate entries.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from citi_kernels import compiled

MAX_EXTENSION = 256
_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16
_CAPABILITY = (9, 0)


def why_not(
    left: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    extension: tuple[Tensor, Tensor] | None = None,
) -> str | None:
    """Why the kernel cannot be given these, or None; looks at metadata alone.

    Args:
        left: x (T, K) or dy (T, N).
        weight_NK: (N, K), contiguous in K.
        bias_N: of a linear layer.
        extension: (u, b) or (dz, stack).
    """
    matrices = (left, weight_NK, *(extension or ()))
    tensors = matrices if bias_N is None else (*matrices, bias_N)
    if left.dtype not in _DTYPES:
        return f"it computes in bf16 and fp16, got {left.dtype}"
    if any(each.dtype != left.dtype for each in tensors):
        return f"all operands must be {left.dtype}, got {', '.join(str(t.dtype) for t in tensors)}"
    if any(each.device != left.device for each in tensors):
        return f"all operands must be on {left.device}"
    if any(each.dim() != 2 or each.numel() == 0 for each in matrices):
        return "it takes matrices with at least one element"
    if extension is not None and extension[0].shape[1] > MAX_EXTENSION:
        return f"its extension is at most {MAX_EXTENSION} wide, got {extension[0].shape[1]}"
    for each in matrices:
        if reason := _misaligned(each):
            return f"{reason}, got shape {tuple(each.shape)}, strides {each.stride()}"
    if bias_N is not None and (not bias_N.is_contiguous() or bias_N.data_ptr() % 4 != 0):
        return "bias must be contiguous and aligned to 4 bytes"
    return why_not_on(left.device)


def extended_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    u_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
) -> Tensor:
    """y (T, N) = x weightᵀ + bias + u bᵀ, for what `why_not` has nothing against.

    Without u and b a plain product. Rows of y lie a multiple of 16 bytes apart: where N is no
    multiple of 8, y is not contiguous.

    Raises:
        ValueError: an argument does not fit the others, or is none that `why_not` takes.
    """
    (num_tokens, num_in), num_out = x_TK.shape, weight_NK.shape[0]
    y_TN = aligned_empty(x_TK, num_out)
    compiled.extension().extended_linear_cuda(
        shape=(num_tokens, num_in, num_out, 0 if u_TR is None else u_TR.shape[1]),
        x=compiled.matrix(x_TK),
        weight=compiled.matrix(weight_NK),
        bias=compiled.vector(bias_N),
        u=None if u_TR is None else compiled.matrix(u_TR),
        b=None if b_NR is None else compiled.matrix(b_NR),
        y=compiled.matrix(y_TN),
        **compiled.launch_place(x_TK),
    )
    return y_TN


def extended_input_gradient(
    dy_TN: Tensor,
    weight_NK: Tensor,
    dz_TZ: Tensor | None = None,
    stack_ZK: Tensor | None = None,
) -> Tensor:
    """dx (T, K) = dy weight + dz stack, for what `why_not` has nothing against.

    Without dz and stack a plain product; rows of dx as those of y in `extended_linear`.

    Raises:
        ValueError: an argument does not fit the others, or is none that `why_not` takes.
    """
    (num_tokens, num_out), num_in = dy_TN.shape, weight_NK.shape[1]
    dx_TK = aligned_empty(dy_TN, num_in)
    compiled.extension().extended_input_gradient_cuda(
        shape=(num_tokens, num_in, num_out, 0 if dz_TZ is None else dz_TZ.shape[1]),
        dy=compiled.matrix(dy_TN),
        weight=compiled.matrix(weight_NK),
        dz=None if dz_TZ is None else compiled.matrix(dz_TZ),
        stack=None if stack_ZK is None else compiled.matrix(stack_ZK),
        dx=compiled.matrix(dx_TK),
        **compiled.launch_place(dy_TN),
    )
    return dx_TK


def aligned_rows(matrix: Tensor) -> Tensor:
    """The matrix itself where the kernel can read it, else a copy in rows of a multiple of 8."""
    if _misaligned(matrix) is None:
        return matrix
    copy = matrix.new_empty(matrix.shape[0], -(-matrix.shape[1] // 8) * 8)[:, : matrix.shape[1]]
    return copy.copy_(matrix)


def aligned_empty(like: Tensor, num_columns: int) -> Tensor:
    """A matrix for the kernel to write, with as many rows as `like`."""
    return like.new_empty(like.shape[0], -(-num_columns // 8) * 8)[:, :num_columns]


def _misaligned(matrix: Tensor) -> str | None:
    num_rows, num_columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    if column_stride != 1 or (num_rows > 1 and row_stride < num_columns):
        return "columns must be contiguous and rows apart"
    row_bytes = 0 if num_rows == 1 else row_stride * matrix.element_size()
    if matrix.data_ptr() % _ALIGNMENT or row_bytes % _ALIGNMENT:
        return f"rows must start at multiples of {_ALIGNMENT} bytes"
    return None


def why_not_on(device: torch.device) -> str | None:
    """Why no GEMM of these can run on this device, or None."""
    if device.type != "cuda":
        return f"it runs on a GPU of compute capability 9.0, got {device}"
    if reason := compiled.why_missing("cuda"):
        return reason
    if "sm_90a" not in (archs := compiled.extension().built_with["cuda_archs"]).split():
        return f"citi_kernels._C was built without sm_90a ({archs})"
    if (found := _capability_of(device.index or 0)) != _CAPABILITY:
        return f"it runs on a GPU of compute capability 9.0, got {found[0]}.{found[1]}"
    return None


@functools.cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
