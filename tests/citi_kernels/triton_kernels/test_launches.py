"""How often a layer launches, and that it never waits: counted on meta tensors, where no value is.

A host read (.item(), nonzero, ...) raises on the meta device, so each of these runs proves that
there is none.
"""

from __future__ import annotations

import pytest
import torch

from layer_launches import STAGES, Layer, names, record


def test_forward_and_backward_of_the_dense_path_are_eight_launches() -> None:
    ours, library = record(Layer())
    assert names(ours) == [
        "shrink_route",
        "expand",
        "up_gradients",
        "rank_gradients",
        "down_gradients",
        "input_gradient",
    ]
    assert library == ["addmm_", "addmm_"]
    assert len(ours) + len(library) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "launches"),
    [
        ("router pre-training", 7),
        ("MOLoRA improvement", 8),
        ("unimportant components, MOLoRA frozen", 6),
        ("first layer of the model", 7),
    ],
)
def test_a_stage_launches_no_kernel_for_gradients_it_does_not_ask(
    stage: str, launches: int, dtype: torch.dtype
) -> None:
    ours, library = record(Layer(trained=STAGES[stage], dtype=dtype))
    assert len(ours) + len(library) == launches
    kernels = names(ours)
    assert ("up_gradients" in kernels) == ("b" in STAGES[stage].split())
    assert ("down_gradients" in kernels) == ("router" in STAGES[stage])
    assert len(library) == (2 if "x" in STAGES[stage].split() else 1)


@pytest.mark.parametrize(
    "options",
    [
        {"num_segments": None},
        {"dropout_p": 0.1},
        {"has_weight": False},
        {"parameter_dtype": torch.bfloat16},
        {"E": 64, "r": 4},
        {"T": 1},
        {"T": 8191, "K": 4095, "N": 4097},
    ],
    ids=str,
)
def test_no_option_of_the_dense_path_costs_more_launches(options: dict) -> None:
    ours, library = record(Layer(**options))
    assert len(ours) + len(library) <= 8


@pytest.mark.parametrize(("way", "launches"), [("few", 3), ("decode", 2)])
def test_few_tokens_take_few_launches(way: str, launches: int) -> None:
    ours, library = record(Layer(T=8, way=way, num_segments=None, trained=""))
    assert len(ours) + len(library) == launches
    assert names(ours) == ["rows", "finish"]


def test_a_group_of_three_reads_x_once_forward_and_once_backward() -> None:
    ours, library = record(Layer(num_layers=3))
    kernels = names(ours)
    assert kernels.count("shrink_route") == kernels.count("down_gradients") == 1
    assert kernels.count("input_gradient") == 1
    assert kernels.count("expand") == kernels.count("up_gradients") == 3
    assert library == ["addmm_"] * 6
    assert len(ours) + len(library) == 18  # alone they would be 24, and two additions of dx


def test_the_unbounded_axis_lies_on_grid_x() -> None:
    for options in ({}, {"top_k": 2}, {"trained": STAGES["router pre-training"]}):
        ours, _ = record(Layer(T=70_000 * 64, K=64, N=64, E=8, **options))
        for launch in ours:
            assert all(size <= 65_535 for size in launch.grid[1:]), launch.kernel
            assert launch.grid[0] < 2**31
