"""The scoring pass on a model: what it allocates, restores, refuses and reports."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from importance_cases import assert_same, packed, padded, sequences, single
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from citi.components import find_components
from citi.importance import ESTIMATORS, ImportanceRecorder, component_importance
from tiny import tiny_model


class _RecordShapes(TorchDispatchMode):
    """Shapes of all tensors made, those that are views of parameters left out."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            is_tensor = isinstance(tensor, torch.Tensor)
            if is_tensor and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "plain backward"])
def test_case_37_no_weight_gradient_is_ever_allocated(architecture, estimator):
    model = tiny_model(architecture).requires_grad_(True)
    batch = padded(sequences(), width=17)  # 51 rows: no activation looks like a weight
    components, _ = find_components(model)
    forbidden = {(c.out_features, c.in_features) for c in components}
    forbidden |= {(c.in_features, c.out_features) for c in components}
    forbidden -= {(c.out_features // 2, c.in_features) for c in components}  # tiles
    with _RecordShapes(model) as record:
        if estimator == "plain backward":
            model(**batch).loss.backward()
        else:
            component_importance(model, [batch], estimator=estimator)
    if estimator == "plain backward":
        assert record.shapes & forbidden
    else:
        assert not record.shapes & forbidden
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def _state(model):
    return (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [set(m.__dict__) for m in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
    )


def _assert_state(before, after):
    assert before[:3] == after[:3]
    for old, new in zip(before[3] + before[4], after[3] + after[4], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward", "progress"])
def test_the_model_is_restored_whatever_happens(estimator, error, where):
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.requires_grad_(False)
    batch = padded(sequences())
    model(**batch).loss.backward()
    before = _state(model)

    def fail(*_):
        if error is not None:
            raise error("stop")

    handles = []
    if where == "forward":
        handles.append(model.model.norm.register_forward_hook(fail))
    elif where == "backward":
        handles.append(model.model.layers[1].register_full_backward_hook(fail))
    progress = fail if where == "progress" else None
    if error is None:
        component_importance(model, [batch], estimator=estimator, progress=progress)
    else:
        with pytest.raises(error, match="stop"):
            component_importance(model, [batch], estimator=estimator, progress=progress)
    for handle in handles:
        handle.remove()
    _assert_state(before, _state(model))


def test_scores_are_those_of_eval_mode_and_leave_the_random_state_alone():
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5).train()
    state = torch.get_rng_state()
    got = component_importance(model, [padded(sequences())])
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(got) == dict(component_importance(model.eval(), [padded(sequences())]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_scoring_works_inside_no_grad_and_inference_mode(context):
    model = tiny_model("llama")
    wanted = component_importance(model, [padded(sequences())])
    with context():
        got = component_importance(model, [padded(sequences())])
    assert dict(got) == dict(wanted)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_scores_are_close_to_those_of_fp32(estimator):
    model = tiny_model("llama")
    wanted = component_importance(model, [padded(sequences())], estimator=estimator)
    with torch.autocast("cpu", torch.bfloat16):
        got = component_importance(model, [padded(sequences())], estimator=estimator)
    assert_same(got, wanted, 0.2)
    total = sum(wanted.values())
    assert abs(sum(got.values()) - total) < 0.02 * total


def test_modules_placed_by_accelerate_keep_their_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama")
    wanted = component_importance(model, [padded(sequences())])
    for name in wanted:
        hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        hooks.add_hook_to_module(model.get_submodule(name), hook)
    before = _state(model)
    assert dict(component_importance(model, [padded(sequences())])) == dict(wanted)
    _assert_state(before, _state(model))
    module = model.get_submodule(next(iter(wanted)))
    hooks.remove_hook_from_module(module)
    assert module(torch.zeros(1, 32)).shape == (1, 32)


class _Doubled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


def test_a_linear_with_its_own_arithmetic_is_scored_by_what_it_computes():
    model = tiny_model("llama", dtype=torch.float64)
    plain = model.model.layers[0].mlp.up_proj
    doubled = _Doubled(32, 48, bias=False, dtype=torch.float64)
    doubled.weight.data = plain.weight.data / 2
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj = doubled
    for estimator in ("token", "batch"):
        wanted = component_importance(model, [padded(sequences())], estimator=estimator)
        got = component_importance(other, [padded(sequences())], estimator=estimator)
        assert_same(got, wanted, 1e-6)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj, got a _Doubled; use"):
        component_importance(other, [padded(sequences())], estimator="parameter")


def test_progress_is_told_after_every_batch():
    model, seen = tiny_model("llama"), []
    batches = [single(part) for part in sequences()]
    component_importance(model, batches, progress=lambda *args: seen.append(args))
    component_importance(model, iter(batches), progress=lambda *args: seen.append(args))
    assert [(done, total) for done, total, _ in seen] == [
        *[(1, 3), (2, 3), (3, 3)],
        *[(1, None), (2, None), (3, None)],
    ]
    notes = [re.fullmatch(r"(\d+) tokens, (\d+) tokens/s", note) for *_, note in seen]
    assert [int(note[1]) for note in notes] == [9, 23, 28] * 2
    assert all(int(note[2]) > 0 for note in notes)


def test_scores_are_a_mapping():
    scores = component_importance(tiny_model("mixtral"), [padded(sequences())])
    assert len(scores) == 12
    assert dict(scores) == scores.scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"labels"),
        ({"labels": torch.zeros(3, 4)}, r"labels must have the shape of input_ids, \(3, 16\)"),
        ({"attention_mask": torch.ones(3, 1, 16, 16)}, r"attention_mask must have the shape"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"input_ids must be \(B, S\)"),
    ],
)
def test_a_malformed_batch_is_named(change, message):
    batch = {k: v for k, v in (padded(sequences()) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        component_importance(tiny_model("llama"), [batch])


def test_case_35_weights_that_are_not_in_memory_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*meta device"):
        component_importance(model, [padded(sequences())])


def test_an_unknown_estimator_and_a_model_without_linears_are_refused():
    with pytest.raises(ValueError, match="token, batch, parameter, got 'taylor'"):
        component_importance(tiny_model("llama"), [], estimator="taylor")
    with pytest.raises(ValueError, match="must hold linear components"):
        component_importance(nn.Sequential(nn.LayerNorm(3)), [])


def test_a_model_that_takes_ids_and_mask_only_is_scored_and_refuses_packed_rows():
    model = tiny_model("llama", dtype=torch.float64)
    wanted = component_importance(model, [padded(sequences())])
    forward = model.forward
    model.forward = lambda input_ids, attention_mask, use_cache: forward(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    assert_same(component_importance(model, [padded(sequences())]), wanted, 1e-6)
    with pytest.raises(ValueError, match=r"takes position_ids, got Llama.*; score"):
        component_importance(model, [packed(sequences())])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parameter_scores_are_formed_as_the_backward_goes(monkeypatch, checkpointing):
    """Nothing may wait for the end of the backward, or every x and g would stay in memory."""
    model, waiting = tiny_model("llama"), []
    if checkpointing:
        model.gradient_checkpointing_enable()
    collect = ImportanceRecorder.collect

    def watched(recorder):
        waiting.append(len(recorder._waiting))
        return collect(recorder)

    monkeypatch.setattr(ImportanceRecorder, "collect", watched)
    component_importance(model, [padded(sequences())], estimator="parameter")
    assert waiting == [0]
