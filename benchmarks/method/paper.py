"""What the paper reports for Llama-3-8B-Instruct trained on API-Bank (arXiv 2409.13202)."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "Llama-3-8B-Instruct"


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper, in percent.

    Attributes:
        calls: API call correctness.
        rouge_l: Of responses.
        gsm8k, humaneval, triviaqa, mt_bench: General ability, higher is better.
    """

    calls: float
    rouge_l: float
    gsm8k: float
    humaneval: float
    triviaqa: float
    mt_bench: float

    def general_loss(self, base: PaperRow) -> float:
        """Mean over the four tests of the share of `base`'s score that is gone."""
        names = ("gsm8k", "humaneval", "triviaqa", "mt_bench")
        return sum(1 - getattr(self, name) / getattr(base, name) for name in names) / len(names)


PAPER = {
    "vanilla": PaperRow(33.25, 14.67, 79.45, 59.15, 64.82, 80.13),
    "ft": PaperRow(56.48, 18.71, 26.38, 0.00, 50.07, 33.88),
    "lora": PaperRow(65.98, 38.62, 76.88, 53.05, 64.84, 68.00),
    "citi": PaperRow(58.92, 34.51, 77.33, 54.88, 64.69, 76.94),
}
