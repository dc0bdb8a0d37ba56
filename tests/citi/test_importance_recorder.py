"""The recorder in a loop of the user's own, and its totals over many batches."""

from __future__ import annotations

import pytest
import torch
from importance_cases import assert_same, padded, sequences
from torch import nn

from citi.importance import BatchCounts, ImportanceRecorder, component_importance
from tiny import tiny_model

COUNTS = BatchCounts(num_samples=3, num_tokens=28, num_answers=12)


def _loss(model, batch):
    """The model's own; padding holds labels in these cases."""
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch | {"labels": labels}, use_cache=False).loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("estimator", ["batch", "parameter"])
def test_a_loop_of_the_users_gives_the_scores_of_its_loss(estimator, checkpointing):
    model = tiny_model("llama", dtype=torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batches = [padded(sequences(seed=seed)) for seed in (0, 1)]
    wanted = component_importance(model, batches, estimator=estimator)
    recorder = ImportanceRecorder(model, estimator=estimator)
    with recorder.installed():
        for batch in batches:
            recorder.begin()
            _loss(model, batch).backward()
            assert not recorder._waiting, "what waits keeps activations in memory"
            assert recorder.finish(COUNTS)
    got = recorder.scores()
    assert_same(got, wanted, 1e-6)
    assert (got.num_batches, got.num_tokens) == (2, 56)


@pytest.mark.parametrize("estimator", ["batch", "parameter"])
@pytest.mark.parametrize("granularity", ["component", "row", "element"])
def test_case_31_under_a_grad_scaler_scores_are_unscaled_and_inf_steps_skipped_and_counted(
    estimator, granularity
):
    model = tiny_model("llama")
    batch = padded(sequences())
    how = {"estimator": estimator, "granularity": granularity}
    wanted = component_importance(model, [batch], **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    scaled = torch.nn.Parameter(torch.zeros(1))  # a scaler steps down only with an optimizer
    optimizer = torch.optim.SGD([scaled])
    recorder = ImportanceRecorder(model, **how)
    added = []
    with recorder.installed():
        for _ in range(3):
            recorder.begin(scale=scaler.get_scale())
            scaler.scale(_loss(model, batch) * 1e3 + scaled.sum()).backward()
            added.append(recorder.finish(COUNTS))
            scaler.step(optimizer)
            scaler.update(1.0 if added[-1] else 2.0**10)
            optimizer.zero_grad()
    assert added == [False, True, True]
    got = recorder.scores()
    assert (got.num_batches, got.num_nonfinite_batches) == (2, 1)
    if granularity != "element":  # the upper layers of the first one were finite, and stay
        assert_same(got, {name: 2e3 * score for name, score in wanted.items()}, 1e-4)


def test_case_29_totals_equal_the_fp64_truth_over_many_steps():
    """10⁵ steps: bf16 sums would stick at 256, fp32 sums would drift."""
    recorder = ImportanceRecorder(tiny_model("llama"))
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(100, 21, generator=generator, dtype=torch.float64) * 1e3
    for _ in range(1000):
        for partials in steps:
            recorder.totals.sums = recorder.totals.sums + partials
    torch.testing.assert_close(recorder.totals.sums, 1000 * steps.sum(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_case_29_half_precision_scores_do_not_stick_or_overflow(dtype):
    """What one batch gives 300 times is 300 times what it gives once."""
    model = tiny_model("llama", dtype=dtype)
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.parameters():
            parameter.mul_(20)  # activations whose squares overflow fp16
    once = component_importance(model, [padded(sequences())], estimator="batch")
    often = component_importance(model, [padded(sequences())] * 300, estimator="batch")
    assert all(score > 0 for score in once.values())
    for name, score in once.items():
        assert often[name] == pytest.approx(300 * score, rel=1e-12)


def test_gradient_accumulation_of_a_loop_is_one_micro_batch_per_begin():
    """Post-accumulate hooks would see the running sum."""
    model = tiny_model("llama", dtype=torch.float64)
    batches = [padded(sequences(seed=seed)) for seed in range(4)]
    singles = [component_importance(model, [b], estimator="parameter") for b in batches]
    together = component_importance(model, batches, estimator="parameter")
    for name, score in together.items():
        assert score == pytest.approx(sum(each[name] for each in singles), rel=1e-12)


def test_a_recorder_without_a_batch_has_no_scores():
    with pytest.raises(ValueError, match="at least one that can be scored, got 0 without"):
        ImportanceRecorder(tiny_model("llama")).scores()


def _with_an_indexer(model):
    """Its first layer chooses something under `no_grad`, as sparse attention does."""
    layer = model.model.layers[0]
    layer.indexer = nn.Linear(32, 4)
    forward = layer.forward

    def choosing(hidden_states, *args, **kwargs):
        with torch.no_grad():
            layer.indexer(hidden_states)
        return forward(hidden_states, *args, **kwargs)

    layer.forward = choosing
    return model


def test_a_component_under_no_grad_scores_0_with_the_reason_and_the_others_as_ever():
    batches = [padded(sequences())]
    plain = component_importance(tiny_model(), batches)
    scores = component_importance(_with_an_indexer(tiny_model()), batches)
    name = "model.layers.0.indexer"
    assert scores[name] == 0.0
    reasons = {module.name: module.reason for module in scores.skipped}
    assert reasons[name] == "scores 0: it ran, but no gradient reached it"
    assert {key: value for key, value in scores.items() if key != name} == dict(plain)


def test_a_whole_layer_under_no_grad_is_refused():
    model = tiny_model()
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = torch.no_grad()(forward)
    with pytest.raises(RuntimeError, match=r"model.layers.1.*whole layer.*use_reentrant"):
        component_importance(model, [padded(sequences())])
