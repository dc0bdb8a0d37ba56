"""Models of random weights in the shape of real ones, and batches of random tokens."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


class Size(NamedTuple):
    """What tells Llama-type models apart."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    is_tied: bool


SIZES = {
    "tiny": Size(8192, 256, 768, 4, 4, 2, True),
    "smollm2-135m": Size(49152, 576, 1536, 30, 9, 3, True),
    "llama-1b": Size(128256, 2048, 8192, 16, 32, 8, True),
    "llama-8b": Size(128256, 4096, 14336, 32, 32, 8, False),
}


def random_model(
    name: str, dtype: torch.dtype, device: str, *, max_layers: int | None = None, seed: int = 0
) -> PreTrainedModel:
    """A model in the shape of `SIZES[name]`, of all or the first layers."""
    size = SIZES[name]
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=min(size.layers, max_layers or size.layers),
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=size.is_tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


Model = TypeVar("Model", bound=nn.Module)


def twin_of(model: Model) -> Model:
    """Another model on the same weights; adapters put into one do not show in the other.

    PEFT copies the components that are trained whole.
    """
    return copy.deepcopy(model, memo={id(each): each for each in model.parameters()})


def draw_updates(model: Model, *, std: float) -> Model:
    """Draw the up-projections of fresh LoRA and MOLoRA adapters: zeros are not what is trained."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


def random_batch(
    name: str, shape: tuple[int, int], device: str, *, answers: float = 1.0
) -> dict[str, Tensor]:
    """Token ids and labels; the last share of every sequence is its answer."""
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(0, SIZES[name].vocabulary, shape, generator=generator).to(device)
    labels = ids.clone()
    labels[:, : round((1 - answers) * shape[1])] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of_frozen(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The loss, with a gradient to the embedded tokens and to no weight."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    return model(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).loss
