"""How many samples are enough: agreement of the rankings of two scorings."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import citi
from citi.analysis import chance_jaccard
from citi.importance import ComponentScores
from citi.importance.ability_scores import AbilityScores
from citi.importance.stability import ranking_stability, stability_obstacle
from citi.plan import make_plan


def scores_of(by_batch, *, counts=None, names=None, estimator="batch", granularity="component"):
    """Scores with these undivided numbers by batch; one sample, 10 tokens, 4 answers a batch."""
    by_batch = torch.as_tensor(by_batch, dtype=torch.float64)
    num_batches, num_components = by_batch.shape
    names = names or [f"c{index:03}" for index in range(num_components)]
    counts = torch.tensor([[1, 10, 4]] * num_batches if counts is None else counts).view(-1, 3)
    num_samples, num_tokens, num_answers = counts.sum(0).tolist()
    return ComponentScores(
        scores=dict(zip(names, by_batch.sum(0).tolist(), strict=True)),
        estimator=estimator,
        num_samples=num_samples,
        num_tokens=num_tokens,
        num_answer_tokens=num_answers,
        num_batches=num_batches,
        num_empty_batches=0,
        num_nonfinite_batches=0,
        skipped=(),
        granularity=granularity,
        by_batch=by_batch,
        batch_counts=counts,
    )


def random_scores(num_batches, num_components, *, seed=0, **given):
    generator = torch.Generator().manual_seed(seed)
    by_batch = torch.rand(num_batches, num_components, generator=generator, dtype=torch.float64)
    return scores_of(by_batch, **given)


def test_equal_batches_agree_wholly_and_the_smallest_scoring_is_enough():
    found = ranking_stability(scores_of([[float(c) for c in range(10)]] * 20))
    assert [(a.num_batches, a.mean, a.low) for a in found.agreements] == [
        (number, 1.0, 1.0) for number in (4, 8, 16, 20)
    ]
    assert found.enough == 4
    assert found.sentence == (
        "4 samples are enough: two scorings of 4 agree on 1.00 of the top 20 %"
    )
    assert found.chance == pytest.approx(1 / 45 * 1 + 16 / 45 * (1 / 3))


@pytest.mark.parametrize(
    ("num_batches", "sizes"),
    [(8, [4, 8]), (9, [4, 8, 9]), (16, [4, 8, 16]), (33, [4, 8, 16, 32, 33])],
)
def test_scorings_double_up_to_all_batches(num_batches, sizes):
    found = ranking_stability(random_scores(num_batches, 10), num_resamples=2)
    assert [each.num_batches for each in found.agreements] == sizes


def test_pure_noise_agrees_as_chance_does():
    found = ranking_stability(random_scores(4096, 50))
    for each in found.agreements[:4]:  # of so few batches, two draws share next to none
        assert each.num_batches <= 32
        assert each.mean == pytest.approx(found.chance, abs=0.02)
    assert found.enough is None
    assert "4096 samples are not enough: two scorings of 4096 agree on 0." in found.sentence
    assert found.sentence.endswith("of the top 20 % (0.90 wanted); score more samples")


def test_one_batch_that_decides_is_seen_as_often_as_it_is_drawn():
    # Without batch 0, "b" leads; with it, "a" does. Each of two scorings of 8 of 8 has it with
    # probability p = 1 - (7/8)^8, so that they agree with p² + (1 - p)².
    by_batch = [[100.0, 0.0, 0.0, 0.0, 0.0]] + [[0.0, 1.0, 0.0, 0.0, 0.0]] * 7
    found = ranking_stability(scores_of(by_batch), num_resamples=20_000)
    with_it = 1 - (7 / 8) ** 8
    wanted = with_it**2 + (1 - with_it) ** 2
    assert found.agreements[-1].mean == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / 20_000))
    assert found.agreements[-1].low == 0


def slow(scores, share, num_resamples, seed):
    """The definition, scoring by scoring: sums, the plan's choice, Jaccard."""
    names = list(scores)
    last = max(layer_of(name) for name in names)
    generator = torch.Generator().manual_seed(seed)
    num_batches = len(scores.by_batch)
    results, size = {}, 4
    while True:
        size = min(size, num_batches)
        draws = torch.randint(num_batches, (2 * num_resamples, size), generator=generator).tolist()
        choices = []
        for drawn in draws:
            values = {}
            for column, name in enumerate(names):
                total = math.fsum(scores.by_batch[b, column].item() for b in drawn)
                divisor = 1
                if scores.estimator == "token":
                    rows = [scores.batch_counts[b].tolist() for b in drawn]
                    is_last = layer_of(name) == last
                    divisor = sum(answers if is_last else tokens - s for s, tokens, answers in rows)
                values[name] = total / divisor
            restored = dataclasses.replace(scores, scores=values)
            plan = make_plan(AbilityScores(restored, {}, {}), important=share, unimportant=0)
            choices.append(set(plan.important))
        pairs = zip(choices[:num_resamples], choices[num_resamples:], strict=True)
        results[size] = [len(a & b) / len(a | b) for a, b in pairs]
        if size == num_batches:
            return results
        size *= 2


def layer_of(name):
    return int(name.split(".")[1])


@pytest.mark.parametrize("estimator", ["token", "batch"])
@pytest.mark.parametrize("share", [0.2, 0.35])
def test_it_equals_the_slow_definition(estimator, share):
    generator = torch.Generator().manual_seed(3)
    names = [f"layers.{layer}.{role}" for layer in (2, 0, 1) for role in "zyxabc"]
    by_batch = torch.randint(1, 4, (11, len(names)), generator=generator)  # many a tie
    counts = [[2, 12 + 5 * b, 1 + b * b % 7] for b in range(11)]
    scores = scores_of(by_batch, counts=counts, names=names, estimator=estimator)
    wanted = slow(scores, share, num_resamples=20, seed=5)
    found = ranking_stability(scores, share=share, num_resamples=20, seed=5)
    assert [each.num_batches for each in found.agreements] == list(wanted)
    for each in found.agreements:
        indices = torch.tensor(wanted[each.num_batches], dtype=torch.float64)
        assert each.mean == pytest.approx(indices.mean().item(), rel=1e-12)
        assert each.low == pytest.approx(indices.quantile(0.05).item(), rel=1e-12)
    assert found.unit == "batches"


def test_tokens_of_the_last_layer_are_divided_by_answers():
    names = ["layers.0.a", "layers.0.b", "layers.0.c", "layers.1.a", "layers.1.b"]
    by_batch = [[6.0, 1.0, 1.0, 5.0, 1.0]] * 8
    counts = [[1, 11, 2]] * 8  # 6 / 10 against 5 / 2
    last_leads = scores_of(by_batch, counts=counts, names=names, estimator="token")
    undecided = scores_of(
        [[6.0, 1.0, 1.0, 5.0, 1.0], [4.0, 1.0, 1.0, 5.0, 1.0]] * 4, counts=counts, names=names
    )
    assert ranking_stability(last_leads).agreements[0].mean == 1
    assert ranking_stability(undecided).agreements[0].mean < 0.8
    same = dataclasses.replace(undecided, estimator="token")
    assert ranking_stability(same).agreements[0].mean == 1


def test_the_seed_decides_the_draws_and_the_global_random_state_stays():
    scores = random_scores(64, 30)
    state = torch.get_rng_state()
    first, again, other = (ranking_stability(scores, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mark_can_be_set():
    levels = torch.arange(30) / 30
    scores = random_scores(64, 30)
    scores = scores_of(scores.by_batch + levels)
    agreements = ranking_stability(scores).agreements
    means = [each.mean for each in agreements]
    assert means == sorted(means)
    assert means[0] < means[-1]
    for each in agreements:
        assert ranking_stability(scores, wanted=each.mean).enough == each.num_batches
    assert ranking_stability(scores, wanted=1.1).enough is None


def test_an_agreement_below_the_mark_is_never_rounded_up_to_it():
    found = ranking_stability(scores_of([[1.0, 2.0, 3.0, 4.0, 5.0]] * 8))
    worse = dataclasses.replace(
        found, agreements=tuple(dataclasses.replace(a, mean=0.8999) for a in found.agreements)
    )
    assert "8 samples are not enough: two scorings of 8 agree on 0.89 of" in worse.sentence


@pytest.mark.parametrize("number", [5, 24])
def test_chance_is_the_mean_over_all_pairs_of_choices(number):
    from itertools import combinations

    chosen = [set(c) for c in combinations(range(number), 2)]
    mean = sum(len(a & b) / len(a | b) for a in chosen for b in chosen) / len(chosen) ** 2
    assert chance_jaccard(number, 2) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("scores", "given", "message"),
    [
        (random_scores(7, 10), {}, "at least 8 scored batches, got 7"),
        (random_scores(0, 10, granularity="element"), {}, "got elements, which keep no scores"),
        (random_scores(8, 10), {"share": 0.0}, r"choose some of 10 components, not all, got 0\.0"),
        (random_scores(8, 10), {"share": 1.0}, "choose some of 10 components"),
        (random_scores(8, 10), {"share": float("nan")}, "choose some of 10 components"),
        (random_scores(8, 1), {}, "choose some of 1 components"),
        (random_scores(8, 10), {"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_the_reason(scores, given, message):
    with pytest.raises(ValueError, match=message):
        ranking_stability(scores, **given)


def test_the_obstacle_is_known_before():
    assert stability_obstacle(random_scores(8, 10)) is None
    assert "got 7" in stability_obstacle(random_scores(7, 10))


def test_it_is_public():
    assert citi.ranking_stability is ranking_stability
