"""The choice between ways to compute the base product: the table is trusted as far as it goes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from citi_kernels import molora_linear, use_backend
from citi_kernels.testing import check_molora_linear, random_case
from citi_kernels.triton_kernels import base_product, decode, extended_gemm
from citi_kernels.triton_kernels.base_product import choose_base_product, forced_base_product
from under_test import DEVICE

GPU = "NVIDIA H100 80GB HBM3"
K, N = 64, 32


def row(tokens: int, winner: str, **changes: Any) -> dict[str, Any]:
    return {
        "gpu": GPU,
        "dtype": "bfloat16",
        "out_features": N,
        "in_features": K,
        "tokens": tokens,
        "direction": "forward",
        "milliseconds": {"update": 2.0, "extended": 1.0, "decode": 0.5},
        "winner": winner,
    } | changes


ROWS = [row(1, "decode"), row(512, "extended"), row(4096, "update")]


def tensors(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[Tensor]:
    return (torch.zeros(rows, K, dtype=dtype, device=DEVICE) for rows in (num_tokens, N))


def choose(num_tokens: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> str:
    x, weight = tensors(num_tokens, dtype)
    return choose_base_product(x, weight, num_tokens, options.pop("rank", 32), **options)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table to write, on what seems to be a GPU."""
    monkeypatch.setattr(base_product, "TABLE", tmp_path / "base_product.json")
    monkeypatch.setattr(base_product, "_gpu_name", lambda device: GPU)
    base_product.measured.cache_clear()
    return base_product.TABLE


def write(table: Path, rows: object) -> None:
    table.write_text(json.dumps({"note": "", "rows": rows}))


def test_the_committed_table_is_valid() -> None:
    committed = json.loads(base_product.TABLE.read_text())
    assert base_product.read_rows(base_product.TABLE) == committed["rows"]


def test_the_nearest_measured_number_of_tokens_at_or_below_decides(table: Path) -> None:
    write(table, ROWS[::-1])
    ways = {T: choose(T) for T in (1, 64, 512, 4095, 4096, 9000)}
    assert ways == {
        1: "decode",
        64: "decode",
        512: "extended",
        4095: "extended",
        4096: "update",
        9000: "update",
    }


def test_what_was_not_measured_is_computed_the_safe_way(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(table, ROWS[1:])
    assert choose(512) == "extended"
    assert choose(16) == choose(64) == "few"
    assert choose(16, direction="backward") == choose(65) == "update"
    assert choose(512, torch.float16) == "update"
    assert choose(512, direction="backward") == "update"
    x, weight = tensors(512)
    assert choose_base_product(x, weight[:16], 512, 32) == "update"
    assert choose_base_product(x, None, 512, 32) == "update"
    assert choose_base_product(x[:8], None, 8, 32) == "few"
    monkeypatch.setattr(base_product, "_gpu_name", lambda device: "another GPU")
    assert choose(512) == "update"
    monkeypatch.setattr(base_product, "_gpu_name", lambda device: None)
    assert choose(512) == choose(16) == "update"


def test_a_way_that_does_not_take_the_input_is_never_chosen(table: Path) -> None:
    fp32 = row(512, "extended", dtype="float32")
    backward = row(1, "decode", direction="backward")
    write(table, [row(1, "decode"), row(512, "extended"), fp32, backward])
    assert choose(65) == "update"
    assert choose(64, rank=257) == "update"
    assert choose(512, rank=257) == "update"
    assert choose(512, torch.float32) == "update"
    assert choose(1, direction="backward") == "update"
    x, weight = tensors(512)
    odd = x.new_zeros(512, K + 1)[:, :K]
    assert choose_base_product(odd, weight, 512, 32) == "update"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"rows": 3}', '{"rows": [[], 3, null, {}]}', "[" * 10**5, "\xff"]
)
def test_a_broken_table_is_an_empty_one(table: Path, text: str) -> None:
    table.write_bytes(text.encode("latin-1"))
    assert choose(512) == "update"


def test_a_missing_table_is_an_empty_one(table: Path) -> None:
    assert not table.exists()
    assert choose(512) == "update"


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": 3},
        {"dtype": None},
        {"out_features": "32"},
        {"in_features": -64},
        {"tokens": True},
        {"tokens": 0},
        {"direction": "sideways"},
        {"winner": "other"},
        {"winner": ["extended"]},
        {"milliseconds": 3},
        {"milliseconds": {"update": 1.0}},
        {"milliseconds": {"extended": "1"}},
        {"milliseconds": {"extended": float("nan")}},
    ],
    ids=str,
)
def test_a_malformed_row_is_ignored_and_the_others_hold(table: Path, changes: dict) -> None:
    write(table, [row(512, "extended") | changes, row(2048, "extended")])
    assert choose(1024) == "update"
    assert choose(2048) == "extended"


def test_the_table_is_read_once(table: Path) -> None:
    write(table, ROWS)
    assert choose(512) == "extended"
    table.unlink()
    assert choose(512) == "extended"


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU without measurements takes few tokens otherwise")
def test_a_forced_way_is_chosen_where_it_takes_the_input() -> None:
    assert choose(16) == "update"
    with forced_base_product("extended"):
        assert choose(16) == choose(512, direction="backward") == "extended"
        assert choose(16, torch.float32) == "update"
        with forced_base_product("decode"):
            assert choose(16) == "decode"
            assert choose(65) == choose(16, direction="backward") == "update"
        assert choose(16) == "extended"
    assert choose(16) == "update"


def test_a_forced_way_holds_in_every_thread() -> None:
    seen = []
    with forced_base_product("extended"):
        thread = threading.Thread(target=lambda: seen.append(choose(16)))
        thread.start()
        thread.join()
    assert seen == ["extended"]


def test_an_unknown_way_is_an_error_that_names_the_ways() -> None:
    with (
        pytest.raises(ValueError, match=r"update, few, extended, decode, got 'cublas'"),
        forced_base_product("cublas"),
    ):
        pass


@pytest.mark.parametrize(
    "options", [{}, {"dropout_p": 0.3, "dropout_seed": torch.tensor(7, device="cpu")}]
)
@pytest.mark.parametrize("way", base_product.WAYS)
def test_the_op_is_accurate_each_way(
    way: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole op, forward and backward; and that the way really ran."""
    ran = []

    def spy(function: Callable, *arguments: Any, **options: Any) -> Any:
        ran.append(function.__name__)
        return function(*arguments, **options)

    for module, name in ((decode, "decode_linear"), (extended_gemm, "extended_linear")):
        monkeypatch.setattr(module, name, partial(spy, getattr(module, name)))
    case = random_case(
        21, K, N, dtype=torch.bfloat16, parameter_dtype=torch.float32, device=DEVICE, **options
    )
    with use_backend("triton"), forced_base_product(way):
        check_molora_linear(molora_linear, case)
    ran_by = {"update": set(), "few": {"decode_linear"}}
    assert set(ran) == ran_by.get(way, {f"{way}_linear"})
