"""Plain LoRA beside a run: tool data alone, no routing, measured the same way."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from run_cases import adapter_tensors, assert_same_tensors, tiny_recipe

from citi.baseline import compare_with_lora, train_lora_baseline
from citi.run import train

SHORT = {"epochs_rp": 0.0, "epochs_mi": 1.0, "epochs_uco": 0.0, "eval_samples": 2}


def test_plain_lora_is_trained_on_the_tool_data_and_measured_once(tmp_path: Path) -> None:
    files = {"tool": str(tmp_path / "data" / "tool.jsonl")}
    recipe = tiny_recipe(tmp_path, eval_tool=files, **SHORT)
    run = train(recipe)
    assert compare_with_lora(recipe, learning_rate=1e-2)
    assert not compare_with_lora(recipe)
    result = json.loads((run.evaluation / "lora.json").read_text())
    assert result["tool"]["tool"]["n"] == 2
    folder = run.path / "lora"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2], "six tool samples, three a step"
    assert not (folder / "checkpoints").exists()
    tensors = adapter_tensors(folder / "adapter")
    assert all("lora_" in name for name in tensors)
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", recipe.r)


def test_a_trained_baseline_is_loaded_not_trained_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **SHORT)
    model, _ = train_lora_baseline(recipe, tmp_path / "lora", learning_rate=1e-2, epochs=1.0)
    before = adapter_tensors(tmp_path / "lora" / "adapter")
    again, _ = train_lora_baseline(recipe, tmp_path / "lora", epochs=5.0)
    assert_same_tensors(adapter_tensors(tmp_path / "lora" / "adapter"), before)
    for (name, ours), theirs in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
