"""Which way computes the product with the frozen weight: by measurement, per GPU and shape.

    update     cuBLAS, then the update of rank R added in place        always possible
    few        the same for up to 64 tokens, their K cut into parts    see `decode.takes`
    extended   one GEMM with a longer K                                see `extended_gemm.takes`
    decode     two launches for the whole layer, up to 64 tokens       see `decode.takes`

The measurements stand in base_product.json, which `python benchmarks/base_product.py --write`
fills. Where nothing was measured (another GPU, another shape, no readable table), the answer leaves
the product to cuBLAS: "few" up to 64 tokens, for which "update" would read a and the router on one
multiprocessor, and "update" beyond. Measured so far: up to 16 tokens at 4096 -> 4096 on an H100.

Shapes: T tokens, K in-features, N out-features.
"""

from __future__ import annotations

import contextlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from citi_kernels.triton_kernels import decode, extended_gemm

WAYS = ("update", "few", "extended", "decode")
DIRECTIONS = ("forward", "backward")
TABLE = Path(__file__).with_name("base_product.json")

# a plain global: autograd's threads must see it
_forced: str | None = None


class Key(NamedTuple):
    """What a row of the table is about, besides its number of tokens."""

    gpu: str  # as `torch.cuda.get_device_name` says
    dtype: str  # "bfloat16"
    out_features: int
    in_features: int
    direction: str


def choose_base_product(
    x_TK: Tensor,
    weight_NK: Tensor | None,
    num_tokens: int,
    rank: int,
    direction: str = "forward",
) -> str:
    """The way that was fastest for the nearest measured number of tokens at or below this one.

    Args:
        x_TK: (T, K); backward: dy (T, N).
        weight_NK: (N, K) or None.
        num_tokens: T.
        rank: stacked rank R.
        direction: "forward" or "backward".
    Returns:
        one of `WAYS` that takes these arguments.
    """
    way = _forced or _fastest(x_TK, weight_NK, num_tokens, direction)
    return way if _takes(way, x_TK, weight_NK, rank, direction) else "update"


@contextlib.contextmanager
def forced_base_product(name: str) -> Iterator[None]:
    """Inside the block, in every thread, this way is chosen where it takes the input."""
    global _forced
    if name not in WAYS:
        raise ValueError(f"name must be one of {', '.join(WAYS)}, got {name!r}")
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer


def _takes(way: str, x_TK: Tensor, weight_NK: Tensor | None, rank: int, direction: str) -> bool:
    if way == "extended":
        return (
            weight_NK is not None
            and rank <= extended_gemm.MAX_RANK
            and extended_gemm.takes(x_TK, weight_NK)
        )
    if way in ("few", "decode"):
        return direction == "forward" and decode.takes(x_TK, rank)
    return True


def _fastest(x_TK: Tensor, weight_NK: Tensor | None, num_tokens: int, direction: str) -> str:
    gpu = _gpu_name(x_TK.device)
    if gpu is None:
        return "update"
    unmeasured = "few" if num_tokens <= decode.MAX_TOKENS else "update"
    if weight_NK is None:
        return unmeasured
    key = Key(gpu, dtype_name(x_TK.dtype), *weight_NK.shape, direction)
    tokens, winners = measured(TABLE).get(key, ((), ()))
    place = bisect_right(tokens, num_tokens)
    return winners[place - 1] if place else unmeasured


@lru_cache
def measured(path: Path) -> dict[Key, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Numbers of tokens, ascending, and their winners, by key; empty where nothing can be read.

    Read once. The table saves time and changes no result, so a broken one is no error.
    """
    winners: dict[Key, dict[int, str]] = {}
    for row in read_rows(path):
        winners.setdefault(key_of(row), {})[row["tokens"]] = row["winner"]
    return {
        key: (tuple(sorted(of_tokens)), tuple(of_tokens[each] for each in sorted(of_tokens)))
        for key, of_tokens in winners.items()
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The valid rows of a table."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    rows = table.get("rows") if isinstance(table, dict) else None
    return [row for row in rows if _is_valid(row)] if isinstance(rows, list) else []


def key_of(row: dict[str, Any]) -> Key:
    return Key(*(row[name] for name in Key._fields))


def _is_valid(row: object) -> bool:
    if not isinstance(row, dict):
        return False
    milliseconds = row.get("milliseconds")
    return (
        all(isinstance(row.get(name), str) for name in ("gpu", "dtype"))
        and all(_is_count(row.get(name)) for name in ("out_features", "in_features", "tokens"))
        and row.get("direction") in DIRECTIONS
        and row.get("winner") in WAYS
        and isinstance(milliseconds, dict)
        and row["winner"] in milliseconds
        and all(_is_time(each) for each in milliseconds.values())
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_time(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value) and value > 0


def dtype_name(dtype: torch.dtype) -> str:
    """As it stands in the table."""
    return str(dtype).removeprefix("torch.")


@lru_cache
def _gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
