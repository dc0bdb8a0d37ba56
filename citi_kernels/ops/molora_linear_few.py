"""Calls of few tokens on a CPU, as generation makes them: what the first of them found out is kept.

For every token a model calls each of its layers with the same parameters, and for a small layer the
checks, the choice of a backend and the taking apart of tensors for `_C` take longer than its
products. All of it follows from the key of a call: where the parameters lie, their dtypes, shapes
and strides, the shape of x, and the settings. A call whose key is known runs at once; a parameter
that was moved, resized or converted has another key. Values are never kept.

Shapes: T tokens, K in-features, N out-features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from citi_kernels import backends, compiled
from citi_kernels.ops import molora_linear_native as native
from citi_kernels.ops.molora_linear_contract import Operands, Settings
from citi_kernels.ops.molora_linear_eager import is_plain_eager, wants_gradient
from citi_kernels.ops.top_k_marks import top_k_numbers

# a key is about a kilobyte; layers that are moved for each call would add one each time
_MAX_KNOWN = 4096


class _Call(NamedTuple):
    """What is left to do: `run` with x and y, if the values are such that it is right (`checks`).

    b is not 0, else it is the base alone; with top_k b is finite, so that gates of 0 hide it.
    """

    run: Callable[..., None]
    checks: tuple[Callable[[], bool], ...]
    workspace_size: int
    dtype_code: int
    num_out: int


_known: dict[tuple, _Call] = {}


def key_of(
    x: Tensor, parameters: tuple[Tensor | None, ...], choices: tuple, *, is_simple: bool
) -> tuple | None:
    """The key of a call, or None where it is not one of a few tokens that nothing looks on.

    Args:
        x: (..., K).
        parameters: weight, bias, a, b, router, as for `molora_linear`.
        choices: the other arguments of `molora_linear` that a result depends on.
        is_simple: without segments and dropout.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not is_simple
        or not x.is_cpu
        or x.dim() == 0
        or not 0 < x.numel() <= native.MAX_FEW_TOKENS.get(x.dtype, 0) * x.shape[-1]
        or not x.is_contiguous()
        or wants_gradient(x, *parameters)
        or torch.is_autocast_enabled("cpu")
        or not is_plain_eager(x, *parameters)
    ):
        return None
    places = [
        None if each is None else (each.data_ptr(), each.dtype, each.shape, each.stride())
        for each in parameters
    ]
    return backends.asked_for(), x.dtype, x.shape, *choices, *places


def repeat(key: tuple, x: Tensor) -> Tensor | None:
    """y (..., N), if the call is known."""
    call = _known.get(key)
    if call is None:
        return None
    for holds in call.checks:
        if not holds():
            return None
    *outer, num_in = x.shape
    y = x.new_empty((*outer, call.num_out))
    code, num_out = call.dtype_code, call.num_out
    # a name of its own keeps it alive during the call
    workspace = x.new_empty(call.workspace_size) if call.workspace_size else None
    call.run(
        x=(x.data_ptr(), x.nbytes, code, num_in, 1),
        y=(y.data_ptr(), y.nbytes, code, num_out, 1),
        workspace=compiled.vector(workspace),
        num_threads=torch.get_num_threads(),
    )
    return y


def remember(key: tuple, operands: Operands, settings: Settings) -> None:
    """Keeps what a checked call of backend "native" was, if it computed all of y in one step.

    Known already is a call whose b was 0.
    """
    if key in _known:
        return
    x_TK, weight_NK, bias_N, a_RK, b_NR, router_GK = operands
    is_taken = (
        native.path(a_RK.shape[0], x_TK.dtype) == "fused"
        and all(each.dtype in native.DTYPES for each in (a_RK, b_NR, router_GK))
        and (weight_NK is None or native.can_be_read(x_TK, weight_NK, bias_N))
    )
    if not is_taken:
        return
    extension, matrix = compiled.extension(), compiled.matrix
    shape, b = native.shape_of(x_TK.shape[0], a_RK, b_NR, settings), matrix(b_NR)
    run = functools.partial(
        extension.molora_forward,
        shape=shape,
        scaling=settings.scaling,
        **top_k_numbers(settings),
        dropout=None,
        a=matrix(a_RK),
        b=b,
        router=matrix(router_GK),
        has_base=False,
        weight=None if weight_NK is None else matrix(weight_NK),
        bias=compiled.vector(bias_N),
        h=None,
        probs=None,
    )
    checks = []
    if weight_NK is not None:
        checks.append(functools.partial(extension.molora_has_update, shape=shape, b=b))
    if settings.is_sparse:
        checks.append(functools.partial(extension.molora_are_finite, shape=shape, a=None, b=b))
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    size = native.workspace_size(shape, x_TK.dtype, has_dropout=False)
    _known[key] = _Call(run, tuple(checks), size, compiled.dtype_code(x_TK.dtype), b_NR.shape[0])
