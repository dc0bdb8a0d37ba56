"""Generation, likelihood and the whole evaluation, on tiny models, against values by hand."""

from __future__ import annotations

import json
import math
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from citi.data.render import render, render_prompt
from citi.data.sample import Message, Sample
from citi.evaluation import (
    AnswerLikelihood,
    EvalResult,
    EvalSettings,
    answer_nll,
    evaluate,
    generate_answers,
)
from citi.evaluation.evaluate import NO_ROUGE
from citi.evaluation.generate import end_token_ids, greedy_config

TEXTS = ["a", "what is the weather in a town", "1 + 1", "name a long river of the north, please"]
ANSWERS = ["yes", "sunny and warm", "2", "the Ob"]


def make_sample(question, reference, /, *, task_type=0, **meta) -> Sample:
    messages = (Message("user", question), Message("assistant", reference))
    return Sample(question, task_type, "tool" if task_type else "math", messages, meta=meta)


@pytest.fixture
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def samples():
    return [make_sample(text, answer) for text, answer in zip(TEXTS, ANSWERS, strict=True)]


def lora(model):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


# --- generation -----------------------------------------------------------------------------


def greedy_by_hand(model, tokenizer, sample, num_tokens) -> str:
    """No cache, no padding, no `generate`: one full forward a token."""
    tokens = render_prompt(sample, tokenizer, max_length=400)
    ends, answer = set(end_token_ids(model, tokenizer)), []
    while len(answer) < num_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([tokens + answer])).logits[0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_batches_give_what_a_plain_loop_gives_in_the_samples_order(
    architecture, tokenizer, samples
):
    model = tiny.tiny_model(architecture)
    answers = generate_answers(model, tokenizer, samples, max_new_tokens=8, batch_size=3)
    assert answers == [greedy_by_hand(model, tokenizer, sample, 8) for sample in samples]
    assert len(set(answers)) > 1


def test_a_tokenizer_without_padding_token_changes_nothing(tokenizer, samples):
    model = tiny.tiny_model()
    expected = generate_answers(model, tokenizer, samples, max_new_tokens=8, batch_size=4)
    tokenizer.pad_token = None
    assert generate_answers(model, tokenizer, samples, max_new_tokens=8, batch_size=4) == expected
    assert tokenizer.pad_token is None


def test_a_peft_model_answers_with_its_adapter(tokenizer, samples):
    base = generate_answers(tiny.tiny_model(), tokenizer, samples, max_new_tokens=8)
    model = lora(tiny.tiny_model())
    tuned = generate_answers(model, tokenizer, samples, max_new_tokens=8, batch_size=3)
    assert tuned == [greedy_by_hand(model, tokenizer, sample, 8) for sample in samples]
    assert tuned != base
    with model.disable_adapter():
        assert generate_answers(model, tokenizer, samples, max_new_tokens=8) == base


def test_two_runs_are_equal_and_ignore_the_models_sampling_settings(tokenizer, samples):
    model = tiny.tiny_model()
    first = generate_answers(model, tokenizer, samples, max_new_tokens=8)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_p = True, 5.0, 0.9
    settings.repetition_penalty, settings.max_length, settings.min_new_tokens = 9.0, 3, 30
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert generate_answers(model, tokenizer, samples, max_new_tokens=8) == first
    assert not [w for w in caught if "generat" in str(w.message).lower()]
    assert model.generation_config is settings


def test_an_answer_stops_at_the_chat_templates_end_token(tokenizer, samples):
    model = tiny.tiny_model()
    free = generate_answers(model, tokenizer, samples[:1], max_new_tokens=12)[0]
    prompt = render_prompt(samples[0], tokenizer, max_length=400)
    config = greedy_config(model, tokenizer, max_new_tokens=12)
    tokens = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
    # The fourth token of the answer becomes the template's end; nobody's eos_token names it.
    ending = tokenizer.convert_ids_to_tokens(int(tokens[3]))
    tokenizer.add_special_tokens({"additional_special_tokens": [ending]})
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(
        "{{ m['content'] }}<|im_end|>", "{{ m['content'] }}" + ending
    )
    assert int(tokens[3]) in end_token_ids(model, tokenizer)
    cut = generate_answers(model, tokenizer, samples[:1], max_new_tokens=12)[0]
    assert len(cut) < len(free)


def test_state_returns_after_generation_and_after_an_exception(tokenizer, samples, monkeypatch):
    model = lora(tiny.tiny_model()).train()
    model.base_model.model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    padding, length = tokenizer.padding_side, tokenizer.model_max_length
    config = model.generation_config

    def check():
        assert [module.training for module in model.modules()] == modes
        assert (tokenizer.padding_side, tokenizer.model_max_length) == (padding, length)
        assert model.generation_config is config
        assert not torch.is_inference_mode_enabled()

    generate_answers(model, tokenizer, samples, max_new_tokens=2)
    check()
    answer_nll(model, tokenizer, samples)
    check()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.get_base_model(), "forward", fail)
    for measure in (generate_answers, answer_nll):
        with pytest.raises(RuntimeError, match="out of memory"):
            measure(model, tokenizer, samples)
        check()


def test_training_goes_on_after_a_measurement(tokenizer, samples):
    model = lora(tiny.tiny_model()).train()
    evaluate(model, tokenizer, general={"g": samples}, settings=EvalSettings(max_new_tokens=2))
    tokens = torch.tensor([render(samples[1], tokenizer, max_length=400).input_ids])
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_progress_counts_every_sample(tokenizer, samples):
    seen = []
    progress = lambda done, total, note: seen.append((done, total, note))  # noqa: E731
    generate_answers(
        tiny.tiny_model(), tokenizer, samples, max_new_tokens=1, batch_size=3, progress=progress
    )
    assert seen == [(3, 4, "answers"), (4, 4, "answers")]


def test_prompts_are_cut_to_the_room_that_the_model_has(tokenizer):
    model = tiny.tiny_model("gpt2", n_positions=64)
    long = [make_sample("word " * 200, "yes")]
    answer = generate_answers(model, tokenizer, long, max_new_tokens=8)
    assert len(answer) == 1
    with pytest.raises(ValueError, match=r"max_length.*64.*lower max_new_tokens"):
        generate_answers(model, tokenizer, long, max_new_tokens=64)


def test_no_samples_give_no_answers(tokenizer):
    model = tiny.tiny_model()
    assert generate_answers(model, tokenizer, []) == []
    empty = answer_nll(model, tokenizer, [])
    assert empty == AnswerLikelihood((), ())
    assert math.isnan(empty.mean)


@pytest.mark.parametrize(
    ("setting", "value"), [("batch_size", 0), ("max_new_tokens", 0), ("max_tool_samples", 0)]
)
def test_counts_below_one_are_refused_by_name(setting, value, tokenizer, samples):
    with pytest.raises(ValueError, match=f"{setting}: wanted at least 1, got {value}"):
        EvalSettings(**{setting: value})
    if setting != "max_tool_samples":
        with pytest.raises(ValueError, match=f"{setting}: wanted at least 1, got {value}"):
            generate_answers(tiny.tiny_model(), tokenizer, samples, **{setting: value})


# --- likelihood -----------------------------------------------------------------------------


def nll_by_hand(model, tokenizer, sample, max_length=400) -> tuple[float, int]:
    """In fp64, one sample, the full logits, one token after the other."""
    rendered = render(sample, tokenizer, max_length=max_length)
    with torch.no_grad():
        logits = model(torch.tensor([rendered.input_ids])).logits[0]
    total, count = 0.0, 0
    for position, label in enumerate(rendered.labels):
        if position > 0 and label != -100:
            row = logits[position - 1]
            total += float(row.logsumexp(0) - row[label])
            count += 1
    return total, count


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "phi3"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_nll_equals_the_fp64_hand_computation(architecture, padding_side, tokenizer, samples):
    model = tiny.tiny_model(architecture)
    result = answer_nll(model, tokenizer, samples, batch_size=3, padding_side=padding_side)
    exact = tiny.tiny_model(architecture).double()
    by_hand = [nll_by_hand(exact, tokenizer, sample) for sample in samples]
    assert result.num_tokens == tuple(count for _, count in by_hand)
    assert result.nll == pytest.approx([nll for nll, _ in by_hand], rel=2e-6)
    total, tokens = (sum(column) for column in zip(*by_hand, strict=True))
    assert result.mean == pytest.approx(total / tokens, rel=2e-6)
    assert result.per_sample[1] == pytest.approx(by_hand[1][0] / by_hand[1][1], rel=2e-6)


def test_bf16_models_are_summed_in_fp32(tokenizer, samples):
    model = tiny.tiny_model(dtype=torch.bfloat16)
    with torch.no_grad():
        rendered = render(samples[1], tokenizer, max_length=400)
        logits = model(torch.tensor([rendered.input_ids])).logits[0].double()
    labels = torch.tensor(rendered.labels)
    answer = (labels[1:] != -100).nonzero().squeeze(1)
    truth = -logits.log_softmax(-1)[answer, labels[1:][answer]].sum()
    assert answer_nll(model, tokenizer, samples[1:2]).nll[0] == pytest.approx(
        float(truth), rel=1e-6
    )


def test_only_the_answers_positions_reach_the_head(tokenizer):
    model = tiny.tiny_model()
    sample = make_sample("a long question " * 10, "yes")
    rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    result = answer_nll(model, tokenizer, [sample])
    assert rows == [result.num_tokens[0]]
    assert rows[0] < 10


def test_a_model_without_logits_to_keep_gives_the_same(tokenizer, samples, monkeypatch):
    model = tiny.tiny_model()
    expected = answer_nll(model, tokenizer, samples)
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, input_ids, attention_mask, use_cache: forward(
            self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        ),
    )
    assert answer_nll(model, tokenizer, samples).nll == pytest.approx(expected.nll, rel=1e-6)


def test_case_57_a_sample_without_answer_counts_nothing_and_is_counted(tokenizer, samples):
    model = tiny.tiny_model()
    unanswered = Sample("q", 0, "instruct", (Message("user", "why?"),))
    alone = answer_nll(model, tokenizer, samples)
    result = answer_nll(model, tokenizer, [unanswered, *samples])
    assert (result.num_skipped, alone.num_skipped) == (1, 0)
    assert (result.nll[0], result.num_tokens[0]) == (0.0, 0)
    assert result.nll[1:] == pytest.approx(alone.nll, rel=1e-6)
    assert result.mean == pytest.approx(alone.mean, rel=1e-6)
    assert math.isnan(result.per_sample[0])


def test_case_57_a_long_question_never_costs_the_answer_its_tokens(tokenizer):
    model = tiny.tiny_model()
    long = answer_nll(model, tokenizer, [make_sample("word " * 200, "yes")], max_length=40)
    short = answer_nll(model, tokenizer, [make_sample("word", "yes")], max_length=40)
    assert long.num_tokens == short.num_tokens


# --- the whole evaluation -------------------------------------------------------------------


class Scripted:
    """Stands in for `generate_answers`: the reference answer, or a fixed text for some ids."""

    def __init__(self, **instead):
        self.instead = instead
        self.asked = []

    def __call__(self, model, tokenizer, samples, **settings):
        self.asked.append([sample.id for sample in samples])
        return [self.instead.get(s.id, s.messages[-1].content) for s in samples]


CALL = "API-Request: [f(a='1', b='2')]"
GOLD = [{"name": "f", "arguments": {"a": "1", "b": "2"}}]


@pytest.fixture
def scripted(monkeypatch):
    answers = Scripted(wrong="API-Request: [f(a='1', b='3')]", reply="the quick fox", late="####19")
    # `citi.evaluation.evaluate` as an attribute is the function, not the module.
    module = sys.modules["citi.evaluation.evaluate"]
    monkeypatch.setattr(module, "generate_answers", answers)
    return answers


def test_evaluate_scores_each_kind_of_row(scripted, tokenizer):
    calls = [
        make_sample("right", CALL, task_type=1, gold_calls=GOLD),
        make_sample("wrong", CALL, task_type=1, gold_calls=GOLD),
        make_sample("reply", "the quick brown fox", task_type=1),
    ]
    math_set = [make_sample("first", "#### 18", answer="18"), make_sample("late", "x", answer="18")]
    chat = [make_sample("hello", "hi")]
    model = tiny.tiny_model()
    result = evaluate(
        model, tokenizer, tool={"api": calls}, general={"math": math_set, "chat": chat}
    )
    figures = result.tool["api"]
    assert (figures["format"], figures["name"]) == (1.0, 1.0)
    assert (figures["arguments"], figures["exact"]) == (0.75, 0.5)
    # Longest common subsequence 3 of 4 reference and 3 generated words.
    assert figures["rouge_l"] == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))
    assert (figures["n"], figures["num_calls"], figures["num_responses"]) == (3, 2, 1)
    assert result.general["math"]["exact_match"] == 0.5
    assert result.general["math"]["num_judged"] == 2
    assert result.general["chat"]["exact_match"] is None
    expected = answer_nll(model, tokenizer, math_set)
    assert result.general["math"]["nll"] == pytest.approx(expected.mean)
    assert result.general["math"]["num_tokens"] == sum(expected.num_tokens)
    assert [row["id"] for row in result.answers["api"]] == ["right", "wrong", "reply"]
    assert [row.get("exact") for row in result.answers["api"]] == [1.0, 0.0, None]
    assert result.notes == ()


def test_limits_choose_the_same_samples_every_time_in_their_order(scripted, tokenizer):
    tool = [make_sample(f"t{i}", CALL, task_type=1, gold_calls=GOLD) for i in range(30)]
    general = [make_sample(f"g{i}", "1", answer="1") for i in range(30)]
    settings = EvalSettings(max_tool_samples=5, max_general_samples=6, max_exact_match=2)
    for _ in range(2):
        result = evaluate(
            tiny.tiny_model(),
            tokenizer,
            tool={"t": tool},
            general={"g": general},
            settings=settings,
        )
        assert (result.tool["t"]["n"], result.general["g"]["n"]) == (5, 6)
        assert result.general["g"]["num_judged"] == 2
    assert scripted.asked[:2] == scripted.asked[2:]
    numbers = [int(name[1:]) for name in scripted.asked[0]]
    assert numbers == sorted(numbers)
    assert numbers != list(range(5))


def test_without_rouge_score_the_figure_is_none_and_the_result_says_why(
    scripted, tokenizer, monkeypatch
):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    rows = [make_sample("reply", "the quick brown fox", task_type=1)]
    result = evaluate(tiny.tiny_model(), tokenizer, tool={"api": rows})
    assert result.tool["api"]["rouge_l"] is None
    assert result.notes == (NO_ROUGE,)


def test_case_57_empty_sets_and_samples_without_answers_are_reported(tokenizer):
    unanswered = [Sample("q", 0, "instruct", (Message("user", "why?"),))]
    result = evaluate(
        tiny.tiny_model(),
        tokenizer,
        tool={"none": []},
        general={"empty": [], "open": unanswered},
        settings=EvalSettings(max_new_tokens=1),
    )
    assert result.tool["none"]["n"] == 0
    assert result.tool["none"]["exact"] is None
    assert result.general["empty"]["nll"] is None
    assert result.general["open"]["nll"] is None
    assert result.notes == (
        "none: no samples",
        "empty: no samples",
        "open: 1 samples without answer tokens",
    )


def test_a_model_that_diverged_is_reported_and_stays_valid_json(tokenizer, samples):
    model = tiny.tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    result = evaluate(model, tokenizer, general={"g": samples})
    assert result.general["g"]["nll"] is None
    assert result.notes == ("g: the NLL is not finite",)
    json.dumps(result.to_json(), allow_nan=False)


def test_end_to_end_on_a_tiny_model_is_deterministic_and_survives_json(tokenizer, samples):
    calls = [make_sample("call f", CALL, task_type=1, gold_calls=GOLD)]
    settings = EvalSettings(max_new_tokens=6, batch_size=2)
    general = {"knowledge": [make_sample(text, "yes", answers=["yes"]) for text in TEXTS]}

    def run():
        model = tiny.tiny_model()
        return evaluate(model, tokenizer, tool={"t": calls}, general=general, settings=settings)

    result = run()
    assert result == run()
    text = json.dumps(result.to_json(), allow_nan=False)
    assert EvalResult.from_json(json.loads(text)) == result


def test_progress_names_the_set(tokenizer, samples):
    seen = []
    evaluate(
        tiny.tiny_model(),
        tokenizer,
        general={"chat": samples},
        settings=EvalSettings(batch_size=4),
        progress=lambda done, total, note: seen.append((done, total, note)),
    )
    assert seen == [(4, 4, "chat: answer likelihood")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "wanted schema 1, got 99"),
        ({"extra": 1}, r"unknown \['extra'\]"),
        ({"tool": None}, r"missing \['tool'\]"),
        ({"settings": {"batch_size": 1}}, r"settings: .*missing \['exact_match'"),
    ],
)
def test_a_foreign_file_is_refused_with_the_keys_by_name(change, message):
    data = {**EvalResult({}, {}).to_json(), **change}
    data = {key: value for key, value in data.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        EvalResult.from_json(data)
