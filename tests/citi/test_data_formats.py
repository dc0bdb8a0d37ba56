"""Every format, by a small row of the shape its authors publish."""

from __future__ import annotations

import json

import pytest

from citi.data import Message, read_data, read_samples

ADD = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
}
CALL = {"name": "add", "arguments": {"a": 1, "note": "naïve"}}
SEARCHER = {
    "apiCode": "ToolSearcher",
    "description": "Searches for relevant tools in library based on the keywords.",
    "parameters": {"keywords": {"type": "str", "description": "The keyword to search for."}},
}
LV3_INSTRUCTION = (
    "\nGenerate an API request in the format of [ApiName(key1='value1', key2='value2', ...)] "
    "based on the user's utterance and available API requests.\nThe current time is {{time}}.\n"
    "Input: \nUser: User's utterence\n\nExpected output:\nAPI-Request: [ApiName(...)]\n\n"
    "API descriptions:\n"
)


def _read(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return read_data(path, **settings)


def _one(tmp_path, row):
    samples, report = _read(tmp_path, row)
    assert len(samples) == 1
    assert report.num_rows == 1
    assert not report.dropped
    return samples[0], report.formats[0].name


def _plain(sample) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


def test_a_chat_record_keeps_all_its_fields(tmp_path):
    row = {
        "id": "r-1",
        "task": "math",
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
        ],
        "tools": [],
        "source": "origin",
        "meta": {"answer": "2"},
    }
    sample, name = _one(tmp_path, row)
    assert name == "chat record"
    assert (sample.id, sample.task, sample.task_type, sample.meta) == (
        "r-1",
        "math",
        0,
        {"answer": "2"},
    )
    assert sample.messages == (Message("user", "1+1?"), Message("assistant", "2"))
    assert sample.source == f"{tmp_path / 'rows.jsonl'}:1"


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [{"id": "x", "type": "function", "function": CALL}]},
        {"tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]},
        {"function_call": {**CALL, "arguments": json.dumps(CALL["arguments"])}},
        {"tool_calls": json.dumps([CALL])},
    ],
)
@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD]), [json.dumps(ADD)]])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_openai_calls_and_tools_are_kept_structured_whatever_their_spelling(
    tmp_path, turn, tools, key
):
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "add"}]},
            {"role": "assistant", "content": None, **turn},
        ],
        key: tools,
    }
    sample, name = _one(tmp_path, row)
    assert name == "OpenAI messages"
    assert sample.tools == (ADD,)
    assert sample.messages == (
        Message("system", "Be brief."),
        Message("user", "add"),
        Message("assistant", "", (CALL,)),
    )
    assert sample.meta["gold_calls"] == [CALL]
    assert sample.task_type == 1


def test_sharegpt_with_function_calls_and_observations(tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "area of 5 x 3?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": '{"area": 15}'},
            {"from": "gpt", "value": "15."},
        ],
        "system": "You calculate.",
        "tools": json.dumps([ADD]),
    }
    sample, name = _one(tmp_path, row)
    assert name == "ShareGPT conversations"
    assert _plain(sample) == [
        ("system", "You calculate."),
        ("user", "area of 5 x 3?"),
        ("assistant", ""),
        ("tool", '{"area": 15}'),
        ("assistant", "15."),
    ]
    assert sample.messages[2].tool_calls == (CALL,)


def test_toolace_keeps_its_functions_in_the_system_text(tmp_path):
    row = {
        "system": 'Functions: [{"name": "add"}]',
        "conversations": [
            {"from": "user", "value": "add"},
            {"from": "assistant", "value": "[add(a=1)]"},
        ],
    }
    sample, _ = _one(tmp_path, row)
    assert _plain(sample)[0] == ("system", 'Functions: [{"name": "add"}]')
    assert _plain(sample)[-1] == ("assistant", "[add(a=1)]")


def test_xlam_strings_become_structured_calls(tmp_path):
    row = {
        "id": 7,
        "query": "add",
        "tools": json.dumps([{"name": "add", "description": "", "parameters": {}}]),
        "answers": json.dumps([CALL, CALL]),
    }
    sample, name = _one(tmp_path, row)
    assert name == "xLAM query-answers"
    assert sample.id == "7"
    assert sample.messages[-1] == Message("assistant", "", (CALL, CALL))
    assert sample.task_type == 1


def test_alpaca_puts_the_input_below_the_instruction_and_the_history_before(tmp_path):
    row = {
        "instruction": "Translate.",
        "input": "Hund",
        "output": "dog",
        "system": "You translate.",
        "history": [["Katze", "cat"]],
    }
    sample, name = _one(tmp_path, row)
    assert name == "Alpaca"
    assert _plain(sample) == [
        ("system", "You translate."),
        ("user", "Katze"),
        ("assistant", "cat"),
        ("user", "Translate.\nHund"),
        ("assistant", "dog"),
    ]
    assert sample.task_type == 0


def test_api_bank_level_3_training_row_becomes_the_dialogue_of_the_chat_record(tmp_path):
    found = {"name": "Checker", "input_parameters": {"specialty": {"type": "str"}}}
    row = {
        "instruction": LV3_INSTRUCTION,
        "input": f"{json.dumps(SEARCHER)}\nUser: Find a cardiologist.TIME: 2034-04-15 10:00:00\n"
        f"API-Request: [ToolSearcher(keywords='checker')]->{found}\nGenerate API Request: ",
        "output": "API-Request: [Checker(specialty='cardiologist')]",
    }
    sample, name = _one(tmp_path, row)
    assert name == "API-Bank"
    assert sample.tools == (SEARCHER,)
    assert _plain(sample) == [
        ("system", LV3_INSTRUCTION),
        ("user", "Find a cardiologist.TIME: 2034-04-15 10:00:00"),
        ("assistant", "API-Request: [ToolSearcher(keywords='checker')]"),
        ("tool", str(found)),
        ("assistant", "API-Request: [Checker(specialty='cardiologist')]"),
    ]
    assert sample.task_type == 1


def test_api_bank_test_row_has_its_descriptions_in_the_instruction(tmp_path):
    row = {
        "file": "Calculator-level-1-1.jsonl",
        "id": 0,
        "instruction": LV3_INSTRUCTION + json.dumps(ADD) + "\n" + json.dumps(SEARCHER),
        "input": "User: Can you\ncalculate?\nAI: Sure.\nGenerate API Request:\n",
        "expected_output": "API-Request: [Calculator(formula='(5+6)*3')]",
    }
    sample, name = _one(tmp_path, row)
    assert name == "API-Bank"
    assert sample.id == "Calculator-level-1-1.jsonl-0"
    assert sample.tools == (ADD, SEARCHER)
    assert _plain(sample)[1:] == [
        ("user", "Can you\ncalculate?"),
        ("assistant", "Sure."),
        ("assistant", "API-Request: [Calculator(formula='(5+6)*3')]"),
    ]


def test_tool_alpaca_gives_one_sample_an_instance_and_leaves_failed_ones_out(tmp_path):
    row = {
        "Name": "Axolotl",
        "Description": "pictures",
        "Function_Description": {"getFacts": "Facts.\nParameters: {}", "components": "#A: Object"},
        "Instances": [
            {
                "input": "A fact?",
                "output": "They are native to Mexico.",
                "intermediate_steps": [[["getFacts", "{}", "I should..."], "Status Code: 200."]],
            },
            {"input": "failed", "output": "", "intermediate_steps": []},
            {"input": "Hello", "output": "Hi."},
        ],
    }
    samples, report = _read(tmp_path, row)
    assert report.formats[0].name == "ToolAlpaca"
    assert [len(sample.messages) for sample in samples] == [5, 3]
    assert len({sample.id for sample in samples}) == 2
    assert _plain(samples[0])[1:] == [
        ("user", "A fact?"),
        ("assistant", "Action: getFacts\nAction Input: {}"),
        ("tool", "Status Code: 200."),
        ("assistant", "They are native to Mexico."),
    ]
    assert samples[0].messages[0].content.endswith("#A: Object\nTools:\n")
    assert samples[0].tools == ({"name": "getFacts", "description": "Facts.\nParameters: {}"},)


def test_tool_alpaca_evaluation_keeps_the_golden_answers(tmp_path):
    golden = [{"Action": "getFacts", "Action_Input": '{"limit": 3}'}]
    row = {
        "Name": "Axolotl",
        "Description": "pictures",
        "Function_Description": {"getFacts": "Facts."},
        "Instructions": ["Three facts?"],
        "Golden_Answers": [golden],
    }
    sample, _ = _one(tmp_path, row)
    assert sample.meta["golden_answer"] == golden
    assert _plain(sample)[-1] == (
        "assistant",
        'Action: getFacts\nAction Input: {"limit": 3}',
    )


def test_bfcl_question_alone_has_no_answer_and_with_truth_the_first_values(tmp_path):
    function = {"name": "area", "parameters": {"type": "dict", "properties": {}}}
    row = {
        "id": "simple_python_0",
        "question": [[{"role": "user", "content": "Area of 10 x 5?"}]],
        "function": [function],
    }
    truth = [{"area": {"base": [10], "height": [5, 5.0], "unit": ["units", ""], "by": []}}]
    samples, report = _read(tmp_path, row, {**row, "id": "b", "ground_truth": truth})
    assert report.formats[0].name == "BFCL question-function"
    assert report.num_without_answer == 1
    assert samples[0].answer_index is None
    assert samples[1].meta["possible_answer"] == truth
    assert samples[1].messages[-1].tool_calls == (
        {"name": "area", "arguments": {"base": 10, "height": 5}},
    )


def test_bfcl_references_take_the_first_values_inside_objects_and_lists_too(tmp_path):
    truth = [
        {
            "fetch": {
                "where": [{"school": ["High", "HS"], "level": ["", 2], "note": [], "n": [3]}],
                "rows": [[{"field": ["age"], "value": [[1, 2], [1]]}, {"field": ["job", "work"]}]],
                "table": [[[1, 2], [3, 4]]],
                "deep": [{"in": [{"unit": ["cm", "m"], "by": ["", 1]}]}],
                "none": [{}, ""],
            }
        }
    ]
    row = {"question": [{"role": "user", "content": "?"}], "function": [], "ground_truth": truth}
    (sample,), _ = _read(tmp_path, row)
    (call,) = sample.messages[-1].tool_calls
    assert call["arguments"] == {
        "where": {"school": "High", "n": 3},
        "rows": [{"field": "age", "value": [1, 2]}, {"field": "job"}],
        "table": [[1, 2], [3, 4]],
        "deep": {"in": {"unit": "cm"}},
    }
    assert sample.meta["possible_answer"] == truth


@pytest.mark.parametrize("truth", [[{"f": {"a": 1}}], [{"name": "f", "arguments": {}}]])
def test_bfcl_rows_whose_truth_lists_no_values_are_dropped_and_counted(tmp_path, truth):
    good = {"prompt": "p", "completion": "c"}
    bad = {"question": [{"role": "user", "content": "?"}], "function": [], "ground_truth": truth}
    _, report = _read(tmp_path, good, bad)
    assert list(report.dropped) == ["ground_truth is not a list of {name: {argument: [values]}}"]


def test_bfcl_multi_turn_rows_are_dropped_and_counted(tmp_path):
    good = {"prompt": "p", "completion": "c"}
    bad = {"question": [[{"role": "user", "content": "a"}]] * 2, "function": []}
    _, report = _read(tmp_path, good, bad)
    assert report.dropped == {"multi-turn BFCL rows have no reference turns": 1}


@pytest.mark.parametrize("conversational", [False, True])
def test_prompt_and_completion_as_texts_or_as_turns(tmp_path, conversational):
    row = {"prompt": "2+2?", "completion": "4"}
    if conversational:
        row = {
            "prompt": [{"role": "user", "content": "2+2?"}],
            "completion": [{"role": "assistant", "content": "4"}],
        }
    sample, name = _one(tmp_path, row)
    assert name == "prompt-completion"
    assert _plain(sample) == [("user", "2+2?"), ("assistant", "4")]


def test_a_prompts_system_text_is_kept(tmp_path):
    turns = [{"role": "system", "content": "own"}, {"role": "user", "content": "p"}]
    samples, _ = _read(
        tmp_path,
        {"system": "be brief", "prompt": "p", "completion": "c"},
        {"system": "be brief", "prompt": turns[1:], "completion": "c"},
        {"system": "be brief", "prompt": turns, "completion": "c"},
    )
    heads = [(sample.messages[0].role, sample.messages[0].content) for sample in samples]
    assert heads == [("system", "be brief"), ("system", "be brief"), ("system", "own")]
    assert [len(sample.messages) for sample in samples] == [3, 3, 3]


@pytest.mark.parametrize(
    ("row", "name", "user", "result"),
    [
        ({"query": "1+1?", "response": "So.\nThe answer is: 2"}, "query-response", "1+1?", "2"),
        ({"question": "1+1?", "answer": "It is\n#### 2"}, "question-answer", "1+1?", "2"),
        ({"question": "Where?", "answer": "In 3 places"}, "question-answer", "Where?", None),
        (
            {"instruction": "Sum up.", "context": "A text.", "response": "Short.", "category": "x"},
            "Dolly",
            "Sum up.\nA text.",
            None,
        ),
        ({"instruction": "Go.", "context": "", "response": "Gone."}, "Dolly", "Go.", None),
    ],
)
def test_question_and_answer_rows(tmp_path, row, name, user, result):
    samples, report = _read(tmp_path, row)
    assert report.formats[0].name == name
    answer = row.get("response", row.get("answer"))
    assert [(m.role, m.content) for m in samples[0].messages] == [
        ("user", user),
        ("assistant", answer),
    ]
    assert samples[0].meta.get("answer") == result


def test_a_tools_result_may_be_a_json_object(tmp_path):
    messages = [
        {"role": "user", "content": "u"},
        {"role": "tool", "content": {"temperature": 21, "unit": "°C"}},
        {"role": "assistant", "content": "a"},
    ]
    samples, _ = _read(tmp_path, {"messages": messages})
    assert samples[0].messages[1].content == '{"temperature": 21, "unit": "°C"}'


def test_formats_are_told_apart_row_by_row(tmp_path):
    _, report = _read(
        tmp_path,
        {"prompt": "p", "completion": "c"},
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "input": "", "output": "o"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    )
    assert [(verdict.name, verdict.num_rows) for verdict in report.formats] == [
        ("Alpaca", 2),
        ("prompt-completion", 1),
        ("OpenAI messages", 1),
    ]


@pytest.mark.parametrize(
    ("column", "argument", "task", "wanted"),
    [
        ("general", 1, "tool", 0),
        (1, 0, "math", 1),
        (None, 1, "math", 1),
        (None, 0, "tool", 0),
        (None, None, "tool", 1),
        (None, None, "math", 0),
    ],
)
def test_task_type_column_wins_over_the_list_and_the_list_over_the_task(
    tmp_path, column, argument, task, wanted
):
    row = {"prompt": "p", "completion": "c", "task": task}
    if column is not None:
        row["task_type"] = column
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert read_samples(path, task_type=argument)[0].task_type == wanted
