"""Autograd of `molora_linear`: what is saved, which gradients exist, tracing, memory, imports."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

from citi_kernels import backends, environment, molora_linear, molora_linear_ref, use_backend
from citi_kernels.testing import OPERANDS, MoLoRACase, evaluate, random_case
from under_test import BACKEND, DEVICE, REPEATS, WIDEST_LAYER, assert_equal_to_rounding

SEED = torch.tensor(7, device="cpu")
OPTIONS = {
    "dense": {},
    "top_k": {"top_k": 2},
    "renormalized": {"top_k": 2, "renormalize": True},
    "dropout": {"dropout_p": 0.3, "dropout_seed": SEED},
    "top_k_dropout": {"top_k": 2, "dropout_p": 0.3, "dropout_seed": SEED},
    "update_only": {"weight": False},
    "no_segments": {"num_segments": None},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def _no_compiled_code_of_another_test() -> None:
    torch._dynamo.reset()


def saved_bytes(case: MoLoRACase, trained: str, function=molora_linear) -> int:
    """Bytes kept for the backward besides the parameters, each storage once."""
    operands = [
        None if each is None else each.clone().requires_grad_(name in trained.split())
        for name, each in zip(OPERANDS, case.operands, strict=True)
    ]
    parameters = {each.data_ptr() for each in operands[1:] if each is not None}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(*operands, **case.options)
    assert outputs[0].requires_grad
    return sum(kept.values())


@each_option
@pytest.mark.parametrize("num_tokens", [3, 21])
def test_without_gradients_the_outputs_are_the_same(
    num_tokens: int, options: dict[str, object]
) -> None:
    case = random_case(num_tokens, 24, 16, **options)
    operands = [each if each is None else each.requires_grad_() for each in case.operands]
    expected = molora_linear(*operands, **case.options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours = molora_linear(*operands, **case.options)
        for one, other in zip(ours, expected, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (torch.equal(one, other) and not one.requires_grad)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_forward_mode_is_refused_and_no_tangent_lost(grad_mode: type) -> None:
    case = random_case(3, 24, 16)
    x, *others = case.operands
    with grad_mode(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            molora_linear(dual, *others, **case.options)


@pytest.mark.parametrize(
    "derivative", [torch.func.jacfwd, torch.func.hessian], ids=lambda each: each.__name__
)
@pytest.mark.parametrize("name", ["x", "b"])
def test_forward_mode_by_a_transform_is_refused_and_no_tangent_is_zero(name, derivative) -> None:
    case = random_case(3, 8, 6, num_segments=None)
    operands = dict(zip(OPERANDS, case.operands, strict=True))

    def loss(value: Tensor) -> Tensor:
        return molora_linear(**(operands | {name: value}), **case.options)[0].square().sum()

    with pytest.raises(NotImplementedError, match="molora_linear: it has no forward-mode"):
        derivative(loss)(operands[name])
    with use_backend("reference"):
        assert derivative(loss)(operands[name]).abs().sum() > 0


def test_forward_mode_is_refused_by_code_that_was_compiled_without_it() -> None:
    case = random_case(3, 8, 6, num_segments=None)
    x, *others = case.operands
    compiled = torch.compile(molora_linear, backend="eager")
    compiled(x, *others, **case.options)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="molora_linear: it has no forward-mode"):
            compiled(dual, *others, **case.options)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("stage", "trained", "saves_x"),
    [
        ("router pre-training", "x router", True),
        ("MOLoRA improvement", "x a b router", True),
        ("experts alone", "x b", False),
        ("unimportant components, MOLoRA frozen", "x", False),
        ("first layer of the model", "a b router", True),
        ("weight trained", "x weight bias", True),
    ],
)
def test_saved_for_backward_is_the_algebra_to_the_byte(
    stage: str, trained: str, saves_x: bool, dropout_p: float, top_k: int | None
) -> None:
    num_tokens, num_in, rank, num_experts = 24, 640, 32, 4
    case = random_case(
        num_tokens,
        num_in,
        320,
        dtype=torch.bfloat16,
        parameter_dtype=torch.float32,
        top_k=top_k,
        dropout_p=dropout_p,
        dropout_seed=SEED if dropout_p else None,
    )
    x_bytes = 2 * num_tokens * num_in if saves_x else 0
    h_bytes, probs_bytes = 2 * num_tokens * rank, 4 * num_tokens * (num_experts + 1)
    # elsewhere the sign of a probability says whether its expert is kept
    masks_experts = top_k and backends.choose("molora_linear", case.x) == "torch"
    kept_bytes = num_tokens * num_experts if masks_experts else 0
    assert saved_bytes(case, trained) == x_bytes + h_bytes + probs_bytes + kept_bytes, stage


@pytest.mark.parametrize(("num_out", "gate"), [(4096, 0.21), (14336, 0.07)])
def test_saved_activations_against_the_expert_loop_hold_the_gate(num_out: int, gate: float) -> None:
    case = random_case(8, 4096, num_out, dtype=torch.bfloat16, num_segments=None, bias=False)

    def authors_loop(x, weight, _bias, a, b, router, *, num_experts, scaling):
        y, gates = F.linear(x, weight), torch.softmax(F.linear(x, router), dim=1)
        for i, (a_i, b_i) in enumerate(zip(a.chunk(num_experts), b.chunk(num_experts, 1))):  # noqa: B905
            y = y + gates[:, i + 1, None] * F.linear(F.linear(x, a_i), b_i) * scaling
        return (y,)

    ours = saved_bytes(case, "x a b router")
    assert ours / saved_bytes(case, "x a b router", authors_loop) <= gate


def test_case_23_every_subset_of_requires_grad_gives_the_same_gradients() -> None:
    for options in OPTIONS.values():
        case = random_case(7, 6, 5, num_experts=3, r=2, **options).to(WIDEST_LAYER)
        expected = evaluate(molora_linear, case)
        present = [name for name in OPERANDS if getattr(case, name) is not None]
        subsets = itertools.chain.from_iterable(
            itertools.combinations(present, size) for size in range(1, len(present) + 1)
        )
        for subset in subsets:
            check_subset(case, subset, expected)


def check_subset(case: MoLoRACase, subset: tuple[str, ...], expected: dict[str, Tensor]) -> None:
    leaves = {name: getattr(case, name) for name in OPERANDS}
    for name in subset:
        leaves[name] = leaves[name].clone().requires_grad_()
    y, gate_sums = molora_linear(*leaves.values(), **case.options)
    assert y.requires_grad
    outputs = [y] if gate_sums is None else [y, gate_sums]
    incoming = [case.dy, case.dgate_sums][: len(outputs)]
    torch.autograd.backward(outputs, incoming)
    for name in subset:
        assert_equal_to_rounding(leaves[name].grad, expected[f"d{name}"])


@each_option
def test_case_23_no_grad_builds_no_graph_and_gives_the_same_values(options: dict) -> None:
    case = random_case(7, 16, 12, **options)
    leaves = [None if each is None else each.requires_grad_() for each in case.operands]
    expected = molora_linear(*leaves, **case.options)
    with torch.no_grad():
        outputs = molora_linear(*leaves, **case.options)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (torch.equal(ours, theirs) and not ours.requires_grad)


@each_option
def test_case_23_two_calls_in_one_graph_add_their_gradients(options: dict) -> None:
    case = random_case(7, 16, 16, **options).to(WIDEST_LAYER)

    def twice(x: Tensor, *others: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        y, first = molora_linear(x, *others, **options)
        y, second = molora_linear(torch.tanh(y), *others, **options)
        return y, None if first is None else first + second

    def twice_ref(x: Tensor, *others: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        y, first = molora_linear_ref(x, *others, **options)
        y, second = molora_linear_ref(torch.tanh(y), *others, **options)
        return y, None if first is None else first + second

    ours, truth = evaluate(twice, case), evaluate(twice_ref, case)
    for name in truth:
        assert_equal_to_rounding(ours[name], truth[name])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"weight": False}])
@pytest.mark.parametrize("output", [0, 1], ids=["y", "gate_sums"])
def test_either_output_alone_may_be_in_the_loss(output: int, options: dict) -> None:
    case = random_case(7, 16, 12, **options).to(WIDEST_LAYER)
    incoming = (case.dy, case.dgate_sums)[output]
    gradients = []
    for function in (molora_linear, molora_linear_ref):
        x, router = case.x.clone().requires_grad_(), case.router.clone().requires_grad_()
        out = function(x, case.weight, case.bias, case.a, case.b, router, **case.options)[output]
        gradients.append(torch.autograd.grad(out, [x, router], incoming))
    for ours, truth in zip(*gradients, strict=True):
        assert_equal_to_rounding(ours, truth)


def whole(tokens: Tensor) -> Tensor:
    return tokens.unflatten(0, (3, 4))


def apart(tokens: Tensor) -> Tensor:
    """Rows that no single stride goes through."""
    return torch.stack([tokens.unflatten(0, (3, 4))] * 2, dim=1)[:, 0]


@pytest.mark.parametrize("laid_out", [whole, apart])
@each_option
def test_batched_tokens_are_rows_and_the_output_may_be_changed_in_place(
    options: dict, laid_out
) -> None:
    case = random_case(12, 16, 12, **options)
    found = []
    for shape in (lambda tokens: tokens, laid_out):
        leaves = [None if each is None else each.clone().requires_grad_() for each in case.operands]
        y, gate_sums = molora_linear(shape(leaves[0]), *leaves[1:], **case.options)
        assert y.shape[:-1] == shape(case.x).shape[:-1]
        y.mul_(2)
        outputs = [y] if gate_sums is None else [y, gate_sums]
        incoming = [shape(case.dy), case.dgate_sums][: len(outputs)]
        torch.autograd.backward(outputs, incoming)
        found.append([y.flatten(0, -2), *(each.grad for each in leaves if each is not None)])
    assert all(map(torch.equal, *found))


@pytest.mark.skipif(torch.float64 != WIDEST_LAYER, reason="this backend has no kernels in fp64")
@each_option
def test_gradcheck_in_fp64(options: dict) -> None:
    case = random_case(4, 5, 3, num_experts=3, r=2, **options).to(torch.float64)
    leaves = [None if each is None else each.requires_grad_() for each in case.operands]

    def function(*operands: Tensor) -> list[Tensor]:
        return [out for out in molora_linear(*operands, **case.options) if out is not None]

    assert torch.autograd.gradcheck(function, leaves)


def test_a_second_derivative_raises_instead_of_being_wrong() -> None:
    case = random_case(4, 5, 3, num_segments=None)
    x = case.x.requires_grad_()
    y, _ = molora_linear(x, *case.operands[1:], **case.options)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["segment_ids", "dropout_seed"])
@pytest.mark.parametrize("through", ["eager", "op"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_change_in_place_before_the_backward_raises_where_it_is_counted(
    mode: type, through: str, name: str
) -> None:
    case = random_case(7, 16, 12, dropout_p=0.3, dropout_seed=SEED)
    with mode():
        case.options[name] = case.options[name].clone()
    leaves = [each.clone().requires_grad_() for each in case.operands]
    if through == "op":
        leaves[0] = torch._neg_view(-leaves[0])  # is left to PyTorch's dispatch
    outputs = molora_linear(*leaves, **case.options)
    torch.autograd.backward(outputs, [case.dy, case.dgate_sums], retain_graph=True)
    if mode is torch.inference_mode:
        return
    case.options[name].mul_(1)
    with pytest.raises(RuntimeError, match=f"molora_linear: {name}, .* modified by an inplace"):
        torch.autograd.backward(outputs, [case.dy, case.dgate_sums])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}], ids=["dense", "top_k"])
def test_recomputation_without_segments_gives_the_same_gradients(options: dict) -> None:
    case = random_case(12, 16, 12, **options)

    def checkpointed(*operands: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        calls = []

        def layer(*operands: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(1)
            if len(calls) == 2:  # recomputation runs outside of any routing context
                y, _ = molora_linear(*operands, **options | {"segment_ids": None})
                return y, y.new_zeros(3, 5)
            return molora_linear(*operands, **options)

        return torch.utils.checkpoint.checkpoint(layer, *operands, use_reentrant=False)

    ours, expected = evaluate(checkpointed, case), evaluate(molora_linear, case)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@each_option
def test_case_22_opcheck(options: dict) -> None:
    case = random_case(6, 8, 10, num_experts=3, r=2, **options)
    leaves = [None if each is None else each.requires_grad_() for each in case.operands]
    defaults = {
        "top_k": None,
        "renormalize": False,
        "segment_ids": None,
        "num_segments": 0,
        "dropout_p": 0.0,
        "dropout_seed": None,
    }
    given = defaults | case.options
    names = ("num_experts", "scaling", *defaults)
    torch.library.opcheck(
        torch.ops.citi.molora_linear.default,
        (*leaves, *(given[name] for name in names), BACKEND),
    )


@each_option
def test_case_22_compiled_without_graph_breaks_equals_eager(options: dict) -> None:
    case = random_case(9, 16, 12, **options)
    compiled = torch.compile(molora_linear, fullgraph=True, backend="aot_eager")
    ours, expected = evaluate(compiled, case), evaluate(molora_linear, case)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["flat", "batched"])
def test_case_22_one_dynamic_graph_serves_every_number_of_tokens(
    shape: tuple[int, ...], dynamic: bool | None
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(molora_linear, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for num_tokens in (21, 6, 33, 27):  # none is another size of the case
        case = random_case(num_tokens, 16, 12)
        shaped = (*shape, num_tokens // (shape[0] if shape else 1))
        case.options["segment_ids"] = case.options["segment_ids"].reshape(shaped)
        case = replace(case, x=case.x.reshape(*shaped, 16))
        ours, expected = evaluate(compiled, case), evaluate(molora_linear, case)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3
    assert dynamic is None or counts[0] == counts[1]


def test_case_22_segments_may_come_after_the_tokens_went_dynamic() -> None:
    compiled = torch.compile(molora_linear, fullgraph=True, backend="aot_eager")
    for num_tokens, num_segments in ((21, None), (6, None), (6, 3), (33, 3)):
        case = random_case(num_tokens, 16, 12, num_segments=num_segments)
        ours, expected = evaluate(compiled, case), evaluate(molora_linear, case)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_case_22_compiles_under_autocast() -> None:
    case = random_case(9, 16, 12)

    def under_autocast(*operands: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return molora_linear(*operands, **options)

    compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    ours, expected = (
        compiled(*case.operands, **case.options),
        under_autocast(*case.operands, **case.options),
    )
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"top_k": 2}], ids=["dense", "top_k"])
def test_case_26_steps_do_not_hold_on_to_memory(options: dict) -> None:
    # 256 KB a tensor of (T, K) or (T, N)
    case = random_case(16 if environment.INTERPRETS else 256, 256, 256, **options)

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    for _ in range(5):
        evaluate(molora_linear, case)
    tensors, peak = live(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(REPEATS):
        evaluate(molora_linear, case)
    assert live() <= tensors
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < 16 * 2**20  # one leaked tensor a step would be 50 MB


def test_case_27_imports_and_runs_on_pytorch_alone() -> None:
    code = """
        import sys

        class Blocker:
            names = ("triton", "transformers", "peft", "accelerate", "citi", "citi_kernels._C")

            def find_spec(self, name, path=None, target=None):
                if name in self.names:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocker())
        import torch
        import citi_kernels

        case = citi_kernels.testing.random_case(4, 8, 6)
        y, _ = citi_kernels.molora_linear(*case.operands, **case.options)
        y_ref, _ = citi_kernels.molora_linear_ref(*case.operands, **case.options)
        torch.testing.assert_close(y, y_ref)
        print(sorted({name.split(".")[0] for name in sys.modules} & set(Blocker.names)))
    """
    chosen = ("CITI_BACKEND", "TRITON_INTERPRET")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name not in chosen},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
