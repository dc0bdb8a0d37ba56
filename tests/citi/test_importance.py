"""Component importance against real gradients in fp64, and what it must not depend on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from importance_cases import assert_same, fp64_model, packed, padded, sequences, single, true_scores
from torch import nn

from citi.importance import ESTIMATORS, component_importance
from citi_kernels.testing import assert_accurate
from tiny import ARCHITECTURES, MIXTURE_OF_EXPERTS, tiny_model

ALL = [*ARCHITECTURES, *MIXTURE_OF_EXPERTS]


@pytest.mark.usefixtures("all_in_fp64")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("architecture", ALL)
def test_scores_equal_the_truth_from_real_gradients(architecture, estimator):
    model = fp64_model(architecture)
    parts = sequences()
    truth = true_scores(model, [parts[:2], parts[2:]], estimator)
    got = component_importance(
        model, [padded(parts[:2]), padded(parts[2:], width=5)], estimator=estimator
    )
    assert_same(got, truth, 1e-9)
    assert (got.num_samples, got.num_tokens, got.num_answer_tokens) == (3, 28, 12)
    assert (got.num_batches, got.num_skipped_batches) == (2, 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_scores_of_an_fp32_model_hold_the_accuracy_rule(architecture, estimator):
    model = tiny_model(architecture)
    parts = sequences(seed=1)
    truth, baseline = (
        torch.tensor(list(true_scores(m, [parts], estimator).values()), dtype=torch.float64)
        for m in (copy.deepcopy(model).double(), model)
    )
    got = component_importance(model, [padded(parts)], estimator=estimator)
    out = torch.tensor(list(got.values()), dtype=torch.float64)
    assert_accurate(out, truth, baseline, kind="backward", dtype=torch.float32)


@pytest.mark.usefixtures("all_in_fp64")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("form", ["left", "right", "packed", "packed and padded"])
def test_case_34_padding_and_packing_change_nothing(architecture, estimator, form):
    model = fp64_model(architecture)
    parts = sequences(seed=2)
    if form.startswith("packed"):
        batches = [packed(parts, padding=3 if "padded" in form else 0)]
    else:
        batches = [padded(parts, side=form)]
    truth = true_scores(model, [parts], estimator)
    got = component_importance(model, batches, estimator=estimator)
    assert_same(got, truth, 1e-9)


def test_case_30_token_scores_do_not_depend_on_the_micro_batch_split():
    model = tiny_model("llama", dtype=torch.float64)
    parts = sequences(seed=3)
    whole = component_importance(model, [padded(parts)])
    for batches in (
        [single(part) for part in parts],
        [padded(parts[1:]), single(parts[0])],
        [packed(parts[:2]), single(parts[2])],
    ):
        split = component_importance(model, batches)
        assert_same(split, whole, 1e-6)
        assert split.num_tokens == whole.num_tokens


@pytest.mark.parametrize("estimator", ["batch", "parameter"])
def test_case_30_the_micro_batch_is_part_of_the_definition_its_order_is_not(estimator):
    model = tiny_model("llama", dtype=torch.float64)
    parts = sequences(seed=3)
    whole = component_importance(model, [padded(parts)], estimator=estimator)
    ordered = component_importance(model, [padded(parts[::-1])], estimator=estimator)
    assert_same(ordered, whole, 1e-6)
    singles = [single(part) for part in parts]
    split = component_importance(model, singles, estimator=estimator)
    ordered = component_importance(model, singles[::-1], estimator=estimator)
    assert_same(ordered, split, 1e-12)
    assert max(split.values()) > 1.01 * max(whole.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_case_33_activation_checkpointing_changes_nothing(architecture, estimator):
    model = tiny_model(architecture)
    plain = component_importance(model, [padded(sequences())], estimator=estimator)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    calls = []
    name = next(iter(plain))
    hook = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    checkpointed = component_importance(model, [padded(sequences())], estimator=estimator)
    hook.remove()
    assert len(calls) == 2, "the first component should have been recomputed once"
    assert dict(checkpointed) == dict(plain)


def test_case_33_reentrant_checkpointing_of_the_models_own_is_refused():
    model = tiny_model("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda x, **kwargs: torch.utils.checkpoint.checkpoint(
        lambda x: forward(x, **kwargs), x, use_reentrant=True
    )
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj.*use_reentrant"):
        component_importance(model, [padded(sequences())])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.usefixtures("all_in_fp64")
def test_case_34_a_tied_weight_counts_once_with_all_its_uses(architecture, estimator):
    model = tiny_model(architecture, dtype=torch.float64)
    layers = model.model.layers if architecture == "llama" else model.transformer.h
    up = "up_proj" if architecture == "llama" else "c_fc"
    getattr(layers[1].mlp, up).weight = getattr(layers[0].mlp, up).weight
    layers[2].mlp = layers[0].mlp
    parts = sequences()
    got = component_importance(model, [padded(parts)], estimator=estimator)
    assert sum(up in name for name in got) == 1
    if estimator == "token":
        untied = copy.deepcopy(model)
        layers = untied.model.layers if architecture == "llama" else untied.transformer.h
        layers[2].mlp = copy.deepcopy(layers[0].mlp)
        layers[1].mlp = copy.deepcopy(layers[1].mlp)
        uses = true_scores(untied, [parts], estimator)
        others, answers = sum(len(ids) - 1 for ids, _ in parts), got.num_answer_tokens
        truth = dict.fromkeys(got, 0.0)
        for name, score in uses.items():
            owner = name if name in truth else name.replace("1.mlp", "0.mlp")
            owner = owner if owner in truth else owner.replace("2.mlp", "0.mlp")
            moved = owner != name and ".2." in name
            truth[owner] += score * (answers / others if moved else 1)
    else:
        truth = true_scores(model, [parts], estimator)
    assert_same(got, truth, 1e-9)


def test_case_34_an_unused_component_scores_zero_with_a_reason():
    model = tiny_model("llama")
    model.model.layers[0].mlp.spare = nn.Linear(32, 32)
    cut = model.model.layers[1].mlp.gate_proj
    hook = cut.register_forward_hook(lambda m, args, y: y.detach())
    scores = component_importance(model, [padded(sequences())])
    hook.remove()
    reasons = {module.name: module.reason for module in scores.skipped}
    assert scores["model.layers.0.mlp.spare"] == 0.0
    assert reasons["model.layers.0.mlp.spare"].startswith("scores 0: it never ran")
    assert scores["model.layers.1.mlp.gate_proj"] == 0.0
    assert "no gradient reached it" in reasons["model.layers.1.mlp.gate_proj"]
    assert "lm_head" in reasons
    assert min(v for name, v in scores.items() if name not in reasons) > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_case_29_half_precision_models_hold_the_accuracy_rule(estimator, dtype):
    model = tiny_model("llama", dtype=dtype)
    parts = sequences(seed=1)
    truth, baseline = (
        torch.tensor(list(true_scores(m, [parts], estimator).values()), dtype=torch.float64)
        for m in (copy.deepcopy(model).double(), model)
    )
    got = component_importance(model, [padded(parts)], estimator=estimator)
    out = torch.tensor(list(got.values()), dtype=torch.float64)
    assert_accurate(out, truth, baseline, kind="backward", dtype=dtype)


def test_case_29_small_fp16_gradients_do_not_vanish_and_large_ones_are_retried(monkeypatch):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)
    wanted = component_importance(model, [padded(sequences())])
    half = copy.deepcopy(model).half()
    assert_same(component_importance(half, [padded(sequences())]), wanted, 0.03)
    monkeypatch.setattr("citi.importance.scoring_pass._HALF_LOSS_SCALE", 2.0**60)
    got = component_importance(half, [padded(sequences())])
    assert_same(got, wanted, 0.03)
    assert got.num_skipped_batches == 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_case_31_batches_that_are_not_finite_are_skipped_whole_and_counted(estimator, where):
    model = tiny_model("llama")
    good, bad = padded(sequences()), padded(sequences(seed=5))
    clean = component_importance(model, [good, good], estimator=estimator)

    def spoil(module, args, y):
        if not torch.equal(current["input_ids"], bad["input_ids"]):
            return y
        return y * float("nan") if where == "loss" else y + (y * 0).sqrt()

    current = {}
    hook = model.model.layers[1].mlp.register_forward_hook(spoil)
    watch = model.register_forward_pre_hook(lambda m, a, k: current.update(k), with_kwargs=True)
    got = component_importance(model, [good, bad, good], estimator=estimator)
    hook.remove()
    watch.remove()
    assert dict(got) == dict(clean)
    assert (got.num_batches, got.num_nonfinite_batches, got.num_skipped_batches) == (2, 1, 1)
    assert got.num_tokens == clean.num_tokens


def test_batches_without_answers_are_skipped_and_counted():
    model = tiny_model("llama")
    good = padded(sequences())
    empty = good | {"labels": torch.full_like(good["labels"], -100)}
    got = component_importance(model, iter([empty, good]))
    assert dict(got) == dict(component_importance(model, [good]))
    assert (got.num_batches, got.num_empty_batches, got.num_skipped_batches) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"1 without answer tokens"):
        component_importance(model, [empty])
    with pytest.raises(ValueError, match=r"at least one that can be scored"):
        component_importance(model, [])


def test_a_sequence_without_answers_does_not_count():
    model = tiny_model("llama", dtype=torch.float64)
    parts = sequences()
    silent = (parts[0][0], torch.full_like(parts[0][1], -100))
    only = component_importance(model, [padded(parts[1:])])
    got = component_importance(model, [padded([silent, *parts[1:]])])
    assert_same(got, only, 1e-6)
    assert (got.num_samples, got.num_tokens) == (2, 19)
