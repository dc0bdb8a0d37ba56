"""What layers launch, recorded on meta tensors: nothing runs, and no value can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from citi_kernels.ops import molora_linear_triton
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Settings
from citi_kernels.triton_kernels.base_product import forced_base_product
from citi_kernels.triton_kernels.launch import Launch, recorded_launches

STAGES = {
    "router pre-training": "x router",
    "MOLoRA improvement": "x a b router",
    "unimportant components, MOLoRA frozen": "x",
    "first layer of the model": "a b router",
}
_NO_LAUNCH = (
    "empty",
    "new_empty",
    "empty_strided",
    "empty_like",
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "alias",
    "detach",
    "expand",
    "split",
    "as_strided",
    "lift_fresh",
)


class LibraryLaunches(TorchDispatchMode):
    """Names of the PyTorch calls that would launch a kernel of a library."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        name = function.overloadpacket.__name__
        on_cpu = any(isinstance(each, Tensor) and each.device.type == "cpu" for each in arguments)
        if name not in _NO_LAUNCH and not on_cpu:
            self.names.append(name)
        return function(*arguments, **(kwargs or {}))


@dataclass(frozen=True)
class Layer:
    """Sizes and options of a recorded layer; T tokens, K in-, N out-features, E experts, rank r."""

    T: int = 8192
    K: int = 4096
    N: int = 4096
    E: int = 4
    r: int = 8
    dtype: torch.dtype = torch.bfloat16
    parameter_dtype: torch.dtype | None = torch.float32
    trained: str = STAGES["MOLoRA improvement"]
    trained_in_others: str | None = None
    num_segments: int | None = 8
    has_weight: bool = True
    top_k: int | None = None
    dropout_p: float = 0.0
    num_layers: int = 1
    way: str = "update"
    strided_weight: bool = False

    def operands(self) -> Operands:
        shape = (self.K, self.N) if self.strided_weight else (self.N, self.K)
        weight = _meta(*shape, dtype=self.dtype)
        rank, parameters = self.E * self.r, self.parameter_dtype
        return Operands(
            x=_meta(self.T, self.K, dtype=self.dtype),
            weight=(weight.T if self.strided_weight else weight) if self.has_weight else None,
            bias=None,
            a=_meta(rank, self.K, dtype=parameters),
            b=_meta(self.N, rank, dtype=parameters),
            router=_meta(self.E + 1, self.K, dtype=parameters),
        )

    def settings(self) -> Settings:
        has_segments = self.num_segments is not None
        seed = torch.tensor(5, device="cpu") if self.dropout_p else None
        return Settings(
            num_experts=self.E,
            scaling=0.25,
            top_k=self.top_k,
            renormalize=False,
            segment_ids=_meta(self.T, dtype=torch.int64) if has_segments else None,
            num_segments=self.num_segments or 0,
            dropout_p=self.dropout_p,
            dropout_seed=seed,
        )

    def needs(self) -> list[Needs]:
        """Of each layer; `trained_in_others` is of all but the first."""
        others = self.trained if self.trained_in_others is None else self.trained_in_others
        trained_L = [self.trained] + [others] * (self.num_layers - 1)
        return [Needs(*(name in each.split() for name in Operands._fields)) for each in trained_L]


def record(layer: Layer) -> tuple[list[Launch], list[str]]:
    """Our launches and the library's, forward and backward of a layer (or a group of them)."""
    settings, needs_L = layer.settings(), layer.needs()
    operands_L = [layer.operands() for _ in range(layer.num_layers)]
    operands_L = [each._replace(x=operands_L[0].x) for each in operands_L]
    dy_TN = _meta(layer.T, layer.N, dtype=layer.dtype)
    dgate_sums_BG = None
    if layer.num_segments is not None:
        dgate_sums_BG = _meta(layer.num_segments, layer.E + 1, dtype=torch.float32)
    with forced_base_product(layer.way), recorded_launches() as ours, LibraryLaunches() as library:
        if layer.num_layers > 1:
            settings_L = [settings] * layer.num_layers
            outputs = molora_linear_triton.forward_group(operands_L, settings_L)
            molora_linear_triton.backward_group(
                [(dy_TN, dgate_sums_BG)] * layer.num_layers,
                operands_L,
                [saved for _, saved, _ in outputs],
                settings_L,
                needs_L,
            )
        else:
            _, saved, _ = molora_linear_triton.forward(operands_L[0], settings)
            molora_linear_triton.backward(
                dy_TN, dgate_sums_BG, operands_L[0], saved, settings, needs_L[0]
            )
    return ours, library.names


def names(launches: Sequence[Launch]) -> list[str]:
    return [launch.kernel.fn.__name__.strip("_").removesuffix("_kernel") for launch in launches]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
