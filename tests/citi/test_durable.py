"""Durable writes: old or new, never half; every failure is one error with the path."""

from __future__ import annotations

import builtins
import errno
import json
import os
from pathlib import Path

import pytest

from citi.durable import (
    WriteError,
    check_writable,
    directory_in_one_step,
    recover_directory,
    replace_directory,
    write_bytes,
    write_json,
    write_text,
)


class Killed(BaseException):
    """Stands for the process dying: nothing may catch it."""


def _fail_at(monkeypatch, name: str, call: int, failure: BaseException) -> None:
    """Let the `call`-th use of `os.<name>` raise `failure`."""
    original, calls = getattr(os, name), iter(range(1_000_000))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise failure
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, wrapped)


def _tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_what_was_written_is_read_back_and_nothing_else_is_left(tmp_path):
    write_bytes(tmp_path / "new" / "folder" / "a.bin", b"\x00\xff")
    write_text(tmp_path / "b.txt", "Zürich\n")
    write_json(tmp_path / "c.json", {"z": 1, "a": ["é", None, 0.5]})
    assert _tree(tmp_path) == {
        "new/folder/a.bin": b"\x00\xff",
        "b.txt": "Zürich\n".encode(),
        "c.json": (tmp_path / "c.json").read_bytes(),
    }
    assert list(json.loads((tmp_path / "c.json").read_text())) == ["z", "a"]
    assert "é" in (tmp_path / "c.json").read_text(encoding="utf-8")


def test_a_lone_surrogate_survives_json(tmp_path):
    write_json(tmp_path / "s.json", {"text": "a\ud83db"})
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == {"text": "a\ud83db"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}, b"bytes"])
def test_what_json_cannot_hold_names_the_path_and_touches_nothing(tmp_path, bad):
    write_json(tmp_path / "m.json", {"ok": 1})
    with pytest.raises((TypeError, ValueError), match=r"m\.json as JSON"):
        write_json(tmp_path / "m.json", {"bad": bad})
    assert json.loads((tmp_path / "m.json").read_text()) == {"ok": 1}


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_case_45_killed_at_any_call_of_a_file_write_leaves_the_old_or_the_new(
    tmp_path, monkeypatch, name
):
    for call in range(3):
        path = tmp_path / f"{name}{call}.json"
        write_bytes(path, b"old")
        with monkeypatch.context() as patch:
            _fail_at(patch, name, call, Killed())
            try:
                write_bytes(path, b"new")
                finished = True
            except Killed:
                finished = False
        content = path.read_bytes()
        assert content in (b"old", b"new")
        assert content == b"new" or not finished
        assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["fsync", "rename", "open"])
def test_case_45_killed_at_any_call_of_a_directory_swap_leaves_one_complete_tree(
    tmp_path, monkeypatch, name
):
    old = {"weights": b"old" * 9, "inner/config": b"old"}
    new = {"weights": b"new" * 9, "inner/config": b"new", "extra": b"new"}
    for call in range(12):
        root = tmp_path / f"{name}{call}"
        for folder, files in (("target", old), ("source", new)):
            for file, data in files.items():
                write_bytes(root / folder / file, data)
        with monkeypatch.context() as patch:
            _fail_at(patch, name, call, Killed())
            try:
                replace_directory(root / "source", root / "target")
                finished = True
            except Killed:
                finished = False
        recover_directory(root / "target")
        assert _tree(root / "target") in (old, new)
        assert not finished or _tree(root / "target") == new
        assert not (root / ".target.previous").exists()
    assert finished


def test_a_directory_replaces_nothing_or_the_earlier_one(tmp_path):
    write_bytes(tmp_path / "one" / "f", b"1")
    replace_directory(tmp_path / "one", tmp_path / "deep" / "target")
    write_bytes(tmp_path / "two" / "g", b"2")
    replace_directory(tmp_path / "two", tmp_path / "deep" / "target")
    assert _tree(tmp_path) == {"deep/target/g": b"2"}
    with pytest.raises(FileNotFoundError, match="source must be an existing directory"):
        replace_directory(tmp_path / "gone", tmp_path / "deep" / "target")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
    ],
)
@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_case_55_disk_full_and_read_only_name_the_path_and_keep_the_old_file(
    tmp_path, monkeypatch, code, words, where
):
    path = tmp_path / "with space" / "ünïcode 文件.json"
    write_json(path, {"old": True})
    with monkeypatch.context() as patch:
        if where == "open":

            def refuse(*args, **kwargs):
                raise OSError(code, os.strerror(code))

            patch.setattr(builtins, "open", refuse)
        else:
            _fail_at(patch, where, 0, OSError(code, os.strerror(code)))
        with pytest.raises(WriteError, match=words) as caught:
            write_json(path, {"new": True})
    assert str(path) in str(caught.value)
    assert (caught.value.errno, caught.value.path) == (code, path)
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_case_55_a_failed_directory_swap_puts_the_old_tree_back(tmp_path, monkeypatch):
    write_bytes(tmp_path / "target" / "f", b"old")
    write_bytes(tmp_path / "source" / "f", b"new")
    with monkeypatch.context() as patch:
        _fail_at(patch, "rename", 1, OSError(errno.ENOSPC, "full"))
        with pytest.raises(WriteError, match="disk is full"):
            replace_directory(tmp_path / "source", tmp_path / "target")
    assert _tree(tmp_path) == {"target/f": b"old", "source/f": b"new"}


def test_case_55_a_full_disk_while_a_directory_is_written_is_named(tmp_path):
    write_bytes(tmp_path / "target" / "f", b"old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(WriteError, match="target: the disk is full"),
        directory_in_one_step(tmp_path / "target"),
    ):
        raise full
    assert (tmp_path / "target" / "f").read_bytes() == b"old"


def test_case_55_a_file_in_the_way_of_a_directory_and_the_reverse_are_named(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(WriteError, match="a part of the path is a file"):
        write_text(tmp_path / "file" / "below.json", "y")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="a directory of that name is in the way"):
        write_text(tmp_path / "folder", "y")
    with pytest.raises(WriteError, match="too long"):
        write_text(tmp_path / ("n" * 300), "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_case_55_what_a_write_would_refuse_is_known_before_and_nothing_is_left(
    tmp_path, monkeypatch
):
    write_text(tmp_path / "file", "x")
    (tmp_path / "folder").mkdir()
    for path, words in (
        (tmp_path / "file" / "below.json", "a part of the path is a file"),
        (tmp_path / "folder", "a directory of that name is in the way"),
        (tmp_path / ("n" * 300), "too long"),
    ):
        with pytest.raises(WriteError, match=words) as caught:
            check_writable(path)
        assert caught.value.path == path

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        with pytest.raises(WriteError, match="read-only"):
            check_writable(tmp_path / "new.json")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "folder" / "deep ü" / "new.json")
    assert _tree(tmp_path) == {"file": b"x"}
