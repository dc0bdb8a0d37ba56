"""Arguments of kernels that drop inputs of the experts.

Integers are int32 and never specialised on, so that one compiled kernel serves all their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from citi_kernels.ops.counter_hash import as_int32
from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.molora_linear_reference import dropout_threshold

# layers that kernels of a group take at once: query, key and value
MAX_LAYERS = 3
DROPOUT_ARGUMENTS = ("seed_low0", "seed_high0", "threshold", "inverse_keep")
GROUP_DROPOUT_ARGUMENTS = (
    *(f"seed_{half}{i}" for i in range(MAX_LAYERS) for half in ("low", "high")),
    "threshold",
    "inverse_keep",
)


def dropout_of(settings: Settings) -> dict[str, Any]:
    """`DROPOUT_ARGUMENTS` of one layer."""
    arguments = dropout_of_group([settings])
    return {name: arguments[name] for name in DROPOUT_ARGUMENTS}


def dropout_of_group(settings_L: Sequence[Settings]) -> dict[str, Any]:
    """Each layer's seed in two halves, the threshold of the hash, 1 / (1 - p); 0 and 1 without."""
    dropout_p = settings_L[0].dropout_p
    seeds = [int(each.dropout_seed) if dropout_p > 0 else 0 for each in settings_L]  # on the CPU
    seeds += [0] * (MAX_LAYERS - len(seeds))
    arguments: dict[str, Any] = {}
    for i, seed in enumerate(seeds):
        arguments |= {f"seed_low{i}": as_int32(seed), f"seed_high{i}": as_int32(seed >> 32)}
    return arguments | {
        "threshold": as_int32(dropout_threshold(dropout_p)),
        "inverse_keep": 1 / (1 - dropout_p),
    }
