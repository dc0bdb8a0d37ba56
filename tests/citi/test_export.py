"""MOLoRA with fixed gates as a LoRA and as plain weights; what `citi export` writes and refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from run_cases import adapted_model, tiny_recipe, without_figures
from test_command_line import citi
from torch import nn
from transformers import AutoModelForCausalLM

from citi.adapters import MoLoraLayer
from citi.command_line import export as command
from citi.components import find_components
from citi.data import Message, Sample
from citi.export import (
    FORMS,
    GATES,
    ExportResult,
    convert_to_lora,
    export_run,
    mean_gates,
)
from citi.gates import collect_gates
from citi.run import train
from citi.run_directory import RunDirectory, RunError
from tiny import ARCHITECTURES, tiny_tokenizer

TOKENS = torch.arange(3, 27).reshape(2, 12)
SAMPLES = [
    Sample(name, kind, name, (Message("user", f"{name}?"), Message("assistant", name * 3)))
    for name, kind in (("tool", 1), ("math", 0), ("weather", 1))
]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def names_of(model: nn.Module) -> list[str]:
    """The components with MOLoRA."""
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, MoLoraLayer)
    ]


def with_equal_gates(architecture: str) -> PeftModel:
    """Routers of zeros: the gates of every token are 1 / G, and fixing them loses nothing."""
    model = adapted_model(architecture, num_experts=3, r=2, lora_alpha=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_router" in name:
                parameter.zero_()
            if "modules_to_save" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_gates_are_the_same_for_all_tokens_the_lora_and_its_merge_are_exact(
    architecture: str,
) -> None:
    model = with_equal_gates(architecture)
    wanted = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), wanted, atol=1e-3)
    lora = convert_to_lora(model, dict.fromkeys(names_of(model), (0.25,) * 4))
    config = lora.peft_config["default"]
    assert (config.r, config.lora_alpha) == (6, 15)
    torch.testing.assert_close(logits(lora), wanted, rtol=1e-4, atol=1e-5)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert find_components(merged)


def test_each_expert_has_its_own_gate() -> None:
    model = adapted_model(num_experts=2, r=4, num_unimportant=0)
    layers = [module for module in model.modules() if isinstance(module, MoLoraLayer)]
    factors = [(m.molora_A["default"].detach(), m.molora_B["default"].detach()) for m in layers]
    names = names_of(model)
    lora = convert_to_lora(model, dict.fromkeys(names, (0.2, 0.3, 0.5)))
    for name, (a, b) in zip(names, factors, strict=True):
        layer = lora.base_model.model.get_submodule(name)
        wanted = 0.3 * b[:, :4] @ a[:4] + 0.5 * b[:, 4:] @ a[4:]
        ours = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
        assert layer.scaling["default"] == 2 / 4


def test_mean_gates_of_both_kinds_count_each_as_much() -> None:
    model, tokenizer = adapted_model(), tiny_tokenizer()
    for name, parameter in model.named_parameters():
        if "molora_router" in name:
            nn.init.normal_(parameter)
    layers = collect_gates(model, tokenizer, SAMPLES).layers
    means = {kind: mean_gates(model, tokenizer, SAMPLES, kind) for kind in ("tool", "general")}
    both = mean_gates(model, tokenizer, SAMPLES, "both")
    for name, by_kind in layers.items():
        assert means["tool"][name] == by_kind["tool"] != by_kind["general"]
        assert means["general"][name] == by_kind["general"]
        halves = [sum(pair) / 2 for pair in zip(by_kind["tool"], by_kind["general"], strict=True)]
        assert both[name] == pytest.approx(halves)
        assert sum(both[name]) == pytest.approx(1)
    with pytest.raises(ValueError, match="samples: wanted some of general data, got none"):
        mean_gates(model, tokenizer, SAMPLES[:1], "both")
    with pytest.raises(ValueError, match="kind: wanted one of tool, general, both, got 'chat'"):
        mean_gates(model, tokenizer, SAMPLES, "chat")


def test_gates_that_do_not_fit_and_other_adapters_are_refused_before_anything_is_taken_off() -> (
    None
):
    model = adapted_model()
    before = logits(model)
    with pytest.raises(ValueError, match=r"gates: wanted 3 of model\.layers\S+, got none"):
        convert_to_lora(model, {})
    with pytest.raises(ValueError, match=r"gates: wanted 3 of model\.layers\S+, got 2"):
        convert_to_lora(model, dict.fromkeys(names_of(model), (0.5, 0.5)))
    assert torch.equal(logits(model), before)
    lora = convert_to_lora(model, dict.fromkeys(names_of(model), (0.2, 0.4, 0.4)))
    with pytest.raises(ValueError, match="model: wanted one with a MOLoRA adapter, got"):
        convert_to_lora(lora, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("exported")
    recipe = tiny_recipe(folder)
    with without_figures():
        return train(recipe)


def test_a_lora_loads_where_citi_is_unknown_and_says_what_was_measured(
    run: RunDirectory, tmp_path: Path
) -> None:
    target = tmp_path / "for others"
    result = export_run(run.path, "lora", output=target, gates="both", num_samples=3)
    assert result.directory == target
    assert not result.is_held_out, "the recipe has no evaluation data"
    assert list(result.answer_nll) == ["tool", "math", "chat"]
    for nll in result.answer_nll.values():
        assert nll["tuned"] < nll["base"], "training helped"
        assert nll["exported"] != nll["tuned"]
        assert abs(nll["exported"] - nll["tuned"]) < nll["base"] - nll["tuned"]
    saved = json.loads((target / "export.json").read_text())
    assert saved["answer_nll"] == result.answer_nll
    assert (saved["to"], saved["gates"]) == ("lora", "both")
    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"base = AutoModelForCausalLM.from_pretrained({run.load_recipe().model!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(target)!r}).eval()\n"
        f"AutoTokenizer.from_pretrained({str(target)!r})\n"
        "logits = model(input_ids=torch.arange(3, 27).reshape(2, 12)).logits\n"
        f"torch.save(logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert 'citi' not in sys.modules\n"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert other.returncode == 0, other.stderr[-3000:]
    assert {each.name for each in tmp_path.iterdir()} == {"for others", "logits.pt"}
    plain = tmp_path / "plain"
    export_run(run.path, "hf", output=plain, gates="both", num_samples=3)
    merged = AutoModelForCausalLM.from_pretrained(plain)
    wanted = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert not list(plain.glob("adapter*"))


def test_the_command_prints_the_cost_and_the_folder_and_replaces_an_earlier_export(
    run: RunDirectory,
) -> None:
    for _ in range(2):
        result = citi("export", run.path, "--to", "lora", "--samples", "2")
        assert result.exit_code == 0, result.output
        assert "answer NLL on training data" in result.stdout
        assert f"exported: {run.path / 'export_lora'}" in result.stdout
    assert "(+" in result.stdout or "(-" in result.stdout
    config = json.loads((run.path / "export_lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_somebody_elses_folder_and_unknown_words_are_refused_at_once(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("citi.export.load_run", lambda path: pytest.fail("too late"))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"output: .* holds something else than an export"):
        export_run(run.path, "lora", output=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match="to: wanted one of lora, hf, got 'gguf'"):
        export_run(run.path, "gguf")
    with pytest.raises(ValueError, match="gates: wanted one of tool, general, both, got 'all'"):
        export_run(run.path, "hf", gates="all")
    with pytest.raises(ValueError, match="num_samples: wanted at least 1, got 0"):
        export_run(run.path, "hf", num_samples=0)
    result = citi("export", tmp_path, "--to", "hf")
    assert result.exit_code == 1
    assert "is not a run directory" in result.stderr


def test_a_result_shows_held_out_data_by_name() -> None:
    from rich.console import Console

    nll = {"api": {"base": 2.0, "tuned": 0.5, "exported": 0.75}}
    console = Console(width=100, file=io.StringIO())
    console.print(command.cost_table(ExportResult(Path("x"), nll, True)))
    text = console.file.getvalue()
    assert "answer NLL on held-out data" in text
    assert "0.750  (+0.250)" in text


def test_the_commands_words_are_those_of_the_python_call() -> None:
    assert (tuple(command.Form), tuple(command.Gates)) == (FORMS, GATES)


def test_two_sets_of_one_name_are_both_measured(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    files = {"train": recipe.tool["tool"]}, {"train": recipe.general["math"]}
    recipe = dataclasses.replace(recipe, tool=files[0], general=files[1])
    with without_figures():
        run = train(recipe)
    result = export_run(run.path, "lora", num_samples=2)
    assert list(result.answer_nll) == ["train (tool)", "train (general)"]
