"""Scores finer than a component against real gradients, and what they must not depend on."""

from __future__ import annotations

import copy

import pytest
import torch
from importance_cases import fp64_model, packed, padded, sequences, single, true_entries

from citi.components import find_components
from citi.importance import ESTIMATORS, GRANULARITIES, component_importance
from citi.importance.granularity import score_shapes
from citi_kernels.testing import assert_accurate
from tiny import ARCHITECTURES, MIXTURE_OF_EXPERTS, tiny_model

FINER = GRANULARITIES[1:]


def _shapes(model, granularity):
    components, _ = find_components(model)
    return {each.name: each.shape for each in score_shapes(model, components, granularity)}


def _flat(entries):
    return torch.cat([entry.double().flatten() for entry in entries.values()])


def _assert_entries(got, wanted, rtol):
    assert list(got) == list(wanted)
    scale = max(entry.max().item() for entry in wanted.values())
    for name, entry in wanted.items():
        assert got[name].shape == entry.shape, name
        error = (got[name].double() - entry).abs()
        allowed = rtol * entry.clamp(min=0.01 * scale)
        assert (error <= allowed).all(), (name, (error / allowed).max())


@pytest.mark.usefixtures("all_in_fp64")
@pytest.mark.parametrize("granularity", FINER)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURE_OF_EXPERTS])
def test_entries_equal_the_truth_from_real_gradients(architecture, estimator, granularity):
    model = fp64_model(architecture)
    parts = sequences()
    truth = true_entries(model, [parts[:2], parts[2:]], estimator, _shapes(model, granularity))
    batches = [padded(parts[:2], side="left"), padded(parts[2:], width=5)]
    got = component_importance(model, batches, estimator=estimator, granularity=granularity)
    # elements are summed in an fp32 buffer
    _assert_entries(got.entries, truth, 1e-6 if granularity == "element" else 1e-9)
    for name, entry in got.entries.items():
        assert got[name] == pytest.approx(entry.sum(dtype=torch.float64).item(), rel=1e-12)


@pytest.mark.parametrize("granularity", FINER)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_hold_the_accuracy_rule(dtype, estimator, granularity):
    model = tiny_model("qwen2", dtype=dtype)
    parts = sequences(seed=1)
    shapes = _shapes(model, granularity)
    got = component_importance(
        model, [padded(parts)], estimator=estimator, granularity=granularity
    ).entries
    wide = copy.deepcopy(model).double()
    truth, baseline = (true_entries(m, [parts], estimator, shapes) for m in (wide, model))
    out, truth, baseline = (_flat(entries) for entries in (got, truth, baseline))
    assert_accurate(out, truth, baseline, kind="backward", dtype=dtype)


@pytest.mark.parametrize("granularity", FINER)
def test_parameter_entries_add_up_to_the_score_of_the_component(granularity):
    model = tiny_model("phi3")
    whole = component_importance(model, [padded(sequences())], estimator="parameter")
    finer = component_importance(
        model, [padded(sequences())], estimator="parameter", granularity=granularity
    )
    assert {name: pytest.approx(score, rel=1e-6) for name, score in whole.items()} == dict(finer)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("granularity", ["row", "column", "head"])
def test_case_34_finer_scores_do_not_see_padding_or_packing(estimator, granularity):
    model = fp64_model("qwen2")
    parts = sequences(seed=2)
    how = {"estimator": estimator, "granularity": granularity}
    wanted = component_importance(model, [padded(parts, width=14)], **how).entries
    for batch in (padded(parts, side="left", width=20), packed(parts), packed(parts, padding=4)):
        _assert_entries(component_importance(model, [batch], **how).entries, wanted, 1e-6)


@pytest.mark.parametrize("granularity", FINER)
def test_case_30_finer_token_scores_do_not_depend_on_the_micro_batch_split(granularity):
    model = fp64_model("llama")
    parts = sequences(seed=3)
    whole = component_importance(model, [padded(parts)], granularity=granularity)
    split = component_importance(model, [single(p) for p in parts], granularity=granularity)
    _assert_entries(split.entries, whole.entries, 1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("granularity", FINER)
def test_case_33_activation_checkpointing_changes_no_entry(estimator, granularity):
    model = tiny_model("gpt2")
    how = {"estimator": estimator, "granularity": granularity}
    plain = component_importance(model, [padded(sequences())], **how)
    model.gradient_checkpointing_enable()
    checkpointed = component_importance(model, [padded(sequences())], **how)
    for name, entry in plain.entries.items():
        assert torch.equal(checkpointed.entries[name], entry), name


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("llama", {"q_proj": (4, 1), "k_proj": (2, 1), "v_proj": (2, 1), "o_proj": (1, 4)}),
        ("phi3", {"qkv_proj": (8, 1), "o_proj": (1, 4), "gate_up_proj": (1, 1)}),
        ("gpt2", {"c_attn": (12, 1), "attn.c_proj": (1, 4), "mlp.c_proj": (1, 1)}),
    ],
)
def test_heads_are_rows_of_what_writes_them_and_columns_of_what_reads_them(architecture, wanted):
    shapes = _shapes(tiny_model(architecture), "head")
    for role, shape in wanted.items():
        found = {s for name, s in shapes.items() if name.endswith(role)}
        assert found == {shape}, role


def test_a_model_without_heads_is_refused_and_an_unknown_granularity_too():
    model = tiny_model("llama")
    for layer in model.model.layers:
        del layer.self_attn.head_dim
    with pytest.raises(ValueError, match='"head" needs attention modules with a head_dim'):
        component_importance(model, [padded(sequences())], granularity="head")
    with pytest.raises(ValueError, match="component, row, column, head, element, got 'layer'"):
        component_importance(model, [padded(sequences())], granularity="layer")


def test_an_element_buffer_in_bf16_is_right_on_average():
    model = tiny_model("llama")
    batches = [padded(sequences(seed=seed)) for seed in range(12)]
    how = {"estimator": "parameter", "granularity": "element"}
    exact = component_importance(model, batches, **how)
    half = component_importance(model, batches, element_dtype=torch.bfloat16, **how)
    for name, entry in exact.entries.items():
        assert half.entries[name].dtype == torch.bfloat16
        assert (half.entries[name].float() - entry).abs().max() <= 0.1 * entry.max()
        assert half[name] == pytest.approx(exact[name], rel=2e-3)
    again = component_importance(model, batches, element_dtype=torch.bfloat16, **how)
    assert all(torch.equal(again.entries[n], t) for n, t in half.entries.items())
    with pytest.raises(ValueError, match=r"element_dtype must be fp32 or bf16, got torch\.float16"):
        component_importance(model, batches, element_dtype=torch.float16, **how)


@pytest.mark.parametrize("estimator", ["token", "parameter"])
def test_case_31_elements_of_a_batch_that_is_run_again_are_added_once(estimator, monkeypatch):
    """The upper layers' gradients were finite at the first try, and stand in the buffer."""
    model = tiny_model("llama").half()
    how = {"estimator": estimator, "granularity": "element"}
    wanted = component_importance(model, [padded(sequences())], **how)
    backwards = []
    hook = model.model.layers[1].mlp.gate_proj.register_forward_hook(
        lambda m, args, y: _OverflowOnce.apply(y, backwards)
    )
    got = component_importance(model, [padded(sequences())], **how)
    hook.remove()
    assert len(backwards) == 2, "the batch should have been run twice"
    for name, entry in wanted.entries.items():
        torch.testing.assert_close(got.entries[name], entry, rtol=0.05, atol=1e-4 * entry.max())


class _OverflowOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, calls):
        ctx.calls = calls
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.calls.append(1)
        return (g if len(ctx.calls) > 1 else g * float("inf")), None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_case_31_elements_take_nothing_from_gradients_that_are_not_finite(estimator):
    model = tiny_model("llama")
    good, bad = padded(sequences()), padded(sequences(seed=5))
    how = {"estimator": estimator, "granularity": "element"}
    wanted = component_importance(model, [good], **how)
    current = {}
    watch = model.register_forward_pre_hook(lambda m, a, k: current.update(k), with_kwargs=True)
    hook = model.model.layers[1].mlp.register_forward_hook(
        lambda m, args, y: (
            y + (y * 0).sqrt() if torch.equal(current["input_ids"], bad["input_ids"]) else y
        )
    )
    got = component_importance(model, [good, bad], **how)
    hook.remove()
    watch.remove()
    assert (got.num_batches, got.num_nonfinite_batches) == (1, 1)
    below = [name for name in got if ".0." in name]
    assert below
    for name in got:
        assert got.entries[name].isfinite().all()
    for name in below:
        assert torch.equal(got.entries[name], wanted.entries[name])


def test_elements_need_the_plain_weight():
    model = tiny_model("llama")
    plain = model.model.layers[0].mlp.up_proj
    plain.forward = lambda x: torch.nn.functional.linear(x, plain.weight)
    with pytest.raises(ValueError, match=r'granularity "element" need the plain weight of .*up_pr'):
        component_importance(model, [padded(sequences())], granularity="element")
