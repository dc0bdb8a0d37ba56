"""Weights that Accelerate keeps elsewhere between forwards: on the CPU, on disk, in pieces."""

from __future__ import annotations

import gc

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from importance_cases import padded, sequences

from citi.fingerprint import model_fingerprint
from citi.importance import ESTIMATORS, component_importance, recorder
from tiny import tiny_model

CPU = torch.device("cpu")


def _offloaded(architecture, where, folder):
    model = tiny_model(architecture)
    if where == "cpu":
        return cpu_offload(model, execution_device=CPU)
    if where == "disk":
        return disk_offload(model, str(folder), execution_device=CPU)
    on_disk = "model.layers.1" if architecture == "llama" else "transformer.h.1"
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    device_map = {name: "cpu" for name in leaves if not name.startswith(f"{on_disk}.")}
    device_map[on_disk] = "disk"
    folder = str(folder)
    return dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("granularity", ["component", "row", "column", "element"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("where", ["cpu", "disk", "one layer on disk"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_offloaded_weights_give_the_same_scores(
    architecture, where, estimator, granularity, tmp_path
):
    how = {"estimator": estimator, "granularity": granularity}
    plain = tiny_model(architecture)
    wanted = component_importance(plain, [padded(sequences())], **how)
    model = _offloaded(architecture, where, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    got = component_importance(model, [padded(sequences())], **how)
    assert dict(got) == dict(wanted)
    for name, entry in wanted.entries.items():
        assert torch.equal(got.entries[name], entry)
    assert any(p.is_meta for p in model.parameters()), "the weights should be offloaded again"
    assert model_fingerprint(model) == model_fingerprint(plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_one_component_at_a_time_is_in_memory(checkpointing, tmp_path):
    """What is scored in the backward finds no weight alive but its own."""
    model = tiny_model("llama", vocab_size=304)
    if checkpointing:
        model.gradient_checkpointing_enable()
    disk_offload(model, str(tmp_path), execution_device=CPU)
    shapes = {(32, 32), (16, 32), (48, 32), (32, 48), (304, 32)}
    alive = []
    plain = recorder.accumulate_row_dots_

    def weights():
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)
        tensors = [each for each in gc.get_objects() if type(each) in kinds]
        return {
            each.untyped_storage().data_ptr()
            for each in tensors
            if each.layout == torch.strided and not each.is_meta and tuple(each.shape) in shapes
        }

    before = weights()  # of other tests

    def watched(*args, **kwargs):
        alive.append(len(weights() - before))
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "accumulate_row_dots_", watched)
        component_importance(model, [padded(sequences(), width=17)])
    assert len(alive) == 21
    assert max(alive) <= 4, "21 components and a head would be alive if the graph kept them"


def test_case_35_sharded_weights_are_refused_by_name():
    model = tiny_model("llama")
    module = model.model.layers[2].mlp.down_proj
    module.weight = torch.nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj must be whole.*sharded"):
        component_importance(model, [padded(sequences(), width=17)])
