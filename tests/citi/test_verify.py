"""`citi verify`: a run as it was written is whole, and every damage is found and named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_cases import tiny_recipe, without_figures, write_model
from safetensors.torch import load_file, save_file
from test_command_line import citi

from citi.run import evaluate_run, train
from citi.run_directory import RunDirectory
from citi.verify import verify_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a run in run/."""
    folder = tmp_path_factory.mktemp("verified")
    recipe = tiny_recipe(folder)
    with without_figures():
        train(recipe)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Its copy; the recipe in it names the data of the original, which stay as they are."""
    shutil.copytree(whole / "run", tmp_path / "run")
    return tmp_path


def problems(run: Path, **options: bool) -> dict[str, str]:
    return {each.part: each.problem for each in verify_run(run, **options) if each.problem}


def test_a_finished_run_is_whole_part_by_part(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*")}
    findings = verify_run(whole / "run")
    assert [each.part for each in findings if each.problem] == []
    stages = ["stage1_rp", "stage2_mi", "stage3_uco"]
    parts = ["recipe", "data", "phases", "importance", "plan", *stages, "adapter", "eval", "model"]
    assert [each.part for each in findings] == parts
    notes = {each.part: each.note for each in findings if each.note}
    assert notes == {"eval": "skipped: the recipe has no eval_tool and no eval_general"}
    assert {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*")} == before
    assert "model" not in [each.part for each in verify_run(whole / "run", with_model=False)]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _recipe_of_another_rank(run: Path) -> None:
    path = run / "recipe.resolved.yaml"
    text = path.read_text()
    assert "\nr: 2\n" in text
    path.write_text(text.replace("\nr: 2\n", "\nr: 4\n"))


DAMAGES: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "edited recipe": (_recipe_of_another_rank, {"recipe": "was edited after the run began"}),
    "lost environment": (
        lambda run: (run / "env.json").unlink(),
        {"phases": "env.json is missing"},
    ),
    "flipped scores": (
        lambda run: _flip(run / "importance.safetensors"),
        {"importance": "importance", "plan": "importance"},
    ),
    "edited plan": (
        lambda run: _edit(run / "plan.json", lambda plan: plan["important"].reverse()),
        {"plan": "is not what the scores and shares give"},
    ),
    "flipped weights of a stage": (
        lambda run: _flip(run / "stage1_rp" / "adapter_model.safetensors"),
        {"stage1_rp": "cut short or changed"},
    ),
    "lost stage": (
        lambda run: shutil.rmtree(run / "stage2_mi"),
        {"stage2_mi": "adapter_config.json: cannot be read"},
    ),
    "another stage's adapter": (
        lambda run: [
            shutil.copy(run / "stage1_rp" / name, run / "adapter" / name)
            for name in ("adapter_model.safetensors", "adapter_config.json")
        ],
        {"adapter": "is not that of the last stage, stage3_uco"},
    ),
    "another chat template": (
        lambda run: (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}"),
        {"adapter": "changed since the run wrote it: adapter/chat_template.jinja"},
    ),
    "lost tokenizer": (
        lambda run: (run / "adapter" / "tokenizer.json").unlink(),
        {"adapter": "missing: adapter/tokenizer.json"},
    ),
    "emptied metrics": (
        lambda run: (run / "metrics.jsonl").write_text(""),
        {"adapter": "changed since the run wrote it: metrics.jsonl"},
    ),
    "another machine": (
        lambda run: _edit(run / "env.json", lambda it: it.update(device_name="H100")),
        {"phases": "changed since the run wrote it: env.json"},
    ),
    "phase not recorded": (
        lambda run: _edit(run / "manifest.json", lambda it: it["phases"].pop("eval")),
        {"phases": "not finished: eval; go on: citi train"},
    ),
    "results gone": (
        lambda run: _edit(run / "manifest.json", lambda it: it["phases"]["eval"].pop("skipped")),
        {"eval": "missing: base.json, tuned.json"},
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_named_and_nothing_else(folder: Path, name: str) -> None:
    damage, wanted = DAMAGES[name]
    damage(folder / "run")
    found = problems(folder / "run", with_model=False)
    assert found.keys() == wanted.keys(), found
    for part, words in wanted.items():
        assert words in found[part]


def test_changed_data_are_wrong_and_absent_data_are_said_to_be(whole: Path, folder: Path) -> None:
    recipe = folder / "run" / "recipe.resolved.yaml"
    moved = shutil.copytree(whole / "data", folder / "data")
    recipe.write_text(recipe.read_text().replace(str(whole / "data"), str(moved)))
    assert problems(folder / "run", with_model=False) == {}
    (moved / "math.jsonl").unlink()
    notes = {each.part: each.note for each in verify_run(folder / "run", with_model=False)}
    assert notes["data"] == "not here, and not looked at: general.math"
    with (moved / "tool.jsonl").open("a") as file:
        file.write("\n")
    found = problems(folder / "run", with_model=False)
    assert found == {"data": "changed since the run began: tool.tool"}


def test_an_adapter_without_effect_and_another_base_are_found(folder: Path) -> None:
    run = RunDirectory(folder / "run")
    weights = run.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    base = {
        name: torch.zeros_like(tensor) if "molora_B" in name else tensor
        for name, tensor in tensors.items()
    }
    original = load_file(Path(run.load_recipe().model) / "model.safetensors")
    for name in base:
        plain = name.removeprefix("base_model.model.")
        if plain in original:
            base[name] = original[plain]
    save_file(base, weights, metadata={"format": "pt"})
    _edit(run.adapter / "adapter_config.json", lambda config: config.pop("weights_sha256"))
    found = problems(run.path)
    assert found.keys() == {"adapter", "model"}
    assert "the adapter changes nothing" in found["model"]

    other = write_model(folder / "other", seed=7)
    recipe = run.recipe_file
    recipe.write_text(recipe.read_text().replace(run.load_recipe().model, str(other)))
    assert "the adapter belongs to another base model" in problems(run.path)["model"]


def test_the_command_prints_each_part_and_ends_with_1_where_one_is_wrong(
    whole: Path, folder: Path
) -> None:
    result = citi("verify", whole / "run", "--no-model")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "ok     recipe"
    _flip(folder / "run" / "adapter" / "adapter_model.safetensors")
    result = citi("verify", folder / "run", "--no-model")
    assert result.exit_code == 1
    assert "WRONG  adapter" in result.stdout
    assert "1 of 10 parts are wrong" in result.stderr
    assert citi("verify", folder).exit_code == 1


def test_results_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, epochs_rp=0.0, epochs_mi=0.0, epochs_uco=0.0)
    recipe = dataclasses.replace(recipe, eval_general=dict(recipe.general), judged_samples=0)
    with without_figures():
        run = train(recipe)
    assert problems(run.path, with_model=False) == {}
    forged = run.evaluation / "tuned.json"
    _edit(forged, lambda result: result["general"]["math"].update(nll=0.1))
    found = problems(run.path, with_model=False)
    assert found == {"eval": "changed since the run wrote it: eval/tuned.json"}
    evaluate_run(run.path)
    assert problems(run.path, with_model=False) == {}
    (run.evaluation / "gates.json").unlink()
    assert problems(run.path, with_model=False) == {"eval": "missing: eval/gates.json"}
