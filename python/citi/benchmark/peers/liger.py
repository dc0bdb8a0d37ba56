"""A Llama on Liger's Triton kernels: RMSNorm, SwiGLU, rotary embedding, loss without logits.

Liger fuses what stands between the linear components and leaves those, and adapters on them, as
they are. Its own call puts some kernels in the place of transformers' classes and functions for
the whole process; here they reach this model alone, so that the rows beside it stay what they are.

Source: liger_kernel.transformers.apply_liger_kernel_to_llama with its defaults, liger-kernel 0.8.5,
github.com/linkedin/Liger-Kernel, which is called, not copied.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from citi.benchmark.peers.installed import why_not_installed

INSTALL = "pip install liger-kernel==0.8.5"
_ROTARY = "apply_rotary_pos_emb"
_REPLACED = (_ROTARY, "LlamaRMSNorm", "LlamaMLP")


def why_not(device: str) -> str | None:
    """Why it cannot run on this device, or None."""
    return why_not_installed("liger_kernel", INSTALL, device)


def liger(model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself, a LlamaForCausalLM, whose forward runs Liger's kernels from now on.

    While it trains on labels it returns their loss and no logits.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    with _originals_put_back():
        apply_liger_kernel_to_llama(model=model)
        rotary = getattr(modeling_llama, _ROTARY)
    forward = model.forward

    @functools.wraps(forward)
    def with_rotary(*arguments: Any, **options: Any) -> Any:
        # attention looks the function up in its module when it is called
        with _originals_put_back():
            setattr(modeling_llama, _ROTARY, rotary)
            return forward(*arguments, **options)

    model.forward = with_rotary
    return model


@contextmanager
def _originals_put_back() -> Iterator[None]:
    """At the end transformers' module holds what it held before."""
    originals = {name: getattr(modeling_llama, name) for name in _REPLACED}
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(modeling_llama, name, original)
