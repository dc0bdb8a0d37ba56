"""Does it reproduce? The targets as computed lines.

A target is met, missed, or undecided: met or missed by its figure, undecided where the 95 %
interval of that figure has both answers in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.method.bootstrap import Estimate
from benchmarks.method.summary import API_BANK, EVERY_GENERAL, GENERAL, RowSummary

NOT_MEASURED = "not yet measured"


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes:
        claim: What is asked.
        answer: "reproduces", "does not reproduce", "undecided", "not yet measured", or why there
            is no answer.
        figures: The numbers behind it.
    """

    claim: str
    answer: str
    figures: str


def verdicts(rows: Mapping[str, RowSummary]) -> list[Verdict]:
    """The targets on the rows of one scale."""
    found = [_calls(rows)]
    groups = {
        "all general sets": EVERY_GENERAL,
        "abilities in the mix": GENERAL["trained"],
        "abilities never trained on": GENERAL["untrained"],
    }
    for title, names in groups.items():
        for row, words, factor in (("ft", "1/10 of FT's", 0.1), ("lora", "1/2 of LoRA's", 0.5)):
            claim = f"CITI's mean relative general loss is at most {words} ({title})"
            found.append(_loss(rows, claim, names, row, factor))
    return found


def _calls(rows: Mapping[str, RowSummary]) -> Verdict:
    claim = "CITI's exact calls on API-Bank are at least those of LoRA + DM"
    if not {"citi", "lora_dm"} <= rows.keys():
        return Verdict(claim, NOT_MEASURED, "")
    ours, theirs = (rows[row].calls(API_BANK) for row in ("citi", "lora_dm"))
    difference = ours - theirs
    figures = f"{ours.value:.1%} against {theirs.value:.1%}; difference {_signed(difference)}"
    if ours.value == theirs.value == 0:
        return Verdict(claim, "neither makes a right call", figures)
    return Verdict(claim, _answer(difference), figures)


def _loss(
    rows: Mapping[str, RowSummary], claim: str, names: tuple[str, ...], row: str, factor: float
) -> Verdict:
    if not {"vanilla", "citi", row} <= rows.keys():
        return Verdict(claim, NOT_MEASURED, "")
    base = rows["vanilla"]
    ours, theirs = rows["citi"].change(base, names), rows[row].change(base, names)
    figures = f"{ours.value:+.2%} against {theirs.value:+.2%}"
    if theirs.value <= 0:
        return Verdict(claim, "no loss to compare with", figures)
    room = theirs * factor - ours
    return Verdict(claim, _answer(room), f"{figures}; room below the target {_signed(room)}")


def _answer(room: Estimate) -> str:
    """`room`: at least 0 where the target is met."""
    low, high = room.interval
    if low < 0 <= high:
        return "undecided"
    return "reproduces" if room.value >= 0 else "does not reproduce"


def _signed(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.value:+.2%} [{low:+.2%}, {high:+.2%}]"
