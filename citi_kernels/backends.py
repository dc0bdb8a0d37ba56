"""Which implementation of an op runs: names, choice, and the reason when one cannot run.

    reference  the definition in plain PyTorch, one expert at a time; never chosen by itself
    torch      stacked algebra and a hand-written backward in PyTorch calls; any device
    native     C++ for the CPU, in the compiled extension `citi_kernels._C`
    triton     Triton kernels; needs a GPU. With TRITON_INTERPRET=1 they are interpreted on the CPU,
               to test values; that is far too slow to be chosen by itself
    cuda       CUDA C++ kernels, in the compiled extension `citi_kernels._C`; needs a GPU

An op registers what it has: `register("molora_linear", "torch", MODULE_OR_NAMESPACE)`. The order of
choice is `use_backend`, then CITI_BACKEND, then the fastest that takes the input's device.

The choice is a plain module global, because dynamo cannot trace a ContextVar: it is shared by all
threads of the process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from citi_kernels import compiled, environment

BACKENDS = ("reference", "torch", "native", "triton", "cuda")
# on a GPU Triton first; where an op knows that CUDA C++ is faster it says so (`first`)
FASTEST_FIRST = ("triton", "cuda", "native", "torch")

_DEVICE = {
    "native": "cpu",
    "triton": "cpu" if environment.INTERPRETS else "cuda",
    "cuda": "cuda",
}


class Explanation(NamedTuple):
    """One line of `explain`: reason is "" for a backend that runs here."""

    backend: str
    available: bool
    reason: str


@dataclass(frozen=True)
class _Entry:
    implementation: Any
    reason: str | None
    refuses: Callable[[Tensor], str | None] | None


_registry: dict[str, dict[str, _Entry]] = {}
_chosen: str | None = None


def register(
    op: str,
    backend: str,
    implementation: Any,
    *,
    refuses: Callable[[Tensor], str | None] | None = None,
) -> None:
    """Make `implementation` the `backend` of `op`.

    Args:
        op: name without the namespace, e.g. "molora_linear".
        backend: one of `BACKENDS`.
        implementation: whatever the op calls; `find` hands it back.
        refuses: given the op's first tensor, why this backend cannot take it, or None. Looks at
            metadata only. None: takes every tensor on its devices.
    Raises:
        ValueError: unknown backend, or this op has one of that name already.
    """
    _check_name(backend, "backend")
    entries = _registry.setdefault(op, {})
    if backend in entries:
        raise ValueError(f"backend: citi::{op} already has a {backend!r} implementation")
    entries[backend] = _Entry(implementation, _missing(backend), refuses)


def find(op: str, backend: str) -> Any:
    """The implementation `register` was given; ValueError names what there is."""
    entries = _registry.get(op, {})
    if backend not in entries:
        raise ValueError(f"backend: citi::{op} has {', '.join(entries) or 'none'}; got {backend!r}")
    return entries[backend].implementation


def operations() -> tuple[str, ...]:
    """Names, without the namespace, of the ops that have registered a backend."""
    return tuple(_registry)


def choose(op: str, x: Tensor, *, first: str | None = None) -> str:
    """The name of the backend that runs `op` on `x`, its first tensor.

    Args:
        first: the one known to be the fastest for this call, where none is asked for.
    Returns:
        the one asked for by `use_backend` or CITI_BACKEND, else the fastest that takes `x`.
    Raises:
        RuntimeError: the one asked for cannot run here, or not on `x`; the message says why.
    """
    wanted = asked_for()
    if wanted is None:
        for name in FASTEST_FIRST if first is None else (first, *FASTEST_FIRST):
            if name == "triton" and environment.INTERPRETS:
                continue
            if _reason(op, name) is None and _refusal(op, name, x) is None:
                return name
        return "torch"
    reason = _reason(op, wanted) or _refusal(op, wanted, x)
    if reason is not None:
        raise RuntimeError(f"backend {wanted!r} cannot run citi::{op}: {reason}")
    return wanted


def asked_for() -> str | None:
    """The backend that `use_backend` or CITI_BACKEND names, if any."""
    return _chosen if _chosen is not None else environment.BACKEND


def explain(op: str) -> list[Explanation]:
    """Every backend with whether it can run `op` here, and the reason if not."""
    reasons = [(name, _reason(op, name)) for name in BACKENDS]
    return [Explanation(name, reason is None, reason or "") for name, reason in reasons]


def available_backends(op: str | None = None) -> tuple[str, ...]:
    """Names of the backends that can run `op` here; without `op`, those that can run any op."""
    ops = _registry if op is None else (op,)
    return tuple(name for name in BACKENDS if any(_reason(each, name) is None for each in ops))


class use_backend:  # noqa: N801 - reads as a verb: `with use_backend("torch"):`
    """Run every op inside the block on one backend; blocks nest.

    Args:
        name: one of `BACKENDS`.
    Raises:
        ValueError: unknown name.
        RuntimeError: no op can run on it here; the message says why. An op that lacks it while
            others have it raises when it is called.
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "name")
        if name not in available_backends():
            reasons = dict.fromkeys(_reason(op, name) for op in _registry)
            raise RuntimeError(f"backend {name!r} cannot run here: {'; '.join(map(str, reasons))}")
        self.name = name
        self._outer: list[str | None] = []

    def __enter__(self) -> use_backend:
        global _chosen
        self._outer.append(_chosen)
        _chosen = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._outer.pop()


def _check_name(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: want one of {', '.join(BACKENDS)}; got {name!r}")


def _reason(op: str, name: str) -> str | None:
    if name not in BACKENDS:
        return f"there is no such backend; want one of {', '.join(BACKENDS)} (CITI_BACKEND)"
    entry = _registry.get(op, {}).get(name)
    if entry is None:
        return f"this version has no {name} implementation of citi::{op}"
    return entry.reason


def _refusal(op: str, name: str, x: Tensor) -> str | None:
    device = _DEVICE.get(name)
    if device is not None and x.device.type != device:
        return f"it runs on {device} tensors, got {x.device.type}"
    refuses = _registry[op][name].refuses
    return None if refuses is None else refuses(x)


def _missing(name: str) -> str | None:
    if name in ("native", "cuda") and (reason := compiled.why_missing(name)):
        return reason
    if name == "triton" and not _is_installed("triton"):
        return "triton is not installed (pip install triton)"
    if name == "triton" and environment.INTERPRETS:
        return None
    if name in ("triton", "cuda") and not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # from a finder that hides it
        return False
