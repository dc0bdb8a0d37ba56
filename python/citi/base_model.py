"""The frozen base of a run: its precision, its device, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from citi.data.chat_template import install_tool_template
from citi.processes import this_process

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base's weights.

    Args:
        name: "fp32", "bf16", "fp16", or "auto": bf16 where the device multiplies it in hardware
            (a GPU that supports it; a CPU with AMX or AVX512-bf16), else fp32.
        device: Where the model will run.
    Raises:
        ValueError: fp16 on a CPU, which has no mixed precision for it.
    """
    if name == "fp16" and device.type == "cpu":
        raise ValueError("dtype: fp16 trains on a GPU only; on this CPU use bf16, fp32 or auto")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def load_base(
    name: str, *, dtype: str = "auto", device_map: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """The frozen model on this process's device, and a tokenizer whose template holds tool calls.

    Args:
        name: Hub name or directory.
        dtype: See `resolve_dtype`.
        device_map: Where Accelerate puts the layers: "auto" and its other strategies, or a device.
            None: all on this process's device.
    Raises:
        ValueError: A path that is no directory; a tokenizer with neither pad nor end token; an
            unknown device map, or one for several processes.
        DataError: The tokenizer has no usable chat template.
        OSError: No such model.
    """
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"model: no such directory: {name}")
    device = _first_device(device_map)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model: the tokenizer of {name} has no pad and no eos token; set one")
        tokenizer.pad_token = tokenizer.eos_token
    install_tool_template(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=resolve_dtype(dtype, device), device_map=device_map
    )
    model.requires_grad_(False).eval()
    return model if device_map is not None else model.to(device), tokenizer


def _first_device(device_map: str | None) -> torch.device:
    process = this_process()
    if device_map is None:
        return process.device
    if process.num_processes > 1:
        raise ValueError(
            f"device_map: {process.num_processes} processes have a device each; use one process to "
            f"spread the model by {device_map!r}"
        )
    if device_map in _STRATEGIES:
        return process.device
    try:
        return torch.device(device_map)
    except RuntimeError as error:
        raise ValueError(
            f"device_map must be one of {', '.join(_STRATEGIES)}, or a device such as cpu or "
            f"cuda:0, got {device_map!r}"
        ) from error
