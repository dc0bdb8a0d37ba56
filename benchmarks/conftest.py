"""Options of `pytest benchmarks/`; the groups of the suites, made once for all of their rows."""

from __future__ import annotations

import gc
from functools import cache

import pytest

from citi.benchmark.group import DTYPES, Group, Pass, Settings
from citi.benchmark.suites import SUITES

collect_ignore = ["figures.py", "report.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("citi")
    options.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    options.addoption("--dtype", choices=DTYPES, action="append", help="default: bf16 and fp32")
    options.addoption("--full", action="store_true", help="every shape, not the quick ones")
    options.addoption("--suite", choices=SUITES, action="append", help="default: all")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "group" not in metafunc.fixturenames:
        return
    config = metafunc.config
    settings = _settings(
        config.getoption("--device"),
        tuple(config.getoption("--dtype") or ("bf16", "fp32")),
        not config.getoption("--full"),
    )
    names = config.getoption("--suite") or list(SUITES)
    cases = [
        pytest.param(group, row, id=f"{group.suite}, {group.title}: {row}")
        for name in names
        for group in SUITES[name](settings)
        for row in group.stands_for
    ]
    metafunc.parametrize(("group", "row"), cases)


@cache
def _settings(device: str, dtypes: tuple[str, ...], is_quick: bool) -> Settings:
    return Settings(device=device, dtypes=dtypes, is_quick=is_quick)


class _Current:
    """The rows of the last group that was asked for, checked; others' memory is given back."""

    def __init__(self) -> None:
        self._group: Group | None = None
        self._passes: dict[str, Pass] = {}

    def passes(self, group: Group) -> dict[str, Pass]:
        """Raises AssertionError where a row of ours is wrong."""
        if group is not self._group:
            self._group, self._passes = None, {}
            gc.collect()
            group.check()
            self._passes = group.make()
            self._group = group
        return self._passes


@pytest.fixture(scope="session")
def current() -> _Current:
    return _Current()


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return _settings(
        request.config.getoption("--device"),
        tuple(request.config.getoption("--dtype") or ("bf16", "fp32")),
        not request.config.getoption("--full"),
    )
