"""Does generated code pass a sample's own tests? Run only on request, in a process of its own.

The process gets an empty folder, no environment, no site packages, ten seconds of CPU time, 1 GB of
memory and no file above 1 MB; where `unshare` may make namespaces, no network either. This keeps
accidents apart from the machine, not an attacker: run it where nothing is to be lost.
"""

from __future__ import annotations

import functools
import re
import resource
import shutil
import subprocess
import sys
import tempfile

from citi.data import Sample

SECONDS = 10
_MEMORY, _FILE_SIZE = 1 << 30, 1 << 20
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def has_tests(sample: Sample) -> bool:
    """Whether meta holds HumanEval's `test` or MBPP's `test_list`."""
    return bool(sample.meta.get("test") or sample.meta.get("test_list"))


def passes_tests(answer: str, sample: Sample) -> bool:
    """Run the code of an answer and the sample's tests; True if nothing failed in time.

    Args:
        answer: Generated text; its first fenced block is the code, else all of it.
        sample: One that `has_tests`.
    """
    return _runs_well(program_of(answer, sample))


def program_of(answer: str, sample: Sample) -> str:
    """Code and tests as one program; HumanEval's prompt goes before a body without its function."""
    fenced = _FENCED.search(answer)
    code, meta = (fenced[1] if fenced else answer), sample.meta
    if meta.get("test"):
        entry = meta["entry_point"]
        if f"def {entry}" not in code:
            code = meta["prompt"] + code
        return f"{code}\n{meta['test']}\ncheck({entry})\n"
    return "\n".join([code, meta.get("test_setup_code", ""), *meta["test_list"], ""])


def _runs_well(program: str) -> bool:
    command = [*_without_network(), sys.executable, "-I", "-S", "-B", "-c", program]
    with tempfile.TemporaryDirectory() as folder:
        try:
            finished = subprocess.run(
                command,
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * SECONDS,
                preexec_fn=_limit,
                start_new_session=True,
                check=False,
            )
        except (subprocess.TimeoutExpired, ValueError, OSError):
            return False  # too slow, or no program text that a process can be given
    return finished.returncode == 0


def _limit() -> None:
    for what, value in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, _FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


@functools.cache
def _without_network() -> tuple[str, ...]:
    """`unshare` with a network namespace of its own, where this machine lets us."""
    command = (shutil.which("unshare") or "", "--map-root-user", "--net")
    if not command[0]:
        return ()
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if tried.returncode == 0 else ()
