"""Greedy answers to the prompts of samples, in batches, the same every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig

from citi.data.render import Renderer
from citi.data.sample import Sample
from citi.evaluation.inference import (
    Progress,
    base_model,
    device_of,
    inference,
    length_sorted_batches,
    pad,
)
from citi.positions import length_limit

_PROBE = "answer-probe"


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    max_length: int = 4096,
    progress: Progress | None = None,
) -> list[str]:
    """Answers each sample's prompt: everything up to its last assistant turn.

    Greedy decoding with the KV cache, on batches of like length, padded on the left. The model's
    own generation settings (temperature, penalties) take no part. An answer ends with the chat
    template's end token, with any end token of the model, or after `max_new_tokens`; a batch gives
    what its samples give one by one, up to rounding in the order of sums.

    Args:
        model: a Hugging Face causal LM or a PeftModel around one.
        tokenizer: its tokenizer; nothing of it is changed.
        samples: in any order and of any length.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts a batch.
        max_length: the longest prompt and answer together, in tokens, less where the model has
            fewer positions; the prompt is cut to what `max_new_tokens` leaves.
        progress: called with (samples done, all samples, note).

    Returns:
        one decoded answer a sample, in the order of `samples`, without special tokens.

    Raises:
        ValueError: a count is less than one, or no room is left for a prompt.
        DataError: the chat template refuses a prompt.
    """
    room = prompt_room(model, max_length=max_length, max_new_tokens=max_new_tokens)
    renderer = Renderer(tokenizer, max_length=room)
    prompts = [renderer.render_prompt(sample) for sample in samples]
    answers = [""] * len(prompts)
    config = greedy_config(model, tokenizer, max_new_tokens=max_new_tokens)
    done = 0
    with inference(model), neutral_generation_config(model):
        for batch in length_sorted_batches([len(prompt) for prompt in prompts], batch_size):
            texts = _answer_batch(model, tokenizer, [prompts[i] for i in batch], config)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
            done += len(batch)
            if progress is not None:
                progress(done, len(prompts), "answers")
    return answers


def prompt_room(model: nn.Module, *, max_length: int, max_new_tokens: int) -> int:
    """How many tokens of a prompt are kept.

    Raises:
        ValueError: see `generate_answers`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted at least 1, got {max_new_tokens}")
    room = length_limit(model, max_length) - max_new_tokens
    if room < 2:
        raise ValueError(
            f"max_length: wanted at least max_new_tokens ({max_new_tokens}) + 2 so that a "
            f"prompt fits, got {room + max_new_tokens} (the smaller of max_length and the model's "
            "positions); lower max_new_tokens"
        )
    return room


def greedy_config(model: nn.Module, tokenizer: Any, *, max_new_tokens: int) -> GenerationConfig:
    """The decoding that every answer is made with: greedy, one beam, KV cache."""
    ends = end_token_ids(model, tokenizer)
    padding = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=padding if padding is not None else (ends[0] if ends else 0),
    )


def end_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the model's, the tokenizer's, and the chat template's.

    Gemma-type templates end a turn with a token that is nobody's `eos_token`; it is found by
    rendering a probe and looking for the first special token after the answer.
    """
    found = {tokenizer.eos_token_id, _template_end_id(tokenizer)}
    stated = getattr(base_model(model), "generation_config", None)
    ends = stated.eos_token_id if stated is not None else None
    found.update(ends if isinstance(ends, (list, tuple)) else [ends])
    return sorted(token for token in found if token is not None)


@contextmanager
def neutral_generation_config(model: nn.Module) -> Iterator[None]:
    """Hides the model's sampling settings, which `generate` merges into any explicit ones."""
    base = base_model(model)
    owners = [part for part in (base, model) if "generation_config" in vars(part)]
    kept = [(owner, owner.generation_config) for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in kept:
            owner.generation_config = config


def _answer_batch(
    model: nn.Module, tokenizer: Any, prompts: list[list[int]], config: GenerationConfig
) -> list[str]:
    """One batch of prompts through `generate`, decoded up to the first end token."""
    input_ids, attention_mask = pad(prompts, config.pad_token_id, side="left")
    device = device_of(model)
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=config,
    )
    ends = set(config.eos_token_id or [])
    return [decode_answer(tokenizer, row, ends) for row in output[:, input_ids.shape[1] :].tolist()]


def decode_answer(tokenizer: Any, token_ids: Sequence[int], ends: set[int]) -> str:
    """The text before the first end token, without special tokens and outer blanks."""
    stop = next((i for i, token in enumerate(token_ids) if token in ends), len(token_ids))
    kept = list(token_ids[:stop])
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


def _template_end_id(tokenizer: Any) -> int | None:
    """The first special token after an assistant turn, None without a template or such a token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tail = tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False)
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in tail if token in special), None)
