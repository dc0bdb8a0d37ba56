"""Router loss against a plain loop, its direction, and what never counts."""

from __future__ import annotations

import pytest
import torch

from citi_kernels.ops.router_loss import router_loss
from citi_kernels.testing import assert_accurate

KINDS = ("cv2", "dispersion")


def loop_truth(gate_sums, token_counts, task_types, delta, kind):
    """The definition, read aloud, one layer, in Python floats."""
    values = []
    for sums, count, task in zip(
        gate_sums.tolist(), token_counts.tolist(), task_types.tolist(), strict=True
    ):
        if count == 0:
            continue
        first, others = (1 + delta, 1 - delta) if task == 1 else (1 - delta, 1 + delta)
        for entry, gate_sum in enumerate(sums):
            z = (first if entry == 0 else others) * gate_sum
            values.append(z / count if kind == "dispersion" else z)
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    variance = sum((z - mean) ** 2 for z in values) / (len(values) - 1)
    return variance / (mean**2 + 1e-10 if kind == "cv2" else mean)


def random_sums(num_layers=2, num_samples=4, num_gates=5, dtype=torch.float64, seed=0):
    """Gate sums of random gates; sample 2 has no token."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 40, (num_samples,), generator=generator)
    counts[2] = 0
    gates = torch.rand(num_layers, num_samples, num_gates, generator=generator, dtype=dtype)
    gates = gates / gates.sum(-1, keepdim=True) * counts.unsqueeze(-1)
    return gates, counts, torch.tensor([1, 0, 1, 0])[:num_samples]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [0.0, 0.5, 0.95, 1.0])
def test_equals_the_loop_for_every_layer(kind, delta):
    sums, counts, tasks = random_sums()
    truth = [loop_truth(layer, counts, tasks, delta, kind) for layer in sums]
    loss = router_loss(sums, counts, tasks, delta=delta, kind=kind)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, torch.tensor(truth, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_holds_the_accuracy_rule(kind):
    sums, counts, tasks = random_sums(num_layers=8, num_samples=64, dtype=torch.float32)
    tasks = torch.arange(64) % 2
    counted = counts > 0
    results = []
    for function, dtype in ((router_loss, torch.float32), (plain, torch.float64)):
        leaf = sums.to(dtype).requires_grad_()
        loss = function(leaf, counts, tasks, kind=kind)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0][:, counted]))
    leaf = sums.clone().requires_grad_()
    loss = plain(leaf, counts, tasks, kind=kind)
    baseline = (loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0][:, counted])
    for place, name in enumerate(("forward", "backward")):
        out, truth = (result[place] for result in results)
        assert_accurate(out, truth, baseline[place], kind=name, name=name)


def plain(gate_sums, token_counts, task_types, *, kind, delta=0.95):
    """The formula in plain PyTorch calls, in the dtype it is given."""
    counted = token_counts > 0
    first = torch.where(task_types == 1, 1 + delta, 1 - delta).to(gate_sums.dtype)
    importance = torch.cat([first[:, None], (2 - first)[:, None].expand(-1, 4)], dim=1)
    z = importance * gate_sums
    if kind == "dispersion":
        z = z / token_counts.clamp(min=1).to(z.dtype)[:, None]
    z = z[:, counted].flatten(1)
    mean = z.mean(1)
    return z.var(1) / (mean**2 + 1e-10 if kind == "cv2" else mean)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_leading_dimensions_give_one_loss_each(shape):
    sums, counts, tasks = random_sums(num_layers=6)
    many = sums[: max(1, torch.Size(shape).numel())].reshape(*shape, 4, 5)
    losses = router_loss(many, counts, tasks)
    assert losses.shape == shape
    one_by_one = [router_loss(s, counts, tasks) for s in many.reshape(-1, 4, 5)]
    torch.testing.assert_close(losses.reshape(-1), torch.stack(one_by_one), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_16_bit_are_reduced_in_fp32(dtype):
    sums, counts, tasks = random_sums()
    narrow = sums.to(dtype)
    loss = router_loss(narrow, counts, tasks)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, router_loss(narrow.float(), counts, tasks), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tool_samples_push_the_backbone_down_and_general_samples_push_it_up(kind):
    for task, wanted_sign in ((1, 1.0), (0, -1.0)):
        logits = torch.zeros(5, requires_grad=True)
        sums = 7 * logits.softmax(-1).unsqueeze(0)
        router_loss(sums, torch.tensor([7]), torch.tensor([task]), kind=kind).backward()
        # Descent moves against the gradient: positive means the backbone's logit goes down.
        assert torch.sign(logits.grad[0]) == wanted_sign
        assert (torch.sign(logits.grad[1:]) == -wanted_sign).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_tokens_takes_no_part_and_gets_no_gradient(kind):
    sums, counts, tasks = random_sums()
    kept = [0, 1, 3]
    poisoned = sums.clone()
    poisoned[:, 2] = float("nan")
    poisoned.requires_grad_()
    loss = router_loss(poisoned, counts, tasks, kind=kind)
    without = router_loss(sums[:, kept], counts[kept], tasks[kept], kind=kind)
    torch.testing.assert_close(loss, without, rtol=1e-12, atol=0)
    loss.sum().backward()
    assert (poisoned.grad[:, 2] == 0).all()
    assert poisoned.grad[:, kept].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_counted_sample_gives_zero_with_a_graph(kind):
    sums = torch.zeros(2, 3, 5, requires_grad=True)
    loss = router_loss(sums, torch.zeros(3, dtype=torch.int64), torch.tensor([1, 0, 1]), kind=kind)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (sums.grad == 0).all()


def test_dispersion_has_no_length_scale():
    sums, counts, tasks = random_sums()
    loss = router_loss(sums, counts, tasks, kind="dispersion")
    longer = router_loss(3 * sums, 3 * counts, tasks, kind="dispersion")
    torch.testing.assert_close(loss, longer, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    sums, counts, tasks = random_sums()
    assert torch.autograd.gradcheck(
        lambda s: router_loss(s, counts, tasks, kind=kind), (sums.requires_grad_(),)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_synchronised_with_the_host(kind):
    # A meta tensor has no values: any `.item()` would raise.
    sums = torch.empty(2, 4, 5, device="meta", requires_grad=True)
    ints = torch.empty(4, dtype=torch.int64, device="meta")
    loss = router_loss(sums, ints, ints, kind=kind)
    loss.sum().backward()
    assert loss.shape == (2,)
    assert sums.grad.shape == sums.shape


def test_compiles_without_graph_breaks_and_equals_eager():
    sums, counts, tasks = random_sums(dtype=torch.float32)
    compiled = torch.compile(router_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(sums, counts, tasks), router_loss(sums, counts, tasks))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kind": "gini"}, ValueError, "kind must be one of cv2, dispersion, got 'gini'"),
        ({"delta": 1.5}, ValueError, "delta must lie within"),
        ({"delta": float("nan")}, ValueError, "delta must lie within"),
        ({"gate_sums": torch.ones(5)}, ValueError, "gate_sums must have the shape"),
        ({"gate_sums": torch.ones(4, 1)}, ValueError, "at least one expert"),
        ({"gate_sums": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "gate_sums must be float"),
        ({"token_counts": torch.ones(3)}, ValueError, r"token_counts must have the shape \(4,\)"),
        ({"task_types": torch.ones(1, 4)}, ValueError, r"task_types must have the shape \(4,\)"),
        ({"task_types": torch.ones(4)}, TypeError, "task_types must be integers"),
        ({"task_types": torch.tensor([1, 0, 2, 0])}, ValueError, "got 2"),
    ],
)
def test_wrong_input_is_named(change, error, words):
    sums, counts, tasks = random_sums()
    given = {"gate_sums": sums, "token_counts": counts, "task_types": tasks, **change}
    with pytest.raises(error, match=words):
        router_loss(**given)
