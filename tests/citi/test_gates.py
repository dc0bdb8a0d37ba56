"""collect_gates against a softmax over the layers' own inputs, computed in fp64."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

from citi.adapters import MoLoraConfig
from citi.data import Message, Sample, render
from citi.gates import GateSummary, collect_gates
from tiny import tiny_model, tiny_tokenizer

ADAPTED = ["q_proj", "down_proj"]


def _sample(name: str, task_type: int, *, words: int) -> Sample:
    messages = (Message("user", "what? " * words), Message("assistant", f"{name} " * words))
    return Sample(name, task_type, "tool" if task_type else "math", messages)


SAMPLES = [
    _sample("a", 1, words=3),
    _sample("b", 0, words=5),
    _sample("c", 1, words=2),
    _sample("d", 0, words=1),
]


@pytest.fixture
def model() -> torch.nn.Module:
    model = get_peft_model(tiny_model(), MoLoraConfig(target_modules=ADAPTED, num_experts=3, r=2))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "molora_router" in name:
            torch.nn.init.normal_(parameter)
    return model.train()


def _truth(model: torch.nn.Module, samples: list[Sample]) -> dict[str, dict[str, torch.Tensor]]:
    """layer -> kind -> (T, G) gates of all its tokens, from the inputs that its router saw."""
    inputs: dict[str, torch.Tensor] = {}
    routers = {}
    handles = []
    for path, module in model.named_modules():
        if hasattr(module, "molora_router"):
            name = path.removeprefix("base_model.model.")
            routers[name] = module.molora_router["default"].detach().double()
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, arguments, name=name: inputs.update({name: arguments[0].detach()})
                )
            )
    gates: dict[str, dict[str, list]] = {name: {"tool": [], "general": []} for name in routers}
    model.eval()
    for sample in samples:
        ids = render(sample, tiny_tokenizer(), max_length=512).input_ids
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        for name, router in routers.items():
            logits = inputs[name][0].double() @ router.T
            gates[name]["tool" if sample.task_type else "general"].append(logits.softmax(-1))
    for handle in handles:
        handle.remove()
    model.train()
    return {
        name: {kind: torch.cat(rows) for kind, rows in kinds.items() if rows}
        for name, kinds in gates.items()
    }


def test_means_and_histogram_are_those_of_a_direct_softmax(model: torch.nn.Module) -> None:
    truth = _truth(model, SAMPLES)
    summary = collect_gates(model, tiny_tokenizer(), SAMPLES, num_bins=10)
    assert list(summary.layers) == list(truth)
    for name, kinds in truth.items():
        for kind, gate_TG in kinds.items():
            expected = gate_TG.mean(0)
            torch.testing.assert_close(
                torch.tensor(summary.layers[name][kind], dtype=torch.float64),
                expected,
                atol=1e-6,
                rtol=0,
            )
    for kind in ("tool", "general"):
        backbone = torch.cat([kinds[kind][:, 0] for kinds in truth.values()])
        # A gate within rounding of an edge may fall on either side of it.
        edges = (backbone * 10 - (backbone * 10).round()).abs() < 1e-4
        expected = torch.histogram(backbone.cpu(), bins=10, range=(0.0, 1.0)).hist
        difference = (torch.tensor(summary.counts[kind]) - expected).abs().sum()
        assert difference <= 2 * edges.sum()
        assert sum(summary.counts[kind]) == len(backbone)
        assert summary.num_tokens[kind] * len(truth) == len(backbone)


def test_the_model_is_left_as_it_was(model: torch.nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    collect_gates(model, tiny_tokenizer(), SAMPLES[:1])
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_task_type_without_samples_has_no_tokens_and_no_means(model: torch.nn.Module) -> None:
    summary = collect_gates(model, tiny_tokenizer(), [SAMPLES[0]])
    assert summary.num_tokens["general"] == 0
    assert sum(summary.counts["general"]) == 0
    assert all(set(kinds) == {"tool"} for kinds in summary.layers.values())


def test_json_has_the_documented_schema(model: torch.nn.Module) -> None:
    content = json.loads(json.dumps(collect_gates(model, tiny_tokenizer(), SAMPLES).to_json()))
    assert set(content) == {"tool", "general", "layers", "num_tokens"}
    assert len(content["tool"]["bins"]) == len(content["tool"]["counts"]) + 1
    assert content["tool"]["bins"][0] == 0.0
    assert content["tool"]["bins"][-1] == 1.0
    assert GateSummary.from_json(content).to_json() == content
    layer = content["layers"][0]
    assert layer["name"] == "model.layers.0.self_attn.q_proj"
    assert len(layer["tool"]) == len(layer["general"]) == 4


def test_a_model_without_routers_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"MOLoRA layers .*LlamaForCausalLM"):
        collect_gates(tiny_model(), tiny_tokenizer(), SAMPLES[:1])
    with pytest.raises(ValueError, match="samples"):
        collect_gates(tiny_model(), tiny_tokenizer(), [])


@pytest.mark.parametrize("part", ["tool", "general", "layers", "num_tokens"])
def test_case_53_json_without_a_part_is_refused(model: torch.nn.Module, part: str) -> None:
    content = collect_gates(model, tiny_tokenizer(), SAMPLES[:2]).to_json()
    del content[part]
    with pytest.raises(ValueError, match="evaluate again"):
        GateSummary.from_json(content)
    with pytest.raises(ValueError, match="evaluate again"):
        GateSummary.from_json(content | {part: {"surprise": 1}})
