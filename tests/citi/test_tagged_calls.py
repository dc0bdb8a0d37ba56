"""Calls in the forms that chat templates write."""

from __future__ import annotations

import pytest

from citi.evaluation.tool_calls import parse_tool_calls, score_tool_calls

WELL_FORMED = {
    "xml": (
        "<tool_call>\n<function=f>\n<parameter=a>\nx <b> \n y\n</parameter>\n<parameter=n>\n2\n"
        "</parameter>\n</function>\n</tool_call>",
        [("f", {"a": "x <b> \n y", "n": "2"})],
    ),
    "two_xml_calls": (
        "Let me look.\n\n<tool_call>\n<function=f>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=a.g>\n<parameter=a>\n\n</parameter>\n</function>\n</tool_call>",
        [("f", {}), ("a.g", {"a": ""})],
    ),
    "glm": (
        "<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>n</arg_key>\n"
        "<arg_value>[1, 2]</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>",
        [("f", {"city": "Paris", "n": "[1, 2]"}), ("g", {})],
    ),
    "glm_in_one_line": (
        "<tool_call>f<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>",
        [("f", {"city": "Paris"})],
    ),
    "glaive": (
        """<functioncall> {"name": "f", "arguments": '{"from": "USD", "to": "O'Neil"}'} """
        "</functioncall>",
        [("f", {"from": "USD", "to": "O'Neil"})],
    ),
    "glaive_with_its_end_token": (
        """Sure. <functioncall> {"name": "f", "arguments": '{"a": 1}'} <|endoftext|>""",
        [("f", {"a": 1})],
    ),
    "glaive_with_json": (
        '<functioncall> {"name": "f", "arguments": {"a": 1}}\n<functioncall> {"name": "g", '
        '"arguments": "{}"}',
        [("f", {"a": 1}), ("g", {})],
    ),
    "gemma_4": (
        'call:f{a:<|"|>x, "y"<|"|>,n:2,o:{k:[true,null]}}call:a.g{}',
        [("f", {"a": 'x, "y"', "n": 2, "o": {"k": [True, None]}}), ("a.g", {})],
    ),
    "gemma_4_with_its_tags": (
        '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|><|tool_call>call:g{}<tool_call|>',
        [("f", {"a": "x"}), ("g", {})],
    ),
    "gpt_oss": (
        'to=functions.get_w<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        [("get_w", {"city": "Paris"})],
    ),
    "gpt_oss_decoded": ('to=functions.get_wcommentary json{"a": 1}', [("get_w", {"a": 1})]),
    "gpt_oss_as_generated": (
        "I need it.assistant<|channel|>commentary to=functions.get_commentary <|constrain|>json"
        '<|message|>{"a": 1}',
        [("get_commentary", {"a": 1})],
    ),
}

DAMAGED = {
    "cut_xml": (
        "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n<parameter=b>\ncut",
        [("f", {"a": "x"})],
    ),
    "xml_not_closed": (
        "<tool_call><function=f>\n</function>\n<tool_call><function=g>\n</function></tool_call>",
        [("f", {}), ("g", {})],
    ),
    "cut_glm": ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x", [("f", {})]),
    "cut_glaive": ("""<functioncall> {"name": "f", "arguments": '{"a": "x""", [("f", {})]),
    "cut_gpt_oss": ('to=functions.fcommentary json{"a": "x', [("f", {})]),
}


def found(text: str) -> list[tuple[str, dict]]:
    return [(call.name, call.arguments) for call in parse_tool_calls(text).calls]


@pytest.mark.parametrize("case", WELL_FORMED)
def test_well_formed_calls_are_read_in_the_form_of_every_template(case):
    text, expected = WELL_FORMED[case]
    assert found(text) == expected
    assert parse_tool_calls(text).well_formed


@pytest.mark.parametrize("case", DAMAGED)
def test_of_damaged_tagged_calls_what_can_be_read_is_kept(case):
    text, expected = DAMAGED[case]
    assert found(text) == expected
    assert not parse_tool_calls(text).well_formed


def test_glaives_arguments_count_in_the_scores():
    gold = [{"name": "f", "arguments": {"from": "USD"}}]
    text = """<functioncall> {"name": "f", "arguments": '{"from": "EUR"}'} <|endoftext|>"""
    assert score_tool_calls(text, gold)["exact"] == 0.0
    assert score_tool_calls(text.replace("EUR", "USD"), gold)["exact"] == 1.0
