"""How a result is judged: the accuracy rule, poison, guard bands, random cases.

Shipped so that you can judge an op on your own machine:

    case = random_case(64, 256, 128, num_experts=4, r=8, dtype=torch.bfloat16)
    check_molora_linear(citi_kernels.molora_linear, case)

Shapes: T tokens, K in-features, N out-features, R = E·r, G = E + 1 gate entries, B segments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels.ops import molora_linear_reference as definition

FACTOR = {"forward": 2.0, "backward": 3.0}
EPSILONS = 1.0
OPERANDS = ("x", "weight", "bias", "a", "b", "router")


class Accuracy(NamedTuple):
    """Error over what the rule allows; both are at most 1 in a result that passes."""

    largest: float
    norm: float


def assert_accurate(
    out: Tensor,
    truth: Tensor,
    baseline: Tensor,
    *,
    kind: str = "forward",
    name: str = "out",
    dtype: torch.dtype | None = None,
) -> Accuracy:
    """Hold `out` to the accuracy rule and print how much of the allowance it used.

        max|out - truth| <= f * max|baseline - truth| + eps(dtype) * max|truth|

    and the same with the 2-norm for max|·|; f is 2 forward, 3 backward. NaN and inf must first
    stand where they stand in the truth rounded to out's dtype.

    Args:
        out: the result to judge.
        truth: the definition in fp64 on the same, upcast inputs; out's shape.
        baseline: the plain PyTorch expression in the dtype of the inputs; out's shape.
        kind: "forward" or "backward".
        name: goes into the message.
        dtype: the dtype computed in, where out's is wider. Default: out's.
    Returns:
        error / allowance, of the largest element and of the norm.
    Raises:
        AssertionError: the rule does not hold.
    """
    assert out.shape == truth.shape == baseline.shape, (
        f"{name}: shapes differ: out {tuple(out.shape)}, truth {tuple(truth.shape)}, "
        f"baseline {tuple(baseline.shape)}"
    )
    _assert_same_specials(out, truth.to(out.dtype), name)
    finite = out.isfinite() & truth.isfinite() & baseline.isfinite()
    out64, truth64, baseline64 = (each.detach()[finite].double() for each in (out, truth, baseline))
    eps = torch.finfo(dtype or out.dtype).eps
    ratios = []
    for size in (lambda v: v.abs().max().item() if v.numel() else 0.0, lambda v: v.norm().item()):
        allowed = FACTOR[kind] * size(baseline64 - truth64) + EPSILONS * eps * size(truth64)
        measured = size(out64 - truth64)
        ratios.append(measured / allowed if allowed else float(measured > 0))
    accuracy = Accuracy(*ratios)
    print(f"{name}: measured/allowed {accuracy.largest:.2f} (max), {accuracy.norm:.2f} (norm)")
    assert max(accuracy) <= 1, f"{name}: error / allowance is {accuracy}, want at most 1"
    return accuracy


def _assert_same_specials(out: Tensor, truth: Tensor, name: str) -> None:
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        ours, theirs = test(out), test(truth)
        assert torch.equal(ours, theirs), (
            f"{name}: {what} in {int(ours.sum())} places, in the truth in {int(theirs.sum())}; "
            f"{int((ours ^ theirs).sum())} places differ"
        )


def poison_like(tensor: Tensor) -> Tensor:
    """A tensor like `tensor` full of NaN; of the least value for integers, True for bool."""
    if tensor.dtype == torch.bool:
        return torch.ones_like(tensor)
    if tensor.is_floating_point():
        return torch.full_like(tensor, float("nan"))
    return torch.full_like(tensor, torch.iinfo(tensor.dtype).min)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block fresh memory starts as NaN, so that an unwritten element shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # memory is filled in this mode alone; it must not refuse cuBLAS
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Inside the block fp32 products are fp32: no TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Embedded(NamedTuple):
    """A copy of a tensor in the middle of a larger buffer full of one guard value."""

    view: Tensor
    buffer: Tensor
    guard: float

    def is_intact(self) -> bool:
        """Whether every element around the view still is the guard value."""
        expected = torch.full_like(self.buffer, self.guard)
        inner = tuple(slice(_MARGIN, _MARGIN + size) for size in self.view.shape)
        expected[inner] = self.view
        return torch.equal(expected.nan_to_num(nan=1e4), self.buffer.nan_to_num(nan=1e4))


_MARGIN = 3


def embed(tensor: Tensor, *, guard: float = float("nan")) -> Embedded:
    """Copy `tensor` into a guard band on every side of every dimension."""
    sizes = [size + 2 * _MARGIN for size in tensor.shape]
    buffer = torch.full(sizes, guard, dtype=tensor.dtype, device=tensor.device)
    view = buffer[tuple(slice(_MARGIN, _MARGIN + size) for size in tensor.shape)]
    view.copy_(tensor.detach())
    return Embedded(view, buffer, guard)


@dataclass(frozen=True)
class MoLoRACase:
    """Arguments of one `molora_linear` call and the gradients that come in."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor
    b: Tensor
    router: Tensor
    dy: Tensor
    dgate_sums: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in OPERANDS)

    def to(self, dtype: torch.dtype) -> MoLoRACase:
        """The same values with every operand and incoming gradient in `dtype`."""
        names = (*OPERANDS, "dy", "dgate_sums")
        tensors = {name: getattr(self, name) for name in names}
        return replace(
            self, **{name: None if t is None else t.to(dtype) for name, t in tensors.items()}
        )


def random_case(
    num_tokens: int,
    num_in: int,
    num_out: int,
    *,
    num_experts: int = 4,
    r: int = 8,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    weight: bool = True,
    bias: bool = True,
    num_segments: int | None = 3,
    device: str | torch.device | None = None,
    drawn_on: str | torch.device = "cpu",
    seed: int = 0,
    **options: Any,
) -> MoLoRACase:
    """Random arguments of `molora_linear`, the same for the same arguments.

    With top_k in `options`, tokens are drawn again until the logits of the last kept and the first
    dropped expert differ by 1e-2 or more, so that every right implementation keeps the same.

    Args:
        num_tokens, num_in, num_out: T, K, N.
        num_experts, r: E and the rank of each.
        dtype: of x, weight, bias and dy.
        parameter_dtype: of a, b and router. Default: dtype.
        weight, bias: whether there is one.
        num_segments: B, tokens spread over them and one in eight in none; None: no segment_ids.
        device: where the tensors go. Default: PyTorch's default.
        drawn_on: where they are drawn; on the CPU the values are the same on every machine, on a
            GPU large cases take no time.
        seed: of the draw.
        options: more keyword arguments of `molora_linear`.
    """
    device = torch.get_default_device() if device is None else device
    source = {"generator": torch.Generator(drawn_on).manual_seed(seed), "device": drawn_on}

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, **source) * scale

    parameter_dtype = parameter_dtype or dtype
    rank = num_experts * r
    router_GK = draw(num_experts + 1, num_in, scale=num_in**-0.5).to(parameter_dtype)
    x_TK = _draw_separated(draw, num_tokens, router_GK, dtype, options.get("top_k"))
    options = {"num_experts": num_experts, "scaling": 2.0 / r, **options}
    dgate_sums = None
    if num_segments is not None:
        ids = torch.randint(0, max(num_segments, 1), (num_tokens,), **source)
        ids[torch.randint(0, 8, (num_tokens,), **source) == 0] = -1
        options |= {"segment_ids": ids.to(device), "num_segments": num_segments}
        wide = definition.gate_dtype(dtype)
        dgate_sums = draw(num_segments, num_experts + 1).to(device, wide)
    return MoLoRACase(
        x=x_TK.to(device),
        weight=draw(num_out, num_in, scale=num_in**-0.5).to(device, dtype) if weight else None,
        bias=draw(num_out).to(device, dtype) if weight and bias else None,
        a=draw(rank, num_in, scale=num_in**-0.5).to(device, parameter_dtype),
        b=draw(num_out, rank).to(device, parameter_dtype),
        router=router_GK.to(device),
        dy=draw(num_tokens, num_out).to(device, dtype),
        dgate_sums=dgate_sums,
        options=options,
    )


def _draw_separated(
    draw: Callable[..., Tensor],
    num_tokens: int,
    router_GK: Tensor,
    dtype: torch.dtype,
    top_k: int | None,
) -> Tensor:
    num_experts, num_in = router_GK.shape[0] - 1, router_GK.shape[1]
    x_TK = draw(num_tokens, num_in).to(dtype)
    if top_k is None or top_k >= num_experts:
        return x_TK
    for _ in range(100):
        logits_TE = x_TK.double() @ router_GK[1:].to(dtype).double().T
        sorted_TE = logits_TE.sort(dim=1, descending=True).values
        close_T = sorted_TE[:, top_k - 1] - sorted_TE[:, top_k] < 1e-2
        if not close_T.any():
            return x_TK
        x_TK[close_T] = draw(int(close_T.sum()), num_in).to(dtype)
    raise ValueError(f"top_k: logits of {num_experts} experts stay too close for top_k={top_k}")


def stacked_molora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    *,
    num_experts: int,
    scaling: float,
    top_k: int | None = None,
    renormalize: bool = False,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The baseline of the rule: `molora_linear` as a plain expression with experts stacked."""
    a, b, router = (each.to(x.dtype) for each in (a, b, router))
    x_TK = x_in_TK = x.reshape(-1, x.shape[-1])
    if dropout_p > 0:
        x_in_TK = x_TK * definition.dropout_scale(
            x_TK.shape, dropout_p, dropout_seed, dtype=x.dtype, device=x.device
        )
    wide_x_TK, wide_router_GK = definition.in_gate_dtype(x_TK, router)
    kept_TE = definition.choose_experts(wide_x_TK @ wide_router_GK.T, top_k)
    (logits_TG,) = definition.in_gate_dtype(F.linear(x_TK, router))
    gate_TG = definition.gates(torch.softmax(logits_TG, dim=1), kept_TE)
    if renormalize:
        gate_TG = gate_TG / gate_TG.sum(1, keepdim=True)
    repeated_TR = gate_TG[:, 1:].repeat_interleave(a.shape[0] // num_experts, dim=1)
    u_TR = (scaling * F.linear(x_in_TK, a) * repeated_TR).to(x.dtype)
    y_TN = F.linear(u_TR, b)
    if weight is not None:
        y_TN = F.linear(x_TK, weight, bias) + y_TN
    sums = None
    if segment_ids is not None:
        sums = definition.sum_over_segments(gate_TG, segment_ids.reshape(-1), num_segments)
    return y_TN.reshape(*x.shape[:-1], b.shape[0]), sums


def evaluate(
    function: Callable[..., tuple[Tensor, Tensor | None]], case: MoLoRACase
) -> dict[str, Tensor]:
    """Outputs of `function` on `case` and the gradients dx, dweight, ... of all its operands."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in case.operands]
    y, gate_sums = function(*leaves, **case.options)
    outputs, incoming = [y], [case.dy.reshape(y.shape)]
    if gate_sums is not None:
        outputs.append(gate_sums)
        incoming.append(case.dgate_sums)
    named = [(name, leaf) for name, leaf in zip(OPERANDS, leaves, strict=True) if leaf is not None]
    gradients = torch.autograd.grad(outputs, [leaf for _, leaf in named], incoming)
    results = {"y": y.detach()} | ({} if gate_sums is None else {"gate_sums": gate_sums.detach()})
    return results | {f"d{name}": g for (name, _), g in zip(named, gradients, strict=True)}


def check_molora_linear(
    function: Callable[..., tuple[Tensor, Tensor | None]], case: MoLoRACase
) -> dict[str, Accuracy]:
    """Hold every output and gradient of `function` on `case` to the accuracy rule.

    Truth: `molora_linear_ref` in fp64. Baseline: `stacked_molora_linear` in the case's dtypes.
    Returns:
        error / allowance by name: y, gate_sums, dx, dweight, dbias, da, db, drouter.
    Raises:
        AssertionError: the rule does not hold for one of them.
    """
    with exact_matmul():
        truth = evaluate(definition.molora_linear_ref, rounded(case).to(torch.float64))
        baseline = evaluate(stacked_molora_linear, case)
        results = evaluate(function, case)
    return {
        name: assert_accurate(
            result,
            truth[name],
            baseline[name],
            kind="backward" if name.startswith("d") else "forward",
            name=name,
            dtype=None if name == "gate_sums" else case.x.dtype,
        )
        for name, result in results.items()
    }


def rounded(case: MoLoRACase) -> MoLoRACase:
    """The case with a, b and router rounded to x's dtype, as the op rounds them."""
    return replace(
        case, **{name: getattr(case, name).to(case.x.dtype) for name in ("a", "b", "router")}
    )
