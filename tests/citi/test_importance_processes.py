"""Case 32: two processes that share the batches, against one that scores them all."""

from __future__ import annotations

import pytest
import torch
from importance_cases import padded, sequences, single
from safetensors.torch import load_file, save_file
from two_processes import run_in_two_processes

from citi.importance import component_importance
from tiny import tiny_model

CASES = [
    ("token", "component"),
    ("batch", "row"),
    ("parameter", "head"),
    ("token", "element"),
]


def batches():
    """Five: one process has one more than the other; and one of them has no answers."""
    made = [single(part) for part in sequences(seed=4)] + [padded(sequences(seed=5))]
    empty = padded(sequences(seed=6))
    return [*made, empty | {"labels": torch.full_like(empty["labels"], -100)}]


def score_share(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    for estimator, granularity in CASES:
        scores = component_importance(
            tiny_model("llama"),
            batches()[rank::2],
            estimator=estimator,
            granularity=granularity,
            group=group,
        )
        tensors = {"scores": torch.tensor(list(scores.values()), dtype=torch.float64)}
        tensors |= {"counts": scores.batch_counts, **scores.entries}
        tensors["skipped"] = torch.tensor([scores.num_empty_batches, scores.num_batches])
        save_file(tensors, f"{folder}/{estimator}-{granularity}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    run_in_two_processes("test_importance_processes", "score_share", folder)
    return folder


@pytest.mark.parametrize(("estimator", "granularity"), CASES)
def test_case_32_two_processes_have_the_scores_of_one(shared, estimator, granularity):
    name = f"{estimator}-{granularity}"
    first, second = (load_file(shared / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone = component_importance(
        tiny_model("llama"), batches(), estimator=estimator, granularity=granularity
    )
    wanted = torch.tensor(list(alone.values()), dtype=torch.float64)
    torch.testing.assert_close(first["scores"], wanted, rtol=1e-6, atol=0)
    for key, entry in alone.entries.items():
        torch.testing.assert_close(first[key], entry, rtol=1e-5, atol=1e-7 * entry.max().item())
    assert first["skipped"].tolist() == [1, 4] == [alone.num_empty_batches, alone.num_batches]
    assert sorted(first["counts"].tolist()) == sorted(alone.batch_counts.tolist())
