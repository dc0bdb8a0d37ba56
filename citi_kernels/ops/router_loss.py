"""Router loss: tool samples to the experts, general samples to the backbone neuron.

Legend: B samples, G gate entries (E + 1, entry 0 is the backbone neuron).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("cv2", "dispersion")
_EPSILON = 1e-10


def router_loss(
    gate_sums: Tensor,
    token_counts: Tensor,
    task_types: Tensor,
    *,
    delta: float = 0.95,
    kind: str = "cv2",
) -> Tensor:
    """Spread of the importance-weighted gate sums of a batch, one loss per layer.

    ::

        I[b] = [1 + delta, 1 - delta, ...] if task_types[b] == 1 else [1 - delta, 1 + delta, ...]
        cv2:         Z = I * gate_sums;                 loss = var(Z) / (mean(Z)**2 + 1e-10)
        dispersion:  Z = I * gate_sums / token_counts;  loss = var(Z) / (mean(Z) + 1e-10)

    `var` is the unbiased variance and `mean` the mean over all B * G values of Z. Making them
    equal moves the gate the other way: tool samples push the backbone entry down, general samples
    push it up. Samples without a token take no part; with at most one value left the loss is 0.

    Args:
        gate_sums: (..., B, G) floating, gates summed over the tokens of each sample. Leading
            dimensions (layers) each give a loss of their own.
        token_counts: (B,) tokens counted into each sample; 0 leaves the sample out.
        task_types: (B,) integers, 1 tool and 0 general.
        delta: strength of the constraint, within [0, 1].
        kind: `cv2` (what the authors ran) or `dispersion` (the paper's equation).

    Returns:
        (...) loss in fp32 (fp64 for fp64 input), with a graph even when it is 0. Nothing is
        synchronised with the host.

    Raises:
        ValueError: a shape, an unknown `kind`, `delta` outside [0, 1], or (checked on the CPU only)
            a task type other than 0 and 1.
        TypeError: `gate_sums` not floating or `task_types` not integer.

    Source: arXiv 2409.13202, eq. 8 and 9. The paper's equation has no
    epsilon; we add the one of `cv2`, so that delta = 1 cannot divide by 0.
    """
    _check(gate_sums, token_counts, task_types, delta=delta, kind=kind)
    gate_sums = gate_sums.to(torch.promote_types(gate_sums.dtype, torch.float32))
    device, dtype = gate_sums.device, gate_sums.dtype
    counted_B1 = (token_counts.to(device) > 0).unsqueeze(-1)
    num_values = counted_B1.sum().to(dtype) * gate_sums.shape[-1]

    importance_BG = _importance(task_types.to(device), gate_sums.shape[-1], delta, dtype)
    z = importance_BG * torch.where(counted_B1, gate_sums, 0.0)
    if kind == "dispersion":
        z = z / token_counts.to(device, dtype).clamp(min=1.0).unsqueeze(-1)

    mean = z.sum((-2, -1), keepdim=True) / num_values.clamp(min=1.0)
    deviation = torch.where(counted_B1, z - mean, 0.0)
    variance = deviation.square().sum((-2, -1)) / (num_values - 1.0).clamp(min=1.0)
    mean = mean.squeeze(-1).squeeze(-1)
    return variance / ((mean.square() if kind == "cv2" else mean) + _EPSILON)


def _importance(task_types: Tensor, num_gates: int, delta: float, dtype: torch.dtype) -> Tensor:
    """(B, G) importance: 1 + delta where a sample's gate should carry less, 1 - delta elsewhere."""
    is_backbone_G = torch.arange(num_gates, device=task_types.device) == 0
    heavy_BG = (task_types == 1).unsqueeze(-1) == is_backbone_G
    return 1.0 + delta * (2.0 * heavy_BG.to(dtype) - 1.0)


def _check(
    gate_sums: Tensor, token_counts: Tensor, task_types: Tensor, *, delta: float, kind: str
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not (math.isfinite(delta) and 0.0 <= delta <= 1.0):
        raise ValueError(f"delta must lie within [0, 1], got {delta}")
    if not gate_sums.is_floating_point():
        raise TypeError(f"gate_sums must be floating, got {gate_sums.dtype}")
    if gate_sums.ndim < 2 or gate_sums.shape[-1] < 2:
        raise ValueError(
            "gate_sums must have the shape (..., samples, experts + 1) with at least one expert, "
            f"got {tuple(gate_sums.shape)}"
        )
    wanted = (gate_sums.shape[-2],)
    for name, tensor in (("token_counts", token_counts), ("task_types", task_types)):
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{name} must have the shape {wanted}, one entry per sample of gate_sums, "
                f"got {tuple(tensor.shape)}"
            )
    if task_types.is_floating_point() or task_types.is_complex():
        raise TypeError(
            f"task_types must be integers, 1 tool and 0 general, got {task_types.dtype}"
        )
    # On an accelerator this look would stall the stream, and under compilation break the graph.
    if task_types.device.type == "cpu" and not torch.compiler.is_compiling():
        strange = task_types[(task_types != 0) & (task_types != 1)]
        if strange.numel():
            raise ValueError(
                f"task_types must hold 1 (tool) and 0 (general) only, got {int(strange[0])}"
            )
