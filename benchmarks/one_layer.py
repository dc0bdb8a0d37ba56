"""One forward and backward of a MOLoRA layer on a GPU, 8192 x 4096 x 4096, bf16: for a profiler.

ncu --metrics dram__bytes.sum python benchmarks/one_layer.py
"""

from __future__ import annotations

import torch

from citi_kernels import molora_linear
from citi_kernels.testing import random_case


def main() -> None:
    on_gpu = {"device": "cuda", "drawn_on": "cuda"}
    case = random_case(
        8192, 4096, 4096, dtype=torch.bfloat16, bias=False, num_segments=None, **on_gpu
    )
    trained = [each.requires_grad_() for each in (case.x, case.a, case.b, case.router)]
    y, _ = molora_linear(*case.operands, **case.options)
    torch.autograd.grad(y, trained, case.dy)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
