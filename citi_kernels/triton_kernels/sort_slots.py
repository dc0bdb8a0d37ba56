"""Slots sorted by expert: a stable counting sort of what the route chose and counted, no atomics.

The route counts every pair of an expert and a choice per block of tokens. A running sum over
(pair, block) says where each block's tokens of a pair begin; within the block, tokens follow in
their order.

Shapes: T tokens, E experts, C choices (top_k), P pairs (E·C), Q blocks of tokens, S slots (C·T).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_top_k import Routing
from citi_kernels.triton_kernels.launch import Meta, launch


@triton.jit
def _sort_slots_kernel(
    pairs_ptr,
    ends_ptr,
    order_ptr,
    offsets_ptr,
    T,
    num_pairs,
    num_blocks,
    top_k,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_T)
    t = block * BLOCK_T + i
    in_T, flat = t < T, t
    for _ in range(top_k):
        pair = tl.load(pairs_ptr + flat, mask=in_T, other=-1).to(tl.int64)
        is_earlier = (pair[:, None] == pair[None, :]) & (i[None, :] < i[:, None])
        counted = pair * num_blocks + block
        start = tl.load(ends_ptr + counted - 1, mask=in_T & (counted > 0), other=0)
        slot = start + tl.sum(is_earlier.to(tl.int32), axis=1)
        tl.store(order_ptr + slot, flat.to(tl.int32), mask=in_T)
        flat += T

    # the offsets are shared out: program i writes those of the i-th blocks of pairs
    for p0 in range(block * BLOCK_P, num_pairs + 1, num_blocks * BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        end = tl.load(ends_ptr + p * num_blocks - 1, mask=(p > 0) & (p <= num_pairs), other=0)
        tl.store(offsets_ptr + p, end, mask=p <= num_pairs)


def sort_slots_(routing: Routing, counts_PQ: Tensor, block_T: int) -> None:
    """Fills order and offsets; counts_PQ[p, q]: pair p in the q-th block of block_T tokens."""
    (top_k, T), (num_pairs, num_blocks) = routing.pairs.shape, counts_PQ.shape
    arguments = {
        "pairs_ptr": routing.pairs,
        "ends_ptr": torch.cumsum(counts_PQ.flatten(), 0, dtype=torch.int32),
        "order_ptr": routing.order,
        "offsets_ptr": routing.offsets,
        "T": T,
        "num_pairs": num_pairs,
        "num_blocks": num_blocks,
        "top_k": top_k,
    }
    meta = Meta({"BLOCK_T": block_T, "BLOCK_P": 128}, num_stages=1)
    launch(_sort_slots_kernel, (num_blocks,), arguments, meta)
