"""Tiles of grouped products: which slots of which expert a program owns, found on the device.

A grid is an upper bound known without looking at the routing; a program beyond the last tile ends.

Shapes: S slots, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(
    offsets_ptr,
    tile,
    E,
    top_k,
    first_choice,
    end_choice,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(expert, its first slot in this tile, the end of its slots), int64; no slot: (.., 0, 0).

    Every expert's slots of the choices first_choice .. end_choice - 1, which must lie side by
    side, are cut into tiles of BLOCK_S; tiles are numbered expert after expert.
    """
    e = tl.arange(0, BLOCK_E).to(tl.int64)
    in_E = e < E
    start = tl.load(offsets_ptr + e * top_k + first_choice, mask=in_E, other=0)
    end = tl.load(offsets_ptr + e * top_k + end_choice, mask=in_E, other=0)
    num_tiles = (end - start + (BLOCK_S - 1)) // BLOCK_S
    end_tile = tl.cumsum(num_tiles, 0)
    expert = tl.sum((end_tile <= tile).to(tl.int64), 0)
    slot = start + (tile - (end_tile - num_tiles)) * BLOCK_S
    is_mine = e == expert
    return (
        expert,
        tl.sum(tl.where(is_mine, slot, 0), 0),
        tl.sum(tl.where(is_mine, end.to(tl.int64), 0), 0),
    )


@triton.jit
def load_slots(order_ptr, s, in_S, T):
    """(choice * T + token, token) of slots s, int64; 0 outside."""
    flat = tl.load(order_ptr + s, mask=in_S, other=0)
    return flat.to(tl.int64), (flat % T).to(tl.int64)


def max_tiles(num_slots: int, num_experts: int, block_S: int) -> int:
    """At least the number of tiles, however the slots spread over the experts."""
    return min(num_slots, (num_slots + num_experts * (block_S - 1)) // block_S)
