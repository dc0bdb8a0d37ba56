"""Calls of layers in every order and mode: each gets what it would have computed alone."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import set_seed

from citi.adapters import MoLoraConfig, shared_input
from citi.adapters.layer import MoLoraLinear
from citi_kernels import environment, use_backend
from citi_kernels.layers.routing import RoutingContext
from shared_input_cases import Attention, adapt, alone, attention, run_together


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of layers of every group call."""
    return run_together(monkeypatch)


def outputs(calls: Callable[[nn.Module], list[Tensor]], model: nn.Module) -> list[Tensor]:
    set_seed(5)
    with torch.no_grad():
        return [*calls(model), torch.rand(2)]


def change_in_place(model):
    x = torch.randn(3, 8)
    return [model.q(x), model.k(x.add_(1)), model.v(x)]


def in_another_mode(model):
    x = torch.randn(3, 8)
    q = model.q(x)
    with torch.enable_grad():
        return [q, model.k(x), model.v(x)]


def under_autocast(model):
    x = torch.randn(3, 8)
    q = model.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        return [q, model.k(x), model.v(x)]


def in_another_context(model):
    x, contexts = torch.randn(3, 8), []
    for layer, ids in ((model.q, torch.arange(3)), (model.k, torch.zeros(3).long())):
        with RoutingContext(ids, num_segments=3) as context:
            contexts += [layer(x)]
        contexts += list(context.gate_sums.values())
    return contexts


def after_a_change_of_mode(model):
    x = torch.randn(3, 8)
    q = model.q(x)
    model.k.train(not model.k.training)
    k = model.k(x)
    model.k.train(not model.k.training)
    return [q, k]


def with_a_new_parameter(model):
    x = torch.randn(3, 8)
    q = model.q(x)
    old = model.k.molora_B["default"]
    model.k.molora_B["default"] = nn.Parameter(old * 2)
    k = model.k(x)
    model.k.molora_B["default"] = old
    return [q, k]


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
SEQUENCES = {
    "as observed": lambda m: [m.q(X), m.k(X), m.v(X)],
    "another order": lambda m: [m.q(X), m.v(X), m.k(X)],
    "first one last": lambda m: [m.k(X), m.v(X), m.q(X)],
    "an equal tensor": lambda m: [m.q(X), m.k(X.clone()), m.v(X)],
    "another tensor": lambda m: [m.q(X), m.k(X + 1), m.v(X)],
    "not at all": lambda m: [m.q(X), m.v(X), m.q(X + 1), m.k(X + 1)],
    "only the first": lambda m: [m.q(X), m.q(X + 1), m.o(X)],
    "twice": lambda m: [m.q(X), m.k(X), m.k(X), m.v(X), m.v(X)],
    "first one twice": lambda m: [m.q(X), m.q(X), m.k(X), m.v(X)],
    "random numbers in between": lambda m: [m.q(X), torch.rand(1), m.k(X), m.v(X)],
    "changed in place": change_in_place,
    "another gradient mode": in_another_mode,
    "autocast": under_autocast,
    "another context": in_another_context,
    "another training mode": after_a_change_of_mode,
    "another parameter": with_a_new_parameter,
}


@pytest.mark.parametrize("calls", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
def test_every_sequence_of_calls_gives_what_layers_give_alone(sizes, calls, dropout):
    model = attention(lora_dropout=dropout).train(dropout > 0)
    expected = alone(outputs, calls, copy.deepcopy(model))
    del sizes[:]
    ours = outputs(calls, model)
    assert sizes[:1] == [3]
    assert all(map(torch.equal, ours, expected))
    assert [each.requires_grad for each in ours] == [each.requires_grad for each in expected]


def test_backward_through_results_of_which_some_are_not_used(sizes):
    model = attention()
    gradients = []
    for run in (lambda call: call(), alone):
        model.zero_grad()
        x = X.clone().requires_grad_()
        run(lambda x=x: [model.q(x), model.k(x).sum(), model.v(x)][1]).backward()
        gradients.append([x.grad] + [p.grad for p in model.parameters()])
    assert sizes[-1] == 3
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs)


def test_observed_calls_have_the_gradients_of_others(sizes):
    def gradients(model) -> list[Tensor | None]:
        with RoutingContext(torch.arange(3), num_segments=3) as context:
            model(X)
        torch.stack([each.square().sum() for each in context.gate_sums.values()]).sum().backward()
        return [p.grad for p in model.parameters()]

    model = adapt(Attention(), ["q", "k", "v"]).base_model.model
    expected, ours = alone(gradients, copy.deepcopy(model)), gradients(model)
    assert not model.q.siblings.are_alone
    assert model.q.siblings._runs
    assert [each is None for each in ours] == [each is None for each in expected]


TAKEN_OUT = {
    "a hook": lambda layer: layer.register_forward_hook(lambda *_: None).remove,
    "a pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None).remove,
    "a backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None).remove,
    "a hook of the base": lambda layer: (
        layer.base_layer.register_forward_hook(lambda module, args, y: y * 2).remove
    ),
    "adapters off": lambda layer: (
        layer.enable_adapters(False) or (lambda: layer.enable_adapters(True))
    ),
    "its own forward": lambda layer: (
        setattr(layer, "forward", lambda x: x * 3) or (lambda: delattr(layer, "forward"))
    ),
    "another mode": lambda layer: (
        layer.train(not layer.training) and (lambda: layer.train(not layer.training))
    ),
    "another dtype": lambda layer: (
        layer.molora_A.to(torch.float64) and (lambda: layer.molora_A.to(torch.float32))
    ),
}


@pytest.mark.parametrize("take_out", TAKEN_OUT.values(), ids=TAKEN_OUT)
@pytest.mark.parametrize(("name", "others"), [("q", []), ("k", [2]), ("v", [2])])
def test_a_layer_that_is_no_longer_alike_runs_alone_for_as_long(sizes, name, others, take_out):
    model, calls = attention(), SEQUENCES["as observed"]
    if name == "q" and take_out in (TAKEN_OUT["another mode"], TAKEN_OUT["another dtype"]):
        pytest.skip("q sets what the others must be like")
    put_back = take_out(getattr(model, name))
    expected = alone(outputs, calls, model)
    del sizes[:]
    assert all(map(torch.equal, outputs(calls, model), expected))
    assert sizes == others
    put_back()
    assert all(map(torch.equal, outputs(calls, model), alone(outputs, calls, model)))
    assert sizes == [*others, 3]


def test_several_active_adapters_run_alone(sizes):
    model = adapt(Attention(), ["q", "k", "v"])
    model.add_adapter("second", MoLoraConfig(r=2, num_experts=3, target_modules=["q", "k", "v"]))
    for active, expected in ((["default", "second"], 0), (["second"], 3), (["default"], 7)):
        model.base_model.set_adapter(active)
        for _ in range(4):
            model(X)
        assert len(sizes) == expected


def test_a_layer_adapted_later_joins(sizes):
    model = adapt(Attention(), ["q", "k"])
    for _ in range(3):
        model(X)
    assert sizes == [2, 2]
    model.add_adapter("second", MoLoraConfig(r=2, num_experts=3, target_modules=["q", "k", "v"]))
    model.set_adapter("second")
    for _ in range(3):
        model(X)
    assert sizes == [2, 2, 3, 3]


def test_case_28_copies_and_pickles_hold_no_result_and_no_state(sizes):
    model = attention()
    names = list(model.state_dict())
    x = X.clone().requires_grad_()
    expected = [model.q(x), model.k(x), model.v(x)]
    q = model.q(x)  # with its graph, while two results wait
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert list(other.state_dict()) == names
        assert all(map(torch.equal, SEQUENCES["as observed"](other), expected))
    copied = copy.deepcopy(model.k)
    assert torch.equal(copied(x), expected[1])
    assert torch.equal(q, expected[0])
    for _ in range(3):
        copy.deepcopy(model)(x)
    del sizes[:]
    other = copy.deepcopy(model)
    for _ in range(3):
        other(X)
    assert sizes == [3, 3]


def test_threads_of_one_model_do_not_meet(sizes):
    model = attention().eval()
    inputs = [torch.randn(3, 8) for _ in range(8)]
    with use_backend("torch"):
        expected = [alone(model, x).detach() for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(30):
            if not torch.equal(model(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    with use_backend("torch"):  # Triton's interpreter has one thread
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(sizes) == 1 + 8 * 30


def test_layers_that_share_nothing_are_soon_left_in_peace(sizes):
    model = adapt(Attention(), ["q", "o"]).base_model.model
    for _ in range(5):
        model(X)
    assert sizes == []
    assert model.q.siblings.are_alone


def test_case_22_compiled_layers_run_alone_without_a_graph_break(sizes):
    torch._dynamo.reset()
    model = attention()
    del sizes[:]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    assert sizes == [3]


def test_inference_mode_runs_alone_and_the_results_of_before_are_not_taken(sizes):
    model = attention()
    with torch.no_grad():
        q = model.q(X)
    del sizes[:]
    with torch.inference_mode():
        k = model.k(X)
        assert k.is_inference()
        model(X)
    assert sizes == []
    assert torch.equal(q, model.q(X))


def test_on_this_machine_nothing_is_observed():
    model = attention()
    assert isinstance(model.q, MoLoraLinear)
    if environment.BACKEND in (None, "torch"):
        assert model.q.siblings._runs == []


@pytest.mark.parametrize(("training", "dropout_p"), [(True, 0.5), (False, 0.0)])
def test_the_choice_knows_whether_layers_drop(monkeypatch, training, dropout_p):
    model, told = attention(lora_dropout=0.5).train(training), []
    monkeypatch.setattr(
        shared_input, "runs_together", lambda *_, **options: told.append(options["dropout_p"])
    )
    model(torch.randn(3, 8))
    assert set(told) == {dropout_p}
