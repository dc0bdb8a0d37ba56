"""How much of everything: minutes a row on a CPU, or all of API-Bank on a GPU.

On the GPU a row trains on 2 million tokens: four passes over the tool data alone, or three over the
mix. What takes the time is the number of micro-batches, not of tokens: rows side by side on an H100
trained 54,000 tokens a second, all together, with 2 micro-batches a step in the order of the
samples (2.45 times the real tokens, with padding), and 33,000 with 4 by length (1.3 times).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """The sizes that every row of a comparison shares.

    Attributes:
        name: Key in file names.
        tool_samples, general_samples: Training samples of each file; None takes all.
        validation_samples: Cut from each training file, for the choice of learning rates.
        eval_samples: Of each evaluation set; None takes all.
        judged_samples: Of these, how many general answers are generated and judged.
        importance_samples: Of each ability, that importance looks at.
        steps: Optimizer steps of a trained row, over all of its stages.
        search_steps: The same for one candidate of the search for learning rates.
        batch_tokens: Real tokens of a micro-batch; at least `max_length`.
        accumulation: Micro-batches of an optimizer step.
        max_length: Longest training sample, in tokens.
        eval_max_length: Longest evaluation sample, in tokens.
        max_new_tokens: Longest generated answer.
        eval_batch_size: Samples evaluated at once.
        save_steps: Optimizer steps between checkpoints.
        r: Rank of an expert, and of plain LoRA.
        lora_alpha: CITI's; plain LoRA takes 2 r.
        dtype: Of the frozen base. A CPU's is fp32: "auto" would take what its hardware multiplies
            fast, so that rows of two machines would not stand beside each other.
    """

    name: str
    tool_samples: int | None
    general_samples: int | None
    validation_samples: int
    eval_samples: int | None
    judged_samples: int
    importance_samples: int
    steps: int
    search_steps: int
    batch_tokens: int
    accumulation: int
    max_length: int
    eval_max_length: int
    max_new_tokens: int
    eval_batch_size: int
    save_steps: int
    r: int = 8
    lora_alpha: float = 16.0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_tokens < self.max_length:
            raise ValueError(
                f"batch_tokens: wanted at least max_length ({self.max_length}), so that every "
                f"micro-batch holds a sample, got {self.batch_tokens}"
            )


CPU = Scale(
    name="cpu",
    tool_samples=160,
    general_samples=120,
    validation_samples=16,
    eval_samples=32,
    judged_samples=32,
    importance_samples=16,
    steps=48,
    search_steps=12,
    batch_tokens=640,
    accumulation=4,
    max_length=640,
    eval_max_length=1536,
    max_new_tokens=64,
    eval_batch_size=16,
    save_steps=8,
    dtype="fp32",
)
GPU = Scale(
    name="gpu",
    tool_samples=None,
    general_samples=400,
    validation_samples=64,
    eval_samples=250,
    judged_samples=100,
    importance_samples=64,
    steps=240,
    search_steps=40,
    batch_tokens=4096,
    accumulation=2,
    max_length=1024,
    eval_max_length=1536,
    max_new_tokens=112,
    eval_batch_size=125,
    save_steps=80,
)
SCALES = {scale.name: scale for scale in (CPU, GPU)}
