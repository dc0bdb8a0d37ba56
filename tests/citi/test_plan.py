"""The plan: the authors' rounding, ties, files, and the model it belongs to."""

from __future__ import annotations

import dataclasses
import json

import pytest

from citi.components import SkippedModule, find_components
from citi.fingerprint import model_fingerprint
from citi.importance import ComponentScores
from citi.importance.ability_scores import AbilityScores
from citi.plan import Plan, make_plan
from citi.saved_json import SavedFileError
from citi.shares import num_least, num_most
from tiny import tiny_model


def component_scores(values, names=None):
    names = names or [f"layers.{index:03}.q" for index in range(len(values))]
    counts = dict.fromkeys(
        ("num_samples", "num_tokens", "num_answer_tokens", "num_batches"), 1
    ) | dict.fromkeys(("num_empty_batches", "num_nonfinite_batches"), 0)
    scores = dict(zip(names, values, strict=True))
    return ComponentScores(scores=scores, estimator="token", skipped=(), **counts)


def ability_scores(tool, general, **options):
    return AbilityScores(
        component_scores(tool, **options),
        {"math": component_scores(general, **options)},
        {"model_type": "llama", "num_components": len(tool)},
    )


def test_llama_3_8b_gets_the_authors_counts():
    plan = make_plan(ability_scores(range(1, 225), range(1, 225)))
    assert (len(plan.important), len(plan.unimportant), plan.num_components) == (45, 22, 224)
    assert plan.important == tuple(f"layers.{index:03}.q" for index in range(179, 224))
    assert plan.unimportant == tuple(f"layers.{index:03}.q" for index in range(22))


@pytest.mark.parametrize("number", [1, 3, 7, 10, 33])
@pytest.mark.parametrize("important", [0, 0.1, 0.2, 0.33, 0.5, 1])
@pytest.mark.parametrize("unimportant", [0.0, 0.1, 0.5, 1.0])
def test_case_36_sets_are_the_authors_slices_at_every_share(number, important, unimportant):
    tool = [((7 * index) % 11) + 1 for index in range(number)]
    general = [((5 * index) % 13) + 1 for index in range(number)]
    scores = ability_scores(tool, general)
    plan = make_plan(scores, important=important, unimportant=unimportant)
    names = list(scores.tool)
    by_tool = sorted(names, key=lambda name: (scores.tool[name], name))
    by_general = sorted(names, key=lambda name: (scores.general["math"][name], name))
    top = by_tool[int((1 - important) * number) :]
    bottom = by_general[: int(unimportant * number)]
    assert list(plan.important) == top
    assert list(plan.unimportant) == [name for name in bottom if name not in top]
    assert list(plan.overlap) == [name for name in bottom if name in top]


@pytest.mark.parametrize(
    ("number", "share", "most"), [(10, 0.9, 9), (210, 0.9, 189), (210, 0.8, 168), (224, 0.2, 45)]
)
def test_shares_are_rounded_as_written_not_as_floats(number, share, most):
    plan = make_plan(ability_scores(range(1, number + 1), range(number, 0, -1)), share, share)
    assert len(plan.important) == num_most(number, share) == most
    assert len(plan.unimportant) + len(plan.overlap) == num_least(number, share)


def test_what_no_scoring_reached_is_not_taken_for_unimportant():
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    scores = ability_scores(values, values)
    assert make_plan(scores, unimportant=0.2).unimportant == ("layers.000.q", "layers.001.q")
    skipped = (
        SkippedModule("layers.000.q", "scores 0: it never ran on these batches"),
        SkippedModule("model.embedding", "embedding, not a linear module"),
    )
    math = dataclasses.replace(scores.general["math"], skipped=skipped)
    scores = dataclasses.replace(scores, general={"math": math})
    assert make_plan(scores, unimportant=0.2).unimportant == ("layers.001.q", "layers.002.q")


def test_case_36_ties_are_broken_by_name_whatever_the_order_of_modules():
    names = ["b", "d", "a", "c", "e"]
    plan = make_plan(ability_scores([1] * 5, [1] * 5, names=names), important=0.4, unimportant=0.4)
    assert plan.important == ("d", "e")
    assert plan.unimportant == ("a", "b")


def test_an_overlap_is_reported_and_molora_wins():
    plan = make_plan(ability_scores([5, 1, 2, 3, 4], [1, 2, 3, 4, 5]), unimportant=0.4)
    assert plan.important == ("layers.000.q",)
    assert plan.unimportant == ("layers.001.q",)
    assert plan.overlap == ("layers.000.q",)


def test_case_36_the_same_report_gives_a_byte_identical_plan(tmp_path):
    scores = ability_scores([5, 1, 2, 3, 4], [1 / 3, 2, 3, 4, 5])
    scores.save(tmp_path / "importance")
    make_plan(scores).save(tmp_path / "one.json")
    make_plan(AbilityScores.load(tmp_path / "importance")).save(tmp_path / "two.json")
    Plan.load(tmp_path / "one.json").save(tmp_path / "three.json")
    one, two, three = ((tmp_path / f"{name}.json").read_bytes() for name in ("one", "two", "three"))
    assert one == two == three


def test_a_plan_survives_its_file(tmp_path):
    plan = make_plan(ability_scores([5, 1, 2, 3, 4], [1, 2, 3, 4, 5]), unimportant=0.4)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "0.2"])
@pytest.mark.parametrize("name", ["important", "unimportant"])
def test_case_36_a_share_outside_0_to_1_is_refused(name, share):
    with pytest.raises(ValueError, match=f"^{name} must be a share between 0 and 1"):
        make_plan(ability_scores([1, 2], [1, 2]), **{name: share})


def test_case_36_a_nan_score_names_the_component():
    scores = ability_scores([1, float("nan"), 3], [1, 2, 3])
    with pytest.raises(ValueError, match=r"tool score of layers\.001\.q must be finite"):
        make_plan(scores)


def test_without_general_abilities_nothing_is_unimportant():
    scores = AbilityScores(component_scores([1, 2, 3, 4, 5]), {}, {})
    assert make_plan(scores, unimportant=0).important == ("layers.004.q",)
    with pytest.raises(ValueError, match="general must hold at least one ability"):
        make_plan(scores, unimportant=0.5)


def _plan_of(model):
    names = [component.name for component in find_components(model)[0]]
    tool, general = component_scores(range(1, 22), names), component_scores(range(1, 22), names)
    return make_plan(AbilityScores(tool, {"math": general}, model_fingerprint(model)))


def test_case_36_a_plan_for_another_model_is_refused():
    plan = _plan_of(tiny_model("llama"))
    plan.check(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"differs in weights_sha256 \(plan .*, model .*\); score"):
        plan.check(tiny_model("llama", seed=1))
    with pytest.raises(ValueError, match=r"components_sha256.*model_type.*num_components"):
        plan.check(tiny_model("phi3"))


def test_an_edited_plan_with_an_unknown_name_is_refused(tmp_path):
    model = tiny_model("llama")
    _plan_of(model).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace("layers.0.self_attn.q", "layers.0.attn.q"))
    with pytest.raises(ValueError, match=r"lacks: \['model\.layers\.0\.attn\.q_proj'\]"):
        Plan.load(tmp_path / "plan.json").check(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"version": 9}, "version 1, got 9"),
        ({"important": "all"}, "must hold a list as 'important'"),
        ({"important": ["a", "a"]}, "names a component twice"),
        ({"important": [3]}, "by strings"),
        ({"overlap": ["z"]}, "lists under overlap what is not important"),
        ({"important_share": 2.0}, "shares between 0 and 1"),
        ({"num_components": 1}, "names 2 components of 1"),
    ],
)
def test_case_53_a_plan_that_breaks_its_schema_is_refused(tmp_path, change, message):
    path = tmp_path / "plan.json"
    make_plan(ability_scores([5, 1, 2, 3, 4], [5, 4, 3, 2, 1]), unimportant=0.2).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SavedFileError, match=rf"plan\.json .*{message}"):
        Plan.load(path)


def test_case_53_a_truncated_plan_is_refused_at_every_64th_byte(tmp_path):
    path = tmp_path / "plan.json"
    make_plan(ability_scores([5, 1, 2, 3, 4], [1, 2, 3, 4, 5])).save(path)
    whole = path.read_bytes()
    for end in range(0, len(whole) - 2, 64):
        path.write_bytes(whole[:end])
        with pytest.raises(SavedFileError, match=r"plan\.json is no JSON"):
            Plan.load(path)
