"""`parameter` scores from stored weight gradients: full backward, then | p ⊙ p.grad | summed.

    I_h = Σ_ij | W_ij (∂L/∂W)_ij |

What one writes without this package. `naive_gradient` takes the batch in one backward;
`naive_gradient_per_sequence` goes sequence by sequence and asks the device for a number per
component, as the authors' scoring is set up (batch size 1, scores as Python numbers).

`token` by elements in this way, a weight gradient g_t x_tᵀ for every token, is no row: for 8 x 256
tokens and the 106 million weights of SmolLM2's components that is 870 GB of fp32.

Source: arXiv 2409.13202, eq. 4, for each parameter by itself; the setting: lm_evaluation_harness of
github.com/hypasd-art/CITI at 2bfc64b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def full_backward(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """One forward and backward; every parameter that requires it gets a fresh gradient."""
    model.zero_grad(set_to_none=True)
    model(**batch, use_cache=False).loss.backward()


def naive_gradient(
    model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, float]:
    """Scores of the modules `names` on one batch; all parameters must require a gradient."""
    full_backward(model, batch)
    weights = {name: model.get_submodule(name).weight for name in names}
    with torch.no_grad():
        scores = {name: (w * w.grad).abs().sum() for name, w in weights.items()}
    model.zero_grad(set_to_none=True)
    numbers = torch.stack(list(scores.values())).tolist()
    return dict(zip(scores, numbers, strict=True))


def naive_gradient_per_sequence(
    model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, float]:
    """The same sequence by sequence, added up."""
    totals = dict.fromkeys(names, 0.0)
    for row in range(len(batch["input_ids"])):
        full_backward(model, {key: value[row : row + 1] for key, value in batch.items()})
        for name in names:
            weight = model.get_submodule(name).weight
            totals[name] += (weight.detach() * weight.grad).abs().sum().item()
    model.zero_grad(set_to_none=True)
    return totals
