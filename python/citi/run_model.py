"""The model of a run: base, adapter as the finished stages left it, and how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel

from citi.adapters import MoLoraConfig
from citi.base_model import load_base
from citi.durable import directory_in_one_step, write_text
from citi.plan import Plan
from citi.recipe import Recipe
from citi.run_directory import RunDirectory, RunError

_MODEL_CARD = """---
base_model: {base}
library_name: peft
tags: [citi, molora, tool-calls]
---
A MOLoRA adapter, trained by CITI (arXiv 2409.13202) on {base}.

```python
import citi  # before loading: it tells PEFT what a "molora" adapter is
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/of/this/folder")
```
It needs `pip install citi-kernels`, and cannot be merged: its gates depend on the token.
`citi export` makes a LoRA, or plain weights, of it, with fixed gates.
"""


class RunModel:
    """Base, tokenizer and adapter of one run, loaded when first asked for.

    Args:
        recipe: Names the base, its dtype, and the adapter's sizes.
        run: Where plan and stage adapters lie.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self.recipe = recipe
        self.run = run
        self._loaded: tuple[PreTrainedModel, Any] | None = None
        self._tuned: PeftModel | None = None
        self._dtype: torch.dtype | None = None

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def base(self) -> PreTrainedModel:
        return self._load()[0]

    @property
    def tokenizer(self) -> Any:
        return self._load()[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base; trainable parameters are fp32 whatever it is."""
        self._load()
        return self._dtype

    def tuned(self, adapter: Path | None) -> PeftModel:
        """The base with its adapter, trainable.

        Args:
            adapter: A saved one; None makes a fresh one from the plan, the same for the same seed.
                Only the first call loads; later ones return the model as it has become.
        """
        if self._tuned is None and adapter is not None:
            self._tuned = PeftModel.from_pretrained(self.base, str(adapter), is_trainable=True)
        elif self._tuned is None:
            config = MoLoraConfig.from_plan(
                Plan.load(self.run.plan_file),
                num_experts=self.recipe.num_experts,
                r=self.recipe.r,
                lora_alpha=self.recipe.lora_alpha,
                lora_dropout=self.recipe.lora_dropout,
                top_k=self.recipe.top_k,
            )
            base = self.base
            set_seed(self.recipe.seed)
            self._tuned = get_peft_model(base, config)
        return self._tuned

    def save(self, target: Path, *, with_tokenizer: bool = False) -> None:
        """Put the tuned model's adapter as it stands into `target`. Raises: WriteError."""
        assert self._tuned is not None, "tuned() comes first"
        tokenizer = self.tokenizer if with_tokenizer else None
        save_adapter(self._tuned, target, self.recipe.model, tokenizer)

    def _load(self) -> tuple[PreTrainedModel, Any]:
        if self._loaded is None:
            self._loaded = load_base(self.recipe.model, dtype=self.recipe.dtype)
            self._dtype = self._loaded[0].dtype
        return self._loaded


def save_adapter(model: PeftModel, target: Path, base: str, tokenizer: Any | None = None) -> None:
    """Write a PEFT directory, and the tokenizer with its chat template, in one step."""
    with directory_in_one_step(target) as unfinished:
        model.save_pretrained(str(unfinished), save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(unfinished))
        if next(iter(model.peft_config.values())).peft_type == "MOLORA":
            write_text(unfinished / "README.md", _MODEL_CARD.format(base=base))


def load_run(path: str | Path) -> tuple[PeftModel, Any]:
    """Model and tokenizer of a finished run, for evaluation and chat.

    Raises:
        RunError: No run in this folder, or its adapter is not there yet.
    """
    run = RunDirectory(Path(path))
    recipe = run.load_recipe(check_files=False)
    if not run.adapter.is_dir():
        raise RunError(f"{run.path} has no adapter yet; finish it: citi train {run.recipe_file}")
    base, _ = load_base(recipe.model, dtype=recipe.dtype)
    tokenizer = AutoTokenizer.from_pretrained(str(run.adapter))
    return PeftModel.from_pretrained(base, str(run.adapter)).eval(), tokenizer
