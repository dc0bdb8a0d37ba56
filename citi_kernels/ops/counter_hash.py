"""Random bits that are a hash of (seed, row, column): the same on every backend, never stored.

row[t]  = hash(hash(t ^ seed_low) ^ seed_high)                           all in uint32
bits    = hash(row[t] + k * 0x9E3779B9)
"""

from __future__ import annotations

import torch
from torch import Tensor


def hash_of_rows(t_T: Tensor, seed: int) -> Tensor:
    """row (T,) int32, whose bits are those of uint32."""
    return _hash32_(_hash32_(t_T.to(torch.int32) ^ as_int32(seed)) ^ as_int32(seed >> 32))


def hash_of_columns(row_T: Tensor, k_K: Tensor) -> Tensor:
    """bits (T, K) int32, for rows from `hash_of_rows`."""
    return _hash32_(row_T[:, None] + k_K.to(torch.int32) * as_int32(0x9E3779B9))


def as_int32(bits: int) -> int:
    """The low 32 bits, as the int32 that has them."""
    return (bits + 2**31) % 2**32 - 2**31


def _hash32_(x: Tensor) -> Tensor:
    """The bijection "lowbias32" of uint32, in place on int32, whose products wrap alike."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        # >> of int32 copies the sign into the top bits; masking them makes it the shift of uint32
        x ^= (x >> shift) & (2 ** (32 - shift) - 1)
        if factor is not None:
            x *= as_int32(factor)
    return x
