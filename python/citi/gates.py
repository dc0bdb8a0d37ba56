"""What the routers do with tool tokens and with general tokens: histogram and means of the gate.

Legend: T tokens of one sample, G gate entries (E + 1), entry 0 the backbone neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from citi.adapters.layer import MoLoraLayer
from citi.data import RenderedDataset
from citi.data.sample import Sample
from citi.evaluation.inference import device_of, inference
from citi.positions import length_limit
from citi_kernels import MoLoRALinear, RoutingContext

Progress = Callable[[int, int | None, str], None]

_KINDS = ("general", "tool")  # index = task type
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class GateSummary:
    """Gates of a model on tokens of both task types.

    Attributes:
        bins: edges of the histogram's bins over [0, 1], one more than there are bins.
        counts: "tool" and "general" -> per bin, how many (token, layer) pairs have a backbone gate
            G[0] in it; a value on an inner edge counts in the bin above.
        layers: MOLoRA layer -> "tool" and "general" -> mean gate, G values, over the tokens; in
            model order, by the names that the base model gives its components.
        num_tokens: "tool" and "general" -> number of tokens.

    A task type without tokens has counts of 0 and no means.
    """

    bins: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]
    layers: dict[str, dict[str, tuple[float, ...]]]
    num_tokens: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The schema of eval/gates.json, which the report draws."""
        histograms = {
            kind: {"bins": list(self.bins), "counts": list(counts)}
            for kind, counts in self.counts.items()
        }
        layers = [
            {"name": name} | {kind: list(mean) for kind, mean in means.items()}
            for name, means in self.layers.items()
        ]
        return histograms | {"layers": layers, "num_tokens": dict(self.num_tokens)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GateSummary:
        """Inverse of `to_json`.

        Raises: ValueError for another shape of data; the message says which part is wrong.
        """
        try:
            if set(data) != {*_KINDS, "layers", "num_tokens"}:
                raise ValueError(f"got the keys {', '.join(map(str, data))}")
            bins = tuple(data["tool"]["bins"])
            counts = {kind: tuple(data[kind]["counts"]) for kind in _KINDS}
            if any(len(bins) != len(each) + 1 for each in counts.values()):
                raise ValueError("the number of bins and counts differ")
            layers = {
                layer["name"]: {kind: tuple(layer[kind]) for kind in _KINDS if kind in layer}
                for layer in data["layers"]
            }
            tokens = {kind: int(data["num_tokens"][kind]) for kind in _KINDS}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"gates: want what GateSummary.to_json writes, got something else ({error!r});"
                " evaluate again"
            ) from error
        return cls(bins, counts, layers, tokens)


def collect_gates(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_length: int = 4096,
    num_bins: int = 40,
    progress: Progress | None = None,
) -> GateSummary:
    """Run `samples` through a model with a MOLoRA adapter and look at every token's gate.

    Each token is a segment of its own in the routing context, so the layers hand over G(x) per
    token. All tokens of a sample count, prompt and answer, as in the router loss.

    Args:
        model: with at least one MOLoRA layer; mode and weights are as before afterwards.
        tokenizer: renders the samples.
        samples: of both task types; `sample.task_type` sorts them. What cannot be rendered for
            training (`RenderedDataset`) is left out.
        max_length: tokens at which a sample is cut.
        num_bins: bins of the histogram over [0, 1].
        progress: called with (samples done, all samples, note).
    Returns:
        The summary; fp64 sums on the host.
    Raises:
        ValueError: no sample, none that can be rendered, or no layer that recorded a gate.
    """
    if not samples:
        raise ValueError("samples: want at least one sample, got none")
    rendered = RenderedDataset(samples, tokenizer, max_length=length_limit(model, max_length))
    totals = _Totals(num_bins)
    with inference(model):
        for index in range(len(rendered)):
            item = rendered[index]
            totals.add(_KINDS[item["task_type"]], _token_gates(model, item["input_ids"]))
            if progress is not None:
                progress(index + 1, len(rendered), "gates")
    return totals.summary(model)


def _token_gates(model: nn.Module, input_ids: list[int]) -> dict[Hashable, Tensor]:
    """Routing key of a layer -> (T, G) gates of one sample."""
    num_tokens = len(input_ids)
    tokens = torch.tensor([input_ids], device=device_of(model))
    segment_ids = torch.arange(num_tokens, device=tokens.device).unsqueeze(0)
    with RoutingContext(segment_ids, num_segments=num_tokens) as context:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return context.gate_sums


class _Totals:
    """Running histograms and sums; everything on the host."""

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.counts = {kind: torch.zeros(num_bins, dtype=torch.int64) for kind in _KINDS}
        self.num_tokens = dict.fromkeys(_KINDS, 0)
        self.sums: dict[Hashable, dict[str, Tensor]] = {}

    def add(self, kind: str, gates: dict[Hashable, Tensor]) -> None:
        """Count the gates of one sample of `kind`."""
        for key, gate_TG in gates.items():
            gate_TG = gate_TG.double().cpu()
            bins_T = (gate_TG[:, 0] * self.num_bins).long().clamp_(0, self.num_bins - 1)
            self.counts[kind] += torch.bincount(bins_T, minlength=self.num_bins)
            layer = self.sums.setdefault(key, {})
            layer[kind] = layer.get(kind, 0.0) + gate_TG.sum(0)
        self.num_tokens[kind] += max((len(gate_TG) for gate_TG in gates.values()), default=0)

    def summary(self, model: nn.Module) -> GateSummary:
        """Means over tokens, by layer names.

        Raises: ValueError when no layer recorded a gate.
        """
        if not self.sums:
            raise ValueError(
                "model: want a model with MOLoRA layers (get_peft_model with citi.MoLoraConfig,"
                f" adapters enabled), got {type(model).__name__}, in which no layer has a gate"
            )
        names = _layer_names(model)
        layers = {
            names[key]: {
                kind: tuple((total / self.num_tokens[kind]).tolist())
                for kind, total in self.sums[key].items()
            }
            for key in names
            if key in self.sums
        }
        return GateSummary(
            bins=tuple(i / self.num_bins for i in range(self.num_bins + 1)),
            counts={kind: tuple(counts.tolist()) for kind, counts in self.counts.items()},
            layers=layers,
            num_tokens=dict(self.num_tokens),
        )


def _layer_names(model: nn.Module) -> dict[Hashable, str]:
    """Routing key -> component name, in model order; with several active adapters, theirs too."""
    names: dict[Hashable, str] = {}
    for path, module in model.named_modules():
        name = path.removeprefix(_PEFT_PREFIX)
        if isinstance(module, MoLoraLayer):
            active = module.active_adapters
            for adapter in active:
                label = name if len(active) == 1 else f"{name} ({adapter})"
                names[module.routing_key(adapter)] = label
        elif isinstance(module, MoLoRALinear):
            names[id(module)] = name
    return names
