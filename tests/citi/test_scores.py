"""Ability scores: from data, their shares, their files, their picture."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from citi.components import SkippedModule
from citi.data import Collator, RenderedDataset, Sample, read_samples
from citi.data.sample import Message
from citi.importance import ComponentScores, component_importance
from citi.importance.ability_scores import AbilityScores
from citi.importance.picture import importance_grid
from citi.importance.score_components import score_components
from citi.saved_json import SavedFileError
from tiny import tiny_model, tiny_tokenizer

NAMES = [
    f"model.layers.{layer}.{path}" for layer in (0, 1) for path in ("attn.q", "attn.o", "mlp.o")
]


def component_scores(values, estimator="token"):
    return ComponentScores(
        scores=dict(zip(NAMES, values, strict=True)),
        estimator=estimator,
        num_samples=2,
        num_tokens=10,
        num_answer_tokens=4,
        num_batches=2,
        num_empty_batches=1,
        num_nonfinite_batches=0,
        skipped=(SkippedModule("lm_head", "output head"),),
    )


def ability_scores():
    return AbilityScores(
        tool=component_scores([1.0, 2.0, 3.0, 4.0, 0.1, 1 / 3]),
        general={
            "math": component_scores([1.0, 1.0, 1.0, 1.0, 1.0, 5.0]),
            "chat": component_scores([40.0, 10.0, 10.0, 10.0, 20.0, 10.0]),
        },
        fingerprint={"model_type": "llama", "num_components": 6},
    )


def samples(task, count=5):
    return [
        Sample(
            id=f"{task}-{index}",
            task_type=int(task == "tool"),
            task=task,
            messages=(
                Message("user", f"{task} question {index}"),
                Message("assistant", f"answer {index * 7}"),
            ),
            tools=(),
            meta={},
            source=f"{task}.jsonl:{index}",
        )
        for index in range(count)
    ]


def write_rows(path, count):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{path.name} question {index}"},
                {"role": "assistant", "content": f"answer {index}"},
            ]
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tool_importance_is_each_components_share():
    scores = ability_scores()
    total = sum(scores.tool.values())
    assert scores.tool_importance == {k: v / total for k, v in scores.tool.items()}


def test_general_importance_adds_the_shares_of_the_abilities():
    importance = ability_scores().general_importance
    assert importance[NAMES[0]] == pytest.approx(0.1 + 0.4)
    assert importance[NAMES[5]] == pytest.approx(0.5 + 0.1)
    assert sum(importance.values()) == pytest.approx(2)


def test_the_order_of_abilities_changes_no_bit():
    scores = ability_scores()
    turned = AbilityScores(scores.tool, dict(reversed(scores.general.items())), {})
    assert turned.general_importance == scores.general_importance


def test_case_36_a_score_that_is_no_number_names_its_component():
    nan = component_scores([1, 2, float("nan"), 4, 5, 6])
    with pytest.raises(ValueError, match=r"tool score of model\.layers\.0\.mlp\.o must be finite"):
        _ = AbilityScores(nan, {}, {}).tool_importance
    with pytest.raises(ValueError, match=r"math score of model\.layers\.0\.mlp\.o must be finite"):
        _ = AbilityScores(component_scores([1] * 6), {"math": nan}, {}).general_importance


def test_shares_of_nothing_are_refused():
    with pytest.raises(ValueError, match="tool scores must not all be 0"):
        _ = AbilityScores(component_scores([0.0] * 6), {}, {}).tool_importance
    with pytest.raises(ValueError, match="general must hold at least one ability"):
        _ = AbilityScores(component_scores([1.0] * 6), {}, {}).general_importance


def test_abilities_of_different_estimators_are_refused():
    other = component_scores([1.0] * 6, estimator="batch")
    with pytest.raises(ValueError, match=r"general\['math'\] must score .* token"):
        AbilityScores(component_scores([1.0] * 6), {"math": other}, {})


def test_a_saved_report_comes_back_equal_and_with_the_same_bytes(tmp_path):
    scores = ability_scores()
    scores.save(tmp_path / "a b ü" / "importance")
    again = AbilityScores.load(tmp_path / "a b ü" / "importance")
    assert again == scores
    again.save(tmp_path / "importance")
    for suffix in (".json", ".safetensors"):
        first = (tmp_path / "a b ü" / "importance").with_suffix(suffix)
        assert first.read_bytes() == (tmp_path / "importance").with_suffix(suffix).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "importance.json",
        "importance.safetensors",
    ]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_case_53_damaged_files_are_one_named_error(tmp_path, suffix):
    prefix = tmp_path / "importance"
    ability_scores().save(prefix)
    path = prefix.with_suffix(suffix)
    whole = path.read_bytes()
    damaged = [whole[:end] for end in range(0, len(whole), 64)]
    for place in range(0, len(whole) - 2, 37):
        damaged.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(SavedFileError, match=str(path.name)):
            AbilityScores.load(prefix)
    path.unlink()
    with pytest.raises(SavedFileError, match=str(path.name)):
        AbilityScores.load(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"version": 1}, "must have version 2, got 1"),
        ({"format": "other"}, "format citi.ability_scores"),
        ({"general": []}, "must hold a dict as 'general'"),
        ({"estimator": "batch"}, "was changed after it was written"),
    ],
)
def test_case_53_other_contents_are_refused(tmp_path, change, message):
    ability_scores().save(tmp_path / "importance")
    path = tmp_path / "importance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SavedFileError, match=message):
        AbilityScores.load(tmp_path / "importance")


def test_case_53_files_of_two_saves_do_not_mix(tmp_path):
    ability_scores().save(tmp_path / "one")
    other = AbilityScores(component_scores([1.0] * 6), {}, {})
    other.save(tmp_path / "two")
    (tmp_path / "two.safetensors").replace(tmp_path / "one.safetensors")
    with pytest.raises(SavedFileError, match=r"not the file that its \.json was written with"):
        AbilityScores.load(tmp_path / "one")


def test_the_picture_is_drawn_without_pyplot_and_is_stable(tmp_path):
    pytest.importorskip("matplotlib")
    loaded = "matplotlib.pyplot" in sys.modules
    for name in ("a.png", "b.png", "c.svg"):
        ability_scores().plot(tmp_path / name)
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    picture = (tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture == (tmp_path / "b.png").read_bytes()
    text = (tmp_path / "c.svg").read_text()
    assert text.startswith("<?xml")


def test_the_heat_map_has_a_row_per_layer_and_a_column_per_path():
    shares = dict(zip(NAMES, [0.1, 0.2, 0.3, 0.1, 0.2, 0.1], strict=True)) | {"adaptor": 0.5}
    rows, columns, grid = importance_grid(shares)
    assert rows == ["0", "1", "none"]
    assert columns == ["q", "attn.o", "mlp.o", "adaptor"]
    assert grid[0][:3] == [10, 20, 30]
    assert grid[2][3] == 50
    assert grid[0][3] != grid[0][3], "nothing is drawn where there is no component"


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"citi-kernels\[report\]"):
        ability_scores().plot(tmp_path / "a.png")


def test_scores_of_samples_are_those_of_their_batches():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    scores = score_components(
        model, tokenizer, tool=samples("tool"), general={"math": samples("math", 3)}
    )
    for ability, got in {"tool": scores.tool, "math": scores.general["math"]}.items():
        data = samples(ability, 5 if ability == "tool" else 3)
        dataset = RenderedDataset(data, tokenizer, max_length=4096)
        batches = [Collator(0)([item]) for item in dataset]
        assert got == component_importance(model, batches)
    assert scores.fingerprint["num_components"] == 21
    assert scores.estimator == "token"


def test_files_lists_and_batch_sizes_give_the_same_token_scores(tmp_path):
    model, tokenizer = tiny_model(dtype=torch.float64), tiny_tokenizer()
    tool, chat = write_rows(tmp_path / "tool.jsonl", 6), write_rows(tmp_path / "chat.v2.jsonl", 6)
    from_files = score_components(model, tokenizer, tool=tool, general=[str(chat)], max_samples=4)
    assert list(from_files.general) == ["chat"]
    assert from_files.tool.num_samples == 4
    from_lists = score_components(
        model,
        tokenizer,
        tool=read_samples(tool, task_type=1),
        general={"chat": read_samples(chat, task_type=0)},
        max_samples=4,
    )
    assert from_lists == from_files
    batched = score_components(
        model, tokenizer, tool=tool, general=[chat], max_samples=4, batch_size=3
    )
    for name, value in from_files.tool.items():
        assert batched.tool[name] == pytest.approx(value, rel=1e-5)


def test_the_seed_chooses_the_samples_and_the_global_random_state_stays():
    model, tokenizer, tool = tiny_model(), tiny_tokenizer(), samples("tool", 20)
    state = torch.get_rng_state()
    first, again, other = (
        score_components(model, tokenizer, tool=tool, general=[], max_samples=3, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first.tool.scores != other.tool.scores
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_names_the_ability():
    seen = []
    score_components(
        tiny_model(),
        tiny_tokenizer(),
        tool=samples("tool", 2),
        general={"math": samples("math", 1)},
        progress=lambda *args: seen.append(args),
    )
    assert [(done, total) for done, total, _ in seen] == [(1, 2), (2, 2), (1, 1)]
    assert [note.split(":")[0] for _, _, note in seen] == ["tool", "tool", "math"]


def test_bad_arguments_are_named_before_anything_is_read(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match="estimator must be one of"):
        score_components(model, tokenizer, tool="none", general=[], estimator="x")
    with pytest.raises(ValueError, match=r"name every ability once, got .*a/m.json and .*b/m.json"):
        score_components(model, tokenizer, tool="none", general=["a/m.json", "b/m.json"])
    with pytest.raises(ValueError, match="general must be a list or a mapping"):
        score_components(model, tokenizer, tool="none", general="m.json")
