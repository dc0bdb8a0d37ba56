"""The compiled extension `citi_kernels._C`: whether it is there, and tensors as it takes them.

`_C` knows no torch: a tensor goes in as its address, the bytes from there to its end (that of its
storage where it has gaps) and its dtype; `_C` refuses what does not stay within them. A missing,
broken or stale `_C` is no error: the backends that need it say why they cannot run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from citi_kernels import environment
from citi_kernels.source_digest import source_digest

_NAME = "citi_kernels._C"


def why_missing(backend: str) -> str | None:
    """Why "native" or "cuda" has no kernels in this installation, or None."""
    module, reason = _load()
    if reason is None and backend == "cuda" and not module.built_with["cuda"]:
        return "citi_kernels._C was built without CUDA (no nvcc, or CITI_BUILD_CUDA=0)"
    return reason


def extension() -> ModuleType:
    """`citi_kernels._C`.

    Raises:
        RuntimeError: it cannot be used; the message is that of `why_missing`.
    """
    module, reason = _load()
    if reason is not None:
        raise RuntimeError(reason)
    return module


def why_slow() -> str | None:
    """Why the torch backend is faster than "native" here, or None; CITI_CPU_FEATURES overrides."""
    module, _ = _load()
    if module is None or environment.CPU_FEATURES or module.cpu_features[0] != "portable":
        return None
    return (
        "this CPU or build has neither AVX2 nor AVX512, without which the torch backend is faster "
        "(CITI_CPU_FEATURES=portable runs it all the same)"
    )


def matrix(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """What `_C` takes for a matrix of any strides."""
    return (*_place(tensor), *tensor.stride())


def vector(tensor: Tensor | None) -> tuple[int, int, int, int] | None:
    """What `_C` takes for a contiguous tensor of any shape, or for none."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return (*_place(tensor), tensor.numel())


def indices(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """What `_C` takes for a contiguous tensor of int32, or for none."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.int32
    num_bytes = tensor.untyped_storage().nbytes() - tensor.storage_offset() * 4
    return tensor.data_ptr(), num_bytes, tensor.numel()


def dtype_code(dtype: torch.dtype) -> int:
    """What `_C` calls a dtype."""
    return _codes()[dtype]


def launch_place(tensor: Tensor) -> dict[str, int]:
    """Where a CUDA kernel of `_C` on this tensor runs: its device, on PyTorch's current stream."""
    device = tensor.device.index
    # the handle alone: a torch.cuda.Stream would be made for every launch
    return {"device": device, "stream": torch._C._cuda_getCurrentRawStream(device)}


def description() -> str:
    """One line: what was built, with what, and what runs of it on this CPU."""
    module, reason = _load()
    if reason is not None:
        return f"not in use: {reason}"
    built = module.built_with
    threads = f"OpenMP {built['openmp']}" if built["openmp"] else "no OpenMP"
    cuda = f"CUDA {built['cuda']} ({built['cuda_archs']})" if built["cuda"] else "no CUDA"
    variant = module.use_cpu_variant(environment.CPU_FEATURES)
    return f"{module.version}: {variant} on this CPU; {built['compiler']}, {threads}, {cuda}"


def _place(tensor: Tensor) -> tuple[int, int, int]:
    assert not tensor.is_neg()  # the memory would hold the negated values
    if tensor.is_contiguous():
        num_bytes = tensor.nbytes
    else:
        offset = tensor.storage_offset() * tensor.element_size()
        num_bytes = tensor.untyped_storage().nbytes() - offset
    return tensor.data_ptr(), num_bytes, dtype_code(tensor.dtype)


@functools.cache
def _codes() -> dict[torch.dtype, int]:
    return {getattr(torch, name): code for name, code in extension().DTYPES.items()}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or why it cannot be used."""
    try:
        if importlib.util.find_spec(_NAME) is None:
            return None, f"{_NAME} is not built in this installation"
        module = importlib.import_module(_NAME)
        sources = source_digest(Path(__file__).resolve().parents[1])
        if sources not in (None, getattr(module, "sources", "")):
            return None, f"{_NAME} was built from other sources than these; pip install again"
        module.use_cpu_variant(environment.CPU_FEATURES)
    except ModuleNotFoundError:  # from a finder that hides it
        return None, f"{_NAME} is not built in this installation"
    except ImportError as error:
        return None, f"{_NAME} cannot be imported: {error}"
    except ValueError as error:
        return None, f"CITI_CPU_FEATURES: {error}"
    return module, None
