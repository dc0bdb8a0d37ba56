"""`molora_linear_group` where its layers are computed one by one, and its errors everywhere."""

from __future__ import annotations

import pytest
import torch

from citi_kernels import molora_linear_group, use_backend
from citi_kernels.ops.molora_linear_group import runs_together
from molora_group_cases import evaluate_group, one_by_one, random_group

OPTIONS = {
    "dense": {},
    "top_k": {"top_k": 2},
    "dropout": {"dropout_p": 0.3},
    "update_only": {"weight": False},
    "no_bias": {"bias": False},
    "no_segments": {"num_segments": None},
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_one_by_one_every_result_is_the_layers_own_bitwise(
    num_layers: int, options: dict, backend: str
) -> None:
    group = random_group(num_layers, **options)
    with use_backend(backend):
        assert not runs_together(group.x, 32, num_experts=4)
        ours, alone = (evaluate_group(each, group) for each in (molora_linear_group, one_by_one))
    assert ours.keys() == alone.keys()
    assert all(torch.equal(ours[name], alone[name]) for name in alone)


def test_layers_keep_the_batch_shape_of_x() -> None:
    group = random_group(2, num_tokens=12, num_segments=None)
    lists = group.lists(group.layers)
    found = []
    for shape in ((12,), (3, 4)):
        x = group.x.clone().requires_grad_()
        outputs = molora_linear_group(x.unflatten(0, shape), *lists, **group.options)
        assert all(y.shape[:-1] == shape for y, _ in outputs)
        sum(y.mul_(2).square().sum() for y, _ in outputs).backward()  # an output may be changed
        found.append([x.grad, *(y.flatten(0, -2) for y, _ in outputs)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weights", lambda each: each[:1], "weights: want 2 entries, as a has, got 1"),
        ("biases", lambda each: [*each, None], "biases: want 2 entries, as a has, got 3"),
        ("b", lambda each: each[:1], "b: want 2 entries, as a has, got 1"),
        ("routers", lambda each: [], "routers: want 2 entries, as a has, got 0"),
        (
            "a",
            lambda each: [each[0], each[1][:16]],
            r"a\[1\]: want \(E \* r, K\) with the E \* r of all layers, that of a\[0\] \(32, 48\), "
            r"got \(16, 48\)",
        ),
        ("routers", lambda each: [each[0], each[1][:3]], r"router: want shape .* got \(3, 48\)"),
        ("b", lambda each: [each[0], each[1][:, :5]], r"b: want shape .* got \(24, 5\)"),
        ("weights", lambda each: [None, None], "bias: want None where weight is None"),
        ("a", lambda each: [], "a: want one tensor or more, got none"),
    ],
)
def test_case_20_errors_name_the_argument(name: str, value, words: str) -> None:
    group = random_group(2)
    names = ("weights", "biases", "a", "b", "routers")
    lists = dict(zip(names, group.lists(group.layers), strict=True))
    lists[name] = value(lists[name])
    with pytest.raises(ValueError, match=words):
        molora_linear_group(group.x, *lists.values(), **group.options)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(6, 48).long(), TypeError, "x: want one of .*, got torch.int64"),
        (torch.ones(()), ValueError, r"x: want \(..., K\), got a tensor without dimensions"),
        (torch.ones(6, 47), ValueError, r"a: want shape \(E \* r, K of x\) = \(32, 47\)"),
    ],
)
def test_case_20_errors_name_x(x: torch.Tensor, error: type[Exception], words: str) -> None:
    group = random_group(2, num_tokens=6, num_segments=None)
    with pytest.raises(error, match=f"molora_linear: {words}"):
        molora_linear_group(x, *group.lists(group.layers), **group.options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout_p": 0.1}, "dropout_seeds: want 2 tensors with dropout_p, got None"),
        (
            {"dropout_p": 0.1, "dropout_seeds": [torch.tensor(1)]},
            "dropout_seeds: want 2 entries, as a has, got 1",
        ),
        ({"num_segments": None}, "num_segments: want the number of segments, got None"),
        ({"top_k": 5}, "top_k: want 1 to num_experts = 4 or None, got 5"),
    ],
)
def test_case_20_errors_name_the_option(options: dict, words: str) -> None:
    group = random_group(2)
    with pytest.raises(ValueError, match=words):
        molora_linear_group(
            group.x, *group.lists(group.layers), **group.options | {"dropout_p": 0.0} | options
        )


def test_forward_mode_is_refused_and_no_tangent_is_zero() -> None:
    group = random_group(2)
    lists = group.lists(group.layers)

    def y(x: torch.Tensor) -> torch.Tensor:
        return molora_linear_group(x, *lists, **group.options)[1][0]

    with pytest.raises(NotImplementedError, match=r"molora_linear(_group)?: it has no forward"):
        torch.func.jvp(y, (group.x,), (group.x,))


def test_case_22_compiled_without_graph_breaks_equals_eager() -> None:
    torch._dynamo.reset()
    group = random_group(3)
    compiled = torch.compile(molora_linear_group, fullgraph=True, backend="aot_eager")
    ours, eager = (evaluate_group(each, group) for each in (compiled, molora_linear_group))
    assert all(torch.equal(ours[name], eager[name]) for name in eager)
