"""Calls `citi_kernels._C.accumulate_score_tile` with wrong numbers; see `fuzz_extension`."""

from __future__ import annotations

import random

import torch
from fuzz_extension import _Guarded, _mutated

from citi_kernels import compiled


def main(num_calls: int, seed: int = 0) -> None:
    extension, generator = compiled.extension(), random.Random(seed)
    codes = extension.DTYPES
    memory = {
        "gradient": _Guarded(48, torch.float32),
        "weight": _Guarded(48, torch.float32),
        "scores": _Guarded(5, torch.float64),
        "sums": _Guarded(6, torch.float64),
    }
    valid = {
        "shape": (6, 8),
        "begin": (6, 0),
        "segments": (5, 1),
        "lengths": (3, 8),
        **{
            name: (*memory[name].place(), codes["float32"], 8, 1) for name in ("gradient", "weight")
        },
        **{
            name: (*memory[name].place(), codes["float64"], memory[name].view.numel())
            for name in ("scores", "sums")
        },
        "scale": 0.5,
        "seed": 1,
        "num_threads": 2,
    }
    extension.accumulate_score_tile(**valid)
    refused = accepted = 0
    for _ in range(num_calls):
        try:
            extension.accumulate_score_tile(**_mutated(valid, generator))
            accepted += 1
        except (ValueError, TypeError):
            refused += 1
    for name, guarded in memory.items():
        assert guarded.is_intact(may_change=name in ("scores", "sums")), name
    print(refused, accepted)
