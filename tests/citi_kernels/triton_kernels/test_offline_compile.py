"""Every kernel compiled for every architecture, with the constants that layers really launch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from citi_kernels.triton_kernels.launch import Launch
from citi_kernels.triton_kernels.persistent import assumed_capability
from layer_launches import STAGES, Layer, record
from offline import CAPABILITIES, SHARED_MEMORY, Compiled, compile_for, identity, is_serialized

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAIN = [Layer(), Layer(way="extended"), Layer(parameter_dtype=None)]
EVERY_KERNEL = [
    *MAIN,
    Layer(trained=STAGES["router pre-training"]),
    Layer(E=8, r=8, top_k=2),
    Layer(E=64, r=64, top_k=2),
    Layer(T=1, way="decode"),
    Layer(T=8, way="few"),
    Layer(trained="b"),
    Layer(num_layers=2, trained=STAGES["first layer of the model"], trained_in_others="b"),
]
# launch constants follow the sizes; 16-bit dtypes have the same ones
SIZES = {
    "stages": [Layer(trained=trained) for trained in STAGES.values()],
    "wide": [Layer(N=14336, E=8, r=16), Layer(K=14336, E=8, r=8), Layer(E=8, r=32)],
    "many experts": [Layer(E=63, r=4), Layer(E=1, r=1, num_segments=None)],
    "odd sizes": [Layer(T=1000, K=37, N=53, E=3, r=5), Layer(T=1, E=2, r=33)],
    "dropout": [Layer(dropout_p=0.1), Layer(dropout_p=0.1, E=8, r=16)],
    "update only": [Layer(has_weight=False), Layer(num_segments=None)],
    "group": [Layer(num_layers=2), Layer(num_layers=3), Layer(num_layers=3, dropout_p=0.1)],
    "top-k": [
        Layer(E=4, r=8, top_k=2, dropout_p=0.1),
        Layer(E=256, r=256, top_k=4),
        Layer(E=64, r=16, top_k=2, dropout_p=0.1),
        Layer(T=1000, K=37, N=53, E=3, r=51, top_k=1),
        Layer(E=200, r=8, top_k=2),
    ],
    "decode": [Layer(T=33, E=8, r=16, way="decode"), Layer(T=4, dropout_p=0.1, way="decode")],
    "extended": [
        Layer(E=8, r=16, way="extended"),
        Layer(dropout_p=0.1, way="extended"),
        Layer(way="extended", strided_weight=True),
    ],
}


@cache
def launches_of(layers: tuple[Layer, ...], dtype: torch.dtype, capability: int) -> list[Launch]:
    """The distinct launches of layers with x, and parameters without a dtype, in `dtype`."""
    found = {}
    for layer in layers:
        changed = replace(layer, dtype=dtype, parameter_dtype=layer.parameter_dtype or dtype)
        with assumed_capability(capability):
            found |= {identity(each): each for each in record(changed)[0]}
    return list(found.values())


def compile_within_limits(launch: Launch, capability: int) -> Compiled:
    compiled = compile_for(launch, capability)
    print(compiled.summary)
    assert compiled.shared <= SHARED_MEMORY[capability], compiled.summary
    assert compiled.int32_address_products == [], compiled.summary
    return compiled


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_within_limits(capability: int, dtype: torch.dtype) -> None:
    launches = launches_of(tuple(EVERY_KERNEL), dtype, capability)
    assert len(launches) >= 20
    for launch in launches:
        compile_within_limits(launch, capability)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_size_compiles_within_limits(capability: int, dtype: torch.dtype, sizes: str) -> None:
    launches = launches_of(tuple(SIZES[sizes]), dtype, capability)
    assert launches
    for launch in launches:
        compile_within_limits(launch, capability)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_main_kernels_use_tensor_cores_and_do_not_spill(
    capability: int, dtype: torch.dtype
) -> None:
    for launch in launches_of(tuple(MAIN), dtype, capability):
        compiled = compile_within_limits(launch, capability)
        assert compiled.spills <= 16, compiled.summary
        if compiled.name in ("_rank_gradients_kernel", "_gate_sums_kernel"):  # no products
            continue
        assert compiled.tensor_core_products > 0, compiled.summary
        if capability == 90:
            assert "wgmma.mma_async" in compiled.ptx, compiled.summary
        if capability >= 90 and compiled.name.startswith("_extended"):
            assert "cp.async.bulk.tensor" in compiled.ptx, compiled.summary


def test_no_kernel_waits_for_every_single_wgmma() -> None:
    layers = [
        *EVERY_KERNEL,
        Layer(num_layers=3),
        Layer(dropout_p=0.1),
        Layer(E=8, r=16),
        Layer(dropout_p=0.1, way="extended"),
    ]
    for launch in launches_of(tuple(layers), torch.bfloat16, 90):
        compiled = compile_for(launch, 90)
        assert not is_serialized(compiled), compiled.summary


def test_the_checks_see_what_they_look_for() -> None:
    compiled = Compiled(
        name="bad",
        ttir="%c = arith.constant 4 : i32\n"
        "%a = arith.muli %row, %stride : tensor<64x1xi32>\n"
        "%b = arith.muli %pid, %c : i32",
        ptx="mma.sync.aligned.m16n8k16",
        shared=0,
        registers=0,
        spills=0,
    )
    assert compiled.int32_address_products == ["('%row', '%stride')"]
    assert compiled.tensor_core_products == 1
