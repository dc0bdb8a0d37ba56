"""Reading data files: what is counted, what is an error, and the real files where they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from citi.data import DataError, read_data, read_samples

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROW = {"prompt": "question", "completion": "answer"}


def _lines(*rows) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def test_lines_list_and_gzip_give_the_same_samples(tmp_path):
    rows = [{**ROW, "id": str(i)} for i in range(3)]
    listed = json.dumps(rows, indent=1).encode()
    files = {
        "a.jsonl": _lines(*rows),
        "b.jsonl.gz": _lines(*rows) + b"\n\n",
        "c.json": listed,
        "d.json": _lines(*rows),
        "e.json.gz": b"\xef\xbb\xbf" + listed,
        "f.jsonl": _lines(*rows).replace(b"\n", b"\r\n"),
    }
    read = [read_samples(_write(tmp_path / name, data)) for name, data in files.items()]
    assert [[sample.id for sample in samples] for samples in read] == [["0", "1", "2"]] * 6
    assert all(samples[1].messages == read[0][1].messages for samples in read)
    assert read[0][2].source.endswith("a.jsonl:3")
    assert read[2][2].source.endswith("c.json:row 3")


def test_max_samples_takes_the_first_or_a_seeded_choice_in_file_order(tmp_path):
    path = _write(tmp_path / "r.jsonl", _lines(*({**ROW, "id": i} for i in range(50))))
    assert [s.id for s in read_samples(path, max_samples=3)] == ["0", "1", "2"]
    chosen = [int(s.id) for s in read_samples(path, max_samples=20, seed=1)]
    assert chosen == sorted(chosen)
    assert chosen == [int(s.id) for s in read_samples(path, max_samples=20, seed=1)]
    assert chosen != [int(s.id) for s in read_samples(path, max_samples=20, seed=2)]
    assert len(read_samples(path, max_samples=99, seed=1)) == 50


def test_case_57_a_broken_line_is_named_by_file_and_line(tmp_path):
    path = _write(tmp_path / "b.jsonl", _lines(ROW, ROW) + b'\n\n{"prompt": "cut off')
    with pytest.raises(DataError, match=r"b\.jsonl:4: not valid JSON"):
        read_samples(path)
    path = _write(tmp_path / "c.jsonl", _lines(ROW) + b"\n[1, 2]")
    with pytest.raises(DataError, match=r"c\.jsonl:2: a row must be a JSON object, got list"):
        read_samples(path)
    path = _write(tmp_path / "d.jsonl", _lines(ROW) + b'\n{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"d\.jsonl:2: not valid JSON"):
        read_samples(path)


@pytest.mark.parametrize("data", [b"", b"\n \n"])
@pytest.mark.parametrize("name", ["e.jsonl", "e.json.gz"])
def test_case_57_an_empty_file_is_an_error_that_names_it(tmp_path, data, name):
    with pytest.raises(DataError, match=r"e\.json.* is empty"):
        read_samples(_write(tmp_path / name, data))


def test_case_57_one_sample_is_enough(tmp_path):
    samples, report = read_data(_write(tmp_path / "one.jsonl", _lines(ROW)))
    assert len(samples) == report.num_samples == 1
    assert report.warnings == ()


def test_case_57_duplicate_ids_missing_tools_and_dropped_rows_are_counted_with_their_place(
    tmp_path,
):
    rows = [
        {**ROW, "id": "same", "task": "tool"},
        {**ROW, "id": "same", "tools": [{"name": "f"}], "task": "tool"},
        {"prompt": "question", "completion": "  "},
        {"messages": [{"role": "narrator", "content": "x"}]},
        {"messages": [{"role": "user", "content": "no answer here"}]},
        {"query": "q", "tools": "[", "answers": "[]"},
        {"conversations": None},
        {"instruction": "i", "output": "o", "history": [["only one"]]},
    ]
    path = _write(tmp_path / "w.jsonl", _lines(*rows))
    samples, report = read_data(path)
    assert (report.num_rows, report.num_samples, len(samples)) == (8, 3, 3)
    assert (report.num_tool, report.num_general) == (2, 1)
    assert (report.num_duplicate_ids, report.num_missing_tools) == (1, 1)
    assert report.num_without_answer == 1
    assert report.dropped == {
        "the answer is empty": 1,
        "unknown role 'narrator'": 1,
        "answers holds no call": 1,
        "the conversation is not a list of turns": 1,
        "malformed Alpaca row (ValueError)": 1,
    }
    assert any("w.jsonl:2" in warning for warning in report.warnings)
    assert len(report.warnings) == 3 + 5
    assert json.loads(json.dumps(report.to_json()))["num_rows"] == 8


def test_case_57_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    path = _write(tmp_path / "n.jsonl", _lines({"prompt": "q", "completion": ""}))
    with pytest.raises(DataError, match=r"n\.jsonl: none of the 1 rows is usable: the answer"):
        read_samples(path)


def test_an_unknown_format_is_an_error_that_lists_the_known_ones(tmp_path):
    path = _write(tmp_path / "u.jsonl", _lines(ROW, {"text": "x", "label": 1}))
    with pytest.raises(DataError, match=r"u\.jsonl:2: .*\['label', 'text'\].*prompt-completion"):
        read_samples(path)


def test_a_wrong_task_type_is_an_error(tmp_path):
    path = _write(tmp_path / "t.jsonl", _lines({**ROW, "task_type": "maths"}))
    with pytest.raises(DataError, match=r"t\.jsonl:1: task_type must be .* got 'maths'"):
        read_samples(path)
    with pytest.raises(ValueError, match="task_type must be 1"):
        read_samples(path, task_type=3)


def test_case_53_a_file_cut_at_every_64th_byte_is_one_named_error(tmp_path):
    data = gzip.compress(_lines(*({**ROW, "id": str(i) * 9} for i in range(200))), mtime=0)
    path = tmp_path / "cut.jsonl.gz"
    for length in range(0, len(data), 64):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"cut\.jsonl\.gz"):
            read_samples(path)


def test_case_53_flipped_bits_never_change_what_is_loaded_silently(tmp_path):
    rows = _lines(*({**ROW, "id": str(i)} for i in range(20)))
    data = gzip.compress(rows, mtime=0)
    path = _write(tmp_path / "flip.jsonl.gz", rows)
    truth = read_samples(path)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        try:
            assert read_samples(path) == truth
        except DataError as error:
            assert "flip.jsonl.gz" in str(error)  # noqa: PT017


def test_case_55_odd_paths_are_read_and_unreadable_ones_named(tmp_path):
    path = _write(tmp_path / "with space" / "größe 文.jsonl", _lines(ROW))
    assert read_samples(str(path))[0].source == f"{path}:1"
    with pytest.raises(DataError, match=r"missing\.jsonl: there is no such data file"):
        read_samples(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_samples(tmp_path / "with space")


def test_line_separators_inside_a_text_do_not_cut_the_row(tmp_path):
    row = {"prompt": "a\u2028b\u0085c", "completion": "d\u2029"}
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read_samples(path)[0].messages[0].content == row["prompt"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real data is not beside this one")
def test_every_real_file_is_read_without_a_dropped_row():
    manifest = json.loads((SHARED / "manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["files"]:
        samples, report = read_data(SHARED / entry["file"])
        assert len(samples) == report.num_rows == entry["records"], entry["file"]
        assert report.dropped == {}
        assert [verdict.name for verdict in report.formats] == ["chat record"]
        assert report.num_duplicate_ids == 0
        assert (report.num_without_answer > 0) == (entry["file"] == "mt_bench/eval.jsonl.gz")


@pytest.mark.parametrize(
    "stated",
    [
        [{"name": "f", "arguments": {"a": 1}}],
        [{"name": "f", "arguments": '{"a": 1}'}],
        [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        '[{"name": "f", "parameters": {"a": 1}}]',
        {"name": "f", "arguments": {"a": 1}},
    ],
)
@pytest.mark.parametrize("key", ["gold_calls", "possible_answer"])
def test_wanted_calls_in_meta_take_one_form_whatever_their_spelling(tmp_path, stated, key):
    path = _write(tmp_path / "g.jsonl", _lines({**ROW, key: stated}))
    (sample,) = read_samples(path)
    assert sample.meta[key] == [{"name": "f", "arguments": {"a": 1}}]
    listing = [{"f": {"a": [1, 2], "b": [""]}}]
    path = _write(tmp_path / "h.jsonl", _lines({**ROW, "meta": {key: listing}}, {**ROW, key: []}))
    assert [sample.meta[key] for sample in read_samples(path)] == [listing, []]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ([{"name": "f", "arguments": "a=1"}], "arguments is not valid JSON"),
        ([{"name": "f", "arguments": [1]}], "the arguments of a tool call are not a JSON object"),
        ([{"tool": "f", "arguments": {}}], "a tool call has no name"),
        (["f(a=1)"], "gold_calls is not valid JSON"),
        ([[]], "a tool call has no name"),
        (7, "a tool call has no name"),
    ],
)
def test_wanted_calls_that_cannot_be_compared_are_refused_by_file_and_line(
    tmp_path, stated, message
):
    path = _write(tmp_path / "g.jsonl", _lines(ROW, {**ROW, "gold_calls": stated}))
    with pytest.raises(DataError, match=rf"g\.jsonl:2: gold_calls: {message}; wanted a list"):
        read_samples(path)
