"""Does tool training push the hidden states of all abilities the same way? (co-directional shift)

    ICC(ability, site) = mean over samples of  h_tuned(sample, site) - h_original(sample, site)
    shift(ability, site) = cos(ICC(tool, site), ICC(ability, site))

with h the input of a layer's attention (q_proj) or MLP (up_proj) at the last token of prompt and
answer, the answer cut at a random place (arXiv 2409.13202, section on capability change).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from citi.components import split_layer
from citi.data.render import IGNORED, Renderer
from citi.data.sample import Sample
from citi.evaluation.inference import Progress, base_model, device_of, inference
from citi.positions import length_limit

_ROLES = {
    "attention": ("q_proj", "qkv_proj", "c_attn"),
    "mlp": ("up_proj", "gate_up_proj", "c_fc"),
}


class Site(NamedTuple):
    """Where states are looked at: the input of "attention" or "mlp" of a layer."""

    layer: int
    part: str


def mean_states(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_length: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Site, Tensor]:
    """Mean over the samples of the state at each site, at the last token that is kept.

    Args:
        model: a Hugging Face causal LM or a PeftModel around one.
        tokenizer: its tokenizer.
        samples: with answers; where an answer is cut depends on `seed` and its place alone, so
            that two models see the same tokens.
        max_length: longest sample, in tokens, less where the model has fewer positions.
        seed: see `samples`.
        progress: called with (samples done, all samples, note).

    Returns:
        site → (hidden size,) fp64, on the CPU, in the order of the layers.

    Raises:
        ValueError: no sample has an answer, or the model has no module that feeds a site.
        DataError: the chat template refuses a sample.
    """
    renderer = Renderer(tokenizer, max_length=length_limit(model, max_length))
    cut = [_cut(renderer, sample, f"{seed}/{i}") for i, sample in enumerate(samples)]
    rows = [tokens for tokens in cut if tokens]
    if not rows:
        raise ValueError(f"samples: wanted some with an answer, got {len(samples)} without")
    sums: dict[Site, Tensor] = {}
    with inference(model), _last_inputs(model) as states:
        for done, tokens in enumerate(rows, start=1):
            model(input_ids=torch.tensor([tokens], device=device_of(model)), use_cache=False)
            for site, state in states.items():
                sums[site] = sums.get(site, 0) + state
            if progress is not None:
                progress(done, len(rows), "hidden states")
    return {site: sums[site] / len(rows) for site in sorted(sums)}


def capability_change(
    original: Mapping[Site, Tensor], tuned: Mapping[Site, Tensor]
) -> dict[Site, Tensor]:
    """ICC: tuned minus original mean states, of one ability's samples.

    Raises:
        ValueError: the two were taken at different sites.
    """
    if original.keys() != tuned.keys():
        raise ValueError(
            f"original and tuned must have the same sites, got {sorted(original)[:2]} … and "
            f"{sorted(tuned)[:2]} …"
        )
    return {site: tuned[site] - original[site] for site in original}


def shift_cosines(
    tool: Mapping[Site, Tensor], general: Mapping[Site, Tensor]
) -> dict[Site, float | None]:
    """Cosine between the ICC of the tool ability and of a general one, per site; 1: co-directional.

    None where one of them did not move at all, such as below the first trained component.

    Raises:
        ValueError: the two were taken at different sites.
    """
    if tool.keys() != general.keys():
        raise ValueError("tool and general must have the same sites; take them from one model")
    cosines = {}
    for site, ours in tool.items():
        lengths = ours.norm() * general[site].norm()
        cosines[site] = float(ours @ general[site] / lengths) if lengths else None
    return cosines


def _cut(renderer: Renderer, sample: Sample, seed: str) -> list[int]:
    """Prompt and a random part of the answer, possibly none of it; [] without an answer."""
    rendered = renderer.render(sample)
    answer = [i for i, label in enumerate(rendered.labels) if label != IGNORED]
    return rendered.input_ids[: random.Random(seed).choice(answer)] if answer else []


@contextmanager
def _last_inputs(model: nn.Module) -> Iterator[dict[Site, Tensor]]:
    """Site → the last token's input of the latest forward, as long as the block lasts."""
    states: dict[Site, Tensor] = {}
    handles = []
    for name, module in base_model(model).named_modules():
        layer, inner = split_layer(name)
        parts = [part for part, roles in _ROLES.items() if inner.rpartition(".")[-1] in roles]
        if layer is not None and parts:
            handles.append(module.register_forward_pre_hook(_keeper(states, Site(layer, parts[0]))))
    try:
        if not handles:
            raise ValueError(f"model must have modules such as {_ROLES}, got none")
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _keeper(states: dict[Site, Tensor], site: Site) -> Any:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states[site] = inputs[0][0, -1].double().cpu()

    return keep
