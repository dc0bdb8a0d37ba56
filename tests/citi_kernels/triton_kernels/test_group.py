"""`molora_linear_group` on Triton's dense path against its layers one by one."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from citi_kernels import molora_linear_group, molora_linear_ref
from citi_kernels.ops.molora_linear_group import runs_together
from citi_kernels.testing import assert_accurate
from molora_group_cases import OF_A_LAYER, evaluate_group, one_by_one, random_group
from under_test import DEVICE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = {
    "dense": {},
    "dropout": {"dropout_p": 0.3},
    "top_k": {"top_k": 2},
    "renormalized": {"top_k": 3, "renormalize": True, "dropout_p": 0.3},
    "update_only": {"weight": False},
    "no_bias": {"bias": False},
    "no_segments": {"num_segments": None},
    "no_token": {"num_tokens": 0},
}
TRAINED = {
    "router pre-training": ("x", "router"),
    "MOLoRA improvement": ("x", "a", "b", "router"),
    "MOLoRA frozen": ("x",),
    "first layer of the model": ("a", "b", "router"),
    "weights": ("x", "weight", "bias"),
    "weights alone": ("weight",),
    "biases alone": ("bias",),
}
SPACING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def _no_compiled_code_of_another_test() -> None:
    torch._dynamo.reset()


def assert_same(
    ours: dict[str, Tensor | None], alone: dict[str, Tensor | None], dtype: torch.dtype
) -> None:
    """Bitwise, and x's gradient to rounding."""
    assert ours.keys() == alone.keys()
    for name, theirs in alone.items():
        if theirs is None:
            assert ours[name] is None, name
        elif name == "dx":
            size = theirs.abs().max() if theirs.numel() else 0.0
            assert (ours[name] - theirs).abs().le(SPACING[dtype] * size).all()
        else:
            assert torch.equal(ours[name], theirs), name


def compare(group, **which) -> None:
    ours, alone = (
        evaluate_group(each, group, **which) for each in (molora_linear_group, one_by_one)
    )
    assert_same(ours, alone, group.x.dtype)


@each_option
@pytest.mark.parametrize(
    ("num_layers", "dtype"),
    [*((size, torch.float32) for size in (1, 2, 3, 4)), (3, torch.bfloat16), (2, torch.float16)],
)
def test_results_are_the_layers_own(num_layers: int, dtype: torch.dtype, options: dict) -> None:
    group = random_group(
        num_layers, dtype=dtype, parameter_dtype=torch.float32, device=DEVICE, **options
    )
    assert runs_together(group.x, 32, num_experts=4)
    compare(group)


@each_option
def test_without_gradients_the_outputs_are_the_same(options: dict) -> None:
    group = random_group(3, device=DEVICE, **options)
    lists = group.lists(group.layers)
    expected = molora_linear_group(
        group.x.requires_grad_(), *lists, **group.options, dropout_seeds=group.seeds
    )
    with torch.no_grad():
        ours = molora_linear_group(group.x, *lists, **group.options, dropout_seeds=group.seeds)
    for one, other in zip(itertools.chain(*ours), itertools.chain(*expected), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and not one.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_input_gradient_holds_the_accuracy_rule(dtype: torch.dtype) -> None:
    group = random_group(3, dtype=dtype, device=DEVICE)

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    truth_x, dx = wide(group.x).requires_grad_(), evaluate_group(molora_linear_group, group)["dx"]
    base_x = group.x.clone().requires_grad_()
    for layer, (dy, dgate_sums) in zip(group.layers, group.incoming, strict=True):
        for x, convert in ((truth_x, wide), (base_x, lambda tensor: tensor)):
            outputs = molora_linear_ref(x, *(convert(each) for each in layer), **group.options)
            torch.autograd.backward(outputs, [convert(dy), dgate_sums.to(outputs[1].dtype)])
    assert_accurate(dx, truth_x.grad, base_x.grad, kind="backward", name="dx")


@pytest.mark.parametrize("names", TRAINED.values(), ids=TRAINED)
def test_case_23_what_trains_in_every_layer(names: tuple[str, ...]) -> None:
    compare(random_group(3, device=DEVICE), trained=lambda _, name: name in names)


@pytest.mark.parametrize("seed", range(12))
def test_case_23_what_trains_in_some_layers_and_what_the_loss_sees(seed: int) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = itertools.count()
    coins = (torch.rand(64, generator=generator, device="cpu") < 0.5).tolist()
    trained = {(i, name): coins[next(draws)] for i in range(3) for name in ("x", *OF_A_LAYER)}
    used = {(i, name): coins[next(draws)] for i in range(3) for name in ("y", "gate_sums")}
    compare(
        random_group(3, device=DEVICE),
        trained=lambda *key: trained[key],
        used=lambda *key: used[key],
    )


def test_a_layer_that_the_loss_does_not_see_has_no_gradient() -> None:
    compare(random_group(3, device=DEVICE), used=lambda layer, _: layer != 1)


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_gate_sums_alone_may_be_in_the_loss(layers: tuple[int, ...]) -> None:
    compare(
        random_group(3, device=DEVICE),
        used=lambda layer, name: name == "gate_sums" and layer in layers,
    )


def test_layers_with_and_without_weight_and_bias_may_stand_together() -> None:
    group = random_group(3, device=DEVICE)
    for layer, absent in ((0, (0, 1)), (2, (1,))):
        operands = list(group.layers[layer])
        for place in absent:
            operands[place] = None
        group.layers[layer] = tuple(operands)
    compare(group)


def test_case_21_autocast_casts_what_the_layers_own_op_casts() -> None:
    group = random_group(3, device=DEVICE)

    def under_autocast(function):
        def call(*arguments, **options):
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return function(*arguments, **options)

        return call

    incoming = [(dy.bfloat16(), sums) for dy, sums in group.incoming]
    group.incoming[:] = incoming
    ours, alone = (
        evaluate_group(under_autocast(each), group) for each in (molora_linear_group, one_by_one)
    )
    assert ours["y[0]"].dtype == torch.bfloat16
    assert_same(ours, alone, torch.bfloat16)


def test_case_13_inputs_and_incoming_gradients_are_unchanged() -> None:
    group = random_group(3, device=DEVICE)
    tensors = [group.x, *sum(group.layers, ()), *sum(group.incoming, ())]
    before = [each.clone() for each in tensors]
    evaluate_group(molora_linear_group, group)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_case_10_lazily_negated_x_and_gradients_equal_plain_ones() -> None:
    group = random_group(3, device=DEVICE)

    def negated(x: Tensor, *lists: list[Tensor], **options: object) -> list:
        return molora_linear_group(lazily_negated(x), *lists, **options)

    incoming = [tuple(map(lazily_negated, pair)) for pair in group.incoming]
    ours = evaluate_group(negated, replace(group, incoming=incoming))
    assert_same(ours, evaluate_group(molora_linear_group, group), torch.float32)


def lazily_negated(tensor: Tensor) -> Tensor:
    view = torch._neg_view(-tensor)  # as of `torch.complex(…).conj().imag`
    assert view.is_neg()
    return view


@pytest.mark.parametrize("name", ["segment_ids", "dropout_seeds[1]"])
@pytest.mark.parametrize("through", ["eager", "op"])
def test_a_change_in_place_before_the_backward_raises(through: str, name: str) -> None:
    group = random_group(3, dropout_p=0.3, device=DEVICE)
    x = group.x.clone().requires_grad_()
    outputs = molora_linear_group(
        lazily_negated(x) if through == "op" else x,
        *group.lists(group.layers),
        **group.options,
        dropout_seeds=group.seeds,
    )
    (group.options[name] if name in group.options else group.seeds[1]).mul_(1)
    with pytest.raises(RuntimeError, match=rf"molora_linear: {re.escape(name)}, .* modified"):
        outputs[2][0].sum().backward()


@pytest.mark.parametrize(
    ("names", "saves_x"), [(("x", "a", "b", "router"), True), (("x", "b"), False), (("x",), False)]
)
def test_saved_for_backward_is_x_once_and_rank_sized(names: tuple[str, ...], saves_x: bool) -> None:
    group = random_group(3, num_segments=None, device=DEVICE)
    layers = [
        [each.clone().requires_grad_(n in names) for n, each in zip(OF_A_LAYER, layer, strict=True)]
        for layer in group.layers
    ]
    parameters = {each.data_ptr() for layer in layers for each in layer}
    x, kept = group.x.clone().requires_grad_("x" in names), {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = molora_linear_group(x, *group.lists(layers), **group.options)
    assert outputs[0][0].requires_grad
    assert sum(kept.values()) == 21 * (48 * 4 * saves_x + 3 * (32 * 4 + 5 * 4))


@each_option
def test_case_22_opcheck(options: dict) -> None:
    group = random_group(3, device=DEVICE, **options)
    leaves = [
        [None if each is None else each.clone().requires_grad_() for each in layer]
        for layer in group.layers
    ]
    weights, biases, *others = group.lists(leaves)
    torch.library.opcheck(
        torch.ops.citi.molora_linear_group.default,
        (
            group.x.clone().requires_grad_(),
            [each for each in weights if each is not None],
            [each for each in biases if each is not None],
            *others,
            [each is not None for each in weights],
            [each is not None for each in biases],
            4,
            0.25,
            group.options.get("top_k"),
            group.options.get("renormalize", False),
            group.options.get("segment_ids"),
            group.options.get("num_segments") or 0,
            group.options["dropout_p"],
            group.seeds or [],
            "triton",
        ),
    )


@each_option
def test_case_22_compiled_without_graph_breaks_equals_eager(options: dict) -> None:
    group = random_group(3, device=DEVICE, **options)
    compiled = torch.compile(molora_linear_group, fullgraph=True, backend="aot_eager")
    ours, eager = (evaluate_group(each, group) for each in (compiled, molora_linear_group))
    assert all(torch.equal(ours[name], eager[name]) for name in eager)


def test_case_22_one_dynamic_graph_serves_every_number_of_tokens() -> None:
    compiled = torch.compile(molora_linear_group, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (21, 6, 33):
        group = random_group(3, num_tokens=num_tokens, device=DEVICE)
        ours, eager = (evaluate_group(each, group) for each in (compiled, molora_linear_group))
        assert all(torch.equal(ours[name], eager[name]) for name in eager)


def test_recomputation_without_segments_gives_the_same_gradients() -> None:
    group = random_group(3, device=DEVICE)

    def checkpointed(x, *lists, **options):
        calls = []

        def layers(*operands: Tensor):
            calls.append(1)
            lists = [list(operands[i : i + 3]) for i in range(1, 16, 3)]
            if len(calls) == 2:  # recomputation runs outside of any routing context
                outputs = molora_linear_group(
                    operands[0], *lists, **options | {"segment_ids": None}
                )
                return [(y, y.new_zeros(3, 5)) for y, _ in outputs]
            return molora_linear_group(operands[0], *lists, **options)

        flat = [each for some in lists for each in some]
        return torch.utils.checkpoint.checkpoint(layers, x, *flat, use_reentrant=False)

    ours, expected = (evaluate_group(each, group) for each in (checkpointed, molora_linear_group))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({}, True),
        ({"top_k": 2}, True),
        ({"stacked_rank": 4096}, False),
        ({"stacked_rank": 4096, "top_k": 2}, False),
    ],
)
def test_only_the_dense_path_computes_layers_together(changes: dict, together: bool) -> None:
    x = torch.zeros(2, 8, device=DEVICE)
    assert runs_together(x, **{"stacked_rank": 32, "num_experts": 4} | changes) is together


@pytest.mark.parametrize("options", [{}, {"top_k": 2}], ids=["library", "grouped"])
def test_layers_of_another_path_are_computed_one_by_one(options: dict) -> None:
    group = random_group(2, r=128, device=DEVICE, **options)
    assert not runs_together(group.x, 512, num_experts=4, top_k=options.get("top_k"))
    ours, alone = (evaluate_group(each, group) for each in (molora_linear_group, one_by_one))
    assert all(torch.equal(ours[name], alone[name]) for name in alone)
