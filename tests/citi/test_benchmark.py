"""`citi bench`: what it measures, what it refuses to time, and what it writes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_command_line import citi
from torch import nn

from citi.benchmark import (
    ceilings,
    importance,
    importance_ops,
    layer,
    linears,
    routing,
    suites,
    training,
)
from citi.benchmark.group import NOT_ASKED, Group, Pass, Result, Row, Settings
from citi.benchmark.layer import FROZEN, OURS, Shape, layer_group
from citi.benchmark.measure import MIN_ROUNDS, measure
from citi.benchmark.record import Record
from citi.benchmark.tables import as_lines, as_markdown, by_shape, verdict
from citi.command_line import bench
from citi.saved_json import SavedFileError

SETTINGS = Settings(dtypes=("fp32",), is_quick=True, seconds=0.0)
SHAPE = Shape(32, 24, 16)


@pytest.fixture
def small_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every suite at sizes that take no time."""
    monkeypatch.setitem(layer.QUICK_SHAPES, "cpu", (SHAPE,))
    monkeypatch.setitem(linears._QUICK, "cpu", ("tiny", 16))
    monkeypatch.setattr(layer, "_SCALED_SIZE", {"cpu": SHAPE})
    monkeypatch.setattr(layer, "SCALED", {"T": (8, 16), "experts": (1, 2), "rank": (4, 8)})
    monkeypatch.setitem(routing.TOP_K_SIZES, "cpu", ((Shape(32, 32, 32), 4, 16),))
    monkeypatch.setitem(routing.DECODED_SIZE, "cpu", (32, 32))
    monkeypatch.setattr(routing, "_BYTES_OF_LAYERS", 2**14)
    monkeypatch.setitem(importance._QUICK, "cpu", (("tiny", 2, 16, 0.5, False),))
    monkeypatch.setitem(importance_ops.SHAPES, "cpu", (SHAPE,))
    monkeypatch.setitem(training._TRAINED, "cpu", (("tiny", 2, 16),))
    monkeypatch.setitem(training._NEW_TOKENS, "cpu", 2)
    monkeypatch.setitem(ceilings._COPIED, "cpu", 2**16)
    monkeypatch.setitem(ceilings._SIZE, "cpu", 32)


def a_group(passes: dict[str, Pass], **changes: object) -> Group:
    group = Group(
        suite="test",
        settings={"T": 4},
        baseline="base",
        make=lambda: passes,
        check=lambda: 0.25,
        stands_for=dict.fromkeys(passes, "a row"),
        tokens=4,
        is_cold=False,
    )
    return replace(group, **changes)


def test_the_help_names_the_suites_that_there_are() -> None:
    assert tuple(suites.SUITES) == bench.SUITES


def test_every_suite_measures_every_row_it_names(small_suites: None) -> None:
    for name, suite in suites.SUITES.items():
        groups = list(suite(SETTINGS))
        assert groups, name
        for group in groups[:1]:
            result = measure(group, SETTINGS)
            assert result.suite == name
            assert result.rounds >= MIN_ROUNDS
            assert {row.name for row in result.rows} <= set(group.stands_for)
            assert result.row(group.baseline).ratio["both"] == 1.0
            assert all(row.seconds["both"] > 0 for row in result.rows)
            assert result.accuracy_used <= 1.0


def test_a_row_of_ours_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*operands: torch.Tensor, **options: object) -> tuple:
        y, sums = layer.stacked_molora_linear(*operands, **options)
        return y * 1.5, sums

    group = layer_group(SHAPE, "fp32", SETTINGS)
    monkeypatch.setattr(layer, "molora_linear", wrong)
    with pytest.raises(AssertionError, match="y: error / allowance"):
        measure(replace(group, make=lambda: pytest.fail("it was made")), SETTINGS)


def test_rows_are_timed_in_turn_and_divided_by_the_baseline_of_their_round() -> None:
    order: list[str] = []
    clock = iter(range(10**6))
    passes = {name: Pass(lambda name=name: order.append(name)) for name in ("base", "other")}
    settings = replace(SETTINGS, clock="count")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.__globals__["CLOCKS"], "count", lambda: next(clock) ** 2)
        result = measure(a_group(passes), settings)
    # two calls count memory, one is the warm-up
    assert order[2:] == ["base", "other"] * (len(order[2:]) // 2)
    assert len(order[2:]) == 2 * (result.rounds + 1)
    # the clock shows squares: its n-th tick lasts 2 n + 1
    ratios = [(8 * n + 5) / (8 * n + 1) for n in range(1, result.rounds + 1)]
    assert result.row("other").ratio["both"] == pytest.approx(sorted(ratios)[len(ratios) // 2])
    assert result.row("base").seconds["backward"] == 0.0


def test_a_row_beyond_the_patience_is_timed_once_beside_the_baseline() -> None:
    calls = {"base": 0, "fast": 0, "slow": 0}

    def row(name: str, seconds: float) -> Pass:
        def forward() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return Pass(forward)

    passes = {"base": row("base", 0.06), "fast": row("fast", 0.0), "slow": row("slow", 0.06)}
    result = measure(a_group(passes), replace(SETTINGS, patience=0.03))
    # one call counts memory
    assert calls == {"base": result.rounds + 2, "fast": result.rounds + 2, "slow": 2}
    assert [row.rounds for row in result.rows] == [None, None, 1]
    assert result.row("slow").ratio["both"] == pytest.approx(1.0, rel=0.5)
    assert "timed once" in "\n".join(as_lines(result))
    assert "slow: a row (timed once)" in "\n".join(as_markdown(result))


def test_rows_that_are_not_asked_for_are_neither_made_nor_timed() -> None:
    settings = replace(SETTINGS, without=(FROZEN, "expert loop", "einsum"))
    result = measure(layer_group(SHAPE, "fp32", settings), settings)
    names = {row.name for row in result.rows}
    assert {FROZEN, OURS} <= names, "a baseline is timed all the same"
    assert names.isdisjoint({"expert loop", "einsum"})
    assert result.skipped["einsum"] == "not asked for"
    group = next(training.training_suite(replace(settings, without=("PEFT LoRA",))))
    assert "PEFT LoRA" not in group.make()


def test_what_is_being_done_is_told_before_it_is_done() -> None:
    told: list[str] = []
    passes = {"base": Pass(lambda: told.append("ran"))}
    group = a_group(passes, check=lambda: told.append("check") or 0.0)
    measure(group, SETTINGS, told.append)
    order = ["checking", "check", "checked; making the rows", "first calls of base", "ran"]
    assert told[: len(order)] == order
    assert told.index("timing") < told.index("ran", len(order))


def test_large_cases_are_drawn_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def random_case(*shape: int, **options: object) -> None:
        raise LookupError(options["device"], options["drawn_on"])

    monkeypatch.setattr(layer, "random_case", random_case)
    monkeypatch.setattr(routing, "random_case", random_case)
    settings = replace(SETTINGS, device="cuda")
    for suite in ("layer", "scaling", "top-k", "decode", "linears"):
        group = next(iter(suites.SUITES[suite](settings)))
        for call in (group.check,) if suite == "linears" else (group.check, group.make):
            with pytest.raises(LookupError) as drawn:
                call()
            assert drawn.value.args == ("cuda", "cuda"), suite


def test_models_are_checked_on_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    batch_of = importance.random_batch
    monkeypatch.setattr(
        importance,
        "random_batch",
        lambda name, shape, *a, **b: seen.append(shape) or batch_of(name, shape, *a, **b),
    )
    assert importance.importance_group("tiny", (64, 4096), "fp32", "cpu").check() <= 1.0
    assert seen == [(importance.CHECKED_SEQUENCES, importance.CHECKED_TOKENS)]


def test_memory_is_counted_without_parameters() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    weight = nn.Parameter(torch.randn(16, 32), requires_grad=False)

    def forward() -> torch.Tensor:
        return torch.tanh(x @ weight.T)

    base = Pass(forward, lambda y: torch.autograd.grad(y.sum(), x))
    row = measure(a_group({"base": base}), SETTINGS).row("base")
    assert row.saved_bytes == 64 * 16 * 4, "tanh keeps y; the product keeps the weight alone"
    assert row.peak_bytes >= 2 * row.saved_bytes


def test_our_layer_keeps_less_than_the_loop_and_says_so() -> None:
    result = measure(layer_group(Shape(64, 32, 48), "fp32", SETTINGS), SETTINGS)
    kept = {row.name: row.saved_bytes for row in result.rows}
    assert kept[FROZEN] == 0
    # x, h and the probabilities
    assert kept[OURS] == 4 * 64 * (32 + 32 + 5)
    # and y of every expert
    assert kept["expert loop"] >= kept[OURS] + 4 * 4 * 64 * 48
    assert "stacked, compiled" in result.skipped


def test_records_come_back_as_they_went(tmp_path: Path) -> None:
    result = measure(layer_group(SHAPE, "fp32", SETTINGS), SETTINGS)
    record = Record({"device": "cpu"}, "citi bench layer", (result,))
    record.save(tmp_path / "a folder" / "record.json")
    assert Record.load(tmp_path / "a folder" / "record.json") == record
    assert record.of("layer", dtype="fp32") == [result]
    assert record.of("layer", dtype="bf16") == record.of("scaling") == []


@pytest.mark.parametrize("change", ["cut", "rows", "version"])
def test_a_damaged_record_is_refused_with_its_path(tmp_path: Path, change: str) -> None:
    path = tmp_path / "record.json"
    result = measure(a_group({"base": Pass(lambda: None)}), SETTINGS)
    Record({}, "citi bench", (result,)).save(path)
    content = json.loads(path.read_text())
    if change == "rows":
        del content["results"][0]["rows"][0]["ratio"]
    if change == "version":
        content["version"] = 99
    text = json.dumps(content)
    path.write_text(text[: len(text) // 2] if change == "cut" else text)
    with pytest.raises(SavedFileError, match=r"record\.json"):
        Record.load(path)


def _result(**ratios: float) -> Result:
    rows = tuple(
        Row(name, "a row", {"both": 0.5 * ratio}, {"both": ratio}, 0, 2**20, None)
        for name, ratio in ratios.items()
    )
    return Result("test", {"T": 4}, "T 4", "base", 4, 0.0, 0.0, 5, 0.1, rows, {"gone": "no GPU"})


def test_tables_hold_ratios_first_and_every_row_that_could_not_run() -> None:
    result = _result(base=1.0, other=1.25)
    lines = "\n".join(as_lines(result))
    assert "1.250" in lines
    assert "skipped: no GPU" in lines
    markdown = as_markdown(result)
    assert markdown[3] == "| other: a row | 1.25 | 625 (6 tokens/s) | 1.0 |"
    assert markdown[4].startswith("| gone: not yet measured, no GPU |")
    wide = by_shape([result, _result(base=1.0)], ["one", "two"])
    assert wide[3] == "| other | 1.25 | not yet measured |"
    unasked = replace(_result(base=1.0), skipped={"other": NOT_ASKED})
    gone = replace(_result(base=1.0), skipped={"other": "needs 80 GB"})
    wide = by_shape([result, unasked, gone], ["one", "two", "three"])
    assert wide[3] == "| other | 1.25 | not yet measured | no: needs 80 GB |"


def test_what_is_checked_is_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, gate sums and dropout decide which code runs."""
    seen, op = [], layer.molora_linear

    def spy(x: torch.Tensor, *operands: torch.Tensor, **options: object) -> tuple:
        seen.append((len(x), options))
        return op(x, *operands, **options)

    monkeypatch.setattr(layer, "molora_linear", spy)
    layer.check_layer(layer.Shape(5, 32, 16), torch.float32, "cpu", 2, 4)
    layer.check_layer(layer.Shape(5000, 32, 16), torch.float32, "cpu", 2, 4, top_k=1)
    assert [tokens for tokens, _ in seen] == [5, 5, 5, 128, 128]
    assert [o.get("segment_ids") is not None for _, o in seen] == [False, True, True, False, True]
    assert [o.get("dropout_p", 0.0) for _, o in seen] == [0.0, 0.0, layer.DROPOUT, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ratio", "word"), [(1.05, "goal met"), (1.1, "gate met"), (1.2, "GATE MISSED")]
)
def test_gates_and_goals_are_judged(ratio: float, word: str) -> None:
    row = replace(_result(base=ratio).rows[0], limit=(1.12, 1.06))
    assert verdict(row) == f"   gate 1.12, goal 1.06: {word}"


def test_the_command_prints_and_writes_what_it_measured(small_suites: None, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    result = citi(
        "bench",
        "layer",
        "decode",
        "--quick",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--json",
        str(file),
    )
    assert result.exit_code == 0, result.output
    record = Record.load(file)
    assert {each.suite for each in record.results} == {"layer", "decode"}
    assert record.command.startswith("citi bench layer decode --quick")
    assert record.machine["device"] == "cpu"
    assert OURS in result.output
    assert "over frozen linear" in result.output


def test_a_wrong_op_is_named_and_ends_with_1(
    small_suites: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(settings: Settings) -> Iterator[Group]:
        def check() -> float:
            raise AssertionError("y differs")

        yield a_group({"base": Pass(lambda: None)}, check=check)
        yield a_group({"base": Pass(lambda: None)}, settings={"T": 5})

    monkeypatch.setitem(suites.SUITES, "layer", wrong)
    file = tmp_path / "results.json"
    result = citi("bench", "layer", "--device", "cpu", "--seconds", "0", "--json", str(file))
    assert result.exit_code == 1
    assert "test · T 4: WRONG, not timed: y differs" in result.output
    assert [each.title for each in Record.load(file).results] == ["T 5"]


def test_what_was_measured_is_in_the_file_after_every_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    held: list[list[str]] = []

    def group(number: int) -> Group:
        def check() -> float:
            held.append([each.title for each in Record.load(file).results] if number else [])
            if number == 2:
                raise KeyboardInterrupt
            return 0.0

        return a_group({"base": Pass(lambda: None)}, settings={"T": number}, check=check)

    monkeypatch.setitem(suites.SUITES, "layer", lambda settings: map(group, range(3)))
    result = citi("bench", "layer", "--device", "cpu", "--seconds", "0", "--json", str(file))
    assert result.exit_code != 0
    assert held == [[], ["T 0"], ["T 0", "T 1"]]
    assert [each.title for each in Record.load(file).results] == ["T 0", "T 1"]


def test_groups_are_chosen_by_a_text_of_their_title(monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(settings: Settings) -> Iterator[Group]:
        for name in ("one", "two", "three"):
            passes = {"base": Pass(lambda: None), "other": Pass(lambda: None)}
            yield a_group(passes, settings={"model": name})

    monkeypatch.setitem(suites.SUITES, "layer", groups)
    always = ("bench", "layer", "--device", "cpu", "--seconds", "0")
    result = citi(*always, "--only", "model t", "--without", "other", "--patience", "9")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    titles = [line.split("   (")[0] for line in lines if line.startswith("test · ")]
    assert titles == ["test · model two", "test · model three"]
    assert any(line.endswith("s] test · model two: checking") for line in lines)
    assert "  other   skipped: not asked for" in lines
    result = citi(*always, "--only", "four")
    assert result.exit_code == 2
    assert "four: in no title; there are: model one" in " ".join(result.output.split())
    result = citi(*always, "--without", "OTHER")
    assert result.exit_code == 2
    assert "OTHER: no such row; there are: base, other" in " ".join(result.output.split())
    result = citi(*always, "--json", "/proc/nope/x.json")
    assert result.exit_code == 1
    assert "cannot write /proc/nope/x.json" in result.output
    assert "test · " not in result.output, "nothing was measured for it"


def test_an_unknown_suite_is_refused_before_anything_runs() -> None:
    result = citi("bench", "layers")
    assert result.exit_code == 2
    assert "there is no such suite" in " ".join(result.output.split())
