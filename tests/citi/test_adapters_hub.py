"""Adapters from the hub: its local copy is checked as a directory is."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from peft import PeftModel
from run_cases import adapted_model

from citi.adapters import AdapterError, MoLoraConfig
from tiny import tiny_model

NAME = "somebody/adapter"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub copy of an adapter, and no network."""
    repository = tmp_path / "models--somebody--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    adapted_model().save_pretrained(repository / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def weights_of(cache: Path) -> Path:
    return next(cache.rglob("adapter_model.safetensors"))


def test_it_loads_as_it_was_saved_on_every_supported_version(cache, monkeypatch) -> None:
    ids = torch.randint(3, 250, (2, 7))
    wanted = adapted_model().eval()(ids).logits
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    model = PeftModel.from_pretrained(tiny_model(), NAME)
    assert torch.equal(model(ids).logits, wanted)


def test_case_53_a_flipped_bit_is_named(cache) -> None:
    file = weights_of(cache)
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40
    file.write_bytes(bytes(data))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: cut short or changed"):
        PeftModel.from_pretrained(tiny_model(), NAME)


def test_what_is_not_there_is_said_as_peft_says_it(cache) -> None:
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'somebody/other'"):
        MoLoraConfig.from_pretrained("somebody/other")
    weights_of(cache).unlink()
    assert MoLoraConfig.from_pretrained(NAME).take_file_shapes() is None


def test_a_second_adapter_of_the_same_configuration_is_added() -> None:
    model = adapted_model()
    model.add_adapter("b", model.peft_config["default"])
    assert sorted(model.peft_config) == ["b", "default"]
    with pytest.raises(ValueError, match="named 'b' already"):
        model.base_model.inject_adapter(model.base_model.model, "b")
