"""Every field of every body: what is taken and refused, derived from the types, and as ``/openapi.json`` says it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator
from msgspec import inspect

from penstock.core.errors import InvalidRequest
from penstock.gateway.app import OPERATIONS
from penstock.gateway.batches.routes import CreateBatch
from penstock.gateway.dialects.compat.bodies import PromptsBody
from penstock.gateway.dialects.native.bodies import GenerateJob
from penstock.gateway.dialects.openai.bodies import ChatCompletion, TextCompletion
from penstock.gateway.files.routes import FileUpload
from penstock.gateway.http import decode
from tests.support.conformance import document

#: The bodies of all POST routes but the upload's, which is a form.
KINDS = sorted(
    {operation.body for operation in OPERATIONS if operation.body is not None} - {FileUpload},
    key=lambda kind: kind.__name__,
)
#: Of which a `PromptsBody` has one.
PROMPTS = ("prompt", "prompts")
#: What a field may be sent instead of what it should be.
ANYTHING: list[Any] = ["text", "", 7, -7, 7.0, 7.5, 1e300, True, [], [7.5], ["text"], [[]], {}, {"x": 1}, {"type": 7}]


def bare(kind: inspect.Type) -> list[inspect.Type]:
    """The alternatives of a type, without what is said about it."""
    if isinstance(kind, inspect.Metadata):
        return bare(kind.type)
    if isinstance(kind, inspect.UnionType):
        return [each for part in kind.types for each in bare(part)]
    return [kind]


def takes_null(kind: inspect.Type) -> bool:
    return any(isinstance(each, inspect.NoneType | inspect.AnyType) for each in bare(kind))


def examples(kind: inspect.Type) -> list[Any]:
    """A value of each alternative of a type, with as little in it as may be."""
    if isinstance(kind, inspect.Metadata) and "enum" in (kind.extra_json_schema or {}):
        return list(kind.extra_json_schema["enum"])
    found: list[Any] = []
    for each in bare(kind):
        match each:
            case inspect.StructType(fields=fields, tag_field=tag_field, tag=tag):
                tagged = {} if tag_field is None else {tag_field: tag}
                required = {field.encode_name: examples(field.type)[0] for field in fields if field.required}
                found.append({**tagged, **required})
            case inspect.ListType(item_type=item):
                found += [[value] for value in examples(item)]
            case inspect.DictType():
                found.append({})
            case inspect.LiteralType(values=values):
                found.append(values[0])
            case inspect.IntType(ge=least):
                found.append(max(3, least or 3))
            case inspect.FloatType():
                found.append(0.5)
            case inspect.BoolType():
                found.append(True)
            case inspect.StrType():
                found.append("x")
            case inspect.AnyType():
                found.append("anything")
    return found


Wrap = Callable[[dict[str, Any]], dict[str, Any]]


def structs(kind: inspect.Type, path: str, wrap: Wrap, seen: tuple[type, ...]) -> Iterator[tuple[Any, str, Wrap]]:
    """Each object of a body: its type, the path of its fields, and the body around a value of it."""
    for each in bare(kind):
        match each:
            case inspect.StructType(cls=cls, fields=fields) if cls not in seen:
                yield each, path, wrap
                least = examples(each)[0]
                for field in fields:

                    def inner(value: Any, least: Any = least, name: str = field.encode_name) -> dict[str, Any]:
                        return wrap({**least, name: value})

                    yield from structs(field.type, f"{path}.{field.encode_name}", inner, (*seen, cls))
            case inspect.ListType(item_type=item):
                yield from structs(item, f"{path}[0]", lambda value: wrap([value]), seen)  # type: ignore[arg-type]


def fields() -> Iterator[Any]:
    """Every field: its body's type, its path and type, whether it is required, and a body with or without it."""
    for kind in KINDS:
        for struct, path, wrap in structs(inspect.type_info(kind), "", lambda value: value, ()):
            least = examples(struct)[0]
            for field in struct.fields:
                name = field.encode_name
                base = {key: value for key, value in least.items() if key != name}
                if struct.cls is PromptsBody and name not in PROMPTS:
                    base = {"prompt": "x"}

                def body(value: Any = ..., base: Any = base, name: str = name, wrap: Wrap = wrap) -> Any:
                    return wrap(base if value is ... else {**base, name: value})

                yield pytest.param(kind, f"{path}.{name}".lstrip("."), field, body, id=f"{kind.__name__}{path}.{name}")


FIELDS = list(fields())


@functools.cache
def validator(kind: type) -> Draft202012Validator:
    components = document()["components"]
    return Draft202012Validator({"$ref": f"#/components/schemas/{kind.__name__}", "components": components})


def document_allows(kind: type, body: Any) -> bool:
    return bool(validator(kind).is_valid(body))


def read(kind: type, body: Any) -> Any:
    return decode(json.dumps(body).encode(), kind)


def refused(kind: type, body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(kind, body)
    assert caught.value.param is not None, caught.value.message
    assert caught.value.param.startswith(param), caught.value.message
    assert not document_allows(kind, body), f"the document allows {body}"


def with_ints(value: Any, change: Callable[[int], Any]) -> Any:
    """*value* with every integer in it changed."""
    if type(value) is int:
        return change(value)
    if isinstance(value, list):
        return [with_ints(each, change) for each in value]
    return {name: with_ints(each, change) for name, each in value.items()} if isinstance(value, dict) else value


def test_there_is_much_to_test() -> None:
    assert {operation.batch.body for operation in OPERATIONS if operation.batch is not None} <= set(KINDS)
    assert len(FIELDS) > 400
    assert sum("[0]" in field.id for field in FIELDS) > 50
    assert sum(isinstance(each, inspect.IntType) for field in FIELDS for each in bare(field.values[2].type)) > 40


@pytest.mark.parametrize(("kind", "path", "field", "body"), FIELDS)
class TestEveryField:
    def test_null_is_the_same_as_nothing(self, kind: type, path: str, field: inspect.Field, body: Any) -> None:
        if field.required and not takes_null(field.type):
            refused(kind, body(None), path)
            refused(kind, body(), path.rpartition(".")[0] or path)
            return
        assert document_allows(kind, body(None))
        if field.required:
            read(kind, body(None))
        elif kind is PromptsBody and path in PROMPTS:
            for nothing in (body(None), body()):
                with pytest.raises(InvalidRequest, match="either one 'prompt'"):
                    read(kind, nothing)
        else:
            assert read(kind, body(None)) == read(kind, body())

    def test_an_integer_may_be_written_as_a_float(self, kind: type, path: str, field: inspect.Field, body: Any) -> None:
        free = any(isinstance(each, inspect.FloatType | inspect.AnyType) for each in bare(field.type))
        for value in examples(field.type):
            floats = with_ints(value, float)
            assert document_allows(kind, body(floats))
            assert read(kind, body(floats)) == read(kind, body(value))
            if with_ints(value, str) != value and not free:
                refused(kind, body(with_ints(value, lambda number: number + 0.5)), path)
                refused(kind, body(with_ints(value, lambda number: 1e300)), path)
                refused(kind, body(with_ints(value, lambda number: True)), path)

    def test_anything_else_is_refused_where_the_document_says_so(
        self, kind: type, path: str, field: inspect.Field, body: Any
    ) -> None:
        for value in ANYTHING:
            if document_allows(kind, body(value)):
                read(kind, body(value))
            elif (kind, path) != (CreateBatch, "endpoint") or not isinstance(value, str):  # its route says which exist
                refused(kind, body(value), path)


class TestFreeJson:
    """What is not ours to read stays as it came."""

    def test_a_schema_keeps_its_nulls_and_floats(self) -> None:
        schema = {"enum": [None, 3.0], "default": None, "minimum": 1.0, "properties": {"n": None}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": None}}
        message = {"role": "user", "content": "x", "tool_calls": None}
        body = {"model": "m", "messages": [message], "tools": [tool], "max_tokens": 3.0}
        found = read(ChatCompletion, body)
        assert found.tools[0].function.parameters == schema
        assert type(found.tools[0].function.parameters["minimum"]) is float
        assert found.max_tokens == 3

    def test_a_number_stays_a_float_where_one_is_wanted(self) -> None:
        found = read(GenerateJob, {"prompt": "x", "temperature": 1.0, "logit_bias": {"5": 2.0}, "top_k": 2.0})
        assert (type(found.temperature), type(found.top_k)) == (float, int)


class TestText:
    """What cannot be read at all, said so that whoever sent it knows why."""

    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    @pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "max_tokens": 3.0}], ids=["exact", "lenient"])
    def test_a_byte_order_mark_is_no_part_of_it(self, mark: bytes, body: dict[str, Any]) -> None:
        assert decode(mark + json.dumps(body).encode(), GenerateJob).prompt == "x"

    def test_but_one_only_at_the_beginning(self) -> None:
        for raw in (b"\xef\xbb\xbf" * 2 + b'{"prompt": "x"}', b' \xef\xbb\xbf{"prompt": "x"}'):
            with pytest.raises(InvalidRequest):
                decode(raw, GenerateJob)

    @pytest.mark.parametrize(
        ("written", "half"),
        [
            (r"\ud83d", r"\ud83d"), (r"a\uD83D", r"\uD83D"), (r"\ud83dx", r"\ud83d"), (r"\ude00", r"\ude00"),
            (r"\ud83d\u0041", r"\ud83d"), (r"\ud83d\ud83d", r"\ud83d"), (r"\ud83d\n", r"\ud83d"),
            (r"\ud83d\ude00\ud83d", r"\ud83d"), (r"\\ud83d\udfff", r"\udfff"),
        ],
    )  # fmt: skip
    def test_half_a_character_is_named(self, written: str, half: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            decode(b'{"prompt": "%s"}' % written.encode(), GenerateJob)
        assert f'"{half}" is half a character' in caught.value.message

    @pytest.mark.parametrize("written", [r"\\ud83d", r"\ud83d\ude00", r"\\\\ude00", "\U0001f600"])
    def test_whole_ones_are_text(self, written: str) -> None:
        assert decode(b'{"prompt": "%s"}' % written.encode(), GenerateJob).prompt == json.loads(f'"{written}"')

    @pytest.mark.parametrize("bad", [b"\xed\xa0\xbd", b"\xff", b"\xc3(", b"\xf0\x9f\x98"])
    def test_bytes_that_are_no_utf8_are_counted_out(self, bad: bytes) -> None:
        with pytest.raises(InvalidRequest, match=f"not valid UTF-8: byte 12 is 0x{bad[0]:02x}"):
            decode(b'{"prompt": "' + bad + b'"}', GenerateJob)

    def test_the_field_that_is_wrong_is_named_beside_nulls_and_floats(self) -> None:
        for wrong, param in (({"temperature": "hot"}, "temperature"), ({"stop": [None]}, "stop[0]")):
            with pytest.raises(InvalidRequest) as caught:
                read(TextCompletion, {"stream": None, "n": 1.0, "model": "m", "prompt": "x", **wrong})
            assert caught.value.param == param
