"""Chat templates that know less, or do more, than plain ChatML."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from citi.data import DataError, Message, Sample, install_tool_template, render, render_prompt
from citi.data.chat_template import ChatTemplate, as_function
from citi.data.render import IGNORED
from tiny import CHAT_TEMPLATE, tiny_tokenizer

LONG = 10_000
TOOL = {"name": "add", "description": "Adds.", "input_parameters": {"a": {"type": "int"}}}
CALL = {"name": "add", "arguments": {"a": 1}}
CALL_TEXT = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

# No system turn, roles must alternate (Gemma).
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Thoughts stand before the last answer only, and the generation prompt opens none (Qwen3).
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought that a rendered answer does not have (DeepSeek R1).
OPENED = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# The whole text ends with one more token, behind the last turn (Phi-3).
ENDED = CHAT_TEMPLATE + "{% if not add_generation_prompt %}<|pad|>{% endif %}"
# Earlier answers are cut short once turns follow them.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content[:2] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}/{{ messages | length }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tools, calls and results of its own.
NATIVE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}@{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

USER, HELLO = Message("user", "Hi there"), Message("assistant", "Hello one")
MORE, AGAIN = Message("user", "more"), Message("assistant", "Hello two")
CALLING = Message("assistant", "", (CALL,))
RESULT = Message("tool", "3", name="add")


def _tokenizer(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _sample(*messages: Message, tools: tuple[dict, ...] = ()) -> Sample:
    return Sample("s", 1, "tool", messages, tools, {}, "file.jsonl:7")


def _texts(sample: Sample, template: str, train_on: str = "last") -> tuple[str, str]:
    """(everything, what is trained); the prompt must be how everything begins."""
    tokenizer = _tokenizer(template)
    rendered = render(sample, tokenizer, max_length=LONG, train_on=train_on)
    prompt = render_prompt(sample, tokenizer, max_length=LONG)
    assert rendered.input_ids[: len(prompt)] == prompt
    trained = [label for label in rendered.labels if label != IGNORED]
    return tokenizer.decode(rendered.input_ids), tokenizer.decode(trained)


def test_without_tool_support_tools_and_calls_take_the_hermes_form():
    sample = _sample(Message("system", "Be brief."), USER, CALLING, tools=(TOOL,))
    text, trained = _texts(sample, CHAT_TEMPLATE)
    assert trained == f"{CALL_TEXT}<|im_end|>"
    system = text.split("<|im_end|>")[0]
    assert system.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    listed = system.split("<tools>\n")[1].split("\n</tools>")[0]
    assert json.loads(listed) == as_function(TOOL)


def test_with_tool_support_the_template_writes_tools_calls_and_results_itself():
    done = Message("assistant", "It is 3")
    sample = _sample(USER, CALLING, RESULT, done, tools=(TOOL,))
    text, trained = _texts(sample, NATIVE)
    assert trained == "It is 3<|im_end|>"
    assert text.startswith('<|im_start|>tools\n[{"type": "function"')
    assert '@{"name": "add", "arguments": {"a": 1}}<|im_end|>' in text
    assert "<|im_start|>tool\n3<|im_end|>" in text
    assert ChatTemplate(_tokenizer(NATIVE)).prelude == ""


def test_several_calls_stand_one_below_the_other_behind_the_text():
    both = Message("assistant", "On it.", (CALL, CALL))
    _, trained = _texts(_sample(USER, both, tools=(TOOL,)), CHAT_TEMPLATE)
    assert trained == f"On it.\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>"


def test_a_strict_template_gets_folded_system_text_merged_answers_and_results_as_user():
    system = Message("system", "API descriptions:")
    first, second = Message("assistant", "Sure."), Message("assistant", "API-Request: [F()]")
    text, trained = _texts(_sample(system, USER, first, second, tools=(TOOL,)), STRICT)
    assert trained == "API-Request: [F()]<|im_end|>"
    assert text == (
        f"<|im_start|>user\nAPI descriptions:\n{json.dumps(TOOL)}\n\nHi there<|im_end|>\n"
        "<|im_start|>model\nSure.\nAPI-Request: [F()]<|im_end|>"
    )
    _, every = _texts(_sample(system, USER, first, second, tools=(TOOL,)), STRICT, "all")
    assert every == "Sure.\nAPI-Request: [F()]<|im_end|>"
    text, trained = _texts(_sample(USER, CALLING, RESULT, RESULT, AGAIN, tools=(TOOL,)), STRICT)
    assert trained == "Hello two<|im_end|>"
    results = "<tool_response>\n3\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text
    text, _ = _texts(_sample(USER, HELLO, RESULT, AGAIN), STRICT)
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>" in text


@pytest.mark.parametrize(
    ("template", "last", "every"),
    [
        (
            THINKING,
            "<think>\n\n</think>\n\nHello two<|im_end|>",
            "Hello one<|im_end|><think>\n\n</think>\n\nHello two<|im_end|>",
        ),
        (OPENED, "Hello two<|im_end|>", "Hello one<|im_end|>Hello two<|im_end|>"),
        (ENDED, "Hello two<|im_end|>\n<|pad|>", "Hello one<|im_end|>Hello two<|im_end|>\n<|pad|>"),
        (STRICT, "Hello two<|im_end|>", "Hello one<|im_end|>Hello two<|im_end|>"),
    ],
)
def test_the_mask_is_exact_where_the_text_depends_on_what_follows(template, last, every):
    sample = _sample(USER, HELLO, MORE, AGAIN)
    assert _texts(sample, template)[1] == last
    assert _texts(sample, template, "all")[1] == every


def test_an_answer_still_to_come_is_prompted_for_where_the_prompt_opens_a_thought():
    waiting = _sample(USER, HELLO, MORE, Message("assistant", ""))
    tokenizer = _tokenizer(OPENED)
    prompt = tokenizer.decode(render_prompt(waiting, tokenizer, max_length=LONG))
    assert prompt.endswith("more<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_consecutive_answers_under_a_thinking_template():
    text, trained = _texts(_sample(USER, HELLO, AGAIN), THINKING)
    assert trained == "Hello two<|im_end|>"
    assert text.endswith("<think>\n\n</think>\n\nHello one\nHello two<|im_end|>")


def test_where_the_text_cannot_be_matched_the_generation_marks_are_taken():
    tokenizer = _tokenizer(MARKED)
    sample = _sample(USER, HELLO, MORE, AGAIN)
    for train_on, wanted in (
        ("last", "Hello two<|im_end|>"),
        ("all", "Hello one<|im_end|>Hello two<|im_end|>"),
    ):
        rendered = render(sample, tokenizer, max_length=LONG, train_on=train_on)
        labels = [label for label in rendered.labels if label != IGNORED]
        assert tokenizer.decode(labels) == wanted


def test_where_nothing_marks_the_answers_the_error_says_where_and_what_to_do():
    sample = _sample(USER, HELLO, MORE, AGAIN)
    assert _texts(sample, FORGETFUL)[1] == "Hello two<|im_end|>"
    with pytest.raises(DataError, match=r"file\.jsonl:7: .*\{% generation %\}.*train_on=last"):
        _texts(sample, FORGETFUL, "all")


def test_a_conversation_that_the_template_refuses_is_named():
    two_users = _sample(USER, MORE, AGAIN)
    with pytest.raises(DataError, match=r"file\.jsonl:7: .*refuses.*roles must alternate"):
        _texts(two_users, STRICT)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, STRICT, NATIVE])
def test_the_installed_template_renders_without_us_what_we_train_on(template, tmp_path):
    sample = _sample(Message("system", "Be brief."), USER, CALLING, tools=(TOOL,))
    before = _texts(sample, template)
    tokenizer = _tokenizer(template)
    assert install_tool_template(tokenizer) == (template is not NATIVE)
    assert not install_tool_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    served = loaded.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": USER.content},
            {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
        ],
        tools=[as_function(TOOL)],
        tokenize=False,
    )
    assert served.rstrip("\n") == before[0]
    assert _texts(sample, loaded.chat_template) == before


def test_plain_conversations_are_untouched_by_the_installed_template():
    sample = _sample(Message("system", "Be brief."), USER, HELLO, MORE, AGAIN)
    tokenizer = _tokenizer(CHAT_TEMPLATE)
    install_tool_template(tokenizer)
    assert _texts(sample, tokenizer.chat_template, "all") == _texts(sample, CHAT_TEMPLATE, "all")


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "description": "d"}},
        {"name": "f", "description": "d", "input_parameters": {"a": {"type": "str"}}},
        {"apiCode": "f", "description": "d", "parameters": {"a": {"type": "str"}}},
        {"name": "f", "description": "d", "parameters": {"type": "dict", "properties": {}}},
        {"name": "f", "description": "d"},
    ],
)
def test_every_form_of_a_tool_becomes_a_function_with_an_object_schema(tool):
    made = as_function(tool)
    assert made["type"] == "function"
    assert (made["function"]["name"], made["function"]["description"]) == ("f", "d")
    schema = made["function"].get("parameters", {"type": "object"})
    assert schema["type"] == "object"
    if "input_parameters" in tool or "apiCode" in tool:
        assert schema["properties"] == {"a": {"type": "str"}}


@pytest.mark.parametrize("parameters", [{"type": "object"}, {"type": "dict", "properties": None}])
def test_a_schema_without_arguments_gets_none(parameters):
    made = as_function({"name": "now", "parameters": parameters})["function"]["parameters"]
    assert made == {"type": "object", "properties": {}}


@pytest.mark.parametrize("parameters", [["a"], '{"a": 1}'])
def test_parameters_that_are_no_object_are_named_with_their_tool(parameters):
    sample = _sample(USER, HELLO, tools=({"name": "now", "parameters": parameters},))
    with pytest.raises(DataError, match=r"file\.jsonl:7: .*parameters of the tool 'now'"):
        render(sample, _tokenizer(NATIVE), max_length=LONG)


@pytest.mark.parametrize("wrote", ["Here: <tools> {tools} </tools>", "You may call add."])
def test_tools_that_the_system_text_describes_are_not_described_again(wrote):
    system = Message("system", wrote.replace("{tools}", json.dumps([TOOL])))
    sample = _sample(system, USER, HELLO, tools=(TOOL,))
    tokenizer = _tokenizer(NATIVE)
    text = tokenizer.decode(render(sample, tokenizer, max_length=LONG).input_ids)
    assert text.count("Adds.") == 1


def _published(name: str) -> str:
    """A template as its model ships it; TRL carries copies."""
    spec = importlib.util.find_spec("trl")
    path = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja" if spec else None
    if path is None or not path.is_file():
        pytest.skip("trl, which carries published chat templates, is not installed")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["llama3", "llama3_1", "qwen2_5", "qwen3", "gemma", "gemma3", "phi3", "deepseekv3"]
)
def test_published_templates_train_exactly_the_last_answer(name):
    template = _published(name)
    tokenizer = _tokenizer(template)
    tokenizer.add_tokens(
        [t for t in ("<|eot_id|>", "<end_of_turn>", "<|end|>") if t in template],
        special_tokens=True,
    )
    system = Message("system", "API descriptions:")
    request, result = Message("assistant", "API-Request: [F()]"), Message("tool", "42")
    for messages in ((USER, HELLO, MORE, AGAIN), (system, USER, HELLO, request, result, AGAIN)):
        rendered = render(_sample(*messages, tools=(TOOL,)), tokenizer, max_length=LONG)
        trained = tokenizer.decode([label for label in rendered.labels if label != IGNORED])
        answer = trained.removeprefix("<think>\n\n</think>\n\n")
        assert answer.startswith("Hello two")
        assert len(answer) < 40
        text = tokenizer.decode(rendered.input_ids)
        assert text.endswith(trained)
        assert all(message.content in text for message in messages)
        assert "Adds." in text


_BAR = "\uff5c"  # what DeepSeek's special tokens have for a bar


def _published_tokenizer(name: str):
    tokenizer = _tokenizer(_published(name))
    special = re.findall(
        rf"<\|\w+\|>|<{_BAR}[^{_BAR}]+{_BAR}>|<end_of_turn>", tokenizer.chat_template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(special))})
    return tokenizer


def _trained_runs(rendered, tokenizer) -> list[str]:
    runs: list[list[int]] = [[]]
    for label in rendered.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    "name",
    ["deepseek_r1_distill", "deepseekv3_training", "llama3_1", "nemotron_3_nano", "phi3", "qwen3"],
)
def test_an_answer_of_calls_alone_begins_behind_its_header(name):
    tokenizer = _published_tokenizer(name)
    call = Message("assistant", "", ({"name": "add", "arguments": {"a": 1}},))
    sample = _sample(USER, call, tools=(TOOL,))
    rendered = render(sample, tokenizer, max_length=LONG)
    (trained,) = _trained_runs(rendered, tokenizer)
    starts = ("<tool_call>", f"<{_BAR}tool▁calls▁begin{_BAR}>", '{"name": "add"')
    assert trained.removeprefix("<think>\n\n</think>").lstrip().startswith(starts)
    prompt = tokenizer.decode(render_prompt(sample, tokenizer, max_length=LONG))
    assert prompt + trained == tokenizer.decode(rendered.input_ids)
    header = {
        "llama3_1": "<|end_header_id|>\n\n",
        "deepseek_r1_distill": f"<{_BAR}Assistant{_BAR}>",
    }
    assert prompt.endswith(header.get(name, ""))


@pytest.mark.parametrize("name", ["qwen3", "phi3", "qwen2_5", "gemma3"])
def test_earlier_calls_are_trained_on_too(name):
    tokenizer = _published_tokenizer(name)
    calls = [
        Message("assistant", said, ({"name": "add", "arguments": {"a": 1}},))
        for said in ("", "First I add.")
    ]
    result = Message("tool", "42", name="add")
    sample = _sample(USER, calls[0], result, AGAIN, MORE, calls[1], result, AGAIN, tools=(TOOL,))
    runs = _trained_runs(render(sample, tokenizer, max_length=LONG, train_on="all"), tokenizer)
    assert len(runs) == 4
    assert runs[0].startswith(CALL_TEXT)
    assert runs[2].startswith(f"First I add.\n{CALL_TEXT}")
    for run in (runs[1], runs[3].removeprefix("<think>\n\n</think>\n\n")):
        assert run.startswith("Hello two")
    assert all(len(run) < 110 for run in runs)


def test_an_earlier_call_whose_end_does_not_show_is_refused():
    # Nothing but a special token inside the call: what it says stands behind that.
    template = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% if m.tool_calls and loop.last %}!{% endif %}{{ m['content'] }}"
        "{% for c in m.tool_calls or [] %}<|pad|>{{ c.function | tojson }}{% endfor %}",
    )
    call = Message("assistant", "", ({"name": "add", "arguments": {"a": 1}},))
    sample = _sample(USER, call, Message("tool", "42", name="add"), HELLO)
    with pytest.raises(DataError, match="cannot be told"):
        render(sample, _tokenizer(template), max_length=LONG, train_on="all")


def test_a_prompt_needs_no_answer_that_the_template_holds():
    template = (
        "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}"
        "{{ raise_exception('one call at a time') }}{% endif %}{% endfor %}" + NATIVE
    )
    call = {"name": "add", "arguments": {"a": 1}}
    one, two = (_sample(USER, Message("assistant", "", (call,) * n)) for n in (1, 2))
    tokenizer = _tokenizer(template)
    with pytest.raises(DataError, match="one call at a time"):
        render(two, tokenizer, max_length=LONG)
    prompts = [render_prompt(sample, tokenizer, max_length=LONG) for sample in (one, two)]
    assert prompts[0] == prompts[1]
