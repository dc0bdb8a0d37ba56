"""Values are tested where kernels run, in the interpreter or on a GPU; the rest needs neither."""

from __future__ import annotations

import importlib.util

import under_test
from citi_kernels import environment

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif environment.INTERPRETS:
    # the interpreter replaces the kernels by functions that cannot be compiled
    collect_ignore_glob = [
        "test_importance_kernels.py",
        "test_launches.py",
        "test_offline_compile.py",
        "test_source.py",
    ]
elif under_test.BACKEND != "triton":
    collect_ignore_glob = [
        "test_base_product.py",
        "test_decode.py",
        "test_dense.py",
        "test_extended_gemm.py",
        "test_group.py",
        "test_grouped.py",
    ]
