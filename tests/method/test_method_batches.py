"""Micro-batches by tokens: budgets, orders, stages."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from benchmarks.method.token_batches import BatchCollator, TokenBatches, cut_batches, stage_steps


@pytest.mark.parametrize("seed", range(8))
def test_every_step_keeps_its_budget_and_its_samples_are_dealt_out_by_length(seed: int) -> None:
    generator = random.Random(seed)
    longest = generator.randint(5, 60)
    lengths = [generator.randint(1, longest) for _ in range(generator.randint(1, 40))]
    accumulation, size = generator.randint(1, 5), longest + generator.randint(0, 40)
    cut = {"accumulation": accumulation, "batch_tokens": size, "seed": seed}
    batches = cut_batches(lengths, num_steps=30, **cut)
    taken = 0
    assert len(batches) == 30 * accumulation
    for step in range(30):
        parts = batches[step * accumulation : (step + 1) * accumulation]
        assert all(parts)
        tokens = [lengths[index] for part in parts for index in part]
        assert tokens == sorted(tokens, reverse=True)
        taken += sum(tokens)
        assert 0 <= taken - (step + 1) * accumulation * size < longest


def test_micro_batches_of_a_step_have_about_equal_tokens() -> None:
    cut = {"accumulation": 2, "batch_tokens": 8, "seed": 0}
    lengths = [8, 2, 2, 2, 2]  # one pass is one step
    assert [sorted(part) for part in cut_batches(lengths, num_steps=1, **cut)] == [
        [0],
        [1, 2, 3, 4],
    ]


def test_every_sample_is_taken_once_a_pass_in_another_order() -> None:
    cut = {"accumulation": 1, "batch_tokens": 4}
    batches = cut_batches([4] * 10, num_steps=20, **cut, seed=3)
    order = [index for batch in batches for index in batch]
    first, second = order[:10], order[10:]
    assert Counter(first) == Counter(second) == Counter(range(10))
    assert first != second
    assert cut_batches([4] * 10, num_steps=20, **cut, seed=3) == batches
    assert cut_batches([4] * 10, num_steps=20, **cut, seed=4) != batches


def test_a_sample_that_is_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_tokens"):
        cut_batches([4, 9], num_steps=2, accumulation=1, batch_tokens=8, seed=0)


def test_a_batch_is_padded_as_its_samples_would_be() -> None:
    items = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "task_type": 1},
        {"input_ids": [8, 9], "labels": [-100, 9], "task_type": 0},
    ]
    batches = TokenBatches(items, [[0, 1], [1]])
    assert (batches.num_tokens, batches.num_answer_tokens) == (7, 4)
    padded = BatchCollator(0)([batches[0]])
    assert torch.equal(padded["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 0]]))
    assert torch.equal(padded["task_types"], torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="batch_size"):
        BatchCollator(0)([batches[0], batches[1]])


def test_stages_share_all_steps() -> None:
    assert stage_steps({"rp": 1, "mi": 2, "uco": 1}, 48) == {
        "rp": range(12),
        "mi": range(12, 36),
        "uco": range(36, 48),
    }
    odd = stage_steps({"rp": 1, "mi": 2, "uco": 1}, 10)
    assert [step for steps in odd.values() for step in steps] == list(range(10))
    with pytest.raises(ValueError, match="too few"):
        stage_steps({"rp": 1, "mi": 20}, 3)
