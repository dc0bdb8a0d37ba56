"""A component with MOLoRA adapters: the fused op where the base is plain, an addition elsewhere.

Legend: K in-features, N out-features, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from citi.adapters.config import MoLoraConfig
from citi.adapters.shared_input import Member, Siblings, apply_shared
from citi_kernels.layers.molora_linear import (
    MoLoRASettings,
    adapter_dtype,
    adapter_shapes,
    reset_adapter_,
)
from citi_kernels.layers.routing import RoutingContext

MERGE_REFUSED = (
    "a MOLoRA adapter cannot be merged: its gates depend on the token, so no single weight equals "
    "it. Keep it as an adapter (save_pretrained and PeftModel.from_pretrained), switch it off with "
    "disable_adapter(), take it off with unload(), or fix its gates (citi.convert_to_lora, "
    "`citi export`)"
)


def feature_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(K, N) of a linear layer, quantised ones included; None for anything else."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads this one's weight and never calls it
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes
    return None


class MoLoraLayer(BaseTunerLayer):
    """What PEFT asks of an adapted layer; see `MoLoraLinear`."""

    adapter_layer_names = ("molora_A", "molora_B", "molora_router")
    other_param_names = ("molora_settings",)

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.molora_A = nn.ParameterDict()
        self.molora_B = nn.ParameterDict()
        self.molora_router = nn.ParameterDict()
        self.molora_settings: dict[str, MoLoRASettings] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        sizes = feature_sizes(self.get_base_layer())
        if sizes is None:
            raise TypeError(
                f"MOLoRA adapts linear layers, got {type(self.get_base_layer()).__name__}; take it "
                "out of target_modules"
            )
        self.in_features, self.out_features = sizes

    def update_layer(self, adapter_name: str, config: MoLoraConfig) -> None:
        """Adds an adapter with fresh tensors: the layer's output stays the base's, bitwise."""
        settings = config.settings()
        dtype = self._adapter_dtype()
        shapes = adapter_shapes(settings, self.in_features, self.out_features)
        self.molora_settings[adapter_name] = settings
        for name, shape in shapes.items():
            getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(shape, dtype=dtype))
        reset_adapter_(*(getattr(self, name)[adapter_name] for name in shapes))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapter_dtype(self) -> torch.dtype:
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        floating = dtype is not None and dtype.is_floating_point
        return adapter_dtype(dtype if floating else torch.float32)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        tensors = (*base_layer.parameters(), *base_layer.buffers())
        weight = getattr(base_layer, "weight", None)
        if not isinstance(weight, Tensor):
            weight = next(iter(tensors), None)
        return (None, None) if weight is None else (weight.device, weight.dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To the device only: PEFT would round fp32 adapters to a 16-bit base and back."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is None or device.type == "meta":
            return
        for name in self.adapter_layer_names:
            tensors = getattr(self, name)
            if adapter_name in tensors and tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused; see the message."""
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def routing_key(self, adapter_name: str) -> Hashable:
        """Under which a `RoutingContext` holds an adapter's gate sums: `id(layer)` for the first
        active adapter, `(id(layer), name)` for further ones."""
        first = next((name for name in self.active_adapters if name in self.molora_A), None)
        return self._key(adapter_name, adapter_name == first)

    def _key(self, adapter_name: str, is_first: bool) -> Hashable:
        return id(self) if is_first else (id(self), adapter_name)


class MoLoraLinear(nn.Module, MoLoraLayer):
    """base(x) + sum over active adapters of scaling * sum_i gate[i] * B_i (A_i x).

    One op computes base and first adapter together where the base layer is a plain `nn.Linear` or
    GPT-2's `Conv1D`. Where calling the base layer does more than its product (quantised weights,
    subclasses, hooks, a replaced `forward`), it is called, and the op computes the update alone.
    Layers of one parent (`siblings`) that share their input run together, see `shared_input`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoLoraConfig) -> None:
        super().__init__()
        MoLoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.siblings = Siblings()
        self.update_layer(adapter_name, config)
        self.train(base_layer.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., K) -> (..., N); further arguments go to the base layer."""
        active = self._active_names()
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        first, *others = active
        if args or kwargs or not is_plain(self.base_layer):
            y, others = self.base_layer(x, *args, **kwargs), active
        elif torch.compiler.is_compiling() or not self._is_one_op(active):
            y = self._fused(first).apply(x)
        else:
            return apply_shared(self._fused(first), x, self.siblings, MoLoraLinear.as_member)
        for name in others:
            y = y + self._update(name, is_first=name == first).apply(x).to(y.dtype)
        return y

    def as_member(self) -> Member | None:
        """The op that a call of this layer is now; None where it is not that alone."""
        active = self._active_names()
        is_one_op = not self.disable_adapters and is_plain(self.base_layer)
        return self._fused(active[0]) if is_one_op and self._is_one_op(active) else None

    def _active_names(self) -> list[str]:
        known = self.molora_settings
        return [name for name in self.active_adapters if name in known]

    def _is_one_op(self, active: list[str]) -> bool:
        """Where the base layer is plain; another class is what FSDP makes of a layer."""
        return len(active) == 1 and type(self) is MoLoraLinear and _is_called_as_it_is(self)

    def _fused(self, name: str) -> Member:
        """Base and the first active adapter."""
        base = self.base_layer
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        return self._member(name, weight, base.bias, is_first=True)

    def _update(self, name: str, *, is_first: bool) -> Member:
        """An adapter without the base."""
        return self._member(name, None, None, is_first=is_first)

    def _member(
        self, name: str, weight: Tensor | None, bias: Tensor | None, *, is_first: bool
    ) -> Member:
        # where nothing is recorded, the layer's id would make each layer a graph of its own
        key = None if RoutingContext.active() is None else self._key(name, is_first)
        return Member(
            layer=self,
            weight=weight,
            bias=bias,
            a=_tensor_of(self.molora_A, name),
            b=_tensor_of(self.molora_B, name),
            router=_tensor_of(self.molora_router, name),
            settings=self.molora_settings[name],
            key=key,
            training=self.training,
        )

    def extra_repr(self) -> str:
        return f"adapters={self.molora_settings}" if self.molora_settings else ""

    def __repr__(self) -> str:
        return "molora." + super().__repr__()


def _tensor_of(adapters: nn.ParameterDict, name: str) -> Tensor:
    """adapters[name], in a third of the time, which counts where text is generated."""
    tensor = adapters._parameters.get(name)
    return adapters[name] if tensor is None else tensor


def is_plain(base: nn.Module) -> bool:
    """Whether `base(x)` is exactly x Wᵀ + b with a dense floating W, and calling it does no more.

    Hooks (Accelerate's and DeepSpeed's offloading, importance) and an instance's own `forward` are
    looked for at every call, because they come and go.
    """
    if type(base) not in (nn.Linear, Conv1D) or not _is_called_as_it_is(base):
        return False
    weight = base.weight
    return (
        type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.ndim == 2
    )


def _is_called_as_it_is(module: nn.Module) -> bool:
    """Whether calling it is its class's `forward` and no more."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return "forward" not in module.__dict__ and not any(hooks)
