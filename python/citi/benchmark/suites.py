"""The suites by name, in the order in which they answer: what will this cost me?"""

from __future__ import annotations

from citi.benchmark.ceilings import ceilings_suite
from citi.benchmark.group import Suite
from citi.benchmark.importance import importance_suite
from citi.benchmark.importance_ops import importance_ops_suite
from citi.benchmark.layer import layer_suite, scaling_suite
from citi.benchmark.linears import linears_suite
from citi.benchmark.routing import decode_suite, top_k_suite
from citi.benchmark.training import generation_suite, training_suite

SUITES: dict[str, Suite] = {
    "layer": layer_suite,
    "linears": linears_suite,
    "scaling": scaling_suite,
    "top-k": top_k_suite,
    "decode": decode_suite,
    "importance ops": importance_ops_suite,
    "importance": importance_suite,
    "training": training_suite,
    "generation": generation_suite,
    "ceilings": ceilings_suite,
}
