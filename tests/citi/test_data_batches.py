"""Rendered data sets, batches and the training mix."""

from __future__ import annotations

import json
import random

import pytest
import torch

from citi.data import (
    Collator,
    DataError,
    Message,
    RenderedDataset,
    Sample,
    describe_rendered,
    mix,
    render,
)
from citi.data.render import IGNORED
from tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LONG = 10_000


def _sample(name: str, answer: str | None = "yes", *, task_type: int = 1) -> Sample:
    messages = [Message("user", f"question {name}")]
    if answer is not None:
        messages.append(Message("assistant", answer))
    return Sample(name, task_type, "tool", tuple(messages), (), {}, f"f.jsonl:{name}")


SAMPLES = [_sample("1", "a longer answer"), _sample("22", "b", task_type=0), _sample("333")]


def test_items_are_the_rendered_samples_in_order():
    dataset = RenderedDataset(SAMPLES, TOKENIZER, max_length=LONG)
    assert len(dataset) == 3
    for sample, item in zip(SAMPLES, dataset, strict=True):
        rendered = render(sample, TOKENIZER, max_length=LONG)
        assert item == {
            "input_ids": rendered.input_ids,
            "labels": rendered.labels,
            "task_type": sample.task_type,
        }


def test_statistics_count_tokens_answers_and_cuts():
    lengths = [
        len(item["input_ids"]) for item in RenderedDataset(SAMPLES, TOKENIZER, max_length=LONG)
    ]
    cut_at = sorted(lengths)[1]
    statistics = RenderedDataset(SAMPLES, TOKENIZER, max_length=cut_at).statistics
    kept = [min(length, cut_at) for length in lengths]
    assert (statistics.num_samples, statistics.num_rendered, statistics.num_tool) == (3, 3, 2)
    assert statistics.num_truncated == 1
    assert statistics.num_tokens == sum(kept)
    assert (statistics.median_tokens, statistics.max_tokens) == (cut_at, cut_at)
    assert statistics.num_answer_tokens == sum(len(a) + 1 for a in ("a longer answer", "b", "yes"))
    assert json.loads(json.dumps(statistics.to_json()))["num_truncated"] == 1


def test_case_43_and_57_samples_without_labels_never_reach_a_batch_and_are_counted():
    blind = [_sample("x", None), *SAMPLES, _sample("y", None)]
    dataset = RenderedDataset(blind, TOKENIZER, max_length=LONG)
    assert len(dataset) == 3
    assert dataset.statistics.dropped == {"no assistant turn": 2}
    assert dataset.statistics.examples == {"no assistant turn": "f.jsonl:x"}
    assert all(any(label != IGNORED for label in item["labels"][1:]) for item in dataset)
    with pytest.raises(DataError, match=r"none of the 1 samples .*no assistant turn.*f\.jsonl:x"):
        RenderedDataset([blind[0]], TOKENIZER, max_length=LONG)


def test_case_57_a_sample_that_the_template_refuses_is_counted_with_the_reason():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'secret' in m.content %}"
        "{{ raise_exception('no secrets') }}{% endif %}"
        + tokenizer.chat_template[len("{% for m in messages %}") :]
    )
    refused = _sample("s", "a secret")
    dataset = RenderedDataset([*SAMPLES, refused], tokenizer, max_length=LONG)
    assert dataset.statistics.dropped == {
        "the chat template refuses the conversation: no secrets": 1
    }


def test_case_57_a_sample_whose_template_marks_no_answer_is_counted():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ messages | length }}{{ m.content }}"
        "{% if 'unmarked' not in m.content %}{% generation %}<|im_end|>{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    unmarked = Sample(
        "u", 1, "tool", (Message("user", "unmarked"), Message("assistant", "unmarked"))
    )
    dataset = RenderedDataset([unmarked, SAMPLES[0]], tokenizer, max_length=LONG)
    assert dataset.statistics.dropped == {"no answer token left to train on": 1}


def test_case_57_one_sample_is_a_data_set():
    dataset = RenderedDataset(SAMPLES[:1], TOKENIZER, max_length=LONG)
    assert (len(dataset), dataset.statistics.p95_tokens) == (1, dataset.statistics.max_tokens)


def test_progress_is_told_to_the_end():
    told = []
    many = [_sample(str(i)) for i in range(130)]
    RenderedDataset(
        many,
        TOKENIZER,
        max_length=LONG,
        progress=lambda done, total, note: told.append((done, total)),
    )
    assert told == [(64, 130), (128, 130), (130, 130)]


def test_segments_are_the_whole_text_and_its_trained_parts():
    segments = describe_rendered(SAMPLES[0], TOKENIZER, max_length=LONG)
    rendered = render(SAMPLES[0], TOKENIZER, max_length=LONG)
    assert "".join(segment.text for segment in segments) == TOKENIZER.decode(rendered.input_ids)
    assert [s.text for s in segments if s.trained] == ["a longer answer<|im_end|>"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 8, 64])
def test_a_batch_without_its_padding_is_the_samples(side, multiple):
    dataset = RenderedDataset(SAMPLES, TOKENIZER, max_length=LONG)
    collate = Collator(TOKENIZER.pad_token_id, side, multiple)
    batch = collate([dataset[i] for i in range(3)])
    longest = max(len(item["input_ids"]) for item in dataset)
    width = batch["input_ids"].shape[1]
    assert width == longest if multiple is None else width == -(-longest // multiple) * multiple
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["task_types"].tolist() == [1, 0, 1]
    for row, item in enumerate(dataset):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == item["input_ids"]
        assert batch["labels"][row][mask].tolist() == item["labels"]
        assert (batch["input_ids"][row][~mask] == TOKENIZER.pad_token_id).all()
        assert (batch["labels"][row][~mask] == IGNORED).all()
        assert mask[0 if side == "right" else -1]
        assert mask.sum() == len(item["input_ids"])


def test_the_loss_of_a_sample_does_not_depend_on_its_neighbours_or_the_padding_side():
    model = tiny_model("llama", dtype=torch.float64)
    dataset = RenderedDataset(SAMPLES, TOKENIZER, max_length=LONG)

    def summed_losses(collate: Collator, indices: list[int]) -> torch.Tensor:
        batch = collate([dataset[i] for i in indices])
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=positions,
            ).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2),
            batch["labels"][:, 1:],
            ignore_index=IGNORED,
            reduction="none",
        )
        return losses.sum(-1)

    truth = torch.cat([summed_losses(Collator(0), [i]) for i in range(3)])
    for side in ("right", "left"):
        together = summed_losses(Collator(0, side, 16), [0, 1, 2])
        torch.testing.assert_close(together, truth, rtol=1e-6, atol=1e-6)


def test_a_collator_without_a_pad_token_or_a_known_side_is_refused():
    with pytest.raises(ValueError, match=r"pad_token_id .* got None.*tokenizer\.pad_token"):
        Collator(None)
    with pytest.raises(ValueError, match="padding_side"):
        Collator(0, "middle")


def _named(prefix: str, count: int, task_type: int) -> list[Sample]:
    return [_sample(f"{prefix}{i}", task_type=task_type) for i in range(count)]


PINNED = ["m24", "m10", "t0", "m11", "t6", "t5"]
TOOL, MATH, CODE = _named("t", 7, 1), _named("m", 30, 0), _named("c", 3, 0)


def test_the_mix_holds_all_of_the_tool_set_and_a_share_of_each_general_set():
    mixed = mix(TOOL, {"math": MATH, "code": CODE}, per_general=5, seed=1)
    ids = [sample.id for sample in mixed]
    assert len(set(ids)) == len(ids) == 7 + 5 + 3
    assert {sample.id for sample in TOOL} <= set(ids)
    assert sum(name.startswith("m") for name in ids) == 5
    assert sum(name.startswith("c") for name in ids) == 3
    assert len(mix(TOOL, {"math": MATH}, per_general=None, seed=1)) == 37
    assert sorted(s.id for s in mix(TOOL, {}, per_general=5, seed=1)) == [s.id for s in TOOL]


def test_the_mix_depends_on_the_seed_alone():
    random.seed(5)
    state = random.getstate()
    first = mix(TOOL, {"math": MATH, "code": CODE}, per_general=5, seed=1)
    again = mix(TOOL, {"code": CODE, "math": MATH}, per_general=5, seed=1)
    other = mix(TOOL, {"math": MATH, "code": CODE}, per_general=5, seed=2)
    assert first == again
    assert [s.id for s in first] != [s.id for s in other]
    assert random.getstate() == state
    # A constant of this package: a run that is resumed on another machine must see the same data.
    assert [s.id for s in first[:6]] == PINNED


def test_another_general_set_does_not_change_what_is_taken_of_the_first():
    alone = mix(TOOL, {"math": MATH}, per_general=5, seed=1)
    both = mix(TOOL, {"math": MATH, "code": CODE}, per_general=5, seed=1)
    assert {s.id for s in alone} == {s.id for s in both if not s.id.startswith("c")}
    with pytest.raises(ValueError, match="per_general"):
        mix(TOOL, {}, per_general=-1, seed=0)
