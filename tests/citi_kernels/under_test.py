"""What this run of the kernels' tests is about; the environment decides.

CITI_BACKEND=triton TRITON_INTERPRET=1        Triton's interpreter, on the CPU
CITI_BACKEND=triton CITI_TEST_DEVICE=cuda     Triton on a GPU
CITI_BACKEND=native                           the C++ kernels, on the CPU
CITI_BACKEND=cuda CITI_TEST_DEVICE=cuda       the CUDA C++ kernels on a GPU
neither                                       on the CPU, what each call chooses: native or torch
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from citi_kernels import environment

BACKEND = environment.BACKEND or "torch"
DEVICE = os.environ.get("CITI_TEST_DEVICE", "cpu")
# the dtype in which an identity of the algebra is tested to rounding
WIDEST = torch.float32 if BACKEND in ("triton", "cuda") else torch.float64
# the same for molora_linear, whose C++ kernels leave fp64 to the torch backend
WIDEST_LAYER = torch.float32 if BACKEND == "native" else WIDEST
# steps that show whether results or memory drift; the interpreter takes 100 times longer for each
REPEATS = 20 if environment.INTERPRETS else 250


def assert_equal_to_rounding(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the rounding of their dtype."""
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-4}[theirs.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
