"""References are read back in the template's call form; those that cannot be stand in a note."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import tiny
from citi.data.sample import Message, Sample
from citi.evaluation import evaluate
from citi.evaluation.readback import num_unreadable

ARGUMENTS = {
    "city": "Paris, France",
    "n": 2,
    "x": 0.1,
    "ok": True,
    "none": None,
    "list": ["a b", 1, {"k": "v"}],
    "object": {"unit": "O'Neil", "deep": [1, 2]},
    "text": 'line one\nline "two" {x}',
}
CALLS = (
    {"name": "get_weather", "arguments": ARGUMENTS},
    {"name": "now", "arguments": {}},
    {"name": "get.x", "arguments": {"q": "it's"}},
)
TOOL = {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}
# A form that no reader knows.
FOREIGN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}@{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %} --{{ k }} {{ v }}{% endfor %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(template: str, *, special: bool = False):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    marks = set(re.findall(r"<\|\w+\|?>|<\w+\|>", template))
    tokenizer.add_tokens(sorted(marks), special_tokens=special)
    return tokenizer


def calling(*calls: dict) -> Sample:
    messages = (Message("user", "go on"), Message("assistant", "", calls))
    return Sample("c", 1, "tool", messages, (TOOL,))


def published(name: str) -> str:
    """A template as its model ships it; TRL carries copies."""
    spec = importlib.util.find_spec("trl")
    path = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja" if spec else None
    if path is None or not path.is_file():
        pytest.skip("trl, which carries this published chat template, is not installed")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("name", "num_calls"),
    [
        ("qwen2_5", 3),
        ("qwen3", 3),
        ("qwen3_5_think", 3),
        ("qwen3_5_nothink", 3),
        ("nemotron_3_nano", 3),
        ("glm4moe", 3),
        ("gemma4", 3),
        ("gptoss", 1),
        ("llama3_1", 1),
        ("gemma3", 3),
        ("lfm2", 3),
    ],
)
def test_references_are_read_back_in_the_form_of_published_templates(name, num_calls, special):
    tokenizer = tokenizer_of(published(name), special=special)
    model = tiny.tiny_model()
    assert num_unreadable(model, tokenizer, [calling(*CALLS[:num_calls])]) == 0


def test_references_that_cannot_be_read_back_are_counted_in_one_note(monkeypatch):
    samples = [
        calling(CALLS[0]),
        calling(CALLS[1]),
        Sample("r", 1, "tool", (Message("user", "hi"), Message("assistant", "hello"))),
        Sample("q", 1, "tool", (Message("user", "hi"),)),
    ]
    module = sys.modules["citi.evaluation.evaluate"]
    monkeypatch.setattr(module, "generate_answers", lambda m, t, samples, **_: [""] * len(samples))
    model = tiny.tiny_model()
    result = evaluate(model, tokenizer_of(FOREIGN), tool={"set": samples})
    wanted = "set: 2 references of this set cannot be read back in the template's call form:"
    assert [note.startswith(wanted) for note in result.notes].count(True) == 1
    result = evaluate(model, tiny.tiny_tokenizer(), tool={"set": samples})
    assert not [note for note in result.notes if "read back" in note]


def test_a_reference_that_the_template_refuses_is_not_counted_as_unreadable():
    refusing = FOREIGN + (
        "{% if messages[-1].tool_calls and messages[-1].tool_calls | length > 1 %}"
        "{{ raise_exception('one call a turn') }}{% endif %}"
    )
    samples = [calling(*CALLS), calling(CALLS[0])]
    assert num_unreadable(tiny.tiny_model(), tokenizer_of(refusing), samples) == 1


def test_only_the_answer_is_read_back_and_not_an_earlier_call():
    first, last = CALLS[1], CALLS[2]
    messages = (
        Message("user", "go on"),
        Message("assistant", "", (first,)),
        Message("tool", "noon", name="now"),
        Message("assistant", "", (last,)),
    )
    sample = Sample("c", 1, "tool", messages, (TOOL,))
    assert num_unreadable(tiny.tiny_model(), tiny.tiny_tokenizer(), [sample]) == 0
