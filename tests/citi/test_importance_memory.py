"""What scoring allocates, counted: no weight gradient, and the inputs of components once.

The floor is a forward and backward with frozen weights, measured in the same way. Sizes are chosen
so that no activation, block or tile has as many bytes as a weight of a component. Where weights or
buffers are bf16, that holds for the MLP alone, whose numbers of rows are odd: half of an even
number of rows in fp32 has the bytes of all of them in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from citi.components import find_components
from citi.importance import (
    ESTIMATORS,
    GRANULARITIES,
    ImportanceRecorder,
    component_importance,
)
from citi.importance.scoring_pass import score_batches
from citi_kernels.tensor_memory import TensorMemory
from tiny import tiny_model

SHAPE = (40, 82)
MIB = 2**20
# Documented are 64 MiB, whatever the shapes; blocks of these shapes need less, and a stricter
# bound also sees outputs that are kept where only inputs should be.
WORKSPACE = 8 * MIB
LAYERS = 6
COARSE = [each for each in GRANULARITIES if each != "element"]


@cache
def model_of(dtype: torch.dtype = torch.float32):
    sizes = {"hidden_size": 99, "intermediate_size": 281, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
    return tiny_model("llama", dtype=dtype, **sizes, **heads)


def batch_of(num_padded: int = 0) -> dict[str, Tensor]:
    """Random tokens; of every second sequence the last `num_padded` are padding."""
    ids = torch.randint(3, 300, SHAPE, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, SHAPE[1] - num_padded :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0] = -100  # a sequence that does not count
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def measured(function: Callable[[], object]) -> TensorMemory:
    with TensorMemory() as memory:
        function()
    return memory


@cache
def floor(dtype: torch.dtype = torch.float32, num_padded: int = 0) -> TensorMemory:
    """Forward and backward with frozen weights."""
    model, batch = model_of(dtype), batch_of(num_padded)

    def run() -> None:
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
        model(inputs_embeds=embedded, **batch, use_cache=False).loss.backward()

    requires_grad = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    memory = measured(run)
    for parameter, before in zip(model.parameters(), requires_grad, strict=True):
        parameter.requires_grad_(before)
    return memory


@cache
def kept(dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Bytes of the components' distinct inputs, and of their outputs."""
    model, inputs, outputs = model_of(dtype), {}, {}
    components, _ = find_components(model)

    def hook(_module, arguments, y):
        inputs[arguments[0].data_ptr()], outputs[y.data_ptr()] = arguments[0], y

    modules = [model.get_submodule(component.name) for component in components]
    handles = [module.register_forward_hook(hook) for module in modules]
    model(**batch_of())
    for handle in handles:
        handle.remove()
    assert len(inputs) == 4 * LAYERS  # q, k, v share one, and gate and up
    assert len(outputs) == 7 * LAYERS
    return tuple(sum(t.nbytes for t in each.values()) for each in (inputs, outputs))


def weight_sizes(dtype: torch.dtype = torch.float32) -> set[int]:
    """Bytes of a weight of each component, in `dtype` and in fp32."""
    components, _ = find_components(model_of())
    if dtype == torch.bfloat16:
        components = [each for each in components if each.name.split(".")[-2] == "mlp"]
    numbers = {c.in_features * c.out_features for c in components}
    return {n * d.itemsize for n in numbers for d in (dtype, torch.float32)}


def num_weight_sized(memory: TensorMemory, dtype: torch.dtype = torch.float32) -> int:
    sizes = weight_sizes(dtype)
    return sum(size in sizes for size in memory.allocations)


def allowed_over_floor(estimator: str, granularity: str, dtype: torch.dtype = torch.float32) -> int:
    """Every distinct x; where rows need the output, at most every y as well."""
    x, y = kept(dtype)
    keeps_y = estimator != "parameter" and granularity in ("row", "head")
    return x + (y if keeps_y else 0) + WORKSPACE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_plain_backward_allocates_a_gradient_per_weight_and_a_frozen_one_none(dtype):
    model = model_of(dtype)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch_of()).loss.backward()

    full = measured(run)
    model.zero_grad(set_to_none=True)
    num_weights = 3 * LAYERS if dtype == torch.bfloat16 else 7 * LAYERS
    assert num_weight_sized(full, dtype) == num_weights
    assert num_weight_sized(floor(dtype), dtype) == 0


@pytest.mark.parametrize("granularity", COARSE)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scoring_allocates_no_weight_gradient_and_keeps_each_input_once(estimator, granularity):
    model, batch = model_of(), batch_of()
    memory = measured(
        lambda: component_importance(model, [batch], estimator=estimator, granularity=granularity)
    )
    assert num_weight_sized(memory) == 0
    assert memory.peak - floor().peak <= allowed_over_floor(estimator, granularity)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bf16_and_padding_make_no_difference(estimator):
    dtype = torch.bfloat16
    model, batch = model_of(dtype), batch_of(30)
    memory = measured(lambda: component_importance(model, [batch], estimator=estimator))
    assert num_weight_sized(memory, dtype) == 0
    extra = memory.peak - floor(dtype, 30).peak
    assert extra <= allowed_over_floor(estimator, "component", dtype)


@pytest.mark.parametrize("element_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_elements_need_one_buffer_per_component_and_no_more(estimator, element_dtype):
    model, batches = model_of(), [batch_of(), batch_of()]
    recorder = ImportanceRecorder(
        model, estimator=estimator, granularity="element", element_dtype=element_dtype
    )
    memory = measured(lambda: score_batches(recorder, batches))
    num_mlp, num_all = 3 * LAYERS, 7 * LAYERS
    buffers = recorder.totals.elements.values()
    assert len(buffers) == num_all
    num_made = num_mlp if element_dtype == torch.bfloat16 else num_all
    assert num_weight_sized(memory, element_dtype) == num_made
    allowed = allowed_over_floor(estimator, "element") + sum(each.nbytes for each in buffers)
    assert memory.peak - floor().peak <= allowed


@pytest.mark.parametrize("granularity", ["component", "row"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_activation_checkpointing_lowers_the_peak(estimator, granularity):
    model, batch = model_of(), batch_of()
    peaks = {}
    for is_on in (False, True):
        if is_on:
            model.gradient_checkpointing_enable()
        memory = measured(
            lambda: component_importance(
                model, [batch], estimator=estimator, granularity=granularity
            )
        )
        peaks[is_on] = memory.peak
        assert num_weight_sized(memory) == 0
    model.gradient_checkpointing_disable()
    assert peaks[True] < 0.4 * peaks[False]
    assert peaks[True] < floor().peak
