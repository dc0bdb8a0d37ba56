"""Calls are found in every format, in damaged text too."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citi.evaluation.tool_calls import parse_tool_calls, score_tool_calls


def found(text: str) -> list[tuple[str, dict]]:
    return [(call.name, call.arguments) for call in parse_tool_calls(text).calls]


WELL_FORMED = {
    "api_bank": (
        "API-Request: [GetUserToken(username='JohnDoe', password='pass123')]",
        [("GetUserToken", {"username": "JohnDoe", "password": "pass123"})],
    ),
    "text_before_and_after": (
        "Sure, one moment.\nAPI-Request: [Tomorrow()]\nDone.",
        [("Tomorrow", {})],
    ),
    "several_calls_and_types": (
        "API-Request: [f(a=1, b=2.5, c=True, d=None, e=['x', 2], g={'k': [1]}), g()]",
        [
            ("f", {"a": 1, "b": 2.5, "c": True, "d": None, "e": ["x", 2], "g": {"k": [1]}}),
            ("g", {}),
        ],
    ),
    "two_requests": (
        "API-Request: [f(a=1)]\nAPI-Request: [g(b='2')]",
        [("f", {"a": 1}), ("g", {"b": "2"})],
    ),
    "unquoted_words": (
        "API-Request: [HospitalLocator(location=New York City, service=emergency services)]",
        [("HospitalLocator", {"location": "New York City", "service": "emergency services"})],
    ),
    "unquoted_time": (
        "API-Request: [Lab(at=2034-01-01 10:00:00, n=2, zip=00123)]",
        [("Lab", {"at": "2034-01-01 10:00:00", "n": 2, "zip": "00123"})],
    ),
    "mixed_quotes": (
        """API-Request: [Book(who="O'Neil", note='say "hi"')]""",
        [("Book", {"who": "O'Neil", "note": 'say "hi"'})],
    ),
    "same_quotes_inside": (
        "API-Request: [AddMeeting(token='a9', attendees='['John Smith', 'Jane Doe']')]",
        [("AddMeeting", {"token": "a9", "attendees": "['John Smith', 'Jane Doe']"})],
    ),
    "a_call_in_the_same_quotes": (
        "API-Request: [Search(query='call g(x='1') now')]",
        [("Search", {"query": "call g(x='1') now"})],
    ),
    "objects_in_the_same_quotes": (
        "API-Request: [Record(time='09:30', data='[{'name': 'pressure', 'value': '120/80'}]')]",
        [("Record", {"time": "09:30", "data": "[{'name': 'pressure', 'value': '120/80'}]"})],
    ),
    "names_with_spaces_dots_dashes": (
        "API-Request: [Get Joke by ID(id='23'), a.b.c(p.q=1), createIn-AppMessage(ref-number='7')]",
        [
            ("Get Joke by ID", {"id": "23"}),
            ("a.b.c", {"p.q": 1}),
            ("createIn-AppMessage", {"ref-number": "7"}),
        ],
    ),
    "python_keywords_as_keys": (
        "API-Request: [FindTrains(from='Phoenix', class='Value')]",
        [("FindTrains", {"from": "Phoenix", "class": "Value"})],
    ),
    "commas_brackets_and_escapes_in_strings": (
        r"API-Request: [f(a='x, b=1) ]', c='it\'s \\ \n', d='a (b), c')]",
        [("f", {"a": "x, b=1) ]", "c": "it's \\ \n", "d": "a (b), c"})],
    ),
    "hermes": (
        '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": null}]}}\n</tool_call>',
        [("f", {"a": [1, {"b": None}]})],
    ),
    "two_hermes_calls": (
        'Let me look.<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [("f", {}), ("g", {"a": 1})],
    ),
    "two_hermes_calls_in_one_tag": (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n{"name": "g", "arguments": {}}\n'
        "</tool_call>",
        [("f", {"a": 1}), ("g", {})],
    ),
    "hermes_with_pythons_quotes": (
        """<tool_call>\n{'arguments': {'a': "it's", 'b': None}, 'name': 'f'}\n</tool_call>""",
        [("f", {"a": "it's", "b": None})],
    ),
    "names_of_several_words": (
        '[Market Trends API(trend_type="X", country="us"), Get All()]',
        [("Market Trends API", {"trend_type": "X", "country": "us"}), ("Get All", {})],
    ),
    "a_marker_in_a_request": (
        "Yes. API-Request: [f(q='API request: [g()]', n=1)]",
        [("f", {"q": "API request: [g()]", "n": 1})],
    ),
    "a_marker_in_a_list": (
        """[f(q="API-Request: [g()] <tool_call>{'name': 'g'}</tool_call>")]""",
        [("f", {"q": "API-Request: [g()] <tool_call>{'name': 'g'}</tool_call>"})],
    ),
    "a_marker_in_json": (
        'Here: {"name": "f", "arguments": {"q": "API request: now"}}.',
        [("f", {"q": "API request: now"})],
    ),
    "a_tag_before_the_calls": (
        "I use no <tool_call>here</tool_call>.\nAPI-Request: [f(a=1)]",
        [("f", {"a": 1})],
    ),
    "bare_json": ('{"name": "f", "arguments": {"city": "Zürich"}}', [("f", {"city": "Zürich"})]),
    "fenced_json_list": (
        '```json\n[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "arguments": {}}]\n```',
        [("f", {"a": 1}), ("g", {})],
    ),
    "openai_tool_calls": (
        '{"tool_calls": [{"id": "1", "type": "function", '
        '"function": {"name": "f", "arguments": "{\\"a\\": \\"b\\"}"}}]}',
        [("f", {"a": "b"})],
    ),
    "toolalpaca": (
        'Thought: I need it.\nAction: searchAnime\nAction Input: {"query": "Your Lie."}\n'
        'Action: getCast\nAction Input: {"animeId": ${animeId from searchAnime}}\nObservation: ok',
        [
            ("searchAnime", {"query": "Your Lie."}),
            ("getCast", {"animeId": "${animeId from searchAnime}"}),
        ],
    ),
    "bfcl_python": (
        "[math.gcd(a=12, b=-18), f(x=.5, y=1e3)]",
        [("math.gcd", {"a": 12, "b": -18}), ("f", {"x": 0.5, "y": 1000.0})],
    ),
}

DAMAGED = {
    "cut_in_a_string": ("API-Request: [f(a='one', b='tw", [("f", {"a": "one", "b": "tw"})]),
    "no_closing_bracket": ("API-Request: [f(a='one')", [("f", {"a": "one"})]),
    "no_brackets": ("API-Request: f(a='one')", [("f", {"a": "one"})]),
    "a_value_without_key": ("API-Request: [f('one', b=2)]", [("f", {"b": 2})]),
    "a_key_without_value": ("API-Request: [f(a=, b=2)]", [("f", {"a": "", "b": 2})]),
    "words_after_a_call": (
        "API-Request: [f(a=1) and g(b=2)",
        [("f", {"a": 1}), ("and g", {"b": 2})],
    ),
    "json_in_the_request": ('API-Request: {"name": "f", "arguments": {}}', [("f", {})]),
    "tag_not_closed": ('<tool_call>{"name": "f", "arguments": {"a": 1}}', [("f", {"a": 1})]),
    "tag_with_python_not_closed": (
        "<tool_call>{'name': 'f', 'arguments': {'a': 1}}",
        [("f", {"a": 1})],
    ),
    "tag_with_words": ("<tool_call>{name: f, arguments: {a: 1}}</tool_call>", [("f", {"a": 1})]),
    "cut_list_of_several_words": (
        '[Market Trends API(trend_type="X", country="u',
        [("Market Trends API", {"trend_type": "X", "country": "u"})],
    ),
    "tag_without_a_call": ("<tool_call>later</tool_call>", []),
    "cut_json": ('{"name": "f", "arguments": {"a": 1', [("f", {})]),
    "action_without_object": ("Action: f\nAction Input: none", [("f", {})]),
    "bare_call": ("f(a=1)", [("f", {"a": 1})]),
}

NO_CALL = [
    "",
    "   \n",
    "None of the available APIs can fulfil this request.",
    "API-Request: []",
    "API-Request:",
    "I found 7 results (all open).",
    'A record: {"name": "John", "age": 30}',
    "squares = [i*i for i in range(1, 11)]",
    'print("Hello World")',
    "x[stack.pop()] and [see Foo (2020)]",
    "Verb: wrote\nAction: writing.",
    "((((([[[[[{{{{{",
    "[link text foo(a=1)] more",
    "See [link text foo(a=1)] more",
    "please call:me{",
]


@pytest.mark.parametrize("case", WELL_FORMED)
def test_well_formed_calls_are_read_in_every_format(case):
    text, expected = WELL_FORMED[case]
    assert found(text) == expected
    assert parse_tool_calls(text).well_formed


@pytest.mark.parametrize("case", DAMAGED)
def test_of_damaged_calls_what_can_be_read_is_kept_but_they_are_not_well_formed(case):
    text, expected = DAMAGED[case]
    assert found(text) == expected
    assert not parse_tool_calls(text).well_formed


@pytest.mark.parametrize("text", NO_CALL)
def test_case_57_empty_and_ordinary_text_holds_no_call(text):
    assert found(text) == []
    assert not parse_tool_calls(text).well_formed


TAGGED = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize("thought", [TAGGED.replace("f", "g"), "API-Request: [g()]", "[g(a=1)] or"])
def test_a_call_considered_in_a_thought_is_not_made(thought):
    for opening in ("<think>\n", ""):  # the prompt may have opened the thought
        for answer in (TAGGED, "API-Request: [f(a=1)]", "[f(a=1)]"):
            assert found(f"{opening}{thought}\n</think>\n\n{answer}") == [("f", {"a": 1})]
        assert found(f"{opening}{thought}</think>I cannot do that.") == []
    assert found(f"<think>{thought} and then") == []


@pytest.mark.parametrize("answer", [TAGGED, "API-Request: [f(a=1)]", "[f(a=1)]"])
def test_the_end_of_a_thought_in_a_string_of_a_call_is_text(answer):
    answer = answer.replace("1", '"</think>"')
    assert found(answer) == [("f", {"a": "</think>"})]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text(alphabet=st.sampled_from(list("[](){}<>='\"\\,:. \n1aT-")), max_size=60).flatmap(
        lambda tail: st.sampled_from(
            [
                "",
                "API-Request: [",
                "<tool_call>{",
                'x{"name": "f", "arguments":',
                "Action: f\nAction Input:",
                "[f(",
                "<functioncall> {",
                "<tool_call><function=f><parameter=a>",
                "<tool_call>f<arg_key>",
                "call:f{a:",
                "to=functions.f json{",
                "<think>",
            ]
        ).map(lambda head: head + tail)
    )
)
def test_no_text_makes_the_parser_or_the_scorer_fail(text):
    parse_tool_calls(text)
    score = score_tool_calls(text, [{"name": "f", "arguments": {"a": text}}])
    assert all(0.0 <= value <= 1.0 for value in score.values())


REPEATED = [
    "[",
    "{",
    "(",
    "[f(a=",
    "[f(",
    "{'a':",
    '<tool_call>{"a":',
    "'",
    "a='b', '",
    "a" * 400 + "(",
    "<tool_call><function=f>",
    "<tool_call><function=f><parameter=a></parameter>",
    "<tool_call>f\n<arg_key>a</arg_key><arg_value>",
    "<functioncall>",
    "call:f{a:",
    "to=functions.f json{",
    "</think></tool_call>",
    "API request: [f(a='",
    "[f a(",
]


@pytest.mark.parametrize("part", REPEATED)
def test_endless_repetitions_are_read_without_recursion_errors_or_long_searches(part):
    text = part * (6000 // len(part))
    for head in ("", "API-Request: [f(a=", "<tool_call>", "Action: f\nAction Input:"):
        parse_tool_calls(head + text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
arguments = st.dictionaries(
    st.from_regex(r"[a-zA-Z_]\w{0,8}", fullmatch=True), json_values, max_size=4
)


@pytest.mark.parametrize("tag", ["<tool_call>", "</tool_call>", "</tool_call><tool_call>"])
def test_a_tag_in_a_string_of_a_hermes_call_is_text(tag):
    call = f"<tool_call>{json.dumps({'name': 'f', 'arguments': {'a': tag}})}</tool_call>"
    assert found(call) == [("f", {"a": tag})]
    assert found(f"{call}\n{call}") == [("f", {"a": tag})] * 2
    assert parse_tool_calls(call).well_formed
    assert not parse_tool_calls(call.removesuffix("</tool_call>")).well_formed


@settings(max_examples=150, deadline=None, derandomize=True)
@given(arguments)
def test_hermes_calls_come_back_exactly(values):
    text = f"<tool_call>{json.dumps({'name': 'f', 'arguments': values})}</tool_call>"
    assert found(text) == [("f", values)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.integers()
        | st.booleans()
        | st.none()
        | st.text(alphabet="abc XYZ.-/äß'\"\\\n\t", max_size=12)
        | st.lists(st.text(alphabet="ab c", max_size=4), max_size=3),
        max_size=4,
    )
)
def test_calls_written_by_repr_come_back_exactly(values):
    text = f"API-Request: [f({', '.join(f'{key}={value!r}' for key, value in values.items())})]"
    assert found(text) == [("f", values)]
