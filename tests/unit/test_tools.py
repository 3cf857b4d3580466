"""What a reply must obey, and the calls found in it, however it is cut."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema_rs import validator_for

from penstock.core.errors import InvalidRequest
from penstock.core.job import Message, Request, ResponseFormat, Tool
from penstock.core.tools import Call, ToolParser, call_id, check_schema, finish_reason, join, parse_tool_calls
from penstock.engines.models import BUNDLED
from penstock.engines.parts.guide import Guides
from penstock.engines.text.model import TextModel

MILLRACE = TextModel.load(BUNDLED / "millrace")
WEATHER = Tool("get_weather", "The weather of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOCK = Tool("clock")


def request(**fields: Any) -> Request:
    return Request(model="m", messages=(Message("user", "?"),), tools=(WEATHER, CLOCK), **fields)


HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "</tool_call> \\" Ulm"}}\n</tool_call>'
FORCED = '{"name": "get_weather", "arguments": {"city": "a } b"}}'

AUTO = [
    ("", "", []),
    ("Hello.", "Hello.", []),
    ("  Hello. ", "  Hello. ", []),
    (HERMES, None, [("get_weather", '{"city": "</tool_call> \\" Ulm"}')]),
    (f"I look.\n\n{HERMES}\n", "I look.", [("get_weather", '{"city": "</tool_call> \\" Ulm"}')]),
    (f'{HERMES}\n<tool_call>{{"name": "clock"}}</tool_call>', None, ["get_weather", ("clock", "{}")]),
    (f"{HERMES} And so on", " And so on", ["get_weather"]),
    ('<tool_call>{"name": "clock", "arguments": {}}', None, [("clock", "{}")]),  # no closing tag
    ('<tool_call>{"name": "clock", "arguments": {"a', '<tool_call>{"name": "clock", "arguments": {"a', []),
    ('a <tool_call>{"name": "rm", "arguments": {}}</tool_call> b', None, None),
    ("a <tool_call>nonsense</tool_call> b", None, None),
    ("1 < 2 <tool", None, None),
    ('{"name": "get_weather", "parameters": {"city": "Ulm"}}', None, [("get_weather", '{"city": "Ulm"}')]),
    ('{"name": "clock", "parameters": {}}; {"name": "clock"}', None, [("clock", "{}"), ("clock", "{}")]),
    ('{"name": "clock", "arguments": "{\\"a\\": 1}"}', None, [("clock", '{"a": 1}')]),
    ('{"name": "clock", "arguments": [1]}', None, None),
    # What a server elsewhere told to be a call is one, whatever its arguments and its name are.
    (
        '<tool_call>{"name": "clock", "arguments": "{\\"a\\": [1, </tool_call>"}</tool_call>',
        None,
        [("clock", '{"a": [1, </tool_call>')],
    ),
    ('<tool_call>{"name": "rm", "arguments": "-rf /"}</tool_call>', None, [("rm", "-rf /")]),
    ('{"name": "rm", "arguments": "-rf"}', None, None),
    ('{"name": "nobody", "parameters": {}}', None, None),
    ('{"answer": 42}', None, None),
    ("[1, 2]", None, None),
    ("[]", None, None),
    ('["a", {"name": "clock"}]', None, None),
    ('{"name": "clo', None, None),
    ('{"name": "clock"', None, None),
    ('{"arguments": {}}', None, None),
    ('{"id": "1", "type": "function", "name": "clock"}', None, [("clock", "{}")]),
    ('{"arguments": {"a": ["}", "\\""]}, "x": [1, {}], "name": "clock"}', None, [("clock", '{"a": ["}", "\\""]}')]),
    ('{"name": "clock", "parameters": null, "n": -1.5e3}', None, [("clock", "{}")]),
    ('{"name": "clock"} {"name": "clock"}. Done', None, None),
    ('{"name": "clock"}{"na', None, None),
    ("[TOOL_CALLED] [1]", None, None),
    ("[TOOL_CALLS] none", None, None),
    ('[1, 2]\n<tool_call>{"name": "clock"}</tool_call>', "[1, 2]", [("clock", "{}")]),
    ('{"answer": "<tool_call>{\\"name\\": \\"clock\\"}"', None, None),
    ('[{"name": "clock", "arguments": {"z": 1e400}}]', None, [("clock", '{"z": 1e400}')]),
    (
        ' [TOOL_CALLS] [{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]',
        None,
        ["clock", "clock"],
    ),
]


@pytest.mark.parametrize(("text", "content", "calls"), AUTO)
def test_calls_in_free_text(text: str, content: str | None, calls: list[Any] | None) -> None:
    found = parse_tool_calls(text, request())
    if calls is None:
        assert found == (text, []), "what is no call is text, unchanged"
        return
    assert found[0] == content
    assert [
        (c.name, c.arguments) if isinstance(e, tuple) else c.name for c, e in zip(found[1], calls, strict=True)
    ] == calls
    assert finish_reason(request(), "stop", text) == ("tool_calls" if calls else "stop")
    assert finish_reason(request(), "length", text) == "length"


@given(st.sampled_from([text for text, _, _ in AUTO]), st.data())
def test_any_cut_gives_the_same_at_every_point(text: str, data: st.DataObject) -> None:
    for choice in ("auto", "required"):
        for source in (text, FORCED, FORCED[:-1], FORCED[:40]):
            cuts = sorted(data.draw(st.lists(st.integers(0, len(source)), max_size=8)))
            parser, pieces = ToolParser(request(tool_choice=choice)), []
            for start, end in zip([0, *cuts], [*cuts, len(source)], strict=True):
                pieces += parser.push(source[start:end])
                at_once = ToolParser(request(tool_choice=choice)).push(source[:end])
                assert join(pieces) == join(at_once), "a resume at this point would say something else"
            pieces += parser.finish()
            assert join(pieces) == parse_tool_calls(source, request(tool_choice=choice))


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ('{"answer": 42}', '{"a'),
        ('{"x": 42}', '{"'),
        ("[1, 2]", "["),
        ("[ 1, 2]", "[ "),
        ('["a"]', "["),
        ("[TOOL] x", "[TOOL"),
        ("{ }", "{ "),
        ("{1: 2}", "{"),
        ('{"name": "nobody"}', '{"name": "'),
        ('{"name": "clock tower"}', '{"name": "clock'),
        ('{"name": 5}', '{"name": '),
        ('{"arguments": 5', '{"arguments": '),
        ('{"name" "clock"}', '{"name" '),
        ('{"name": "clock"} is one', '{"name": "clock"} '),
        ('[{"name": "clock"}; {', '[{"name": "clock"}'),
        ('{"parameters": {"a": 1]', '{"parameters": {"a": 1'),
    ],
)
def test_what_cannot_be_a_call_any_more_is_given_out_at_once(text: str, held: str) -> None:
    for more in (text[len(held)], text[len(held) :], text[len(held) :] + " and so on"):
        parser = ToolParser(request())
        assert parser.push(held) == [], "it may still become one"
        assert parser.push(more) == [(held + more).rstrip()]
        assert (
            join([*parser.push(" the end"), *parser.finish()])[0]
            == (held + more)[len((held + more).rstrip()) :] + " the end"
        )


@given(st.text('<>/tool_call{}[];,"\\ \nnameclock:arguments', max_size=200))
def test_nothing_is_lost_of_a_text_without_calls(text: str) -> None:
    content, calls = parse_tool_calls(text, request())
    assert calls or content == text


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists), max_size=4))
def test_any_arguments_come_back(arguments: dict[str, Any]) -> None:
    written = json.dumps({"name": "clock", "arguments": arguments})
    for text, choice in ((written, "required"), (written, "auto"), (f"<tool_call>{written}</tool_call>", "auto")):
        content, (call,) = parse_tool_calls(text, request(tool_choice=choice))
        assert (content, call.name, json.loads(call.arguments)) == (None, "clock", arguments)


def test_a_forced_call_that_was_cut_keeps_what_there_is() -> None:
    forced = request(tool_choice="required")
    assert parse_tool_calls(FORCED, forced) == (None, [Call("get_weather", '{"city": "a } b"}')])
    assert parse_tool_calls(FORCED[:-1], forced) == (None, [Call("get_weather", '{"city": "a } b"}')])
    assert parse_tool_calls(FORCED[:-2], forced) == (None, [Call("get_weather", '{"city": "a } b"')])
    assert parse_tool_calls(FORCED[:-5], forced) == (None, [Call("get_weather", '{"city": "a }')])


def test_who_may_be_called() -> None:
    text = '{"name": "clock", "arguments": {}}'
    assert parse_tool_calls(text, request(tool_choice="none")) == (text, [])
    assert parse_tool_calls(text, request(tool_choice="required", tool_name="get_weather")) == (text, [])
    two = f"{text}\n{text}"
    assert len(parse_tool_calls(two, request())[1]) == 2
    assert len(parse_tool_calls(two, request(parallel_tool_calls=False))[1]) == 1


def test_ids_depend_on_the_place_alone() -> None:
    places = [("job_1", 0, 0), ("job_1", 0, 1), ("job_1", 1, 0), ("job_2", 0, 0)]
    assert len({call_id(*place) for place in places}) == 4
    assert call_id("job_1", 0, 0) == call_id("job_1", 0, 0)


ONE = {"const": 1}
#: (a schema of arguments with the property a, what that may be, what not).
ARGUMENTS: list[tuple[dict[str, Any], Any, Any]] = [
    ({"$id": "https://x.org/t", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": ONE}}, 1, 2),
    ({"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": ONE}}, 1, 2),
    ({"properties": {"a": {"$ref": "#n"}}, "$defs": {"n": {"$anchor": "n", **ONE}}}, 1, 2),
    (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "properties": {"a": {"$ref": "#n"}},
            "definitions": {"x": {"$id": "#n", **ONE}},
        },
        1,
        2,
    ),
    ({"properties": {"a": {"const": {"$ref": "#/x"}}}}, {"$ref": "#/x"}, {"$ref": "#/$defs/clock/x"}),
    ({"properties": {"a": {"enum": [{"$ref": "#"}, {"$anchor": "n"}]}}}, {"$anchor": "n"}, {"$anchor": "_clock.n"}),
    ({"properties": {"a": {"default": {"$ref": "#"}, "examples": [{"$ref": "#"}], "type": "integer"}}}, 1, "x"),
    (
        {
            "properties": {"a": {"$ref": "#/$defs/const"}},
            "$defs": {"const": {"$ref": "#/$defs/enum"}, "enum": ONE},
        },
        1,
        2,
    ),
    (
        {"properties": {"a": {"properties": {"const": {"$ref": "#/$defs/n"}}}}, "$defs": {"n": ONE}},
        {"const": 1},
        {"const": 2},
    ),
    (
        {"properties": {"a": {"properties": {"$ref": {"$ref": "#/$defs/n"}}}}, "$defs": {"n": ONE}},
        {"$ref": 1},
        {"$ref": 2},
    ),
    (
        {
            "properties": {"a": {"$ref": "in"}},
            "$defs": {"r": {"$id": "in", "$ref": "#/$defs/n", "$defs": {"n": ONE}}, "n": {"const": 2}},
        },
        1,
        2,
    ),
    (
        {"properties": {"a": {"$ref": "#/components/n"}}, "components": {"n": {"$ref": "#/components/m"}, "m": ONE}},
        1,
        2,
    ),
]
NESTED = {"properties": {"a": {}}}
#: (a schema of arguments, or of their property x; may there be others beside a? None: not even a).
CLOSED: list[tuple[dict[str, Any], bool | None]] = [
    (NESTED, True),
    ({"properties": {"x": {"type": "object", **NESTED}}}, True),
    ({"properties": {"x": {"type": "array", "items": NESTED}}}, True),
    ({"properties": {"x": {"anyOf": [NESTED, {"type": "null"}]}}}, True),
    ({"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": NESTED}}, True),
    ({**NESTED, "additionalProperties": {}}, False),
    ({**NESTED, "unevaluatedProperties": True}, False),
    ({**NESTED, "patternProperties": {"^b": {}}}, False),
    ({**NESTED, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, False),
    ({"allOf": [NESTED, {"properties": {"b": {}}}]}, False),
    ({"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {}}}], "$defs": {"a": NESTED}}, False),
    ({"$ref": "#/$defs/a", "properties": {"b": {}}, "$defs": {"a": NESTED}}, False),
    ({"if": {"properties": {"a": ONE}}, "then": {"properties": {"b": {}}}}, False),
    ({"type": "object"}, False),
    ({**NESTED, "required": ["a", "b"]}, None),
    ({"properties": {}, "required": ["a"]}, False),
    ({"properties": {}, "minProperties": 1}, False),
    ({"properties": {"x": {"type": "object"}}}, False),
    ({"properties": {"x": {"const": {"properties": {"a": {}}, "b": 1}}}}, None),
]


class TestGuide:
    def test_free_replies_have_none(self) -> None:
        assert request().guide is None
        assert request(tool_choice="none").guide is None

    def test_formats_are_their_schema(self) -> None:
        schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "integer"}}}
        assert Request(model="m", prompt="p", response_format=ResponseFormat("json_schema", schema)).guide == schema
        assert Request(model="m", prompt="p", response_format=ResponseFormat("json_object")).guide == {"type": "object"}

    def test_a_named_tool(self) -> None:
        guide = request(tool_choice="required", tool_name="clock").guide
        assert guide is not None
        assert guide["properties"]["name"] == {"const": "clock"}
        assert "anyOf" not in guide

    def test_references_are_found_where_a_schema_has_moved_to(self) -> None:
        tree = Tool("tree", "", {"properties": {"left": {"$ref": "#"}, "x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {}}})
        guide = Request(model="m", messages=(), tools=(tree, CLOCK), tool_choice="required").guide
        assert guide is not None
        moved = guide["$defs"]["tree"]["properties"]
        assert moved == {"left": {"$ref": "#/$defs/tree"}, "x": {"$ref": "#/$defs/tree/$defs/x"}}
        assert [option["properties"]["arguments"] for option in guide["anyOf"]] == [
            {"$ref": "#/$defs/tree"},
            {"$ref": "#/$defs/clock"},
        ]

    @pytest.mark.parametrize(
        ("schema", "right", "wrong"),
        ARGUMENTS,
    )
    def test_arguments_are_what_their_own_schema_says(self, schema: dict[str, Any], right: Any, wrong: Any) -> None:
        schema = {"type": "object", "required": ["a"], **schema}
        other = Tool("other", "", {**schema, "properties": {"a": {"const": "other"}}})
        for tools in ((Tool("clock", "", schema),), (Tool("clock", "", schema), other)):
            asked = Request(model="m", messages=(), tools=tools, tool_choice="required")
            for value, fits in ((right, True), (wrong, False)):
                assert validator_for(schema).is_valid({"a": value}) is fits
                call = {"name": "clock", "arguments": {"a": value}}
                assert validator_for(asked.guide).is_valid(call) is fits
                matcher = Guides(MILLRACE).begin(asked)
                assert matcher is not None
                for token in MILLRACE.tokenizer.encode(json.dumps(call)).ids:
                    matcher.accept(token)
                assert (matcher.error is None) is fits

    @pytest.mark.parametrize(
        ("schema", "closed"),
        CLOSED,
    )
    def test_what_the_arguments_schema_does_not_list_is_forbidden(self, schema: Any, closed: bool | None) -> None:
        asked = request(tool_choice="required", tool_name="clock")
        guide = msgspec.structs.replace(asked, tools=(Tool("clock", "", schema),)).guide
        nested = "x" in schema.get("properties", {})

        def fits(inner: Any) -> bool:
            inner = [inner] if "items" in schema.get("properties", {}).get("x", {}) else inner
            call = {"name": "clock", "arguments": {"x": inner} if nested else inner}
            return validator_for(guide).is_valid(call)

        assert fits({"a": 1}) is (closed is not None)
        assert fits({"a": 1, "b": 1}) is (closed is False or "required" in schema)
        if nested and closed is None:
            assert fits({"properties": {"a": {}}, "b": 1}), "an instance is not a schema"

    def test_a_format_is_not_closed(self) -> None:
        form = {"type": "object", "properties": {"a": {}}}
        assert Request(model="m", prompt="p", response_format=ResponseFormat("json_schema", form)).guide == form
        beside = request(response_format=ResponseFormat("json_schema", form)).guide
        assert beside is not None
        assert beside["$defs"][".answer"] == form

    @pytest.mark.parametrize("name", ["password", "int32", "json-pointer", "made-up"])
    def test_a_format_that_no_grammar_knows_is_an_annotation(self, name: str) -> None:
        plain = {"type": "string", "const": {"format": name}}
        form = {"properties": {"format": {**plain, "format": name}, "day": {"type": "string", "format": "date"}}}
        wanted = {"properties": {"format": plain, "day": {"type": "string", "format": "date"}}}
        assert Request(model="m", prompt="p", response_format=ResponseFormat("json_schema", form)).guide == wanted
        guide = request(tool_choice="required", response_format=ResponseFormat("json_schema", form)).guide
        assert guide is not None
        assert name not in json.dumps(guide).replace(json.dumps(plain), "")

    def test_a_format_beside_tools_leaves_the_choice(self) -> None:
        guide = request(response_format=ResponseFormat("json_object")).guide
        assert guide is not None
        assert len(guide["anyOf"]) == 3


class TestBounds:
    @pytest.mark.parametrize(
        ("schema", "words"),
        [
            ({"enum": ["x" * 70_000]}, "bytes"),
            ({"multipleOf": 99_991}, "multipleOf"),
            ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf"),
            ({"multipleOf": 1e-9}, "multipleOf"),
            ({"enum": [2**64]}, "64 bits"),
            ({"properties": {"x": {"minimum": -(2**63) - 1}}}, "64 bits"),
        ],
    )
    def test_what_costs_too_much(self, schema: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidRequest, match=words) as caught:
            check_schema(schema, "response_format")
        assert caught.value.param == "response_format"

    def test_depth(self) -> None:
        schema: dict[str, Any] = {}
        for _ in range(63):
            schema = {"items": schema}
        check_schema(schema, "p")
        with pytest.raises(InvalidRequest, match="levels"):
            check_schema({"items": schema}, "p")

    def test_what_people_write(self) -> None:
        check_schema({"properties": {"multipleOf": {"type": "string"}, "price": {"multipleOf": 0.01}}}, "p")
        check_schema({"properties": {"a": {"multipleOf": 5}, "b": {"multipleOf": 0.001}}}, "p")
        check_schema({"enum": [2**64 - 1, -(2**63), True]}, "p")
