"""The skinny passes of `citi::molora_linear` in CUDA C++: calls of `citi_kernels._C`, workspaces.

Each function is one pass over a wide matrix, or one over what is rank-sized. x, dy and everything
rank-sized have one dtype, bf16 or fp16; probabilities and parts of sums are fp32. Sums over parts
have an order that follows from the shape alone. Given `beside`, a function takes its memory at once
and its kernel runs with the others of `side_stream.Beside`.

Shapes: T tokens, K in-features, N out-features, M either, E experts, R stacked rank (E·r), G gates
(E + 1); P = R rounded up to 8, Z = P + G rounded up to 8; C parts, V columns of a narrow matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels import compiled, environment
from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.molora_linear_reference import dropout_numbers
from citi_kernels.ops.side_stream import Beside
from citi_kernels.ops.top_k_marks import top_k_numbers

# beyond it the parts of du that one pass over dy leaves are as large as dy
MAX_RANK_OF_ONE_PASS = 32
_PACKED = (torch.float32, torch.bfloat16, torch.float16)


class Sizes(NamedTuple):
    """Sizes of a layer; those with 8 are rounded up to it."""

    T: int
    E: int
    R: int

    @property
    def G(self) -> int:  # noqa: N802
        return self.E + 1

    @property
    def P(self) -> int:  # noqa: N802
        return padded(self.R)

    @property
    def Z(self) -> int:  # noqa: N802
        return self.P + padded(self.G)

    @property
    def shape(self) -> tuple[int, int, int]:
        """What `_C` takes: T, E, r."""
        return self.T, self.E, self.R // self.E


def padded(size: int) -> int:
    return -(-size // 8) * 8


def aligned(x_TM: Tensor) -> Tensor:
    """x itself where every row begins at 16 bytes and M is a multiple of 8, or a copy like that.

    The copy has zeros up to that multiple. A row stride greater than M is taken as it is.
    """
    missing = padded(x_TM.shape[1]) - x_TM.shape[1]
    is_aligned = (
        missing == 0
        and x_TM.stride(1) == 1
        and x_TM.stride(0) >= x_TM.shape[1]
        and x_TM.stride(0) % 8 == 0
        and x_TM.data_ptr() % 16 == 0
    )
    if is_aligned:
        return x_TM
    return (
        F.pad(x_TM, (0, missing)) if missing else x_TM.clone(memory_format=torch.contiguous_format)
    )


def stack(
    a_RK: Tensor,
    router_GK: Tensor,
    sizes: Sizes,
    dtype: torch.dtype,
    cleared: Tensor | None = None,
) -> Tensor:
    """[a; router] (Z, K rounded up to 8) in `dtype`, each padded with rows of zeros.

    cleared: int32, set to zero by the same launch.
    """
    shape = (sizes.Z, padded(a_RK.shape[1]))
    return packed(shape, dtype, (a_RK, 0), (router_GK, sizes.P), cleared=cleared)


def packed(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *sources: tuple[Tensor, int],
    cleared: Tensor | None = None,
) -> Tensor:
    """Up to two matrices, each from a row on, in `dtype` and contiguous, with zeros elsewhere.

    shape: its second entry a multiple of 8; cleared: int32, set to zero. One launch, whatever the
    strides and dtypes.
    """
    numbers = []
    # what else a parameter can be is rounded first; this name keeps that until the launch
    matrices = [each if each.dtype in _PACKED else each.to(dtype) for each, _ in sources]
    out = matrices[0].new_empty(shape, dtype=dtype)
    for each, (_, first_row) in zip(matrices, sources, strict=True):
        numbers.append((compiled.matrix(each), first_row, *each.shape))
    compiled.extension().pack_rows_cuda(
        shape=shape,
        sources=numbers,
        out=compiled.vector(out),
        zeros=compiled.indices(cleared),
        **compiled.launch_place(out),
    )
    return out


def shrink_route(
    x_TK: Tensor, stack_ZK: Tensor, sizes: Sizes, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """h (T, R), u (T, P), zeros from R on, and probs (T, G), marked where the expert is dropped."""
    T, K = x_TK.shape
    h_TR, u_TP = x_TK.new_empty(T, sizes.R), x_TK.new_empty(T, sizes.P)
    probs_TG = x_TK.new_empty(T, sizes.G, dtype=torch.float32)
    extension, parts_CTZ = compiled.extension(), None
    num_splits = extension.shrink_cuda_splits(num_tokens=T, num_inputs=K)
    if num_splits > 1:
        parts_CTZ = x_TK.new_empty(num_splits, T, sizes.Z, dtype=torch.float32)
    extension.shrink_cuda(
        shape=sizes.shape,
        num_inputs=K,
        x=compiled.matrix(x_TK),
        stack=compiled.vector(stack_ZK),
        h=compiled.vector(h_TR),
        u=compiled.vector(u_TP),
        probs=compiled.vector(probs_TG),
        parts=compiled.vector(parts_CTZ),
        **top_k_numbers(settings),
        scaling=settings.scaling,
        dropout=_dropout(settings),
        **compiled.launch_place(x_TK),
    )
    return h_TR, u_TP, probs_TG


def scaled_ranks(
    h_TR: Tensor, probs_TG: Tensor, sizes: Sizes, settings: Settings, beside: Beside | None = None
) -> Tensor:
    """u (T, P) as the forward had it."""
    u_TP = h_TR.new_empty(sizes.T, sizes.P)
    _launch(
        "scale_ranks_cuda",
        (h_TR, probs_TG, u_TP),
        beside,
        shape=sizes.shape,
        h=compiled.vector(h_TR),
        probs=compiled.vector(probs_TG),
        u=compiled.vector(u_TP),
        scaling=settings.scaling,
    )
    return u_TP


def row_products(wide_TM: Tensor, rows_VM: Tensor) -> Tensor:
    """Parts (C, T, V) of wide rowsᵀ, in one pass over wide."""
    (T, M), V = wide_TM.shape, rows_VM.shape[0]
    extension = compiled.extension()
    num_splits = extension.shrink_cuda_splits(num_tokens=T, num_inputs=M)
    parts_CTV = wide_TM.new_empty(num_splits, T, V, dtype=torch.float32)
    extension.row_product_cuda(
        shape=(T, M, V),
        wide=compiled.matrix(wide_TM),
        rows=compiled.vector(rows_VM),
        parts=compiled.vector(parts_CTV),
        **compiled.launch_place(wide_TM),
    )
    return parts_CTV


@dataclasses.dataclass
class Early:
    """A pass over x that begins beside the GEMM which makes its narrow operand.

    Its blocks look at the GEMM's counts, and leave their parts to `rest` where some of the operand
    is not there yet: nobody waits. All are int32 and zero before: counts and done, one for each
    block, are views of numbers.
    """

    numbers: Tensor
    counts: Tensor
    done: Tensor
    rest: Callable[[], None] | None = None


def factor_gradients(
    wide_TM: Tensor,
    narrow_TV: Tensor,
    b_MR: Tensor | None = None,
    *,
    rank_columns: int = 0,
    settings: Settings | None = None,
    beside: Beside | None = None,
    early: Early | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Parts (C, M, V) of wideᵀ narrow and, given b, parts (C, T, V) of wide b; one pass over wide.

    settings: those of the dropout of wide that the first `rank_columns` of narrow see; None: none.
    early: parts are there after `early.rest()` alone.
    """
    (T, M), V = wide_TM.shape, narrow_TV.shape[1]
    extension, gives_ranks = compiled.extension(), b_MR is not None
    num_tiles, num_shares = extension.factor_gradients_cuda_parts(
        num_tokens=T, num_columns=M, num_narrow=V, gives_ranks=gives_ranks
    )
    parts_CMV = wide_TM.new_empty(num_shares, M, V, dtype=torch.float32)
    du_CTV = None
    if gives_ranks:
        du_CTV = wide_TM.new_empty(num_tiles, T, V, dtype=torch.float32)
    launch = functools.partial(
        _launch,
        "factor_gradients_cuda",
        (wide_TM, narrow_TV, b_MR, du_CTV, parts_CMV),
        shape=(T, M, V),
        wide=compiled.matrix(wide_TM),
        narrow=compiled.matrix(narrow_TV),
        num_ranks=b_MR.shape[1] if gives_ranks else 0,
        b=compiled.vector(b_MR),
        du=compiled.vector(du_CTV),
        parts=compiled.vector(parts_CMV),
        rank_columns=rank_columns,
        dropout=_dropout(settings),
        done=None if early is None else compiled.indices(early.done),
        fits_narrow="fit_up" in environment.TRIALS,
    )
    launch(beside, counts=None if early is None else compiled.indices(early.counts))
    if early is not None:
        early.rest = functools.partial(launch, None, counts=None)
    return parts_CMV, du_CTV


def num_parts(num_tokens: int, num_columns: int, num_narrow: int) -> int:
    """Blocks of `factor_gradients` without b."""
    return math.prod(
        compiled.extension().factor_gradients_cuda_parts(
            num_tokens=num_tokens,
            num_columns=num_columns,
            num_narrow=num_narrow,
            gives_ranks=False,
        )
    )


def rank_gradients(
    du_CTP: Tensor | None,
    h_TR: Tensor,
    probs_TG: Tensor,
    dgate_TG: Tensor | None,
    sizes: Sizes,
    settings: Settings,
) -> Tensor:
    """dz (T, Z): dh in columns 0 to R, dlogits in columns P to P + G, zeros in the others."""
    dz_TZ = h_TR.new_empty(sizes.T, sizes.Z)
    compiled.extension().rank_gradients_cuda(
        shape=sizes.shape,
        num_parts=0 if du_CTP is None else du_CTP.shape[0],
        du=compiled.vector(du_CTP),
        h=compiled.vector(h_TR),
        probs=compiled.vector(probs_TG),
        dgate=compiled.vector(dgate_TG),
        dz=compiled.vector(dz_TZ),
        scaling=settings.scaling,
        **compiled.launch_place(h_TR),
    )
    return dz_TZ


class Columns(NamedTuple):
    """Columns of a sum that become a tensor of their own."""

    first: int
    count: int
    dtype: torch.dtype
    is_transposed: bool


def sum_parts(parts_CMV: Tensor, *wanted: Columns, beside: Beside | None = None) -> list[Tensor]:
    """For each of the up to two wanted (M, count), or (count, M), of the sum over C."""
    C, M, V = parts_CMV.shape
    outputs, numbers = [], []
    for first, count, dtype, is_transposed in wanted:
        shape = (count, M) if is_transposed else (M, count)
        # what else a parameter can be, the op rounds the gradient to
        is_known = dtype in (torch.bfloat16, torch.float16)
        outputs.append(parts_CMV.new_empty(shape, dtype=dtype if is_known else torch.float32))
        numbers.append((compiled.vector(outputs[-1]), first, count, is_transposed))
    _launch(
        "sum_shares_cuda",
        (parts_CMV, *outputs),
        beside,
        shape=(C, M, V),
        parts=compiled.vector(parts_CMV),
        outputs=numbers,
    )
    return outputs


def update_input_gradient_(
    dx_TK: Tensor,
    dz_TZ: Tensor,
    stack_ZK: Tensor,
    sizes: Sizes,
    settings: Settings,
    *,
    has_base: bool,
) -> None:
    """dx += dz stack, in place, with dropout over the part of a; without a base dx is written.

    dx has rows as `aligned` gives them.
    """
    compiled.extension().update_input_gradient_cuda(
        shape=sizes.shape,
        num_inputs=dx_TK.shape[1],
        dx=compiled.matrix(dx_TK),
        dz=compiled.vector(dz_TZ),
        stack=compiled.vector(stack_ZK),
        has_base=has_base,
        dropout=_dropout(settings),
        **compiled.launch_place(dx_TK),
    )


def add_non_finite_(
    out_TM: Tensor,
    left_TR: Tensor,
    right_RM: Tensor,
    probs_TG: Tensor,
    sizes: Sizes,
    dropout: Settings | None = None,
) -> None:
    """out[t] += left[t] right over the NaN and inf of right that belong to experts which t keeps.

    dropout: settings of the dropout that lies over the sum; None: none.
    """
    compiled.extension().add_non_finite_cuda(
        shape=sizes.shape,
        num_columns=out_TM.shape[1],
        out=compiled.vector(out_TM),
        left=compiled.matrix(left_TR),
        right=compiled.matrix(right_RM),
        probs=compiled.vector(probs_TG),
        dropout=_dropout(dropout),
        **compiled.launch_place(out_TM),
    )


def _launch(
    kernel: str, tensors: tuple[Tensor | None, ...], beside: Beside | None, **arguments: Any
) -> None:
    """A kernel of `_C` on the current stream, or with those of `beside`.

    tensors: all that the arguments point to; the first says where the kernel runs.
    """
    function = getattr(compiled.extension(), kernel)
    if beside is None:
        function(**arguments, **compiled.launch_place(tensors[0]))
    else:
        beside.later(function, arguments, tensors)


def _dropout(settings: Settings | None) -> tuple[int, int, int, float] | None:
    return settings and dropout_numbers(settings.dropout_p, settings.dropout_seed)
