"""What a reply must obey, and whom it may call."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from jsonschema_rs import validator_for

from penstock.core.bounds import check_schema
from penstock.core.calls import call_id
from penstock.core.errors import InvalidRequest
from penstock.core.job import Message, Request, ResponseFormat, Tool
from penstock.engines.parts.guide import Guides
from penstock.engines.text.model import TextModel
from penstock.models.catalogue import PACKAGED

MILLRACE = TextModel.load(PACKAGED / "millrace")
WEATHER = Tool("get_weather", "The weather of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOCK = Tool("clock")


def request(**fields: Any) -> Request:
    return Request(model="m", messages=(Message("user", "?"),), tools=(WEATHER, CLOCK), **fields)


def test_who_may_be_called() -> None:
    assert request().callable_tools == (WEATHER, CLOCK)
    assert request(tool_choice="none").callable_tools == ()
    assert request(tool_choice="required", tool_name="clock").callable_tools == (CLOCK,)


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
