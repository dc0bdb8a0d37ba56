"""Measures what a model can do: tool calls, responses, general ability; base against tuned."""

from citi.evaluation.call_syntax import ToolCall
from citi.evaluation.comparison import (
    comparison_markdown,
    comparison_table,
    mean_relative_change,
)
from citi.evaluation.evaluate import EvalResult, EvalSettings, evaluate
from citi.evaluation.generate import generate_answers
from citi.evaluation.likelihood import AnswerLikelihood, answer_nll
from citi.evaluation.tool_calls import (
    ParsedCalls,
    gold_calls_of,
    parse_tool_calls,
    score_tool_calls,
)

__all__ = [
    "AnswerLikelihood",
    "EvalResult",
    "EvalSettings",
    "ParsedCalls",
    "ToolCall",
    "answer_nll",
    "comparison_markdown",
    "comparison_table",
    "evaluate",
    "generate_answers",
    "gold_calls_of",
    "mean_relative_change",
    "parse_tool_calls",
    "score_tool_calls",
]
