"""Calls `citi_kernels._C` with numbers that are wrong in one to three places, thousands of times.

An address or a size of memory is changed only to what can be known to be wrong: no library could
tell whether a number is the address of memory.
"""

from __future__ import annotations

import random

import torch

from citi_kernels import compiled

_SIZES = (-(2**63), -1, 0, 1, 2, 3, 5, 7, 8, 9, 64, 2**31, 2**32 + 1, 2**58, 2**62, 2**63 - 1)
_ODD = (None, 1.5, "8", 2**64, -(2**70), (), [], True)
_CANARY = 7.0


class _Guarded:
    """Memory in the middle of a canary."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.buffer = torch.full((size + 64,), _CANARY).to(dtype)
        self.view = self.buffer[32:-32]
        self.before = self.buffer.clone()

    def is_intact(self, *, may_change: bool) -> bool:
        if not may_change:
            return torch.equal(self.buffer, self.before)
        outside = torch.cat([self.buffer[:32], self.buffer[-32:]])
        return torch.equal(outside, torch.full_like(outside, _CANARY))

    def place(self) -> tuple[int, int]:
        return self.view.data_ptr(), self.view.numel() * self.view.element_size()


def _mutated(arguments: dict, generator: random.Random) -> dict:
    changed = dict(arguments)
    for _ in range(generator.choice((1, 1, 2, 3))):
        name = generator.choice(tuple(changed))
        value = changed[name]
        if not isinstance(value, tuple) or generator.random() < 0.05:
            changed[name] = generator.choice(_SIZES + _ODD)
            continue
        numbers = list(value)
        entry = generator.randrange(len(numbers)) if numbers else 0
        if name != "shape" and entry == 0 and numbers:
            numbers[0] = generator.choice((0, -1, None, 2.0, 2**64, value[0] and value[0] + 1))
        elif name != "shape" and entry == 1:
            most = value[1] if isinstance(value[1], int) else 0
            numbers[1] = generator.choice((-(2**63), -1, 0, 1, most - 1, most // 2, most))
        elif numbers:
            numbers[entry] = generator.choice(_SIZES if generator.random() < 0.9 else _ODD)
        changed[name] = tuple(numbers)
    return changed


def main(num_calls: int, seed: int = 0) -> None:
    extension, generator = compiled.extension(), random.Random(seed)
    codes = extension.DTYPES
    memory = {
        "a": _Guarded(48, torch.float32),
        "b": _Guarded(48, torch.float32),
        "scores": _Guarded(4, torch.float64),
        "valid": _Guarded(6, torch.uint8),
        "offset": _Guarded(8, torch.float32),
        "parts": _Guarded(4 * extension.row_dots_parts(6, 8, 4), torch.float64),
    }
    code_of = {"scores": "float64", "valid": "bool", "offset": "float32", "parts": "float64"}
    valid = {
        "shape": (6, 8),
        **{name: (*memory[name].place(), codes["float32"], 8, 1) for name in "ab"},
        **{
            name: (*memory[name].place(), codes[code], memory[name].view.numel())
            for name, code in code_of.items()
        },
        "is_signed": False,
        "num_threads": 2,
    }
    extension.accumulate_row_dots(**valid)
    refused = accepted = 0
    for _ in range(num_calls):
        try:
            extension.accumulate_row_dots(**_mutated(valid, generator))
            accepted += 1
        except (ValueError, TypeError):
            refused += 1
    for name, guarded in memory.items():
        assert guarded.is_intact(may_change=name in ("scores", "parts")), name
    print(refused, accepted)
