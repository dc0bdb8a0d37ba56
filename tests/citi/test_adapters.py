"""The PEFT method `molora` on every architecture: inject, train, switch, take off."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.import_utils import is_peft_greater_or_equal

from citi.adapters import MoLoraConfig, MoLoraLayer, routing_names
from citi.adapters.layer import feature_sizes
from citi_kernels.layers.routing import RoutingContext
from citi_kernels.ops.router_loss import router_loss
from tiny import ARCHITECTURES, MIXTURE_OF_EXPERTS, tiny_model

MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
TASKS = torch.tensor([1, 0])


@dataclass
class FakePlan:
    """What `from_plan` reads of a plan."""

    important: list[str]
    unimportant: list[str]
    fingerprint: dict = field(default_factory=dict)


def component_names(model) -> list[str]:
    """Linear components but the head, in model order."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if feature_sizes(m) and m is not head]


def plan_for(model, num_important: int = 4, num_unimportant: int = 2) -> FakePlan:
    names = component_names(model)
    return FakePlan(names[1 : 1 + num_important], names[-num_unimportant:])


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": MASK}


def make_live(model, adapter: str = "default", seed: int = 1):
    """Experts and saved modules that differ from the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f"molora_B.{adapter}") or f".modules_to_save.{adapter}." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def adapted(architecture: str = "llama", *, live: bool = True, **settings):
    """A tiny base, its logits, and the PeftModel made of it."""
    base = tiny_model(architecture)
    logits = base(**inputs()).logits.detach()
    config = MoLoraConfig.from_plan(plan_for(base), **settings)
    model = get_peft_model(base, config)
    return (make_live(model) if live else model), logits


def run_step(model, optimizer=None) -> torch.Tensor:
    context = RoutingContext.from_attention_mask(MASK, task_types=TASKS)
    batch = inputs()
    labels = batch["input_ids"].masked_fill(MASK == 0, -100)
    with context:
        loss = model(**batch, labels=labels).loss
    for gate_sums in context.stacked():
        loss = loss + 0.01 * router_loss(gate_sums, context.token_counts, TASKS).sum()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURE_OF_EXPERTS])
def test_case_51_fresh_and_disabled_adapters_give_the_base_output_bitwise(architecture):
    model, logits = adapted(architecture, live=False)
    assert torch.equal(model(**inputs()).logits, logits)
    make_live(model)
    assert not torch.equal(model(**inputs()).logits, logits)
    with model.disable_adapter():
        assert torch.equal(model(**inputs()).logits, logits)
    assert not torch.equal(model(**inputs()).logits, logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_steps_move_adapters_and_saved_modules_and_nothing_else(architecture):
    model, _ = adapted(architecture, live=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {n for n in before if ".molora_" in n or ".modules_to_save." in n}
    assert trainable == wanted
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [run_step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == wanted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_with_the_cache_equals_generation_without(architecture):
    model, _ = adapted(architecture)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs(), use_cache=True, **settings)
    assert cached.shape == (2, 13)
    assert torch.equal(cached, model.generate(**inputs(), use_cache=False, **settings))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_case_52_unload_restores_the_original_modules(architecture):
    base = tiny_model(architecture)
    logits = base(**inputs()).logits
    modules = dict(base.named_modules())
    model = make_live(get_peft_model(base, MoLoraConfig.from_plan(plan_for(base))))
    restored = model.unload()
    assert restored is base
    assert not hasattr(restored, "peft_config")
    after = dict(restored.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert torch.equal(restored(**inputs()).logits, logits)


def test_two_adapters_switch_add_up_and_go_one_by_one():
    model, logits = adapted()
    first = model(**inputs()).logits
    names = component_names(tiny_model())
    model.add_adapter("second", MoLoraConfig(r=3, num_experts=2, target_modules=names[:3]))
    make_live(model, "second", seed=2)
    assert torch.equal(model(**inputs()).logits, first)
    model.set_adapter("second")
    second = model(**inputs()).logits
    assert not torch.equal(second, first)
    assert not torch.equal(second, logits)
    # modules_to_save cannot be active twice; the experts can.
    model.base_model.set_adapter(["second", "default"])
    both = model(**inputs()).logits
    assert not torch.equal(both, first)
    assert not torch.equal(both, second)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(**inputs()).logits, first)
    assert not any("second" in name for name, _ in model.named_parameters())
    model.delete_adapter("default")
    assert not any("molora" in name for name, _ in model.named_parameters())
    assert torch.equal(model.base_model.model(**inputs()).logits, logits)


def test_several_active_adapters_are_the_base_plus_each_update():
    names = component_names(tiny_model())[:1]
    model = get_peft_model(tiny_model(), MoLoraConfig(target_modules=names, num_experts=2, r=2))
    model.add_adapter("other", MoLoraConfig(target_modules=names, num_experts=3, r=4, top_k=1))
    make_live(model)
    make_live(model, "other", seed=5)
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    x = torch.randn(4, 32)
    base = layer.base_layer(x)
    updates = []
    for adapter in ("default", "other"):
        layer.set_adapter(adapter)
        updates.append(layer(x) - base)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), base + updates[0] + updates[1])
    assert updates[1].abs().max() > 0


def test_deepcopy_of_a_model_with_a_live_adapter_is_equal_and_apart():
    model, _ = adapted()
    run_step(model)
    copied = copy.deepcopy(model)
    expected = model(**inputs()).logits
    assert torch.equal(copied(**inputs()).logits, expected)
    make_live(copied, seed=9)
    assert torch.equal(model(**inputs()).logits, expected)
    assert not torch.equal(copied(**inputs()).logits, expected)
    with pytest.raises(ValueError, match="extra"):  # the copy checks what it loads, too
        copied.load_state_dict({"base_model.model.nowhere.molora_A.default": torch.ones(1)}, False)


def test_case_28_pickle_and_to_dtype_of_an_adapted_model():
    model, _ = adapted()
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(**inputs()).logits, model(**inputs()).logits)
    assert copied.peft_config["default"] == model.peft_config["default"]
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    run_step(model)


def test_case_50_a_tied_head_stays_tied(tmp_path):
    model, logits = adapted("gemma", live=False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    run_step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    model.save_pretrained(tmp_path)
    assert head.weight is embedding.weight
    loaded = PeftModel.from_pretrained(tiny_model("gemma"), tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    restored = loaded.unload()
    assert restored.get_output_embeddings().weight is restored.get_input_embeddings().weight
    assert torch.equal(restored(**inputs()).logits, logits)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_case_41_on_a_16_bit_base_adapters_and_their_gradients_are_fp32(
    architecture, dtype, autocast_adapter_dtype
):
    base = tiny_model(architecture, dtype=dtype)
    logits = base(**inputs()).logits
    config = MoLoraConfig.from_plan(plan_for(base))
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    assert torch.equal(model(**inputs()).logits, logits)
    make_live(model)
    run_step(model)  # without autocast
    tensors = {name: p for name, p in model.named_parameters() if ".molora_" in name}
    assert {p.dtype for p in tensors.values()} == {torch.float32}
    assert {p.grad.dtype for p in tensors.values()} == {torch.float32}
    assert all(p.grad.abs().sum() > 0 for name, p in tensors.items() if "molora_A" in name)


def test_case_21_autocast_on_an_fp32_base_runs_both_ways():
    model, _ = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run_step(model)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_merging_is_refused_with_the_reason():
    model, _ = adapted()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="gates depend on the token"):
            merge()
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    with pytest.raises(ValueError, match="gates depend on the token"):
        layer.merge()


def test_case_52_injection_is_per_instance_and_twice_raises():
    other = tiny_model()
    base = tiny_model()
    plan = plan_for(base)
    model = make_live(get_peft_model(base, MoLoraConfig.from_plan(plan)))
    assert not any(isinstance(m, MoLoraLayer) for m in other.modules())
    expected = model(**inputs()).logits
    for again in (base, model):
        with pytest.raises(ValueError, match="carries a MOLoRA adapter named 'default' already"):
            get_peft_model(again, MoLoraConfig.from_plan(plan))
    assert torch.equal(model(**inputs()).logits, expected)
    assert model.peft_config["default"] is base.peft_config["default"]


def test_case_52_zero_matches_and_no_target_raise():
    with pytest.raises(ValueError, match=r"not found in the base model|No `?modules"):
        get_peft_model(tiny_model(), MoLoraConfig(target_modules=["nowhere_proj"]))
    with pytest.raises(ValueError, match="target_modules must name the components"):
        get_peft_model(tiny_model(), MoLoraConfig())


def test_a_name_that_matches_nothing_is_refused_beside_others_that_match():
    right, wrong = component_names(tiny_model())[0], "model.layers.0.self_attn.q_porj"
    for settings in (
        {"target_modules": [right, wrong]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.layers.9.mlp.up_proj"]},
    ):
        base = tiny_model()
        with pytest.raises(ValueError, match=r"q_porj'\] not found|layers.9.*not found"):
            get_peft_model(base, MoLoraConfig(**settings))
        assert not any(isinstance(m, MoLoraLayer) for m in base.modules())


def test_a_component_adapted_by_one_adapter_and_saved_by_another_is_refused():
    model, _ = adapted()
    plan = plan_for(model.get_base_model())
    config = model.peft_config["default"]
    (adapted_name, *_), (saved_name, *_) = sorted(config.target_modules), config.modules_to_save
    before, logits = [n for n, _ in model.named_modules()], model(**inputs()).logits
    for settings in (
        {"target_modules": [saved_name]},
        {"target_modules": ["model.layers.0.mlp.down_proj"], "modules_to_save": [adapted_name]},
    ):
        with pytest.raises(ValueError, match=r"must not share a component .* already"):
            model.add_adapter("other", MoLoraConfig(task_type="CAUSAL_LM", **settings))
        assert [n for n, _ in model.named_modules()] == before
        assert torch.equal(model(**inputs()).logits, logits)
    model.add_adapter("other", MoLoraConfig.from_plan(plan, r=3))


def test_a_batch_of_mixed_adapters_is_refused_and_not_answered_by_one():
    model, _ = adapted()
    with pytest.raises(ValueError, match="no batches of mixed adapters"):
        model(**inputs(), adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="no batches of mixed adapters"):
        model.generate(**inputs(), adapter_names=["default", "__base__"], max_new_tokens=1)


def test_full_names_match_one_layer_only_also_when_there_are_many():
    base = tiny_model(num_hidden_layers=12)
    names = [n for n in component_names(base) if ".layers.1." in n or ".layers.3." in n]
    names += [n for n in component_names(base) if ".layers.10." in n and n.endswith("proj")]
    saved = [n for n in component_names(base) if ".layers.2." in n]
    assert len(names) >= 20  # from here on PEFT shortens the list
    plan = FakePlan(names, saved)
    model = get_peft_model(base, MoLoraConfig.from_plan(plan))
    found = routing_names(model).values()
    assert sorted(found) == sorted(names)
    kept = [n for n, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    assert sorted(kept) == sorted(saved)


def test_from_plan_takes_names_and_fingerprint_and_lets_molora_win():
    plan = FakePlan(["a.q_proj", "a.k_proj"], ["a.k_proj", "a.up_proj"], {"model_type": "llama"})
    config = MoLoraConfig.from_plan(plan, num_experts=2, r=4, lora_alpha=8)
    assert config.target_modules == {"a.q_proj", "a.k_proj"}
    assert config.modules_to_save == ["a.up_proj"]
    assert config.base_fingerprint == {"model_type": "llama"}
    assert config.task_type == "CAUSAL_LM"
    assert config.settings().scaling == 2.0
    assert MoLoraConfig.from_plan(FakePlan(["a"], [])).modules_to_save is None
    with pytest.raises(ValueError, match="must have an important component"):
        MoLoraConfig.from_plan(FakePlan([], ["a"]))


def test_a_routing_context_collects_every_adapted_component_by_name():
    model, _ = adapted()
    with RoutingContext.from_attention_mask(MASK) as context:
        model(**inputs())
    names = routing_names(model)
    assert [names[key] for key in context.gate_sums] == plan_for(tiny_model()).important
    (stacked,) = context.stacked()
    counts = context.token_counts.float().expand(4, 2)
    torch.testing.assert_close(stacked.sum(-1), counts)


def test_gradient_checkpointing_changes_no_gradient_and_reentrant_is_refused():
    gradients = []
    for settings in (None, {"use_reentrant": False}):
        model, _ = adapted()
        model.train()
        if settings:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            model.enable_input_require_grads()
        run_step(model)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run_step(model)


def test_dropout_trains_and_is_off_in_evaluation():
    model, _ = adapted(lora_dropout=0.5)
    first = model(**inputs()).logits
    assert torch.equal(model(**inputs()).logits, first)
    model.train()
    assert not torch.equal(model(**inputs()).logits, first)


@pytest.mark.skipif(
    not is_peft_greater_or_equal(MIN_PEFT_VERSION),
    reason=f"this transformers wants peft >= {MIN_PEFT_VERSION} for its own add_adapter",
)
def test_the_transformers_integration_adds_and_switches_adapters():
    base = tiny_model()
    logits = base(**inputs()).logits
    # transformers' enable_adapters forgets modules_to_save, so this adapter has none.
    base.add_adapter(MoLoraConfig(target_modules=plan_for(base).important))
    assert torch.equal(base(**inputs()).logits, logits)
    make_live(base)
    live = base(**inputs()).logits
    assert not torch.equal(live, logits)
    base.disable_adapters()
    assert torch.equal(base(**inputs()).logits, logits)
    base.enable_adapters()
    assert torch.equal(base(**inputs()).logits, live)
