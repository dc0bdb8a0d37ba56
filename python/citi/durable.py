"""Files that are either the old ones or the new ones, never halves.

Every write goes to a temporary file in the target's own directory, is flushed to the disk and
renamed over the target, and the directory entry is flushed too. A process killed at any point
leaves the earlier file intact, and at worst a hidden temporary file next to it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_WAYS_OUT = {
    errno.ENOSPC: "the disk is full; free some space or choose another directory",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another directory",
    errno.EFBIG: "the file is larger than this system allows here; choose another directory",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.EACCES: "permission denied; choose a directory that you may write to",
    errno.EPERM: "permission denied; choose a directory that you may write to",
    errno.EISDIR: "a directory of that name is in the way; remove it or choose another name",
    errno.ENOTDIR: "a part of the path is a file, not a directory; choose another path",
    errno.EEXIST: "a part of the path is a file, not a directory; choose another path",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.ENOENT: "the directory is not there",
    errno.EXDEV: "the source lies on another file system; build it beside the target",
}


class WriteError(OSError):
    """A file or directory could not be written; what stood there before is intact."""

    def __init__(self, path: Path, cause: OSError) -> None:
        reason = _WAYS_OUT.get(cause.errno, cause.strerror or str(cause))
        super().__init__(f"cannot write {path}: {reason} (an earlier version, if any, is intact)")
        self.errno = cause.errno
        self.path = path


def write_bytes(path: str | Path, data: bytes) -> None:
    """Put `data` into `path` in one step; parent directories are made.

    Raises: WriteError with the path and the way out: disk full, read-only, no permission ...
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise WriteError(path, error) from error


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of `text` in UTF-8, line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, obj: object) -> None:
    """`write_bytes` of `obj` as indented JSON, keys in the order given, unicode readable.

    Raises: ValueError or TypeError for what JSON cannot hold (NaN, infinity, foreign types), with
    the path, before anything is touched; WriteError as `write_bytes` does.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot write {path} as JSON: {error}") from error
    # A lone surrogate has no UTF-8 form; `backslashreplace` turns it into its JSON escape.
    write_bytes(path, (text + "\n").encode("utf-8", errors="backslashreplace"))


def check_writable(path: str | Path) -> None:
    """Refuse at once what `write_bytes` would refuse after hours; parent directories are made.

    Raises: WriteError as `write_bytes` does. Whether the disk has room is not known.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(path).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            open(temporary, "xb").close()
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(path, error) from error


def replace_directory(source: str | Path, target: str | Path) -> None:
    """Put the finished directory `source` in the place of `target`, which may exist.

    All files are flushed before the rename. Renaming onto a non-empty directory is impossible, so
    the earlier one is first moved to `.<name>.previous` beside it and removed last;
    `recover_directory` undoes a move that was cut in between.

    Raises: FileNotFoundError without `source`; WriteError with the path.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise FileNotFoundError(f"source must be an existing directory, got {source}")
    previous = _previous(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_directory(target)
        _sync_tree(source)
        if target.is_dir():
            os.rename(target, previous)
        try:
            os.rename(source, target)
        except OSError:
            recover_directory(target)
            raise
        _sync_directory(target.parent)
        if previous.exists():
            _discard(previous)
    except OSError as error:
        raise WriteError(target, error) from error


@contextlib.contextmanager
def directory_in_one_step(target: str | Path) -> Iterator[Path]:
    """A path beside `target` to write a directory at, which takes its place when the block ends.

    Where the block raises, `target` stays as it was; an OSError in it becomes a WriteError.

    Raises: as `replace_directory`.
    """
    target = Path(target)
    unfinished = unfinished_of(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(target, error) from error
    replace_directory(unfinished, target)


def unfinished_of(target: Path) -> Path:
    """Where `directory_in_one_step` lets a directory be written."""
    return target.with_name(f".{target.name}.unfinished")


def recover_directory(target: str | Path) -> bool:
    """Finish or undo a `replace_directory` that was killed; call it before reading `target`.

    Returns: True when the earlier directory was put back.
    """
    target = Path(target)
    previous = _previous(target)
    if not previous.exists():
        return False
    if target.exists():
        _discard(previous)
        return False
    os.rename(previous, target)
    _sync_directory(target.parent)
    return True


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _discard(directory: Path) -> None:
    """Remove a tree under another name first, so that half of it is never taken for the whole."""
    doomed = directory.parent / f".{secrets.token_hex(8)}.tmp"
    os.rename(directory, doomed)
    shutil.rmtree(doomed)


def _sync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, leaves first."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(folder))


def _sync_directory(path: Path) -> None:
    """Flush a directory's entries, where the system knows such a thing (Windows does not)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to flush a directory; the rename has been done by then.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
