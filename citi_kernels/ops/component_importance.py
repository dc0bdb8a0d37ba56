"""Importance of a frozen linear component from the activations of one backward pass.

For y = x Wᵀ (+ b) with upstream gradient g = ∂L/∂y and this component's own input gradient
dx = g W (not the sum over siblings that share x):

    W ⊙ ∂L/∂W summed  =  Σ_t (W x_t) · g_t  =  Σ_t x_t · dx_t        (arXiv 2409.13202, eq. 4)

so the scores need x and dx only, and no weight gradient. With a bias, x·dx is the exact form
(y·g would count the bias). `parameter_score` needs gᵀx, which is built tile by tile, multiplied by
W and reduced at once.

Shape suffixes: T tokens, K in-features, N out-features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one fp32 block: stays in cache on a CPU, hides launches on a GPU, and three such
# blocks (two upcast operands and a product) stay below the 64 MiB of workspace we allow.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_DEVICE = 2**22
_TILE_ELEMENTS = 2**22


def row_dots(x: Tensor, dx: Tensor) -> Tensor:
    """One dot product per token, upcast block by block.

        out[t] = Σ_k x[t, k] · dx[t, k]

    Args:
        x: (T, K) floating, any strides.
        dx: (T, K) floating, may differ from `x` in dtype.

    Returns:
        (T,) fp64 if either input is fp64, else fp32; products and sums are formed in that dtype.

    Raises:
        ValueError: the inputs are not two matrices of one shape.
    """
    _check_matrices(x=x, dx=dx)
    _check_equal("dx", tuple(dx.shape), tuple(x.shape), "the shape of x")
    dtype = _score_dtype(x, dx)
    out_T = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    step = _rows_per_block(x)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        x_TK, dx_TK = (tensor[rows].to(dtype).contiguous() for tensor in (x, dx))
        out_T[rows] = torch.linalg.vecdot(x_TK, dx_TK)
    return out_T


def row_dots_ref(x: Tensor, dx: Tensor) -> Tensor:
    """The definition of `row_dots` in fp64."""
    return (x.double() * dx.double()).sum(-1)


def token_score(x: Tensor, dx: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Sum over tokens of the absolute row dot.

        Σ_{t valid} | x_t · dx_t |

    Args:
        x: (T, K) floating.
        dx: (T, K) floating, this component's own input gradient.
        valid: (T,) bool, the tokens that count; None counts all. A token that does not count is
            selected away, so its NaN stays out of the sum.

    Returns:
        0-d tensor, fp64 (fp32 on a device without fp64), on the inputs' device, not synchronised.

    Raises:
        ValueError: shapes do not fit.
    """
    return _sum(row_dots(x, dx).abs_(), valid)


def token_score_ref(x: Tensor, dx: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The definition of `token_score` in fp64."""
    dots_T = row_dots_ref(x, dx).abs()
    return (dots_T if valid is None else dots_T[valid]).sum()


def batch_score(x: Tensor, dx: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Signed sum over tokens of the row dot; its absolute value is | W · ∂L/∂W |.

        Σ_{t valid} x_t · dx_t

    The sign is kept, so that uses of one weight in one batch can be added first.
    Arguments, returns and errors as for `token_score`.
    """
    return _sum(row_dots(x, dx), valid)


def batch_score_ref(x: Tensor, dx: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The definition of `batch_score` in fp64."""
    dots_T = row_dots_ref(x, dx)
    return (dots_T if valid is None else dots_T[valid]).sum()


def parameter_score(weight: Tensor, x: Tensor, g: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Per-parameter importance, summed, with no tensor of the weight gradient's size.

        Σ_ij | W_ij (gᵀx)_ij |       rows of gᵀx in tiles of at most 4 Mi elements and N/2 rows

    Args:
        weight: (N, K) floating, any strides.
        x: (T, K) floating.
        g: (T, N) floating, gradient of the output; `x` is cast to its dtype for the product.
        valid: (T,) bool, the tokens that count; None counts all.

    Returns:
        0-d tensor as for `token_score`. Products are accumulated in fp32 at least; on a CPU a tile
        of bf16 inputs is rounded to bf16 once, as their weight gradient would be.

    Raises:
        ValueError: shapes do not fit.
    """
    _check_matrices(weight=weight, x=x, g=g)
    _check_equal("weight", tuple(weight.shape), (g.shape[1], x.shape[1]), "(N of g, K of x)")
    _check_equal("g", g.shape[0], x.shape[0], "the tokens of x")
    if valid is not None:
        x, g = x[valid], g[valid]
    x, g, dtype = x.to(g.dtype).contiguous(), g.contiguous(), _score_dtype(weight, g)
    total = torch.zeros((), dtype=_total_dtype(x.device), device=x.device)
    step = _rows_per_tile(weight)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        tile_NK = _gradient_tile(x, g[:, rows]).to(dtype).mul_(weight[rows])
        total += tile_NK.abs_().sum()
    return total


def parameter_score_ref(
    weight: Tensor, x: Tensor, g: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """The definition of `parameter_score` in fp64, the whole gradient at once."""
    if valid is not None:
        x, g = x[valid], g[valid]
    return (weight.double() * (g.double().T @ x.double())).abs().sum()


def scored_linear(
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    *,
    weight: Tensor | None,
    anchor: Tensor,
    on_backward: Callable[[Tensor, Tensor, Tensor | None], None],
    needs_dx: bool = True,
) -> Tensor:
    """Run a frozen linear so that its backward hands x, g and its own dx to a callback.

        y = forward(x);   in backward, given g:   dx = g W;   on_backward(x, g, dx)

    Saved for backward: x itself, once however many components share it. No gradient of the weight
    or bias is formed. A recomputation under non-reentrant activation checkpointing calls back
    once, since only the backward does.

    Args:
        x: (..., K) floating.
        forward: maps (..., K) to (..., N) and is affine in x.
        weight: (N, K) used by `forward`, any strides; None where it cannot be used as it stands
            (quantised, or a subclass with arithmetic of its own): then the backward runs
            `forward` once more and differentiates it.
        anchor: any tensor that requires grad; makes the backward run even if x does not.
        on_backward: called with x (T, K), g (T, N) and dx (T, K) or None.
        needs_dx: False lets dx be None where x needs no gradient.

    Returns:
        `forward(x)`, attached to the graph.
    """
    return _ScoredLinear.apply(x, anchor, forward, weight, on_backward, needs_dx)


class _ScoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, forward, weight, on_backward, needs_dx):
        ctx.save_for_backward(x)
        # Kept as attributes: frozen, alive anyway, and nothing for checkpointing to recompute.
        ctx.forward, ctx.weight = forward, weight
        ctx.on_backward, ctx.needs_dx = on_backward, needs_dx
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        needs_input_gradient = ctx.needs_input_grad[0]
        dx = None
        if needs_input_gradient or ctx.needs_dx:
            dx = _own_input_gradient(x, g, ctx.forward, ctx.weight)
        ctx.on_backward(_matrix(x), _matrix(g), None if dx is None else _matrix(dx))
        return (dx if needs_input_gradient else None), None, None, None, None, None


def _own_input_gradient(x, g, forward, weight):
    if weight is not None:
        return (g @ weight.to(g.dtype)).to(x.dtype)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf), leaf, g)[0]


def _gradient_tile(x: Tensor, g: Tensor) -> Tensor:
    """The rows of gᵀx that belong to the given columns of g."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(g.T, x, out_dtype=torch.float32)
    if x.dtype != torch.float16:
        return g.T @ x
    tile_NK = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    step = max(1, _TILE_ELEMENTS // max(x.shape[1], g.shape[1], 1))
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        tile_NK.addmm_(g[rows].float().T, x[rows].float())
    return tile_NK


def _sum(dots_T: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None:
        _check_equal("valid", tuple(valid.shape), tuple(dots_T.shape), "one entry per token")
        dots_T = torch.where(valid, dots_T, 0)
    return dots_T.sum(dtype=_total_dtype(dots_T.device))


def _score_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _total_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _rows_per_block(x: Tensor) -> int:
    elements = _BLOCK_ELEMENTS.get(x.device.type, _BLOCK_ELEMENTS_DEVICE)
    return max(1, elements // max(1, x.shape[1]))


def _rows_per_tile(weight: Tensor) -> int:
    """At most half of the rows: even a small weight never has its whole gradient in memory."""
    num_rows, num_columns = weight.shape
    return max(1, min(_TILE_ELEMENTS // max(1, num_columns), num_rows // 2))


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _check_matrices(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a floating matrix (rows, features), got shape "
                f"{tuple(tensor.shape)} of {tensor.dtype}; reshape it to (-1, features)"
            )


def _check_equal(name: str, got: object, wanted: object, what: str) -> None:
    if got != wanted:
        raise ValueError(f"{name} must match {what}, {wanted}, got {got}")
