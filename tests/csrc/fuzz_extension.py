"""Calls `citi_kernels._C` with numbers that are wrong in one to three places, thousands of times.

An address or a size of memory is changed only to what can be known to be wrong: no library could
tell whether a number is the address of memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

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


class _Target(NamedTuple):
    """A function, arguments that it takes, and the memory that they are about."""

    function: Callable[..., None]
    valid: dict
    memory: dict[str, _Guarded]
    outputs: tuple[str, ...]

    def touched(self) -> list[str]:
        """Names of the arguments around which, or in which, something was written."""
        return [
            name
            for name, guarded in self.memory.items()
            if not guarded.is_intact(may_change=name in self.outputs)
        ]


def _row_dots(extension: ModuleType) -> _Target:
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
    return _Target(extension.accumulate_row_dots, valid, memory, ("scores", "parts"))


# K, N, E, R; few tokens have kernels of their own in the forward
_MOLORA_SIZES = (8, 10, 2, 4)
_MANY, _FEW = 19, (3, 11)


# the halves of a seed, the threshold, 1 / (1 - p)
_DROPOUT = (1, 2, 2**30, 4 / 3)


def _molora(
    function: Callable[..., None],
    num_tokens: int,
    workspace: int,
    names: str,
    outputs: str,
    code: int,
    dropout: tuple | None,
) -> _Target:
    K, N, _, R = _MOLORA_SIZES
    T, G = num_tokens, 3
    matrices = {"x": (T, K), "a": (R, K), "b": (N, R), "router": (G, K), "y": (T, N)}
    matrices |= {"dy": (T, N), "dx": (T, K), "weight": (N, K)}
    sizes = {name: rows * columns for name, (rows, columns) in matrices.items()}
    sizes |= {"h": T * R, "probs": T * G, "dgate": T * G, "da": R * K, "db": N * R}
    sizes |= {"drouter": G * K, "bias": N, "workspace": workspace}
    memory = {name: _Guarded(sizes[name], torch.float32) for name in names.split() if sizes[name]}
    valid = {"shape": (T, *_MOLORA_SIZES), "scaling": 0.5, "has_base": True, "num_threads": 2}
    valid |= {"dropout": dropout} | dict.fromkeys(name for name in names.split())
    for name, guarded in memory.items():
        last = (matrices[name][1], 1) if name in matrices else (sizes[name],)
        valid[name] = (*guarded.place(), code, *last)
    return _Target(
        function, valid, memory, tuple(each for each in outputs.split() if each in memory)
    )


def molora_forward(
    extension: ModuleType,
    dropout: tuple | None = None,
    num_tokens: int = _MANY,
    has_weight: bool = False,
    top_k: int = 1,
) -> _Target:
    shape = (num_tokens, *_MOLORA_SIZES)
    code = extension.DTYPES["float32"]
    size = extension.molora_forward_workspace(shape, code, has_dropout=dropout is not None)
    names, outputs = "x a b router y h probs workspace", "y h probs workspace"
    function = extension.molora_forward
    names += " weight bias" if has_weight else ""
    target = _molora(function, num_tokens, size, names, outputs, code, dropout)
    target.valid.update({"has_base": False} if has_weight else {"weight": None, "bias": None})
    target.valid.update(top_k=top_k, renormalizes=True)
    return target


def molora_backward(extension: ModuleType, dropout: tuple | None = None) -> _Target:
    size = extension.molora_backward_workspace((_MANY, *_MOLORA_SIZES))
    names = "dy x a b router h probs dgate dx da db drouter workspace"
    outputs = "dx da db drouter workspace"
    code = extension.DTYPES["float32"]
    return _molora(extension.molora_backward, _MANY, size, names, outputs, code, dropout)


def main(num_calls: int, seed: int = 0) -> None:
    """Prints, for each function, how many calls were refused and how many were not."""
    extension, generator = compiled.extension(), random.Random(seed)
    few = (
        molora_forward(extension, num_tokens=num_tokens, has_weight=has_weight, top_k=0)
        for num_tokens in _FEW
        for has_weight in (False, True)
    )
    targets = [_row_dots(extension), *few]
    for dropout in (None, _DROPOUT):
        targets += [molora_forward(extension, dropout), molora_backward(extension, dropout)]
    for target in targets:
        target.function(**target.valid)
        refused = accepted = 0
        for _ in range(num_calls):
            try:
                target.function(**_mutated(target.valid, generator))
                accepted += 1
            except (ValueError, TypeError):
                refused += 1
        assert target.touched() == [], target.function.__name__
        print(refused, accepted)
