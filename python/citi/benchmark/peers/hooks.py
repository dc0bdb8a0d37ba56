"""`token` scores as the authors compute them: outputs and their gradients kept by hooks.

    I_h = Σ_t | y_t · ∂L/∂y_t |

Every component's output is copied to the CPU as it is made, its gradient in a hook of the output;
after the backward they are multiplied and summed there, one number per component. All weights but
the embedding require a gradient, so the backward forms weight gradients that nobody reads. What
differs here: forward hooks in place of edited model files, and the model's own attention.
`hooks_per_sequence` is their setting (batch size 1).

Source: calculate_importance_llama in lm_evaluation_harness/lm_eval/base.py, and the same tree's
transformers/models/llama/modeling_llama.py, github.com/hypasd-art/CITI at 2bfc64b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from citi.benchmark.peers.naive_gradient import full_backward


def hooks(model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """Scores, not divided by the number of tokens, of the modules `names` on one batch."""
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    with _kept(model, names, outputs, gradients):
        full_backward(model, batch)
    scores = {}
    for name in names:
        dot_BS = torch.einsum("bsn,bsn->bs", gradients.pop(name), outputs.pop(name))
        scores[name] = dot_BS.abs().sum().item()
    model.zero_grad(set_to_none=True)
    return scores


def hooks_per_sequence(
    model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, float]:
    """The same sequence by sequence, each with the mean loss of its own, added up."""
    totals = dict.fromkeys(names, 0.0)
    for row in range(len(batch["input_ids"])):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        for name, score in hooks(model, one, names).items():
            totals[name] += score
    return totals


@contextmanager
def _kept(
    model: nn.Module,
    names: Sequence[str],
    outputs: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> Iterator[None]:
    """Inside, every forward and backward fills the two dictionaries."""

    def keep(name: str, module: nn.Module, arguments: object, y: Tensor) -> None:
        outputs[name] = y.detach().cpu()
        y.register_hook(lambda grad_y: gradients.update({name: grad_y.cpu()}))

    handles = [model.get_submodule(n).register_forward_hook(partial(keep, n)) for n in names]
    model.get_input_embeddings().weight.requires_grad_(False)
    try:
        yield
    finally:
        model.get_input_embeddings().weight.requires_grad_(True)
        for handle in handles:
            handle.remove()
