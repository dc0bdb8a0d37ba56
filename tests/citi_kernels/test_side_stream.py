"""Launches beside another one: their order, and that their memory outlives them.

On a GPU: tests/citi_kernels/test_molora_on_gpu.py.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from skinny_double import StreamDouble
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import side_stream
from citi_kernels.ops.side_stream import Beside
from under_test import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="streams are doubles")
CPU = torch.device("cpu")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    record: list[str] = []
    streams = {name: StreamDouble(name, record) for name in ("main", "side")}
    streams["side"].cuda_stream = 9
    monkeypatch.setattr(side_stream, "_current_stream", lambda device: streams["main"])
    monkeypatch.setattr(side_stream, "_side_stream", lambda device: streams["side"])
    monkeypatch.setattr(compiled, "launch_place", lambda tensor: {"device": 5, "stream": 3})
    return record


def kernel_of(record: list[str], name: str):
    return lambda **arguments: record.append(f"{name} {arguments}")


def test_launches_wait_for_what_came_before_and_are_waited_for(record: list[str]) -> None:
    beside = Beside(CPU)
    beside.later(kernel_of(record, "first"), {"size": 1}, (torch.zeros(1), None))
    beside.later(kernel_of(record, "second"), {"size": 2}, (torch.zeros(1),))
    assert record == []
    with beside:
        record.append("body")
    assert record == [
        "main records",
        "body",
        "side waits for main",
        "first {'size': 1, 'device': 5, 'stream': 9}",
        "second {'size': 2, 'device': 5, 'stream': 9}",
        "side records",
        "main waits for side",
    ]


def test_without_launches_no_stream_is_touched(record: list[str]) -> None:
    with Beside(CPU):
        record.append("body")
    assert record == ["body"]


def test_memory_stays_until_the_join(record: list[str]) -> None:
    def remembered() -> weakref.ref[Tensor]:
        tensor = torch.zeros(1)
        beside.later(lambda **place: is_alive.append(tensor_of() is not None), {}, (tensor,))
        return weakref.ref(tensor)

    beside, is_alive = Beside(CPU), []
    tensor_of = remembered()
    with beside:
        gc.collect()
    assert is_alive == [True]
    assert tensor_of() is None


def test_a_body_that_raises_launches_nothing(record: list[str]) -> None:
    beside = Beside(CPU)
    beside.later(kernel_of(record, "never"), {}, (torch.zeros(1),))
    with pytest.raises(ValueError, match="body"), beside:
        raise ValueError("body")
    assert record == ["main records"]


def test_a_launch_that_raises_is_still_joined(record: list[str]) -> None:
    def fails(**arguments: int) -> None:
        raise RuntimeError("launch")

    beside = Beside(CPU)
    beside.later(kernel_of(record, "first"), {}, (torch.zeros(1),))
    beside.later(fails, {}, (torch.zeros(1),))
    with pytest.raises(RuntimeError, match="launch"), beside:
        pass
    assert record[-2:] == ["side records", "main waits for side"]
