"""What an evaluation leaves out or cuts is said, and what cannot be evaluated is said at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from run_cases import tiny_recipe, without_figures, write_model

import tiny
from citi.capability_shift import mean_states
from citi.data.sample import Message, Sample
from citi.evaluation import EvalSettings, evaluate
from citi.importance.score_components import score_components
from citi.positions import length_limit
from citi.recipe import RecipeError, load_recipe
from citi.run import train

ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}@{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sample_of(question: str, answer: str = "yes", *, calls: int = 0, **meta) -> Sample:
    made = tuple({"name": "add", "arguments": {"a": i}} for i in range(calls)) or None
    messages = (Message("user", question), Message("assistant", answer, made))
    return Sample(question[:9], int(calls > 0), "math", messages, meta=meta)


@pytest.fixture
def tokenizer():
    return tiny.tiny_tokenizer()


def test_samples_that_the_template_refuses_are_left_out_and_counted(tokenizer) -> None:
    tokenizer.chat_template = ONE_CALL
    samples = [sample_of("a"), sample_of("b", calls=2), sample_of("c", calls=1)]
    model = tiny.tiny_model()
    settings = EvalSettings(max_new_tokens=2)
    result = evaluate(
        model, tokenizer, tool={"t": samples}, general={"g": samples}, settings=settings
    )
    assert result.tool["t"]["n"] == 3, "a prompt holds whatever its answer is"
    assert result.general["g"]["n"] == 2
    (note,) = result.notes
    assert note.startswith("g: 1 of 3 samples left out: the chat template refuses")
    assert "one call at a time" in note
    alone = evaluate(model, tokenizer, general={"g": samples[::2]}, settings=settings)
    assert alone.general == result.general


def test_cut_prompts_and_samples_are_counted(tokenizer) -> None:
    samples = [sample_of("x" * 100), sample_of("short")]
    model = tiny.tiny_model()
    settings = EvalSettings(max_new_tokens=10, max_length=70)
    notes = evaluate(
        model, tokenizer, tool={"t": samples}, general={"g": samples}, settings=settings
    ).notes
    assert any(note.startswith("t: 1 of 2 prompts cut to 60 tokens") for note in notes)
    assert any(note.startswith("g: 1 of 2 samples cut to 70 tokens") for note in notes)
    whole = EvalSettings(max_new_tokens=10, max_length=400)
    notes = evaluate(
        model, tokenizer, tool={"t": samples}, general={"g": samples}, settings=whole
    ).notes
    assert not any("cut to" in note for note in notes)


def test_a_likelihood_alone_needs_no_room_for_answers(tokenizer) -> None:
    settings = EvalSettings(exact_match=False, max_length=60, max_new_tokens=256)
    result = evaluate(
        tiny.tiny_model(), tokenizer, general={"g": [sample_of("a")]}, settings=settings
    )
    assert result.general["g"]["nll"] > 0


def test_a_recipe_without_room_for_answers_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    tool = {"eval_tool": dict(recipe.tool)}
    with pytest.raises(RecipeError, match=r"max_length: .*max_new_tokens \+ 2 \(97\).*got 96"):
        dataclasses.replace(recipe, max_new_tokens=95, **tool)
    assert dataclasses.replace(recipe, max_new_tokens=94, **tool).generates_answers
    general = {"eval_general": dict(recipe.general), "max_new_tokens": 95}
    assert not dataclasses.replace(recipe, judged_samples=0, **general).generates_answers
    with pytest.raises(RecipeError, match="max_length"):
        dataclasses.replace(recipe, **general)


def test_a_model_without_room_for_answers_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    model = write_model(tmp_path / "short", max_position_embeddings=64)
    recipe = tiny_recipe(tmp_path, model=str(model), max_new_tokens=80)
    recipe = dataclasses.replace(recipe, eval_tool=dict(recipe.tool))
    with without_figures(), pytest.raises(ValueError, match=r"max_new_tokens \(80\).*positions"):
        train(recipe)
    assert not (tmp_path / "run" / "importance.json").exists()


def test_evaluation_sets_are_switched_off_by_an_override(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    file = tmp_path / "recipe.yaml"
    evaluated = dataclasses.replace(recipe, eval_tool=dict(recipe.tool), output=str(tmp_path))
    file.write_text(evaluated.dump())
    assert load_recipe(file).eval_tool
    for override in ("eval_tool=null", "eval_tool="):
        assert load_recipe(file, [override]).eval_tool == {}
    with pytest.raises(RecipeError, match=r"^tool: wanted"):
        load_recipe(file, ["tool="])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_longer_samples_than_the_model_has_positions_are_cut_everywhere(
    architecture: str, tmp_path: Path
) -> None:
    tokenizer = tiny.tiny_tokenizer()
    settings = {"n_positions": 48} if architecture == "gpt2" else {"max_position_embeddings": 48}
    model = tiny.tiny_model(architecture, **settings)
    assert length_limit(model, 4096) == length_limit(model.config, 4096) == 48
    assert length_limit(model, 10) == 10
    samples = [sample_of("x" * 100), sample_of("y" * 5)]
    scores = score_components(model, tokenizer, tool=samples, general={"g": samples})
    assert all(value >= 0 for value in scores.tool.scores.values())
    assert mean_states(model, tokenizer, samples)

    folder = write_model(tmp_path / "model", architecture, **settings)
    recipe = tiny_recipe(tmp_path, model=str(folder), max_length=4096, epochs_mi=1.0)
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "%s", "completion": "yes"}\n' % ("z" * 300))
    recipe = dataclasses.replace(recipe, tool={"long": str(long)}, max_new_tokens=4)
    with without_figures():
        run = train(recipe)
    assert run.load_manifest().finished
