"""Gate sums: gates summed over the tokens of each segment, in two stages of fixed order.

Shapes: T tokens, G gate entries (E + 1), B segments, S shares of the tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.triton_kernels.launch import (
    Meta,
    launch,
    next_power_of_2,
    num_multiprocessors,
)


@triton.jit
def _gate_sums_kernel(
    gates_ptr,
    segment_ids_ptr,
    sums_ptr,
    T,
    G,
    num_segments,
    tokens_per_share,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # one program = one segment in one share of the tokens
    pid = tl.program_id(0).to(tl.int64)
    share, segment = pid // num_segments, pid % num_segments
    g = tl.arange(0, BLOCK_G)
    in_G = g < G
    start = share * tokens_per_share
    end = tl.minimum(start + tokens_per_share, T)
    acc = tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.float32)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        is_mine = tl.load(segment_ids_ptr + t, mask=t < end, other=-1) == segment
        acc += tl.load(
            gates_ptr + t[:, None] * G + g[None, :],
            mask=is_mine[:, None] & in_G[None, :],
            other=0.0,
        )
    tl.store(sums_ptr + pid * G + g, tl.sum(acc, axis=0), mask=in_G)


def launch_meta(G: int) -> Meta:
    block_G = next_power_of_2(G)
    return Meta({"BLOCK_T": max(1, 4096 // block_G), "BLOCK_G": block_G}, num_stages=1)


def gate_sums(gate_TG: Tensor, settings: Settings) -> Tensor:
    """(B, G) fp32; a token of segment -1 counts nowhere."""
    (T, G), num_segments = gate_TG.shape, settings.num_segments
    meta = launch_meta(G)
    block_T = meta.constants["BLOCK_T"]
    num_blocks = max(triton.cdiv(T, block_T), 1)
    wanted = 2 * num_multiprocessors(gate_TG.device) // max(num_segments, 1)
    per_share = triton.cdiv(num_blocks, min(max(wanted, 1), num_blocks))
    num_shares = triton.cdiv(num_blocks, per_share)
    sums_SBG = gate_TG.new_empty(num_shares, num_segments, G)
    arguments = {
        "gates_ptr": gate_TG,
        "segment_ids_ptr": settings.segment_ids.contiguous(),
        "sums_ptr": sums_SBG,
        "T": T,
        "G": G,
        "num_segments": num_segments,
        "tokens_per_share": per_share * block_T,
    }
    launch(_gate_sums_kernel, (num_shares * num_segments,), arguments, meta)
    return torch.sum(sums_SBG, dim=0)
