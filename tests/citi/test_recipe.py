"""Recipes: every mistake is named, paths hold wherever one stands, and the keys are frozen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from citi.recipe import Recipe, RecipeError, load_recipe, template

_KEYS = """
model tool general eval_tool eval_general output dtype estimator importance_samples important
unimportant num_experts r lora_alpha lora_dropout top_k router_loss router_loss_weight delta
base_kl_weight tool_samples general_samples max_length train_on batch_size gradient_accumulation
gradient_checkpointing learning_rate uco_learning_rate epochs_rp epochs_mi epochs_uco eval_samples
judged_samples eval_batch_size max_new_tokens seed save_steps report_to
"""
KEYS = _KEYS.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tool.jsonl", "math.jsonl", "chat.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(
        "model: some/model\ntool: tool.jsonl\ngeneral: [math.jsonl, chat.jsonl]\n"
    )
    return tmp_path


def refuse(folder: Path, *lines: str, match: str) -> None:
    text = (folder / "recipe.yaml").read_text() + "\n".join(lines) + "\n"
    (folder / "wrong.yaml").write_text(text)
    with pytest.raises(RecipeError, match=match):
        load_recipe(folder / "wrong.yaml")


def test_case_59_keys_are_frozen() -> None:
    """Another key set is another version of the recipe: bump the version and say so."""
    assert [field.name for field in dataclasses.fields(Recipe)] == KEYS


def test_defaults_are_the_papers(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    assert (recipe.important, recipe.unimportant, recipe.estimator) == (0.20, 0.10, "token")
    assert (recipe.num_experts, recipe.r, recipe.lora_alpha, recipe.top_k) == (4, 8, 2, None)
    assert (recipe.router_loss, recipe.router_loss_weight, recipe.delta) == ("cv2", 0.01, 0.95)
    assert (recipe.learning_rate, recipe.uco_learning_rate) == (2e-4, 2e-5)
    assert (recipe.epochs_rp, recipe.epochs_mi, recipe.epochs_uco) == (1, 2, 1)
    assert (recipe.general_samples, recipe.max_length, recipe.train_on) == (5000, 4096, "last")
    assert recipe.batch_size * recipe.gradient_accumulation == 16


def test_paths_are_relative_to_the_recipe(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir("/")
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.tool == {"tool": str(folder / "tool.jsonl")}
    assert recipe.general == {
        "math": str(folder / "math.jsonl"),
        "chat": str(folder / "chat.jsonl"),
    }
    assert recipe.output == str(folder / "runs" / "recipe")
    assert recipe.model == "some/model"


def test_a_model_that_is_a_folder_beside_the_recipe_is_taken(folder: Path) -> None:
    (folder / "some" / "model").mkdir(parents=True)
    assert load_recipe(folder / "recipe.yaml").model == str(folder / "some" / "model")


def test_overrides_win_and_take_paths_from_the_working_directory(
    folder: Path, tmp_path_factory, monkeypatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "mine.jsonl").write_text("{}")
    monkeypatch.chdir(elsewhere)
    overrides = ["tool=mine.jsonl", "learning_rate=1e-3", "top_k=2", "output=here", "seed=7"]
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    assert recipe.tool == {"mine": str(elsewhere / "mine.jsonl")}
    assert (recipe.learning_rate, recipe.top_k, recipe.seed) == (1e-3, 2, 7)
    assert recipe.output == str(elsewhere / "here")


def test_data_files_may_be_named(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml", [f"general={{numbers: {folder}/math.jsonl}}"])
    assert recipe.general == {"numbers": str(folder / "math.jsonl")}


def test_files_of_one_name_take_their_folders_name_too(folder: Path) -> None:
    for name in ("gsm8k", "dolly"):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("{}")
    (folder / "two.yaml").write_text(
        "model: m\ntool: tool.jsonl\ngeneral: [gsm8k/train.jsonl, dolly/train.jsonl]\n"
    )
    assert list(load_recipe(folder / "two.yaml").general) == ["train", "dolly_train"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean learning_rate"),
        ("zzzzzz: 1", "unknown key 'zzzzzz'; the keys are model, tool"),
        ("seed: many", r"seed: wanted a whole number, got 'many' \(str\)"),
        ("seed: 1.5", r"seed: wanted a whole number, got 1.5 \(float\)"),
        ("batch_size: true", r"batch_size: wanted a whole number, got True \(bool\)"),
        ("batch_size: 0", "batch_size: wanted at least 1, got 0"),
        ("top_k: 5", r"top_k: wanted at most num_experts \(4\), got 5"),
        ("top_k: all", "top_k: wanted a whole number or null"),
        ("gradient_checkpointing: 1", "gradient_checkpointing: wanted true or false, got 1"),
        ("learning_rate: fast", "learning_rate: wanted a number, got 'fast'"),
        ("learning_rate: 0", "learning_rate: wanted a number above 0, got 0"),
        ("learning_rate: .nan", "learning_rate: wanted a number above 0, got nan"),
        ("important: 1.2", "important: wanted at most 1"),
        ("unimportant: -0.1", "unimportant: wanted at least 0"),
        ("dtype: float8", "dtype: wanted one of auto, fp32, bf16, fp16, got 'float8'"),
        ("tool: missing.jsonl", "tool.missing: no such file: .*missing.jsonl"),
        ("tool: 3", "tool: wanted a path, a list of paths or name: path, got 3"),
        ("tool: [1]", "tool: wanted paths, got 1"),
        ("tool: []", "tool: wanted tool-call data"),
        ("general: [math.jsonl, math.jsonl]", "general: .*math.jsonl is there twice"),
        ("model:", r"model: wanted text, got None \(NoneType\)"),
    ],
)
def test_a_mistake_names_the_key_what_was_wanted_and_what_was_got(
    folder: Path, line: str, message: str
) -> None:
    refuse(folder, line, match=message)


def test_numbers_in_the_notation_that_yaml_takes_for_text(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text() + "learning_rate: 2e-4\nlora_alpha: 4\n"
    )
    recipe = load_recipe(folder / "recipe.yaml")
    assert (recipe.learning_rate, recipe.lora_alpha) == (2e-4, 4.0)


def test_unreadable_recipes_are_named(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none.yaml"):
        load_recipe(folder / "none.yaml")
    (folder / "broken.yaml").write_text("model: [")
    with pytest.raises(RecipeError, match=r"broken.yaml is not valid YAML"):
        load_recipe(folder / "broken.yaml")
    (folder / "list.yaml").write_text("- model")
    with pytest.raises(RecipeError, match="wanted `key: value` lines"):
        load_recipe(folder / "list.yaml")
    with pytest.raises(RecipeError, match="wanted key=value, got 'seed'"):
        load_recipe(folder / "recipe.yaml", ["seed"])
    (folder / "no_model.yaml").write_text("tool: tool.jsonl\ngeneral: math.jsonl\n")
    with pytest.raises(RecipeError, match="model: wanted model name"):
        load_recipe(folder / "no_model.yaml")


def test_the_template_says_every_key_and_loads_as_the_defaults(folder: Path) -> None:
    text = template("some/model", "tool.jsonl", ["math.jsonl", "chat.jsonl"])
    (folder / "fresh.yaml").write_text(text)
    fresh, plain = load_recipe(folder / "fresh.yaml"), load_recipe(folder / "recipe.yaml")
    assert fresh.differences(plain) == []
    lines = text.splitlines()[1:]
    assert [line.removeprefix("# ").split(":")[0] for line in lines] == KEYS
    assert all("  # " in line for line in lines)


def test_the_resolved_recipe_reads_back_equal_from_anywhere(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml", ["top_k=2", "learning_rate=3e-5"])
    moved = tmp_path / "mövéd run" / "recipe.resolved.yaml"
    moved.parent.mkdir()
    moved.write_text(recipe.dump(), encoding="utf-8")
    again = load_recipe(moved)
    assert again == dataclasses.replace(recipe, output=str(moved.parent))
    assert set(yaml.safe_load(recipe.dump())) == set(KEYS)


def test_differences_name_the_keys_that_matter(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    other = dataclasses.replace(recipe, seed=1, r=4, save_steps=7, output="x", report_to="wandb")
    assert recipe.differences(other) == ["r: 8 → 4", "seed: 0 → 1"]
    moved = dataclasses.replace(recipe, tool={"tool": "/elsewhere/tool.jsonl"})
    assert recipe.differences(moved) == [], "the manifest compares the files' content"


def test_paths_of_a_recipe_made_in_python_hold_from_its_run_directory(
    folder: Path, monkeypatch
) -> None:
    (folder / "weights").mkdir()
    monkeypatch.chdir(folder)
    recipe = Recipe(model="weights", tool="tool.jsonl", general={"m": "math.jsonl"}, output="run")
    assert recipe.data_files["tool.tool"] == folder / "tool.jsonl"
    (folder / "run").mkdir()
    (folder / "run" / "recipe.resolved.yaml").write_text(recipe.dump())
    monkeypatch.chdir("/")
    assert load_recipe(folder / "run" / "recipe.resolved.yaml") == recipe


@pytest.mark.parametrize("key", ["epochs_mi", "router_loss_weight", "learning_rate"])
def test_infinity_is_refused(folder: Path, key: str) -> None:
    refuse(folder, f"{key}: .inf", match=f"{key}: wanted a .*number.*, got inf")
