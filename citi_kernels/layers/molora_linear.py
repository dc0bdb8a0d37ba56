"""MoLoRALinear: a frozen linear with routed low-rank experts, thin over `molora_linear`.

Legend: K in-features, N out-features, E experts, r rank, R = E * r, G = E + 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from citi_kernels.layers.routing import RoutingContext
from citi_kernels.ops.molora_linear import molora_linear
from citi_kernels.ops.molora_linear_checks import FLOATING
from citi_kernels.ops.molora_linear_group import molora_linear_group


@dataclass(frozen=True, kw_only=True)
class MoLoRASettings:
    """What a MOLoRA layer is, apart from its tensors.

    Attributes:
        num_experts: E, low-rank pairs per layer.
        r: rank of each expert.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an input of the experts (the router and the frozen linear
            see all of it), in training mode only.
        top_k: experts kept per token, the others exactly 0; None keeps all (the paper's layer).
        renormalize: with `top_k`, divide the kept gates by their sum.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    num_experts: int = 4
    r: int = 8
    alpha: float = 2.0
    dropout: float = 0.0
    top_k: int | None = None
    renormalize: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "r"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}")
        alpha, dropout, top_k = self.alpha, self.dropout, self.top_k
        if not (isinstance(alpha, Real) and math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be a number > 0, got {alpha!r}")
        if not (isinstance(dropout, Real) and 0.0 <= dropout < 1.0):
            raise ValueError(f"dropout must lie within [0, 1), got {dropout!r}")
        if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= self.num_experts):
            raise ValueError(
                f"top_k must be None (all experts) or within [1, {self.num_experts}], num_experts, "
                f"and an integer, got {top_k!r}"
            )

    @property
    def scaling(self) -> float:
        """alpha / r, the factor of the update."""
        return self.alpha / self.r

    def drops(self, training: bool) -> bool:
        """Whether inputs of the experts are dropped."""
        return training and self.dropout > 0


class MoLoRALinear(nn.Module):
    """y = W x + b + (alpha / r) * sum_i gate[i] * B_i (A_i x), gate = softmax(router x).

    `weight` and `bias` are frozen; `molora_A` (E * r, K), `molora_B` (N, E * r) and `molora_router`
    (E + 1, K) train. B starts at zero, so a fresh layer gives the frozen linear's output bitwise.
    The experts and the router are fp32 where `dtype` is narrower: they are small, and 16-bit
    parameters lose small optimizer steps. `.to(dtype)` and `.half()` convert them with the rest.

    Inside a `RoutingContext` each call records its gate sums under `id(layer)`. `torch.compile` of
    single layers or blocks then compiles one graph for each, and torch._dynamo.config's
    recompile_limit must be at least their number; outside, equal ones share a graph.

    Source: arXiv 2409.13202, section "MOLoRA".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int = 4,
        r: int = 8,
        alpha: float = 2,
        dropout: float = 0.0,
        top_k: int | None = None,
        renormalize: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer with a weight of its own, initialised as `nn.Linear` does, and frozen.

        Args:
            in_features, out_features: K and N.
            num_experts, r, alpha, dropout, top_k, renormalize: see `MoLoRASettings`.
            bias: whether there is a (frozen) bias.
            device, dtype: of weight and bias; the experts and the router are at least fp32.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.settings = MoLoRASettings(
            num_experts=num_experts,
            r=r,
            alpha=alpha,
            dropout=dropout,
            top_k=top_k,
            renormalize=renormalize,
        )
        of_base = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **of_base), False)
        self.bias = nn.Parameter(torch.empty(out_features, **of_base), False) if bias else None
        for name, shape in adapter_shapes(self.settings, in_features, out_features).items():
            of_adapter = {"device": device, "dtype": adapter_dtype(self.weight.dtype)}
            setattr(self, name, nn.Parameter(torch.empty(shape, **of_adapter)))
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        num_experts: int = 4,
        r: int = 8,
        alpha: float = 2,
        dropout: float = 0.0,
        top_k: int | None = None,
        renormalize: bool = False,
    ) -> MoLoRALinear:
        """Wraps a linear: its parameters are shared, not copied, and frozen.

        Returns:
            a layer on the linear's device whose output equals `linear(x)` bitwise at the start.

        Raises:
            TypeError: not an `nn.Linear` with a floating weight (a parameter of fp16 or wider), or
                calling it does more than its product: a `forward` of its own, or hooks.
        """
        if not isinstance(linear, nn.Linear) or linear.weight.dtype not in FLOATING:
            raise TypeError(
                "linear must be an nn.Linear with a floating weight "
                f"({', '.join(map(str, FLOATING))}), got {type(linear).__name__}"
            )
        if not _is_plain(linear):
            raise TypeError(
                "linear must be a plain nn.Linear: its forward, its parametrization or its hooks "
                f"would be lost, got {type(linear).__name__}; take them off, or use the PEFT "
                "method molora, which calls the layer"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            num_experts=num_experts,
            r=r,
            alpha=alpha,
            dropout=dropout,
            top_k=top_k,
            renormalize=renormalize,
            bias=False,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.requires_grad_(False)
        for name in adapter_shapes(layer.settings, layer.in_features, layer.out_features):
            like = getattr(layer, name)
            setattr(layer, name, nn.Parameter(torch.empty_like(like, device=linear.weight.device)))
        layer.reset_adapter_parameters()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialises everything, also the frozen weight: for layers made on the meta device."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.in_features, 1))
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter_parameters()

    def reset_adapter_parameters(self) -> None:
        """Initialises experts and router only; the layer then equals its frozen linear."""
        reset_adapter_(self.molora_A, self.molora_B, self.molora_router)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return apply_molora(
            x,
            self.weight,
            self.bias,
            self.molora_A,
            self.molora_B,
            self.molora_router,
            settings=self.settings,
            key=self._routing_key(),
            training=self.training,
        )

    def _routing_key(self) -> Hashable:
        """None where nothing is recorded: with its id, each layer would be a graph of its own."""
        return None if RoutingContext.active() is None else id(self)

    def extra_repr(self) -> str:
        s = self.settings
        top_k = "" if s.top_k is None else f", top_k={s.top_k}, renormalize={s.renormalize}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, num_experts={s.num_experts}, r={s.r}, "
            f"alpha={s.alpha:g}, dropout={s.dropout:g}{top_k}"
        )


def apply_molora(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    *,
    settings: MoLoRASettings,
    key: Hashable,
    training: bool,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The op with what a layer adds: dropout while training, and the active routing context.

    Args:
        x, weight, bias, a, b, router: as for `citi_kernels.molora_linear`.
        settings: of the layer.
        key: under which the routing context records this call's gate sums; any outside of one.
        training: whether the layer is in training mode.
        dropout_seed: of this call; None draws one where the layer drops.

    Returns:
        (..., N) output, or the update alone where `weight` is None.
    """
    context = RoutingContext.active()
    options = _options(x, settings, training, context)
    if settings.drops(training) and dropout_seed is None:
        dropout_seed = draw_seed()
    y, gate_sums = molora_linear(
        x, weight, bias, a, b, router, **options, dropout_seed=dropout_seed
    )
    if context is not None:
        context.record(key, gate_sums)
    return y


def apply_molora_group(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    routers: Sequence[Tensor],
    *,
    settings: MoLoRASettings,
    training: bool,
    dropout_seeds: Sequence[Tensor] | None,
) -> list[tuple[Tensor, Tensor | None]]:
    """`apply_molora` of several layers with the same settings; nothing is recorded.

    Args:
        x, weights, biases, a, b, routers: as for `citi_kernels.molora_linear_group`.
        settings, training: of all layers.
        dropout_seeds: one for each layer, where they drop; otherwise None.

    Returns:
        each layer's output, and its gate sums for the active routing context (None outside one).
    """
    options = _options(x, settings, training, RoutingContext.active())
    return molora_linear_group(
        x, weights, biases, a, b, routers, **options, dropout_seeds=dropout_seeds
    )


def _options(
    x: Tensor, settings: MoLoRASettings, training: bool, context: RoutingContext | None
) -> dict[str, Any]:
    options = {
        "num_experts": settings.num_experts,
        "scaling": settings.scaling,
        "top_k": settings.top_k,
        "renormalize": settings.renormalize,
        "dropout_p": settings.dropout if settings.drops(training) else 0.0,
    }
    if context is not None:
        options["segment_ids"] = context.segment_ids_for(x, training=training)
        options["num_segments"] = context.num_segments
    return options


def adapter_shapes(
    settings: MoLoRASettings, in_features: int, out_features: int
) -> dict[str, tuple[int, int]]:
    """Names and shapes of a layer's trainable tensors."""
    rank = settings.num_experts * settings.r
    return {
        "molora_A": (rank, in_features),
        "molora_B": (out_features, rank),
        "molora_router": (settings.num_experts + 1, in_features),
    }


def adapter_dtype(base_dtype: torch.dtype) -> torch.dtype:
    """fp32 for a base of fp32 or narrower, fp64 for fp64."""
    return torch.promote_types(base_dtype, torch.float32)


@torch.no_grad()
def reset_adapter_(a: Tensor, b: Tensor, router: Tensor) -> None:
    """A and router Kaiming-uniform with a = sqrt(5), B zero.

    The bound depends on K alone, so that one draw over the stacked A is a draw per expert.
    """
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.kaiming_uniform_(router, a=math.sqrt(5))
    b.zero_()


def _is_plain(linear: nn.Linear) -> bool:
    """Whether calling it is F.linear with its weight and bias, and no more."""
    hooks = (
        linear._forward_pre_hooks,
        linear._forward_hooks,
        linear._backward_pre_hooks,
        linear._backward_hooks,
    )
    has_own_forward = type(linear).forward is not nn.Linear.forward or "forward" in vars(linear)
    is_parameter = isinstance(linear.weight, nn.Parameter)
    return is_parameter and not has_own_forward and not any(hooks)


def draw_seed(generator: torch.Generator | None = None) -> Tensor:
    """0-d int64 on the CPU, from the default generator: checkpointing restores that one."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu", generator=generator)


def next_seeds(count: int) -> list[Tensor]:
    """What the next calls of `draw_seed` will give; the default generator stays as it is."""
    generator = torch.Generator("cpu")
    generator.set_state(torch.get_rng_state())
    return [draw_seed(generator) for _ in range(count)]
