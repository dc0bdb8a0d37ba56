"""How long a sample a model can take."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig


def length_limit(model: nn.Module | PretrainedConfig, max_length: int) -> int:
    """`max_length`, or the model's number of positions where that is smaller.

    Args:
        model: a Hugging Face model, a PeftModel around one, or its config.
        max_length: in tokens.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", base).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return min(max_length, positions) if positions else max_length
