"""The same numbers from the same seed, on a GPU too."""

from __future__ import annotations

import os

import torch


def make_repeatable() -> None:
    """Let PyTorch use only algorithms that add in a fixed order, or say that there is none.

    Attention's backward, and whatever adds by atomics, else differs from run to run on a GPU. On a
    CPU nothing changes: what the rows use there is repeatable as it is.
    """
    if not torch.cuda.is_available():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS' first call
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
