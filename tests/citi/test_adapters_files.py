"""Saved adapters: whole, bitwise, and refused with one named error when anything is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from citi.adapters import AdapterError, MoLoraConfig, MoLoraLayer, load_adapter
from citi.adapters.adapter_file import CONFIG_FILE, WEIGHTS_FILE, read_adapter_shapes
from citi.adapters.model import AUTO_MODEL_WANTS
from citi.fingerprint import model_fingerprint
from tiny import ARCHITECTURES, tiny_model

AUTO_MODEL_LOADS_ALL = all(
    Version(version(package)) >= Version(wanted) for package, wanted in AUTO_MODEL_WANTS.items()
)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
IMPORTANT = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
UNIMPORTANT = ["model.layers.1.mlp.up_proj"]
GPT2 = (["transformer.h.0.attn.c_attn"], ["transformer.h.1.mlp.c_fc"])
PHI3 = (["model.layers.0.self_attn.qkv_proj"], ["model.layers.1.mlp.gate_up_proj"])


def adapted(base, **settings):
    """A PeftModel with live experts and changed saved modules."""
    kind = base.config.model_type
    targets, saved = {"gpt2": GPT2, "phi3": PHI3}.get(kind, (IMPORTANT, UNIMPORTANT))
    config = MoLoraConfig(
        **{"target_modules": targets, "modules_to_save": saved, "task_type": "CAUSAL_LM"} | settings
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model.eval()


@pytest.fixture
def saved(tmp_path) -> Path:
    """An adapter of the tiny Llama, on disk."""
    directory = tmp_path / "adapter"
    adapted(tiny_model()).save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes) -> None:
    path = directory / CONFIG_FILE
    settings = json.loads(path.read_text())
    settings.update(changes)
    path.write_text(json.dumps(settings))


def edit_weights(directory: Path, edit) -> None:
    """Changes the tensors and drops the hash, so that only the content is judged."""
    tensors = load_file(directory / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    edit_config(directory, weights_sha256=None)


def assert_untouched(base) -> None:
    assert not any(isinstance(module, MoLoraLayer) for module in base.modules())
    assert torch.equal(base(IDS).logits, tiny_model()(IDS).logits)


LOADERS = {
    "from_pretrained": lambda base, path: PeftModel.from_pretrained(base, path),
    "load_adapter": lambda base, path: load_adapter(base, path),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_case_48_saved_and_loaded_is_bitwise_equal(architecture, loader, tmp_path):
    model = adapted(tiny_model(architecture))
    model.save_pretrained(tmp_path)
    loaded = loader(tiny_model(architecture), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_case_48_fp32_adapters_on_a_16_bit_base_load_bitwise(dtype, low_cpu_mem_usage, tmp_path):
    model = adapted(tiny_model(dtype=dtype))
    model.save_pretrained(tmp_path)
    base = tiny_model(dtype=dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def test_case_48_a_fresh_process_loads_both_ways_bitwise(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = adapted(base, base_fingerprint=model_fingerprint(base))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model(IDS).logits, tmp_path / "logits.pt")
    code = f"""
import torch, citi.adapters
from peft import PeftModel
from transformers import AutoModelForCausalLM
place = {str(tmp_path)!r}
ids = torch.tensor({IDS.tolist()})
wanted = torch.load(place + "/logits.pt")
base = AutoModelForCausalLM.from_pretrained(place + "/base")
by_peft = PeftModel.from_pretrained(base, place + "/adapter").eval()
assert torch.equal(by_peft(ids).logits, wanted)
if {AUTO_MODEL_LOADS_ALL}:
    by_transformers = AutoModelForCausalLM.from_pretrained(place + "/adapter").eval()
    assert torch.equal(by_transformers(ids).logits, wanted)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "gpt2"])
def test_auto_model_loads_an_adapter_directory_whole_or_refuses(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval())
    model.save_pretrained(tmp_path / "adapter")
    if not AUTO_MODEL_LOADS_ALL:
        with pytest.raises(AdapterError, match=r"load a part .* PeftModel\.from_pretrained"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        return
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("package", AUTO_MODEL_WANTS)
def test_auto_model_of_a_version_that_loses_tensors_is_refused(package, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(
        tmp_path / "adapter"
    )
    monkeypatch.setitem(AUTO_MODEL_WANTS, package, "99.0")
    with pytest.raises(AdapterError, match=rf"{package} .*wants >= 99\.0.* load a part"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_second_saved_adapter_joins_a_model_and_keeps_its_own_values(tmp_path):
    first, second = adapted(tiny_model()), adapted(tiny_model(), r=3, num_experts=2)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = load_adapter(tiny_model(), tmp_path / "first")
    assert load_adapter(model, tmp_path / "second", adapter_name="other") is model
    assert torch.equal(model(IDS).logits, second(IDS).logits)
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first(IDS).logits)
    with pytest.raises(ValueError, match="the model has 'other' already"):
        load_adapter(model, tmp_path / "second", adapter_name="other")


def test_is_trainable_makes_exactly_the_adapter_trainable(saved):
    loaded = load_adapter(tiny_model(), saved, is_trainable=True)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    wanted = {n for n, _ in loaded.named_parameters() if "molora_" in n or "modules_to_save" in n}
    assert trainable == wanted


def test_case_54_only_safetensors_json_and_the_card_are_written(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        [CONFIG_FILE, WEIGHTS_FILE, "README.md"]
    )


def test_case_54_pickled_weights_are_refused(tmp_path):
    model = adapted(tiny_model())
    with pytest.raises(ValueError, match=r"adapter_model.bin: .* safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / CONFIG_FILE).exists()


def test_equal_adapters_give_equal_files(saved, tmp_path):
    adapted(tiny_model()).save_pretrained(tmp_path / "again")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


KEY = f"base_model.model.{IMPORTANT[0]}.molora_A"
SAVED_KEY = f"base_model.model.{UNIMPORTANT[0]}.weight"
BROKEN = {
    "missing": (lambda t: t.pop(KEY), rf"missing: {IMPORTANT[0]}.molora_A"),
    "missing_saved_module": (lambda t: t.pop(SAVED_KEY), rf"missing: {UNIMPORTANT[0]}.weight"),
    "extra": (
        lambda t: t.update({"base_model.model.model.layers.9.x.molora_A": torch.ones(2, 2)}),
        r"extra: model.layers.9.x.molora_A",
    ),
    "extra_base_weight": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
        r"extra: model.norm.weight",
    ),
    "renamed": (
        lambda t: t.update({KEY.replace("_A", "_C"): t.pop(KEY)}),
        r"missing: .*molora_A; extra: .*molora_C",
    ),
    "other_shape": (
        lambda t: t.update({KEY: t[KEY][:16].clone()}),
        r"another shape: .*molora_A \(wanted \(32, 32\), got \(16, 32\)\)",
    ),
    "other_shape_saved_module": (
        lambda t: t.update({SAVED_KEY: torch.ones(3, 3)}),
        rf"another shape: {UNIMPORTANT[0]}.weight",
    ),
    "wrong_dtype": (
        lambda t: t.update({KEY: t[KEY].to(torch.int8)}),
        r"must be F64, F32, F16, BF16, got .*molora_A \(I8\)",
    ),
    "empty": (lambda t: t.clear(), r"missing: .*and .* more|missing: "),
}


@pytest.mark.parametrize(("edit", "words"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_case_48_and_53_wrong_tensors_are_named_and_the_model_is_untouched(
    loader, edit, words, saved
):
    edit_weights(saved, edit)
    base = tiny_model()
    with pytest.raises(AdapterError, match=words) as raised:
        loader(base, saved)
    assert str(saved / WEIGHTS_FILE) in str(raised.value)
    assert_untouched(base)


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_case_48_a_changed_configuration_is_seen_in_the_weights(loader, saved):
    edit_config(saved, num_experts=2)
    with pytest.raises(AdapterError, match=r"molora_router \(wanted \(3, 32\), got \(5, 32\)\)"):
        loader(tiny_model(), saved)


def test_case_48_resuming_in_place_is_strict_and_writes_nothing(saved):
    model = adapted(tiny_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for case, words in (
        ("missing", r"missing: .*q_proj\.molora_A\.default"),
        ("extra", r"extra: .*layers\.9\.x\.molora_A"),
        ("other_shape", r"another shape: .*q_proj\.molora_A\.default"),
        ("other_shape_saved_module", r"another shape: .*up_proj\.modules_to_save\.default\.weight"),
    ):
        adapted(tiny_model()).save_pretrained(saved)
        edit_weights(saved, BROKEN[case][0])
        with pytest.raises(AdapterError, match=words):
            model.load_adapter(saved, "default", is_trainable=True)  # what Trainer does
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("with_hash", [True, False])
def test_case_53_truncated_at_every_64th_byte_is_one_named_error(saved, with_hash):
    path = saved / WEIGHTS_FILE
    whole = path.read_bytes()
    sha256 = json.loads((saved / CONFIG_FILE).read_text())["weights_sha256"]
    for size in range(0, len(whole), 64):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterError) as raised:
            read_adapter_shapes(saved, sha256 if with_hash else None)
        assert str(path) in str(raised.value)
    path.write_bytes(whole)
    assert len(read_adapter_shapes(saved, sha256)) == 7


@pytest.mark.parametrize("with_hash", [True, False])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_case_53_truncated_weights_leave_the_model_untouched(loader, saved, with_hash):
    path = saved / WEIGHTS_FILE
    whole = path.read_bytes()
    if not with_hash:
        edit_config(saved, weights_sha256=None)
    base = tiny_model()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterError, match=WEIGHTS_FILE):
            loader(base, saved)
    assert_untouched(base)


def test_case_53_a_flipped_bit_is_found(saved):
    path = saved / WEIGHTS_FILE
    whole = path.read_bytes()
    for place in range(8, len(whole), len(whole) // 20):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(AdapterError, match="changed since it was saved"):
            load_adapter(tiny_model(), saved)


def test_case_53_a_broken_or_unknown_configuration_is_named(saved):
    path = saved / CONFIG_FILE
    whole = path.read_bytes()
    base = tiny_model()
    for size in range(0, len(whole) - 1, 64):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterError, match=CONFIG_FILE):
            load_adapter(base, saved)
    path.write_bytes(whole)
    edit_config(saved, rank_of_experts=3)
    for loader in LOADERS.values():
        with pytest.raises(AdapterError, match=r"unknown keys \['rank_of_experts'\]"):
            loader(base, saved)
    assert_untouched(base)


def test_case_53_missing_files_are_named(saved, tmp_path):
    (saved / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match=WEIGHTS_FILE):
        load_adapter(tiny_model(), saved)
    (saved / CONFIG_FILE).unlink()
    with pytest.raises(AdapterError, match=CONFIG_FILE):
        load_adapter(tiny_model(), saved)
    with pytest.raises(AdapterError, match="nowhere: no such directory"):
        load_adapter(tiny_model(), tmp_path / "nowhere")


def test_case_49_another_base_model_is_refused_by_config_and_by_weights(tmp_path):
    base = tiny_model()
    fingerprint = model_fingerprint(base)
    adapted(base, base_fingerprint=fingerprint).save_pretrained(tmp_path)
    other_weights, other_config = tiny_model(seed=1), tiny_model(num_hidden_layers=4)
    for other, words in ((other_weights, "weights_sha256"), (other_config, "num_components")):
        for loader in LOADERS.values():
            with pytest.raises(AdapterError, match=f"another base model, by .*{words}"):
                loader(other, tmp_path)
        assert not any(isinstance(module, MoLoraLayer) for module in other.modules())
    with pytest.raises(AdapterError, match="another base model"):
        adapted(tiny_model(seed=1), base_fingerprint=fingerprint)


def test_case_49_the_base_is_recognised_under_another_adapter_and_as_bf16(tmp_path):
    fingerprint = model_fingerprint(tiny_model())
    adapted(tiny_model(), base_fingerprint=fingerprint).save_pretrained(tmp_path)
    model = load_adapter(adapted(tiny_model()), tmp_path, adapter_name="other")
    assert torch.equal(model(IDS).logits, load_adapter(tiny_model(), tmp_path)(IDS).logits)
    assert isinstance(model.peft_config["default"], MoLoraConfig)
    load_adapter(tiny_model(dtype=torch.bfloat16), tmp_path)
    wrong = adapted(tiny_model(seed=1))
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(wrong, tmp_path, adapter_name="other")
    assert list(wrong.peft_config) == ["default"]


def test_case_49_a_base_that_is_not_in_memory_is_a_named_error(tmp_path):
    fingerprint = model_fingerprint(tiny_model())
    base = tiny_model().to("meta")
    with pytest.raises(AdapterError, match=r"cannot be compared: .*meta"):
        get_peft_model(base, MoLoraConfig(target_modules=IMPORTANT, base_fingerprint=fingerprint))


def test_a_resized_vocabulary_is_saved_along_and_accepted(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(310)
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(310)
    loaded = load_adapter(other, tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
