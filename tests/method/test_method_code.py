"""Generated code against its tests, in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks.method import code_tests
from benchmarks.method.code_tests import has_tests, passes_tests, program_of
from citi.data import Message, Sample


def sample(**meta) -> Sample:
    return Sample("1", 0, "code", (Message("user", "?"), Message("assistant", "!")), meta=meta)


MBPP = sample(test_list=["assert double(2) == 4", "assert double(3) == 6"], test_setup_code="")
HUMANEVAL = sample(
    prompt="def double(n):\n",
    test="def check(candidate):\n    assert candidate(2) == 4\n",
    entry_point="double",
)


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("Here:\n```python\ndef double(n):\n    return 2 * n\n```\nDone.", True),
        ("def double(n):\n    return 2 * n", True),
        ("def double(n):\n    return n + 2", False),
        ("I do not know.", False),
        ("", False),
        ("\0", False),
    ],
)
def test_an_answer_passes_if_all_its_tests_do(answer: str, passes: bool) -> None:
    assert passes_tests(answer, MBPP) is passes


def test_a_body_alone_is_put_behind_humanevals_prompt() -> None:
    assert passes_tests("    return 2 * n\n", HUMANEVAL)
    assert passes_tests("```python\ndef double(n):\n    return n + n\n```", HUMANEVAL)
    assert not passes_tests("    return n\n", HUMANEVAL)
    assert program_of("def double(n): ...", HUMANEVAL).count("def double") == 1


def test_code_that_never_ends_fails(monkeypatch) -> None:
    monkeypatch.setattr(code_tests, "SECONDS", 1)
    assert not passes_tests("while True: pass", MBPP)
    assert not passes_tests("import time\ntime.sleep(60)", MBPP)


def test_code_finds_no_environment_and_no_room(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SECRET", "1")
    right = "def double(n): return 2 * n\n"
    assert not passes_tests(right + "import os\nassert 'SECRET' in os.environ", MBPP)
    assert not passes_tests(right + "x = bytearray(4 << 30)", MBPP)
    big = "open('f', 'wb').write(bytes(4 << 20))"
    assert not passes_tests(right + big, MBPP)
    assert passes_tests(right + "import os\nassert os.listdir() == []", MBPP)


def test_only_samples_with_tests_are_run() -> None:
    assert has_tests(MBPP)
    assert has_tests(HUMANEVAL)
    assert not has_tests(sample(answer="4"))
