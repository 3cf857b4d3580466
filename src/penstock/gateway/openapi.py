"""The API described for machines (``/openapi.json``) and people (``/docs``), from the table of operations."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp

from penstock import __version__
from penstock.api.base import WireType
from penstock.api.errors import ErrorBody
from penstock.gateway.dialects.fields import JobBody
from penstock.gateway.http import Call, json_reply
from penstock.gateway.operation import Content, Operation

Schema = dict[str, Any]


def operations(described: Sequence[Operation]) -> list[Operation]:
    """The routes that tell of those *described*."""
    known = functools.cache(lambda: document(described))

    async def openapi_json(call: Call) -> ASGIApp:
        return json_reply(known())

    async def docs(call: Call) -> ASGIApp:
        return HTMLResponse(page(known()))

    return [
        Operation("GET", "/openapi.json", openapi_json, scope="public"),
        Operation("GET", "/docs", docs, scope="public"),
    ]


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI document; of version 3.2, the first that can say what the events of a stream are."""
    described = [operation for operation in operations if operation.summary]
    schemas, components = _schemas(described)
    paths: dict[str, dict[str, Any]] = {}
    for operation in described:
        if operation.header:
            continue  # told of with the one beside it
        same = (operation.method, operation.path)
        others = [other for other in described if other.header and (other.method, other.path) == same]
        path = paths.setdefault(operation.path.replace(":path", ""), {})
        path[operation.method.lower()] = _operation(operation, others, schemas)
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "Penstock",
            "version": __version__,
            "description": "Submit once, stream anywhere, lose nothing.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components, "responses": _failures(described, schemas)},
    }


def _schemas(described: Sequence[Operation]) -> tuple[dict[type, Schema], dict[str, Schema]]:
    """A reference to each type that is said or heard, and what those refer to."""
    bodies = {operation.body: operation.body_media for operation in described if operation.body is not None}
    said: set[type] = {ErrorBody, *(operation.dialect.failure for operation in described)}
    for operation in described:
        said |= {kind for kind in operation.answers.values() if not isinstance(kind, Content)}
        said |= set(operation.events.values())
    kinds = sorted(said | bodies.keys(), key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    as_json = {body for body, media in bodies.items() if media == "application/json"}
    for name in msgspec.json.schema_components(as_json)[1]:
        _nullable(components[name])
    for answer in _kinds_of(WireType):
        if answer.__name__ in components:
            _exact(components[answer.__name__])
    return dict(zip(kinds, schemas, strict=True)), components


def _operation(operation: Operation, others: Sequence[Operation], schemas: dict[type, Schema]) -> dict[str, Any]:
    """*others*: those that answer who sends their header."""
    responses: dict[str, Any] = {}
    for status, kind in operation.answers.items():
        if isinstance(kind, Content):
            continue
        options = [schemas[kind], *(schemas[other.answers[status]] for other in others)]  # type: ignore[index]
        schema = options[0] if len(options) == 1 else {"anyOf": options}
        responses[str(status)] = {
            "description": operation.summary,
            "content": {"application/json": {"schema": schema}},
        }
    if operation.events:
        stream = responses.setdefault("200", {"description": operation.summary, "content": {}})
        data = {name: schemas[kind] for name, kind in operation.events.items()}
        stream["content"]["text/event-stream"] = {"itemSchema": _event(data, schemas[ErrorBody])}
    for status, kind in operation.answers.items():
        if isinstance(kind, Content):
            responses[str(status)] = _content(kind, operation.summary)
    failure = _EITHER if others else _name(operation.dialect.failure)
    for code in (*sorted(_statuses(operation)), "default"):
        responses.setdefault(str(code), {"$ref": f"#/components/responses/{failure}"})
    found: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.parameters:
        found["parameters"] = operation.parameters
    if operation.body is not None:
        content = {operation.body_media: {"schema": schemas[operation.body]}}
        found["requestBody"] = {"required": operation.body_required, "content": content}
    return found


def _content(content: Content, summary: str) -> dict[str, Any]:
    raw = {"schema": {"type": "string", "format": "binary"}}
    found: dict[str, Any] = {"description": content.description or summary}
    return found | ({"content": dict.fromkeys(content.media, raw)} if content.media else {})


def _nullable(body: dict[str, Any]) -> None:
    """Let null stand for what may be left out of a *body*, as `lenient` does."""
    for name, kind in body["properties"].items():
        if name in body.get("required", ()) or kind.keys() <= {"default", "description"}:
            continue
        options = kind.get(
            "anyOf", [{key: each for key, each in kind.items() if key not in ("default", "description")}]
        )
        if {"type": "null"} not in options:
            around = {key: each for key, each in kind.items() if key in ("default", "description")}
            body["properties"][name] = {"anyOf": [*options, {"type": "null"}], **around}


def _exact(answer: Schema) -> None:
    """An *answer* has no other fields, and one with a default is left out instead of null."""
    answer["additionalProperties"] = False
    for name, kind in answer["properties"].items():
        if kind.get("default", "") is None:
            options = [option for option in kind["anyOf"] if option != {"type": "null"}]
            only = options[0] if len(options) == 1 else {"anyOf": options}
            told = {"description": kind["description"]} if "description" in kind else {}
            answer["properties"][name] = only | told


def _kinds_of(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds_of(kind)


def _event(data: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """One event of a stream, given the schema of the data of each by its name. One without a name has a chunk of
    OpenAI's, an error, or the end."""
    options = []
    for name, schema in data.items():
        unnamed = name == "message"
        content = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
        if unnamed:
            content["contentSchema"] = {"anyOf": [schema, error]}
        text = {"anyOf": [{"const": "[DONE]"}, content]} if unnamed else content
        options.append(
            {
                "type": "object",
                "properties": {"event": {"const": name}, "data": text, "id": {"type": "string"}},
                "required": ["data"] if unnamed else ["event", "data"],
            }
        )
    return {"description": "A server-sent event (docs/protocol.md)", "anyOf": options}


#: The name of a failure in the shape of whichever dialect was asked in.
_EITHER = "EitherError"


def _name(failure: type) -> str:
    return failure.__name__.removesuffix("Body")


def _failures(described: Sequence[Operation], schemas: dict[type, Schema]) -> dict[str, Any]:
    """The shapes of failures, by their names."""
    shapes = {operation.dialect.failure: schemas[operation.dialect.failure] for operation in described}
    return {
        **{_name(kind): _failure(schema) for kind, schema in shapes.items()},
        _EITHER: _failure({"anyOf": [*shapes.values()]}),
    }


def _failure(schema: Schema) -> dict[str, Any]:
    return {"description": "Error", "content": {"application/json": {"schema": schema}}}


def _statuses(operation: Operation) -> set[int]:
    """The failures that a client should expect; any other has the same shape."""
    statuses: set[int] = set()
    if operation.body is not None or operation.parameters:
        statuses.add(400)
    if operation.body is not None:
        statuses |= {413, 415}
        if issubclass(operation.body, JobBody):
            statuses |= {404, 422, 429, 503}
    if "{" in operation.path:
        statuses.add(404)
    return statuses


def page(document: dict[str, Any]) -> str:
    """A *document* as one self-contained HTML page: no script, no network."""
    rows = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            fields = "".join(_parameter(parameter) for parameter in operation.get("parameters", []))
            body = operation.get("requestBody")
            if body is not None:
                fields += "".join(_fields(document, content["schema"]) for content in body["content"].values())
            rows.append(
                f"<details><summary><code><b>{method.upper()}</b> {html.escape(path)}</code> "
                f"{html.escape(operation['summary'])}</summary><table>{fields}</table></details>"
            )
    return _PAGE.format(version=__version__, rows="\n".join(rows))


def _parameter(parameter: dict[str, Any]) -> str:
    return _row(
        parameter["name"], f"{parameter['in']}, {parameter['schema']['type']}", parameter.get("required", False)
    )


def _fields(document: dict[str, Any], schema: Schema) -> str:
    components = document["components"]["schemas"]
    resolved = components[schema["$ref"].rsplit("/", 1)[1]]
    required = resolved.get("required", [])
    return "".join(_row(name, _kind(kind), name in required) for name, kind in resolved["properties"].items())


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(_kind(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    kind = "one of " + ", ".join(map(str, schema["enum"])) if "enum" in schema else str(schema.get("type", "any"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "maxLength": "length ≤", "maxItems": "items ≤"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return f"{kind} ({', '.join(limits)})" if limits else kind


def _row(name: str, kind: str, required: bool) -> str:
    star = " *" if required else ""
    return f"<tr><td><code>{html.escape(name)}{star}</code></td><td>{html.escape(kind)}</td></tr>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Penstock API</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
details {{ border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); padding: .4rem 0; }}
summary {{ cursor: pointer; }} table {{ margin: .5rem 1.2rem; }} td {{ padding: 0 1rem 0 0; vertical-align: top; }}
</style></head><body>
<h1>Penstock {version}</h1>
<p>Submit once, stream anywhere, lose nothing. Machine-readable: <a href="/openapi.json">openapi.json</a>.
Fields with a star are required.</p>
{rows}
</body></html>
"""
