"""Several MOLoRA linears of one input, computed together.

Query, key and value share their input, and so do gate and up. Together they read it once in the
forward and once in the backward, and their input gradients are added in place.

Shapes: T tokens, K in-features, N out-features (another one for every layer), E experts, r rank,
R = E·r, G = E + 1 gate entries, B segments (samples); L layers, as a suffix of lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from citi_kernels import backends, environment
from citi_kernels.ops import molora_linear_cuda
from citi_kernels.ops.autocast import as_autocast, autocast_is_on
from citi_kernels.ops.molora_linear import molora_linear
from citi_kernels.ops.molora_linear_checks import FLOATING, flat_segment_ids
from citi_kernels.ops.molora_linear_contract import Operands, Settings
from citi_kernels.ops.molora_linear_eager import is_plain_eager, refuse_forward_mode, rows_of
from citi_kernels.ops.molora_linear_group_eager import run_eager_group
from citi_kernels.ops.molora_linear_group_op import group_op

_LISTS = ("weights", "biases", "a", "b", "routers")


def molora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    routers: Sequence[Tensor],
    *,
    num_experts: int,
    scaling: float,
    top_k: int | None = None,
    renormalize: bool = False,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    dropout_p: float = 0.0,
    dropout_seeds: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """`molora_linear` of several layers with one input; the layers may differ in N.

        results[i] = molora_linear(x, weights[i], biases[i], a[i], b[i], routers[i], ...,
                                   dropout_seed=dropout_seeds[i])

    bitwise in the forward; x's gradient, a sum over the layers, to rounding. Where `runs_together`
    says so, up to three layers are one op, and more are several ops; elsewhere (another backend
    than Triton, a path of Triton's other than "dense", a single layer) this line is what runs.

    Kept for the backward: x once, and per layer h = a @ x and the gate probabilities. The layers
    of one op have one backward: once it ran, for one output or all, what was kept for all is freed.

    Args:
        x: (..., K) fp32, bf16, fp16 or fp64; no token at all is allowed.
        weights: L times (N, K) in x's dtype, or None.
        biases: L times (N,) in x's dtype, or None.
        a: L times (E·r, K), the same E·r in all layers.
        b: L times (N, E·r).
        routers: L times (E + 1, K).
        num_experts, scaling, top_k, renormalize, segment_ids, num_segments, dropout_p: of all
            layers, see `molora_linear`.
        dropout_seeds: L times () int64 on the CPU, needed with dropout_p.
    Returns:
        L times (y, gate_sums), as `molora_linear` gives them.
    Raises:
        ValueError: lists of different lengths, ranks that differ.
        ValueError, TypeError, NotImplementedError, RuntimeError: as `molora_linear`, about one of
            the layers.
    """
    lists = (weights, biases, a, b, routers)
    _check_lists(lists, dropout_p, dropout_seeds)
    options = {
        "num_experts": num_experts,
        "scaling": scaling,
        "top_k": top_k,
        "renormalize": renormalize,
        "segment_ids": segment_ids,
        "num_segments": num_segments,
        "dropout_p": dropout_p,
    }
    seeds = [None] * len(a) if dropout_seeds is None else list(dropout_seeds)
    layers = list(zip(*lists, seeds, strict=True))
    if len(layers) == 1 or not runs_together(
        x,
        a[0].shape[0],
        num_experts=num_experts,
        top_k=top_k,
        dropout_p=dropout_p,
        has_weight=any(each is not None for each in weights),
    ):
        return [
            molora_linear(x, *operands, **options, dropout_seed=seed) for *operands, seed in layers
        ]
    from citi_kernels.triton_kernels.dropout import MAX_LAYERS

    results = []
    for start in range(0, len(layers), MAX_LAYERS):
        results += _one_op(x, layers[start : start + MAX_LAYERS], options)
    return results


def runs_together(
    x: Tensor,
    stacked_rank: int,
    *,
    num_experts: int,
    top_k: int | None = None,
    dropout_p: float = 0.0,
    has_weight: bool = True,
) -> bool:
    """Whether layers of x with these sizes are computed by one op, and not one by one.

    Args:
        x: (..., K), the layers' input.
        stacked_rank: E·r.
        num_experts, top_k, dropout_p: as for `molora_linear`.
        has_weight: whether one of the layers has a weight.
    Raises:
        RuntimeError: the backend asked for cannot run here.
    """
    if x.device.type == "cpu" and not environment.INTERPRETS:
        return False  # Triton's backend alone takes several layers
    if x.dtype not in FLOATING or x.dim() == 0:
        return False  # the first layer says what is wrong
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else x.dtype
    settings = Settings(num_experts, 1.0, top_k, False, None, 0, dropout_p, None)
    is_cuda_first = molora_linear_cuda.is_fastest(
        x, stacked_rank, settings, has_weight=has_weight, dtype=dtype
    )
    first = "cuda" if is_cuda_first else None
    run = backends.find("molora_linear", backends.choose("molora_linear", x, first=first))
    if not hasattr(run, "forward_group"):
        return False
    return run.path(stacked_rank, dtype, settings) == "dense"


def _check_lists(
    lists: tuple[Sequence[Tensor | None], ...],
    dropout_p: float,
    dropout_seeds: Sequence[Tensor] | None,
) -> None:
    a = lists[_LISTS.index("a")]
    if not a:
        raise ValueError("molora_linear_group: a: want one tensor or more, got none")
    named = [*zip(_LISTS, lists, strict=True)]
    if dropout_seeds is not None:
        named.append(("dropout_seeds", dropout_seeds))
    elif dropout_p > 0:
        raise ValueError(
            f"molora_linear_group: dropout_seeds: want {len(a)} tensors with dropout_p, got None"
        )
    for name, each in named:
        if len(each) != len(a):
            raise ValueError(
                f"molora_linear_group: {name}: want {len(a)} entries, as a has, got {len(each)}"
            )
    for i, each in enumerate(a):
        if each.dim() != 2 or each.shape[0] != a[0].shape[0]:
            raise ValueError(
                f"molora_linear_group: a[{i}]: want (E * r, K) with the E * r of all layers, "
                f"that of a[0] {tuple(a[0].shape)}, got {tuple(each.shape)}"
            )


def _one_op(
    x: Tensor, layers: list[tuple[Any, ...]], options: dict[str, Any]
) -> list[tuple[Tensor, Tensor | None]]:
    if len(layers) == 1:
        ((*operands, seed),) = layers
        return [molora_linear(x, *operands, **options, dropout_seed=seed)]
    segment_ids, num_segments = options["segment_ids"], options["num_segments"]
    if segment_ids is not None and num_segments is None:
        raise ValueError("molora_linear_group: num_segments: want the number of segments, got None")
    weights, biases, a, b, routers, seeds = (list(each) for each in zip(*layers, strict=True))
    if autocast_is_on(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = as_autocast(x, dtype)
        weights = [as_autocast(each, dtype) for each in weights]
        biases = [as_autocast(each, dtype) for each in biases]
    if segment_ids is not None:
        segment_ids = flat_segment_ids(segment_ids, x.shape)
    backend = backends.choose("molora_linear", x)
    shared = (
        options["num_experts"],
        float(options["scaling"]),
        options["top_k"],
        options["renormalize"],
        segment_ids,
        num_segments or 0,
        options["dropout_p"],
    )
    if is_plain_eager(x, *weights, *biases, *a, *b, *routers):
        settings_L = [Settings(*shared, seed) for seed in seeds]
        layers = zip(weights, biases, a, b, routers, strict=True)
        return run_eager_group([Operands(x, *each) for each in layers], settings_L, backend)
    refuse_forward_mode("molora_linear_group")
    x_TK = rows_of(x)
    y_LTN, _, _, gate_sums_LBG = group_op(
        x_TK,
        [each for each in weights if each is not None],
        [each for each in biases if each is not None],
        a,
        b,
        routers,
        [each is not None for each in weights],
        [each is not None for each in biases],
        *shared,
        [each for each in seeds if each is not None],
        backend,
    )
    y_L = [y_TN.reshape(*x.shape[:-1], y_TN.shape[1]) for y_TN in y_LTN]
    return list(zip(y_L, gate_sums_LBG or [None] * len(y_L), strict=True))
