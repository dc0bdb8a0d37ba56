"""A whole run on tiny models: every architecture, every file, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from run_cases import adapter_tensors, assert_same_tensors, tiny_recipe, without_figures
from transformers import AutoModelForCausalLM

from citi.data import Collator, DataError
from citi.manifest import digest_of
from citi.observer import RunObserver
from citi.processes import refuse_sharding
from citi.recipe import load_recipe
from citi.run import evaluate_run, load_run, train
from citi.run_directory import RunDirectory, RunError
from citi.verify import verify_run
from tiny import ARCHITECTURES, MIXTURE_OF_EXPERTS

SHORT = {"epochs_mi": 1.0, "batch_size": 6, "save_steps": 100}
PHASES = ["env", "importance", "plan", "rp", "mi", "uco", "adapter", "eval", "report"]


class Events(RunObserver):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.finished: list[str] = []
        self.skipped: dict[str, str] = {}
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, Mapping]] = []
        self.totals: dict[str, int | None] = {}

    def phase_started(self, phase: str, title: str) -> None:
        self.started.append(phase)

    def phase_finished(self, phase: str, seconds: float) -> None:
        self.finished.append(phase)

    def phase_skipped(self, phase: str, title: str, reason: str) -> None:
        self.skipped[phase] = reason

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        assert total is None or 0 <= done <= total
        self.totals[self.started[-1]] = total

    def metrics(self, stage: str, step: int, values: Mapping) -> None:
        self.steps.append((stage, step, values))

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def _without_figures():
    with without_figures():
        yield


no_figures = pytest.mark.usefixtures("_without_figures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[RunDirectory, Events]:
    """One run with evaluation, watched."""
    folder = tmp_path_factory.mktemp("a run with späces")
    recipe = tiny_recipe(folder, eval_samples=3)
    recipe = dataclasses.replace(
        recipe, eval_tool=recipe.tool, eval_general={"math": recipe.general["math"]}
    )
    events = Events()
    return train(recipe, observer=events), events


def test_a_run_leaves_the_files_that_the_readme_promises(finished) -> None:
    run, _ = finished
    names = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {
        "recipe.resolved.yaml",
        "env.json",
        "manifest.json",
        "metrics.jsonl",
        "importance.json",
        "importance.safetensors",
        "importance.png",
        "plan.json",
        "report.html",
        "eval/base.json",
        "eval/tuned.json",
        "eval/gates.json",
        *(f"{stage}/{n}" for stage in ("stage1_rp", "stage2_mi", "stage3_uco") for n in adapter),
        *(f"adapter/{name}" for name in adapter | tokenizer),
    }


def test_phases_come_in_order_and_are_recorded(finished) -> None:
    run, events = finished
    assert events.started == events.finished == PHASES
    manifest = json.loads(run.manifest_file.read_text())
    assert list(manifest["phases"]) == PHASES
    assert manifest["finished"] == manifest["phases"]["eval"]["finished"]
    assert [manifest["phases"][stage]["steps"] for stage in ("rp", "mi", "uco")] == [6, 12, 6]
    assert events.totals["mi"] == 12
    assert events.totals["importance"]


def test_metrics_hold_a_row_per_step(finished) -> None:
    run, events = finished
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    wanted = [
        (s, n) for s, count in (("rp", 6), ("mi", 12), ("uco", 6)) for n in range(1, count + 1)
    ]
    assert [(row["stage"], row["step"]) for row in rows] == wanted
    assert [(stage, step) for stage, step, _ in events.steps] == wanted
    assert all({"loss", "ce_loss", "router_loss", "learning_rate"} <= row.keys() for row in rows)
    peak = [max(r["learning_rate"] for r in rows if r["stage"] == s) for s in ("rp", "mi", "uco")]
    assert peak == pytest.approx([1e-2, 1e-2, 1e-3])


def test_the_environment_is_recorded(finished) -> None:
    record = json.loads(finished[0].environment_file.read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"] == "cpu"
    assert "torch" in record["backends"]


def test_each_stage_moves_its_own_part_of_the_adapter(finished) -> None:
    run, _ = finished
    rp, mi, uco = (adapter_tensors(run.path / s) for s in ("stage1_rp", "stage2_mi", "stage3_uco"))

    def moved(before, after) -> set[str]:
        different = [name for name in before if not torch.equal(before[name], after[name])]
        return {next((p for p in n.split(".") if "molora" in p), "weight") for n in different}

    assert moved(rp, mi) == {"molora_A", "molora_B", "molora_router"}
    assert moved(mi, uco) == {"weight"}
    assert_same_tensors(uco, adapter_tensors(run.adapter))
    assert all(not rp[name].any() for name in rp if "molora_B" in name)


def test_run_again_skips_everything_and_changes_nothing(finished) -> None:
    run, _ = finished
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    events = Events()
    train(load_recipe(run.recipe_file), observer=events)
    assert list(events.skipped) == PHASES
    assert set(events.skipped.values()) == {"done earlier"}
    assert events.lines == []
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_the_evaluation_compares_the_base_with_the_tuned_model(finished) -> None:
    run, _ = finished
    first = json.loads((run.evaluation / "tuned.json").read_text())
    base = json.loads((run.evaluation / "base.json").read_text())
    assert base["general"]["math"]["nll"] != first["general"]["math"]["nll"]
    assert base["tool"]["tool"]["n"] == 3
    again = evaluate_run(run.path)
    assert again["tuned"].general["math"]["nll"] == first["general"]["math"]["nll"]
    assert again["base"].general["math"]["nll"] == base["general"]["math"]["nll"]
    model, _ = load_run(run.path)
    with model.disable_adapter():
        assert model.base_model is not None


def test_a_changed_recipe_names_the_changed_keys(finished) -> None:
    run, _ = finished
    with pytest.raises(RunError, match=r"r: 2 → 4\n.*seed: 0 → 3\nGive another output"):
        train(load_recipe(run.recipe_file, ["seed=3", "r=4"]))
    train(load_recipe(run.recipe_file, ["save_steps=7"]))


@no_figures
def test_changed_data_names_the_file(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, epochs_rp=0.0, epochs_mi=0.0, epochs_uco=0.0)
    train(recipe)
    path = Path(recipe.general["chat"])
    path.write_text(path.read_text().replace("nice", "cold"))
    with pytest.raises(RunError, match=r"general.chat: the content of .*chat.jsonl changed"):
        train(recipe)


@no_figures
def test_an_edited_resolved_recipe_is_noticed(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, epochs_rp=0.0, epochs_mi=0.0, epochs_uco=0.0)
    run = train(recipe)
    written = run.recipe_file.read_text()
    run.recipe_file.write_text(written.replace("delta: 0.95", "delta: 0.5"))
    with pytest.raises(RunError, match=r"recipe.resolved.yaml was edited after the run began"):
        train(load_recipe(run.recipe_file))
    train(recipe)
    assert run.recipe_file.read_text() == written


@no_figures
def test_a_run_of_an_older_version_goes_on_where_new_keys_have_their_defaults(
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(tmp_path, epochs_rp=0.0, epochs_mi=0.0, epochs_uco=0.0)
    run = train(recipe)
    values = yaml.safe_load(run.recipe_file.read_text())
    del values["base_kl_weight"]
    run.recipe_file.write_text(yaml.safe_dump(values))
    manifest = json.loads(run.manifest_file.read_text())
    known = {key: value for key, value in recipe.identity().items() if key in values}
    manifest["recipe_sha256"] = digest_of(known)
    run.manifest_file.write_text(json.dumps(manifest))
    older = run.recipe_file.read_text()
    with pytest.raises(RunError, match=r"base_kl_weight: 0.0 → 1.0"):
        train(dataclasses.replace(recipe, base_kl_weight=1.0))
    assert run.recipe_file.read_text() == older
    assert not verify_run(run.path, with_model=False)[0].problem
    train(recipe)
    assert "base_kl_weight" in run.recipe_file.read_text()
    assert run.load_manifest().recipe_sha256 == digest_of(recipe.identity())


@no_figures
def test_stages_without_epochs_or_components_are_skipped_with_the_reason(tmp_path: Path) -> None:
    events = Events()
    recipe = tiny_recipe(tmp_path, epochs_rp=0.0, unimportant=0.0, **(SHORT | {"epochs_mi": 0.5}))
    run = train(recipe, observer=events)
    assert events.skipped == {
        "rp": "its epochs are 0",
        "uco": "the plan unfreezes no unimportant component",
        "eval": "the recipe has no eval_tool and no eval_general",
    }
    assert_same_tensors(adapter_tensors(run.path / "stage2_mi"), adapter_tensors(run.adapter))
    assert not (run.path / "stage1_rp").exists()


def test_a_missing_report_extra_does_not_fail_the_run(tmp_path: Path, monkeypatch) -> None:
    import citi.report
    from citi.importance.ability_scores import AbilityScores

    def refuse(*args, **kwargs):
        raise ImportError("figures need matplotlib: pip install 'citi-kernels[report]'")

    recipe = tiny_recipe(tmp_path, epochs_rp=0.0, epochs_mi=0.0, epochs_uco=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(citi.report, "build_report", refuse)
        patch.setattr(AbilityScores, "plot", refuse)
        events = Events()
        run = train(recipe, observer=events)
    said = [line for line in events.lines if "pip install 'citi-kernels[report]'" in line]
    assert len(said) == 2
    assert said[-1].endswith(f"citi report {run.path}")
    assert not run.report_file.exists()
    train(recipe)
    assert run.report_file.is_file()


@no_figures
def test_a_run_in_bf16_keeps_fp32_adapters_and_bf16_copies(tmp_path: Path) -> None:
    run = train(tiny_recipe(tmp_path, dtype="bf16", **SHORT))
    tensors = adapter_tensors(run.adapter)
    dtypes = {name: t.dtype for name, t in tensors.items()}
    assert {t for n, t in dtypes.items() if "molora" in n} == {torch.float32}
    assert {t for n, t in dtypes.items() if "molora" not in n} == {torch.bfloat16}
    model, tokenizer = load_run(run.path)
    assert model.get_base_model().dtype == torch.bfloat16
    model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=2)


def test_fp16_on_a_cpu_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype: fp16 trains on a GPU only"):
        train(tiny_recipe(tmp_path, dtype="fp16"))


@no_figures
def test_activation_checkpointing_ends_at_the_same_weights(tmp_path: Path) -> None:
    runs = []
    for enabled in (False, True):
        settings = {"gradient_checkpointing": enabled, "output": str(tmp_path / str(enabled))}
        runs.append(adapter_tensors(train(tiny_recipe(tmp_path, **SHORT, **settings)).adapter))
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=1e-3, atol=1e-5)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run directory"):
        load_run(tmp_path)
    recipe = tiny_recipe(tmp_path)
    Path(recipe.tool["tool"]).write_text("not json\n")
    with pytest.raises(DataError, match=r"tool.jsonl:1"):
        train(recipe)
    with pytest.raises(RunError, match=r"has no adapter yet; finish it: citi train"):
        load_run(recipe.output)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURE_OF_EXPERTS])
@no_figures
def test_every_architecture_goes_all_the_way(architecture: str, tmp_path: Path) -> None:
    """Importance, plan, all stages, save, load in a fresh base, generate."""
    run = train(tiny_recipe(tmp_path, architecture, **SHORT))
    phases = json.loads(run.manifest_file.read_text())["phases"]
    assert [phases[stage]["steps"] for stage in ("rp", "mi", "uco")] == [3, 3, 3]
    model, tokenizer = load_run(run.path)
    base = AutoModelForCausalLM.from_pretrained(load_recipe(run.recipe_file).model).eval()
    prompt = tokenizer("Weather in Rome?", return_tensors="pt")
    with torch.no_grad():
        plain, tuned = base(**prompt).logits, model(**prompt).logits
        with model.disable_adapter():
            assert torch.equal(model(**prompt).logits, plain)
        again = PeftModel.from_pretrained(base, str(run.adapter))(**prompt).logits
    assert torch.equal(tuned, again)
    assert not torch.equal(tuned, plain)
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


@no_figures
@pytest.mark.parametrize("key", ["tool", "eval_tool"])
def test_a_broken_data_file_is_told_before_any_work_and_may_be_mended(
    key: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{broken\n")
    settings = {"epochs_rp": 0.34, "epochs_mi": 0.0, "epochs_uco": 0.0, "judged_samples": 0}
    recipe = tiny_recipe(tmp_path, **({key: {"mine": str(broken)}} | settings))
    events = Events()
    with pytest.raises(DataError, match=r"broken\.jsonl:1"):
        train(recipe, observer=events)
    assert "importance" not in events.finished
    broken.write_text((tmp_path / "data" / "tool.jsonl").read_text())
    run = train(recipe)
    assert run.load_manifest().finished


@no_figures
def test_a_run_made_in_python_with_relative_paths_goes_on_from_anywhere(
    tmp_path: Path, monkeypatch
) -> None:
    made = tiny_recipe(tmp_path, epochs_rp=0.34, epochs_mi=0.0, epochs_uco=0.0)
    monkeypatch.chdir(tmp_path)
    data = {"tool": {"tool": "data/tool.jsonl"}, "general": {"math": "data/math.jsonl"}}
    run = train(dataclasses.replace(made, model="model-llama", output="run", **data))
    monkeypatch.chdir("/")
    events = Events()
    train(load_recipe(run.recipe_file), observer=events)
    assert not events.started


def test_a_model_path_that_is_no_directory_is_named() -> None:
    from citi.base_model import load_base

    with pytest.raises(ValueError, match=r"model: no such directory: \./nowhere"):
        load_base("./nowhere")


def test_training_data_of_the_caller_replaces_the_mix_of_every_stage(tmp_path: Path) -> None:
    asked = []

    def training_data(stage, tokenizer):
        asked.append(stage.name)
        item = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "task_type": len(asked) % 2}
        return [item] * 6, Collator(tokenizer.pad_token_id)

    recipe = tiny_recipe(tmp_path, epochs_mi=1.0)
    with without_figures():
        run = train(recipe, training_data=training_data)
    assert asked == ["rp", "mi", "uco"]
    phases = run.load_manifest().phases
    assert [phases[name]["steps"] for name in asked] == [2, 2, 2], "six samples, three a step"


@pytest.mark.parametrize("value", ["true", "1", "True"])
@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_case_40_a_launch_that_spreads_parameters_is_refused_before_anything(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, **SHORT)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name} is set.*--multi_gpu"):
        train(recipe)
    assert not Path(recipe.output).exists()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
    refuse_sharding()
