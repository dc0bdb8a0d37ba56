"""Suite "linears": the seven linears of a decoder layer, without what lies between them.

Query, key and value read one input, gate and up another; the output and down projections have
theirs. Adapters are put in as in training: by PEFT, by the names of the components.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from citi.adapters import MoLoraConfig
from citi.benchmark.group import DTYPES, Group, Pass, Settings
from citi.benchmark.layer import FROZEN, NUM_EXPERTS, OURS, RANK, Shape, check_layer, trained_pass
from citi.benchmark.models import SIZES, Size, draw_updates, twin_of

# whose layer, and how many tokens
_MEASURED = {"cpu": ("llama-1b", 512), "cuda": ("llama-8b", 8192)}
_QUICK = {"cpu": ("smollm2-135m", 512), "cuda": ("llama-8b", 8192)}
_STANDS_FOR = {
    FROZEN: "seven nn.Linear, the floor of any adapter",
    OURS: "adapters of 4 experts of rank 8 and a router on all seven",
    "PEFT LoRA": "PEFT, adapters of rank 8 in the dtype of the weights on all seven",
    "PEFT LoRA, fp32": "the same in fp32, as PEFT makes them",
}
_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class SevenLinears(nn.Module):
    """As they stand in a model: four in the attention, three in the MLP."""

    def __init__(self, size: Size, **placed: object) -> None:
        super().__init__()
        shapes = shapes_of(size)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for role, (num_in, num_out) in shapes.items():
            parent = self.self_attn if role in _ROLES[:4] else self.mlp
            parent.add_module(role, nn.Linear(num_in, num_out, bias=False, **placed))
        self.requires_grad_(False)

    def forward(self, x: Tensor, x_of_o: Tensor, x_of_mlp: Tensor, x_of_down: Tensor) -> list:
        """What each of the seven gives, in the order of the model."""
        attention, mlp = self.self_attn, self.mlp
        outputs = [each(x) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
        outputs.append(attention.o_proj(x_of_o))
        outputs += [each(x_of_mlp) for each in (mlp.gate_proj, mlp.up_proj)]
        return [*outputs, mlp.down_proj(x_of_down)]


def shapes_of(size: Size) -> dict[str, tuple[int, int]]:
    """In- and out-features by role."""
    hidden, wide = size.hidden, size.intermediate
    shared = hidden * size.kv_heads // size.heads
    outs = {"q_proj": hidden, "k_proj": shared, "v_proj": shared, "o_proj": hidden}
    shapes = {role: (hidden, out) for role, out in outs.items()}
    return shapes | {
        "gate_proj": (hidden, wide),
        "up_proj": (hidden, wide),
        "down_proj": (wide, hidden),
    }


def linears_suite(settings: Settings) -> Iterator[Group]:
    """One model's layer in every dtype."""
    name, num_tokens = (_QUICK if settings.is_quick else _MEASURED)[settings.device]
    products = [num_in * num_out for num_in, num_out in shapes_of(SIZES[name]).values()]
    for dtype in settings.dtypes:
        yield Group(
            suite="linears",
            settings={"model": name, "T": num_tokens, "dtype": dtype},
            baseline=FROZEN,
            make=partial(_make, name, num_tokens, DTYPES[dtype], settings),
            check=partial(_check, name, DTYPES[dtype], settings.device),
            stands_for=_STANDS_FOR,
            tokens=num_tokens,
            limits={OURS: (1.08, 1.04)} if settings.device == "cuda" else {},
            flops=4.0 * num_tokens * sum(products),
        )


def _check(name: str, dtype: torch.dtype, device: str) -> float:
    """Of every shape that one of the seven has."""
    shapes = sorted(set(shapes_of(SIZES[name]).values()))
    return max(check_layer(Shape(0, *each), dtype, device, NUM_EXPERTS, RANK) for each in shapes)


def _make(name: str, num_tokens: int, dtype: torch.dtype, settings: Settings) -> dict[str, Pass]:
    size, device = SIZES[name], settings.device
    torch.manual_seed(0)
    with torch.device(device):
        base = SevenLinears(size, dtype=dtype)
        widths = (size.hidden, size.hidden, size.hidden, size.intermediate)
        inputs = [torch.randn(num_tokens, K, dtype=dtype).requires_grad_() for K in widths]
        outs = [num_out for _, num_out in shapes_of(size).values()]
        incoming = [torch.randn(num_tokens, N, dtype=dtype) for N in outs]
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(_ROLES))
    molora = MoLoraConfig(r=RANK, num_experts=NUM_EXPERTS, target_modules=list(_ROLES))

    def adapted(config: LoraConfig | MoLoraConfig, **options: bool) -> Pass:
        model = get_peft_model(twin_of(base), config, **options)
        draw_updates(model, std=RANK**-0.5)
        trained = [each for each in model.parameters() if each.requires_grad]
        return trained_pass(lambda: model(*inputs), inputs + trained, incoming)

    makers = {
        FROZEN: lambda: trained_pass(lambda: base(*inputs), inputs, incoming),
        OURS: partial(adapted, molora),
        "PEFT LoRA": partial(adapted, lora, autocast_adapter_dtype=False),
        "PEFT LoRA, fp32": partial(adapted, lora),
    }
    return {row: make() for row, make in makers.items() if settings.wants(row, FROZEN)}
