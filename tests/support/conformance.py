"""Whether an answer of a server is one that ``/openapi.json`` describes: status, content type, JSON, each event's data.

The integration tests' client and their event streams ask this of all that they see.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from typing import Any
from urllib.parse import unquote

import httpx
from jsonschema_rs import Draft202012Validator

from penstock.gateway import openapi
from penstock.gateway.app import OPERATIONS

#: Routes that are files or describe the API itself.
UNDESCRIBED = re.compile(r"/|/static/.*|/openapi\.json|/docs|/metrics")

#: (method, path, status or event) that were seen, and how often.
seen: Counter[tuple[str, str, str]] = Counter()


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI document of all routes."""
    return openapi.document(OPERATIONS)


@functools.cache
def _paths() -> list[tuple[re.Pattern[str], str]]:
    """Every path as a pattern; a model's name may have slashes. Fixed paths before those with parameters."""
    paths = sorted(document()["paths"], key=lambda path: path.count("{"))
    return [
        (re.compile(re.sub(r"\\\{(\w+)\\\}", lambda m: ".+" if m[1] == "model" else "[^/]+", re.escape(path))), path)
        for path in paths
    ]


def operation(method: str, path: str) -> tuple[str, dict[str, Any]] | None:
    """The documented path and operation of a request; None where there is none (a 404 or a 405)."""
    for pattern, template in _paths():
        found = document()["paths"][template].get(method.lower())
        if found is not None and pattern.fullmatch(unquote(path)):
            return template, found
    return None


@functools.cache
def _validator(pointer: str) -> Draft202012Validator:
    schema: Any = document()
    for part in pointer.split("|"):
        schema = schema[int(part) if isinstance(schema, list) else part]
    return Draft202012Validator({**schema, "components": document()["components"]})


def _check(pointer: str, value: Any, what: str) -> None:
    errors = [f"{error.message} at {error.instance_path}" for error in _validator(pointer).iter_errors(value)]
    assert not errors, f"{what} is not as documented: {'; '.join(errors)}: {json.dumps(value)[:1000]}"


def check_answer(method: str, path: str, status: int, content_type: str, body: bytes | None) -> None:
    """*body* is None where it is a stream: its events are checked one by one."""
    method = "GET" if method == "HEAD" else method
    found = operation(method, path)
    what = f"{method} {path} → {status} {content_type}"
    if found is None:
        assert UNDESCRIBED.fullmatch(path) or status in (400, 404, 405), f"{what}: the route is not documented"
        return
    template, described = found
    code = str(status) if str(status) in described["responses"] else "default"
    answer = described["responses"][code]
    pointer = f"paths|{template}|{method.lower()}|responses|{code}"
    if "$ref" in answer:
        name = answer["$ref"].rsplit("/", 1)[1]
        pointer, answer = f"components|responses|{name}", document()["components"]["responses"][name]
    assert code != "default" or status >= 400, f"{what}: the status is not documented"
    seen[method, template, str(status)] += 1
    content = answer.get("content", {})
    kind = content_type.partition(";")[0]
    if not content:
        assert not body, f"{what}: there is a body, where none is documented"
        return
    assert kind in content, f"{what}: the content type is not documented"
    if kind == "application/json" and body is not None:
        _check(f"{pointer}|content|{kind}|schema", json.loads(body), what)


def check_event(method: str, path: str, name: str, data: str) -> None:
    """One event of a stream that began with a 200."""
    found = operation(method, path)
    assert found is not None
    template, described = found
    what = f"the event {name!r} of {method} {template}"
    seen[method, template, name] += 1
    options = described["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]["anyOf"]
    number = next((i for i, option in enumerate(options) if option["properties"]["event"]["const"] == name), None)
    assert number is not None, f"{what} is not documented"
    pointer = (
        f"paths|{template}|{method.lower()}|responses|200|content|text/event-stream|itemSchema|anyOf|{number}"
        "|properties|data"
    )
    if name == "message":
        if data == "[DONE]":
            return
        pointer += "|anyOf|1"
    _check(f"{pointer}|contentSchema", json.loads(data), what)


async def conforms(reply: httpx.Response) -> None:
    """A response hook for `httpx.AsyncClient`."""
    kind = reply.headers.get("content-type", "")
    stream = kind.startswith("text/event-stream")
    body = None if stream or reply.request.method == "HEAD" else await reply.aread()
    check_answer(reply.request.method, reply.request.url.path, reply.status_code, kind, body)
