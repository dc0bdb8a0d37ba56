"""The one place that reads environment variables, once, when the package is imported.

CITI_BACKEND      the backend every op must use (see `citi_kernels.backends`); empty: no choice.
TRITON_INTERPRET  1: Triton interprets its kernels, so the backend "triton" runs on the CPU.
CITI_CPU_FEATURES which C++ kernels the backend "native" runs: avx512_bf16, avx512, avx2 or
                  portable; empty: the widest that this CPU has. Row dots are the same to the bit,
                  MOLoRA's results to rounding.
CITI_EXTENDED_GEMM 0: the backend "cuda" leaves the base product to cuBLAS and adds the update in
                  place, also where one GEMM of ours could compute both (Hopper).
CITI_ROUTED_GEMM  0: ranks and gates come from passes of their own also where that GEMM could make
                  them.
CITI_TRIALS       names, between commas, of ways of the backend "cuda", see `TRIALS`; empty: none of
                  them; unset: those that an H100 was faster with. Results are the same to the bit.
"""

from __future__ import annotations

import os

BACKEND: str | None = os.environ.get("CITI_BACKEND") or None
INTERPRETS: bool = os.environ.get("TRITON_INTERPRET") == "1"
CPU_FEATURES: str = os.environ.get("CITI_CPU_FEATURES", "")
EXTENDED_GEMM: bool = os.environ.get("CITI_EXTENDED_GEMM") != "0"
ROUTED_GEMM: bool = os.environ.get("CITI_ROUTED_GEMM") != "0"
# down_beside    da and drouter begin beside the GEMM, as soon as all of dz is there
# fit_up         db takes no wider products than its rank needs
# fit_narrow     the GEMM's gradient of ranks takes none wider than 32 columns
# keep_weight    L2 keeps weight rather than the output of the GEMM
# one_call       a layer's launches come from one call of C++ a direction; not yet run on a GPU
# zeros_in_pack  one launch packs the stack and clears the counts
# group_N        the GEMM goes through all columns with N tiles of rows at a time (8 without)
_FASTER = "down_beside,fit_narrow,fit_up,zeros_in_pack"  # benchmarks/results/H100.md
TRIALS: frozenset[str] = frozenset(filter(None, os.environ.get("CITI_TRIALS", _FASTER).split(",")))
