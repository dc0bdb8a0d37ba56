"""The loss mask against the answers' own text, truncation, and prompts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citi.data import DataError, Message, Sample, describe_rendered, render, render_prompt
from citi.data.render import IGNORED
from tiny import tiny_tokenizer

LONG = 10_000
TOKENIZER = tiny_tokenizer()
SMOL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _sample(*turns: tuple[str, str], tools: tuple[dict, ...] = ()) -> Sample:
    messages = tuple(Message(role, content) for role, content in turns)
    return Sample("s", 1, "tool", messages, tools, {}, "file.jsonl:1")


def _trained(rendered) -> str:
    return TOKENIZER.decode([label for label in rendered.labels if label != IGNORED])


DIALOGUE = _sample(
    ("system", "Be brief."),
    ("user", "What is 6 x 7?"),
    ("assistant", "Forty-two."),
    ("user", "And naïve 文 \U0001f680?"),
    ("assistant", "A rocket \U0001f680, naïvely."),
)


def test_the_labels_are_the_last_answer_and_its_end_token():
    rendered = render(DIALOGUE, TOKENIZER, max_length=LONG)
    assert _trained(rendered) == "A rocket \U0001f680, naïvely.<|im_end|>"
    assert not rendered.truncated
    assert rendered.task_type == 1


def test_with_all_the_labels_are_every_answer_and_its_end_token():
    rendered = render(DIALOGUE, TOKENIZER, max_length=LONG, train_on="all")
    assert _trained(rendered) == "Forty-two.<|im_end|>A rocket \U0001f680, naïvely.<|im_end|>"
    assert all(
        label in (IGNORED, token)
        for token, label in zip(rendered.input_ids, rendered.labels, strict=True)
    )


def test_the_text_is_the_template_s_own_with_one_bos_only():
    rendered = render(DIALOGUE, TOKENIZER, max_length=LONG)
    wanted = TOKENIZER.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in DIALOGUE.messages], tokenize=False
    )
    assert TOKENIZER.decode(rendered.input_ids) == wanted.rstrip("\n")
    assert TOKENIZER.decode(rendered.input_ids[:2]) == "<|im_start|>s"


def test_a_tokenizer_that_adds_bos_by_itself_gives_no_second_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    rendered = render(DIALOGUE, tokenizer, max_length=LONG)
    assert rendered == render(DIALOGUE, TOKENIZER, max_length=LONG)
    prompts = [render_prompt(DIALOGUE, t, max_length=LONG) for t in (tokenizer, TOKENIZER)]
    assert prompts[0] == prompts[1]


def test_the_smollm_template_puts_its_default_system_text_outside_the_mask():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SMOL_TEMPLATE
    sample = _sample(("user", "Hi"), ("assistant", "Hello"))
    segments = describe_rendered(sample, tokenizer, max_length=LONG)
    assert [(segment.text, segment.trained) for segment in segments] == [
        (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("Hello<|im_end|>", True),
    ]


def test_consecutive_assistant_turns_train_the_last_one_or_each():
    sample = _sample(("user", "Do it"), ("assistant", "Sure."), ("assistant", "API-Request: [F()]"))
    last = render(sample, TOKENIZER, max_length=LONG)
    assert _trained(last) == "API-Request: [F()]<|im_end|>"
    every = render(sample, TOKENIZER, max_length=LONG, train_on="all")
    assert _trained(every) == "Sure.<|im_end|>API-Request: [F()]<|im_end|>"


def test_turns_behind_the_last_answer_are_left_out():
    sample = _sample(("user", "a"), ("assistant", "b"), ("user", "never seen"))
    rendered = render(sample, TOKENIZER, max_length=LONG)
    assert "never seen" not in TOKENIZER.decode(rendered.input_ids)
    assert _trained(rendered) == "b<|im_end|>"


@pytest.mark.parametrize("ending", ["API descriptions:", "API descriptions:\n", "Tools:\n"])
def test_announced_tools_follow_the_system_text_one_json_a_line(ending):
    tools = ({"name": "f", "description": "größer"}, {"name": "g"})
    sample = _sample(("system", ending), ("user", "u"), ("assistant", "a"), tools=tools)
    text = TOKENIZER.decode(render(sample, TOKENIZER, max_length=LONG).input_ids)
    head = ending.rstrip()
    assert text.startswith(
        f'<|im_start|>system\n{head}\n{{"name": "f", "description": "größer"}}\n'
        '{"name": "g"}<|im_end|>\n<|im_start|>user\n'
    )


def test_the_prompt_ends_with_the_generation_prompt_and_continues_into_the_answer():
    prompt = render_prompt(DIALOGUE, TOKENIZER, max_length=LONG)
    assert TOKENIZER.decode(prompt).endswith("\U0001f680?<|im_end|>\n<|im_start|>assistant\n")
    rendered = render(DIALOGUE, TOKENIZER, max_length=LONG)
    answer = [label for label in rendered.labels if label != IGNORED]
    assert prompt + answer == rendered.input_ids


def test_a_sample_without_an_answer_is_a_prompt_as_a_whole_and_has_no_label():
    sample = _sample(("user", "one"), ("user", "two"))
    prompt = TOKENIZER.decode(render_prompt(sample, TOKENIZER, max_length=LONG))
    assert prompt.endswith("two<|im_end|>\n<|im_start|>assistant\n")
    assert render(sample, TOKENIZER, max_length=LONG).num_answer_tokens == 0


def test_a_prompt_too_long_loses_its_oldest_tokens_but_not_bos():
    whole = render_prompt(DIALOGUE, TOKENIZER, max_length=LONG)
    cut = render_prompt(DIALOGUE, TOKENIZER, max_length=40)
    assert cut == [TOKENIZER.bos_token_id, *whole[-39:]]


TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), min_size=1, max_size=30
)


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "tool"]), TEXT), min_size=1, max_size=5
    ),
    answer=TEXT,
)
def test_the_mask_is_exact_for_any_conversation(turns, answer):
    sample = _sample(("user", "q"), *turns, ("assistant", answer))
    rendered = render(sample, TOKENIZER, max_length=LONG)
    assert _trained(rendered) == answer + "<|im_end|>"
    every = render(sample, TOKENIZER, max_length=LONG, train_on="all")
    answers = [text for role, text in (*turns, ("assistant", answer)) if role == "assistant"]
    assert _trained(every) == "".join(text + "<|im_end|>" for text in answers)
    labels = [label for label in rendered.labels if label != IGNORED]
    assert render_prompt(sample, TOKENIZER, max_length=LONG) + labels == rendered.input_ids


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_case_57_truncation_keeps_the_answer_and_never_removes_all_labels(train_on):
    whole = render(DIALOGUE, TOKENIZER, max_length=LONG, train_on=train_on)
    last = render(DIALOGUE, TOKENIZER, max_length=LONG)
    answer = [label for label in last.labels if label != IGNORED]
    for max_length in range(2, len(whole.input_ids) + 2):
        cut = render(DIALOGUE, TOKENIZER, max_length=max_length, train_on=train_on)
        assert len(cut.input_ids) == min(max_length, len(whole.input_ids))
        assert cut.truncated == (max_length < len(whole.input_ids))
        assert cut.num_answer_tokens >= 1
        if max_length - len(answer) >= max_length // 4:
            assert cut.input_ids[-len(answer) :] == cut.labels[-len(answer) :] == answer
        elif max_length >= 4:
            kept = max_length - max_length // 4
            assert cut.input_ids[-kept:] == cut.labels[-kept:] == answer[:kept]
        assert cut.labels[0] == IGNORED


def test_an_answer_behind_a_template_without_an_end_token_gets_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rendered = render(_sample(("user", "a"), ("assistant", "b")), tokenizer, max_length=LONG)
    assert tokenizer.decode(rendered.input_ids) == "user: a\nassistant: b\n<|im_end|>"
    assert _trained(rendered) == "b\n<|im_end|>"


def test_a_token_that_would_straddle_prompt_and_answer_is_split_as_in_generation():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġb"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("Ġ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    sample = _sample(("user", "a"), ("assistant", "b"))
    assert tokenizer.encode("t: b")[-1] == tokenizer.convert_tokens_to_ids("Ġb")
    rendered = render(sample, tokenizer, max_length=LONG)
    assert tokenizer.decode([t for t in rendered.labels if t != IGNORED]) == "b<|end|>"
    prompt = render_prompt(sample, tokenizer, max_length=LONG)
    assert rendered.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"max_length": 1}, "max_length"), ({"max_length": 9, "train_on": "first"}, "train_on")],
)
def test_wrong_settings_name_the_argument(wrong, words):
    with pytest.raises(ValueError, match=words):
        render(DIALOGUE, TOKENIZER, **wrong)


def test_a_tokenizer_without_a_template_is_refused_with_the_way_out():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*set tokenizer\.chat_template"):
        render(DIALOGUE, tokenizer, max_length=LONG)
