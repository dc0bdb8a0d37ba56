"""The report: all parts from the run's files, self-contained, escaped, always the same bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from citi.components import split_layer
from citi.durable import write_json, write_text
from citi.evaluation import EvalResult
from citi.gates import GateSummary
from citi.importance import ComponentScores
from citi.importance.ability_scores import AbilityScores
from citi.importance.stability import ranking_stability
from citi.plan import make_plan
from citi.report import build_report, read_results
from citi.report.plots import importance_map, stage_curves

NAMES = [
    f"model.layers.{layer}.{path}"
    for layer in range(4)
    for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]
SECTIONS = {
    "tradeoff": "Base against tuned",
    "importance": "Which components matter",
    "overlap": "Do abilities share components?",
    "training": "Training",
    "gates": "What the routers do",
    "settings": "What ran",
}
HOSTILE = "chat <script>alert('&')</script> $_$x$_5_6$"


def ability_scores() -> AbilityScores:
    def scores(seed: int) -> ComponentScores:
        draw = random.Random(seed)
        return ComponentScores(
            scores={name: math.exp(draw.gauss(0, 1)) for name in NAMES},
            estimator="token",
            num_samples=4,
            num_tokens=400,
            num_answer_tokens=40,
            num_batches=4,
            num_empty_batches=0,
            num_nonfinite_batches=0,
            skipped=(),
        )

    return AbilityScores(
        tool=scores(0),
        general={"math": scores(1), HOSTILE: scores(2)},
        fingerprint={"model_type": "llama", "num_components": len(NAMES)},
    )


def result(exact: float, nll: float) -> EvalResult:
    calls = {"format": 0.9, "name": 0.8, "arguments": 0.5, "exact": exact, "rouge_l": None}
    return EvalResult(
        tool={"API-Bank": calls | {"n": 40, "num_calls": 40, "num_responses": 0}},
        general={
            HOSTILE: {"nll": nll, "exact_match": None, "n": 30, "num_tokens": 90, "num_judged": 0},
            "math": {"nll": 1.5, "exact_match": 0.25, "n": 30, "num_tokens": 90, "num_judged": 20},
        },
        notes=(f"{HOSTILE}: 1 samples without answer tokens",),
    )


def metrics() -> list[dict]:
    return [
        {
            "stage": stage,
            "step": step,
            "loss": 2.1 - 0.1 * step,
            "ce_loss": 2.0 - 0.1 * step,
            "router_loss": 1.0 / step,
            "base_kl": 0.01 * step,
            "backbone_gate_tool": 0.3,
            "backbone_gate_general": 0.6,
        }
        for stage, steps in (("rp", 6), ("mi", 9), ("uco", 2))
        for step in range(1, steps + 1)
    ]


def write_run(root: Path) -> Path:
    """A run directory with every file that the report reads."""
    recipe = f"model: org/tiny-model\ngeneral: {{{json.dumps(HOSTILE)}: chat.jsonl}}\nseed: 7\n"
    write_text(root / "recipe.resolved.yaml", recipe)
    write_json(root / "env.json", {"versions": {"torch": "9.9.9"}, "device_name": "a <b>CPU</b>"})
    phases = {"rp": {"seconds": 61.0}, "mi": {"seconds": 59.7}, "report": {"seconds": 3.0}}
    finished = "2031-02-03T04:05:06+00:00"
    write_json(
        root / "manifest.json", {"started": finished, "finished": finished, "phases": phases}
    )
    rows = [json.dumps(row) for row in metrics()]
    write_text(root / "metrics.jsonl", "\n".join([*rows, '{"stage": "uco", "st']))
    scores = ability_scores()
    scores.save(root / "importance")
    make_plan(scores, important=0.25, unimportant=0.25).save(root / "plan.json")
    for name, measured in {"tuned": result(0.5, 2.25), "base": result(0.1, 2.0)}.items():
        write_json(root / "eval" / f"{name}.json", measured.to_json())
    write_json(root / "eval" / "lora.json", result(0.6, 3.0).to_json())
    gates = GateSummary(
        bins=(0.0, 0.5, 1.0),
        counts={"general": (1, 3), "tool": (3, 1)},
        layers={NAMES[0]: {"tool": (0.3, 0.7), "general": (0.6, 0.4)}},
        num_tokens={"general": 4, "tool": 4},
    )
    write_json(root / "eval" / "gates.json", gates.to_json())
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a run")


class Page(HTMLParser):
    """What the tests look at: sections, pictures, table rows, ids, visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.sections: list[str] = []
        self.pictures: list[dict] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "section":
            self.sections.append(attributes["id"])
        elif tag == "svg":
            self.pictures.append(attributes)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip() + " "

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, label: str) -> list[str]:
        """Cells of the first table row whose head begins with `label`."""
        found = next(row for row in self.rows if row and row[0].startswith(label))
        return [cell.strip() for cell in found[1:]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a whole run."""
    return Page(build_report(write_run(tmp_path_factory.mktemp("runs") / "a run")))


def test_a_whole_run_gives_every_section_and_names_nothing_as_missing(page: Page) -> None:
    assert page.sections == list(SECTIONS)
    assert all(title in page.text for title in SECTIONS.values())
    assert "org/tiny-model" in page.text
    assert "2031-02-03 04:05:06 UTC · torch 9.9.9" in page.text


def test_the_file_needs_nothing_but_itself(page: Page) -> None:
    assert "://" not in page.source
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert not re.search(r"url\((?!#)|@import|src=", page.source)
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', page.source)
    assert references
    assert set(references) <= set(page.ids)


def test_ids_are_unique_over_all_pictures(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))


def test_the_same_files_give_the_same_bytes(run: Path, page: Page) -> None:
    path = build_report(run)
    assert path == run / "report.html"
    assert path.read_bytes() == page.source.encode()
    assert build_report(run).read_bytes() == page.source.encode()


def test_what_users_wrote_is_escaped_everywhere(page: Page) -> None:
    assert "<script" not in page.source
    assert "<b>" not in page.source
    assert page.text.count(HOSTILE) >= 3
    assert "a <b>CPU</b>" in page.text


def test_every_picture_has_words_for_those_who_do_not_see_it(page: Page) -> None:
    assert len(page.pictures) == 10
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in page.pictures)
    assert page.source.count("<figcaption>") == len(page.pictures)


def test_the_table_holds_each_value_and_its_change_against_the_base(page: Page) -> None:
    assert page.row("measure") == ["base", "CITI", "LoRA on tool data"]
    assert page.row("exact call") == ["10.0 %", "50.0 % +40.0", "60.0 % +50.0"]
    assert page.row("answer NLL") == ["2.000", "2.250 +0.250", "3.000 +1.000"]
    assert page.row("exact match") == ["25.0 %", "25.0 % +0.0", "25.0 % +0.0"]
    assert not any(row and row[0].startswith("ROUGE-L") for row in page.rows)
    assert 'class="good">+40.0' in page.source
    assert 'class="bad">+0.250' in page.source
    assert "1 samples without answer tokens" in page.text


def test_the_headline_is_the_gain_and_the_mean_forgetting(page: Page) -> None:
    text = page.text
    assert "Exact tool calls 50.0 % base 10.0 %, so +40.0 points" in text
    assert "General answer NLL +0.125" in text


def test_chance_is_stated_for_the_smallest_set(page: Page) -> None:
    assert "a share of 20 answers by up to ±22 points" in page.text


def test_the_scatter_places_gain_against_mean_forgetting(page: Page) -> None:
    words = next(p["aria-label"] for p in page.pictures if "% exact, NLL" in p["aria-label"])
    assert words == (
        "base: 10.0 % exact, NLL +0.000; CITI: 50.0 % exact, NLL +0.125;"
        " LoRA on tool data: 60.0 % exact, NLL +0.500"
    )


def test_the_maps_mark_what_the_plan_took(page: Page) -> None:
    scores = ability_scores()
    plan = make_plan(scores, important=0.25, unimportant=0.25)
    assert page.row(f"MOLoRA ({len(plan.important)})") == [", ".join(plan.important)]
    assert page.row("unfrozen in UCO") == [", ".join(plan.unimportant)]
    top = max(scores.tool_importance, key=scores.tool_importance.__getitem__)
    assert f"Largest: {top} ({scores.tool_importance[top]:.2%})" in page.text


def test_the_ranking_is_called_sure_or_not_where_scores_by_batch_tell(run: Path) -> None:
    assert "Is the tool ranking sure?" not in Page(build_report(run)).text
    scores, plan = ability_scores(), make_plan(ability_scores(), important=0.25, unimportant=0.25)
    by_batch = torch.tensor([list(scores.tool.values())] * 8, dtype=torch.float64)
    counts = torch.tensor([[1, 10, 4]] * 8)
    tool = dataclasses.replace(scores.tool, by_batch=by_batch, batch_counts=counts)
    dataclasses.replace(scores, tool=tool).save(run / "importance")
    sentence = ranking_stability(tool, share=plan.important_share).sentence
    assert "two scorings of 4 agree on 1.00 of the top 25 %" in sentence
    page = Page(build_report(run))
    assert f"over all components. Is the tool ranking sure? {sentence}." in page.text


def test_the_overlap_states_jaccard_indices_and_chance(page: Page) -> None:
    def high(scores: ComponentScores) -> set[str]:
        order = sorted(NAMES, key=lambda name: (scores[name], name))
        return set(order[len(order) - len(order) // 3 :])

    scores = ability_scores()
    tool, math_ = high(scores.tool), high(scores.general["math"])
    words = next(p["aria-label"] for p in page.pictures if "tool and math" in p["aria-label"])
    assert f"tool and math: {len(tool & math_) / len(tool | math_):.2f}" in words
    assert "what two random thirds would give" in page.text


def test_curves_lay_the_stages_end_to_end(page: Page) -> None:
    words = next(p["aria-label"] for p in page.pictures if p["aria-label"].startswith("loss in RP"))
    assert words == (
        "loss in RP: from 1.9 to 1.4; loss in MI: from 1.9 to 1.1; loss in UCO: from 1.9 to 1.8"
    )


def test_gate_means_come_from_the_histogram(page: Page) -> None:
    text = page.text
    assert "tool tokens: mean backbone gate 0.38; general tokens: mean backbone gate 0.62" in text


def test_the_reports_own_time_is_left_out(page: Page) -> None:
    assert page.row("rp") == ["1:01 min"]
    assert page.row("mi") == ["1:00 min"]
    assert "report" not in [row[0].strip() for row in page.rows if row]


@pytest.mark.parametrize(
    ("files", "sections"),
    [
        (["recipe.resolved.yaml"], ["settings"]),
        (["importance.json", "importance.safetensors"], ["importance", "overlap"]),
        (["metrics.jsonl"], ["training"]),
        (["eval/base.json"], ["tradeoff"]),
        (["eval/gates.json"], ["gates"]),
    ],
)
def test_a_partial_run_gives_its_parts_and_names_the_rest(
    run: Path, tmp_path: Path, files: list[str], sections: list[str]
) -> None:
    part = tmp_path / "part"
    for name in files:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_bytes((run / name).read_bytes())
    page = Page(build_report(part))
    assert page.sections == [*sections, "missing"]
    assert page.row("plan.json")[0].startswith("not in this run yet; written by")
    assert not any(row and row[0].strip() in files for row in page.rows)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no file of a run"):
        build_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_report(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "recipe.resolved.yaml",
        "env.json",
        "metrics.jsonl",
        "importance.json",
        "plan.json",
        "eval/base.json",
        "eval/gates.json",
    ],
)
def test_case_53_a_broken_file_is_named_and_an_earlier_report_stays(run: Path, name: str) -> None:
    before = build_report(run).read_bytes()
    (run / name).write_text("{ : broken\n{}\n")
    with pytest.raises(ValueError, match=re.escape(str(run / name))):
        build_report(run)
    assert (run / "report.html").read_bytes() == before


def test_results_come_base_first_tuned_second(run: Path) -> None:
    assert list(read_results(run / "eval")) == ["base", "tuned", "lora"]
    assert read_results(run / "eval")["lora"] == result(0.6, 3.0)


def test_components_are_split_at_the_layer_number() -> None:
    assert split_layer("model.layers.11.mlp.up_proj") == (11, "mlp.up_proj")
    assert split_layer("transformer.h.0.attn.c_proj") == (0, "attn.c_proj")
    assert split_layer("model.layers.2.experts.3.w1") == (2, "experts.3.w1")
    assert split_layer("projector") == (None, "projector")


def test_a_map_has_each_share_in_its_cell_and_each_mark_on_its_component() -> None:
    shares = {name: (index + 1) / 200 for index, name in enumerate(NAMES)}
    marked = {"model.layers.2.mlp.up_proj": "molora", "model.layers.0.self_attn.v_proj": "uco"}
    figure = importance_map(
        shares | {"projector": 0.5}, marked=marked, limits=(0.02, 0.1), title="tool"
    )
    axes = figure.axes[0]
    mesh, dot, *squares = axes.collections
    cells = mesh.get_array().reshape(4, 4)
    columns = ["q_proj", "v_proj", "up_proj", "down_proj"]
    assert [label.get_text() for label in axes.get_xticklabels()] == columns
    for name, share in shares.items():
        layer, path = split_layer(name)
        column = columns.index(path.split(".")[1])
        assert cells[layer, column] == max(share, 0.02), name
    assert dot.get_offsets().tolist() == [[2.5, 2.5]]
    assert all(square.get_offsets().tolist() == [[1.5, 0.5]] for square in squares)


def test_a_curve_begins_where_the_stage_before_ends_and_its_mean_is_the_windows() -> None:
    values = [float(step % 7) for step in range(1, 121)]
    rp = [(1, 5.0), (4, 3.0)]
    mi = list(zip(range(1, 121), values, strict=True))
    figure = stage_curves({"loss": {"RP": rp, "MI": mi}}, label="loss")
    raw_rp, _, raw_mi, mean_mi = figure.axes[0].lines[:4]
    assert list(raw_rp.get_xdata()) == [1, 4]
    assert list(raw_mi.get_xdata()) == [4 + step for step, _ in mi]
    assert list(raw_mi.get_ydata()) == values
    means = list(mean_mi.get_ydata())
    assert means[0] == values[0]
    assert means[50] == pytest.approx(sum(values[47:54]) / 7)


def test_components_outside_numbered_layers_leave_the_map_out(run: Path) -> None:
    scores = ability_scores()
    renamed = {
        name: dataclasses.replace(each, scores={n.replace(".", "_"): v for n, v in each.items()})
        for name, each in {"tool": scores.tool, **scores.general}.items()
    }
    AbilityScores(renamed.pop("tool"), renamed, scores.fingerprint).save(run / "importance")
    assert "importance" not in Page(build_report(run)).sections
