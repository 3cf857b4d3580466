"""The API described for machines (``/openapi.json``) and people (``/docs``), from the types that routes decode."""

from __future__ import annotations

import functools
import html
from typing import Any

import msgspec

from penstock import __version__
from penstock.core.job import Status
from penstock.gateway.batches.routes import CreateBatch
from penstock.gateway.dialects.anthropic.routes import CountTokens, CreateMessage
from penstock.gateway.dialects.compat.routes import GenerateVLLM, PromptBody, PromptsBody
from penstock.gateway.dialects.fields import JobBody
from penstock.gateway.dialects.native.routes import Generate, GenerateJob
from penstock.gateway.dialects.openai.chat import ChatCompletion
from penstock.gateway.dialects.openai.completions import TextCompletion
from penstock.gateway.dialects.openai.embeddings import CreateEmbeddings
from penstock.gateway.dialects.responses.routes import CountInputTokens, CreateResponse
from penstock.gateway.dialects.tokens.routes import Detokenize, Tokenize
from penstock.gateway.files.routes import FileUpload
from penstock.gateway.operator.models import ManageModel
from penstock.gateway.schemas import ANSWERS, EVENTS, FOR_ANTHROPIC, ErrorBody, Key, MessageErrorBody

_ID = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]


_MODEL = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]


def _query(**names: str) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", "schema": {"type": kind}} for name, kind in names.items()]


def _limit(most: int) -> dict[str, Any]:
    return {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": most}}


_LAST_EVENT_ID: dict[str, Any] = {"name": "Last-Event-ID", "in": "header", "schema": {"type": "string"}}
_RESUME = [_LAST_EVENT_ID, *_query(after="string")]
#: Where the ids of events are positions.
_RESUME_AT = [
    {**_LAST_EVENT_ID, "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"}},
    {"name": "after", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}},
]
_ORDER = {"name": "order", "in": "query", "schema": {"type": "string", "enum": ["asc", "desc"]}}
_STATUS = "|".join(Status)

_OF_USER: list[dict[str, Any]] = [
    {"name": "user_id", "in": "query", "required": True, "schema": {"type": "string"}},
    *_RESUME,
]

#: (method, path) → summary, body type, status of success, whether it may answer as SSE, parameters
OPERATIONS: dict[Key, tuple[str, type | None, int, bool, list[dict[str, Any]]]] = {
    ("POST", "/v1/jobs"): ("Submit a job; never waits", GenerateJob, 202, False, []),
    ("GET", "/v1/jobs"): (
        "List jobs, newest first",
        None,
        200,
        False,
        [
            {
                "name": "status",
                "in": "query",
                "schema": {"type": "string", "pattern": f"^({_STATUS})(,({_STATUS}))*$"},
            },
            *_query(model="string", user_id="string", cursor="string"),
            _limit(500),
        ],
    ),
    ("GET", "/v1/jobs/{id}"): ("A job, with its result once it has ended", None, 200, False, _ID),
    ("GET", "/v1/jobs/{id}/events"): ("The job's log as SSE; resumable", None, 200, True, _ID + _RESUME_AT),
    ("DELETE", "/v1/jobs/{id}"): ("Drop a job and its result; one that runs is cancelled", None, 200, False, _ID),
    ("POST", "/v1/jobs/{id}/cancel"): ("Cancel a job; idempotent", None, 200, False, _ID),
    ("GET", "/v1/events"): (
        "All jobs of a user over one SSE stream; resumable",
        None,
        200,
        True,
        _OF_USER,
    ),
    ("POST", "/v1/generate"): ("Generate: one JSON reply, or a stream", Generate, 200, True, []),
    ("POST", "/v1/chat/completions"): ("OpenAI chat completions", ChatCompletion, 200, True, []),
    ("POST", "/v1/completions"): ("OpenAI completions", TextCompletion, 200, True, []),
    ("POST", "/v1/responses"): ("OpenAI responses; in the background, too", CreateResponse, 200, True, []),
    ("POST", "/v1/responses/compact"): ("Not offered", None, 404, False, []),
    ("POST", "/v1/responses/input_tokens"): (
        "How many tokens a response's input has",
        CountInputTokens,
        200,
        False,
        [],
    ),
    ("GET", "/v1/responses/{id}"): (
        "A response as it is, or its events; resumable",
        None,
        200,
        True,
        [
            *_ID,
            {"name": "stream", "in": "query", "schema": {"type": "string", "enum": ["true", "false"]}},
            *_query(starting_after="integer"),
            _LAST_EVENT_ID,
        ],
    ),
    ("DELETE", "/v1/responses/{id}"): ("Drop a response; one that runs is cancelled", None, 200, False, _ID),
    ("POST", "/v1/responses/{id}/cancel"): ("Cancel a background response; idempotent", None, 200, False, _ID),
    ("GET", "/v1/responses/{id}/input_items"): (
        "The items that a response answers",
        None,
        200,
        False,
        [
            *_ID,
            _ORDER,
            _limit(100),
            *_query(after="string"),
        ],
    ),
    ("POST", "/v1/files"): ("Upload the input of a batch", FileUpload, 200, False, []),
    ("GET", "/v1/files"): (
        "List files",
        None,
        200,
        False,
        [
            *_query(purpose="string", after="string"),
            _limit(10_000),
            _ORDER,
        ],
    ),
    ("GET", "/v1/files/{id}"): ("What is known of a file", None, 200, False, _ID),
    ("DELETE", "/v1/files/{id}"): ("Delete a file", None, 200, False, _ID),
    ("GET", "/v1/files/{id}/content"): ("A file's content", None, 200, False, _ID),
    ("POST", "/v1/batches"): ("Run the requests of a file at batch priority", CreateBatch, 200, False, []),
    ("GET", "/v1/batches"): (
        "List batches, newest first",
        None,
        200,
        False,
        [*_query(after="string"), _limit(100)],
    ),
    ("GET", "/v1/batches/{id}"): ("A batch: how far it is, and where its results are", None, 200, False, _ID),
    ("POST", "/v1/batches/{id}/cancel"): ("Cancel a batch; idempotent", None, 200, False, _ID),
    ("POST", "/v1/embeddings"): ("OpenAI embeddings", CreateEmbeddings, 200, False, []),
    ("POST", "/tokenize"): ("The tokens of a prompt or of messages", Tokenize, 200, False, []),
    ("POST", "/detokenize"): ("The text of token ids", Detokenize, 200, False, []),
    ("POST", "/v1/messages"): ("Anthropic Messages", CreateMessage, 200, True, []),
    ("POST", "/v1/messages/count_tokens"): ("How many tokens a message's input has", CountTokens, 200, False, []),
    ("GET", "/v1/models"): (
        "The models served. To who sends an anthropic-version: as Anthropic has them, in pages",
        None,
        200,
        False,
        [],
    ),
    ("GET", "/v1/models/{model:path}"): ("One model", None, 200, False, _MODEL),
    ("POST", "/v1/models/{model:path}/load"): ("Load a model of this process", ManageModel, 200, True, _MODEL),
    ("POST", "/v1/models/{model:path}/unload"): ("Unload a model of this process", ManageModel, 200, True, _MODEL),
    ("POST", "/submit_job"): ("Queue a prompt for a user", PromptBody, 200, False, _query(user_id="string")),
    ("GET", "/events"): ("All jobs of a user over one SSE stream; resumable", None, 200, True, _OF_USER),
    ("POST", "/generate"): (
        "One prompt: a task to ask for later (202). Several: all their results",
        PromptsBody,
        202,
        False,
        [],
    ),
    ("GET", "/result/{id}"): ("What became of a task; 202 while it has not ended", None, 200, False, _ID),
    ("GET", "/status/{id}"): ("A task's state and its place in the queue", None, 200, False, _ID),
    ("POST", "/basic_generate"): ("One prompt or several, answered when done", PromptsBody, 200, False, []),
    ("POST", "/generate_stream"): ("One prompt as SSE", PromptBody, 200, True, []),
    ("POST", "/api/v1/req"): ("One prompt as SSE: pings while it waits, then its tokens", PromptBody, 200, True, []),
    ("POST", "/generate_vllm"): ("Several prompts on a model that vLLM runs", GenerateVLLM, 200, False, []),
    ("GET", "/healthz"): ("Liveness", None, 200, False, []),
    ("GET", "/readyz"): ("Readiness", None, 200, False, []),
    ("GET", "/health"): ("Broker, workers, models, queue", None, 200, False, []),
}

#: The shapes of failures: ours, and that of Anthropic's routes.
FAILURES: dict[str, type] = {"Error": ErrorBody, "MessageError": MessageErrorBody}


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI document; of version 3.2, the first that can say what the events of a stream are."""
    bodies = {body for _, body, *_ in OPERATIONS.values() if body is not None}
    answers = {kind for answers in ANSWERS.values() for kind in answers.values()}
    events = {kind for events in EVENTS.values() for kind in events.values()}
    others = {*FOR_ANTHROPIC.values(), *FAILURES.values()}
    kinds = sorted({*bodies, *answers, *events, *others}, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(kinds, schemas, strict=True))
    asked: dict[str, Any] = msgspec.json.schema_components(bodies - {FileUpload})[1]  # that one is a form
    for name in asked:
        _nullable(components[name])
    paths: dict[str, Any] = {}
    for (method, path), (summary, body, status, stream, parameters) in OPERATIONS.items():
        responses: dict[str, Any] = {}
        for code, kind in ANSWERS.get((method, path), {} if stream else {status: None}).items():
            schema = schema_of[kind] if kind is not None else {"type": "object"}
            if (method, path) in FOR_ANTHROPIC:
                schema = {"anyOf": [schema, schema_of[FOR_ANTHROPIC[method, path]]]}
            responses[str(code)] = {"description": summary, "content": {"application/json": {"schema": schema}}}
        if stream:
            answer = responses.setdefault("200", {"description": summary, "content": {}})
            kinds_of = {name: schema_of[kind] for name, kind in EVENTS.get((method, path), {}).items()}
            answer["content"]["text/event-stream"] = {"itemSchema": _event(kinds_of, schema_of[ErrorBody])}
        if path == "/v1/files/{id}/content":
            raw = {"schema": {"type": "string", "format": "binary"}}
            responses["200"]["content"] = {"application/octet-stream": raw}
            part = {"application/octet-stream": raw, "multipart/byteranges": raw}
            responses["206"] = {"description": "What the header `Range` asked for", "content": part}
        if path in ("/v1/jobs/{id}/events", "/v1/responses/{id}") and stream:
            responses["204"] = {"description": "Everything was delivered already"}
        failures = _failures((method, path), body, parameters)
        responses |= {code: answer for code, answer in failures.items() if code not in responses}
        operation: dict[str, Any] = {"summary": summary, "responses": responses}
        if parameters:
            operation["parameters"] = parameters
        if body is not None:
            required = body is not ManageModel
            media = "multipart/form-data" if body is FileUpload else "application/json"
            operation["requestBody"] = {"required": required, "content": {media: {"schema": schema_of[body]}}}
        paths.setdefault(path.replace(":path", ""), {})[method.lower()] = operation
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "Penstock",
            "version": __version__,
            "description": "Submit once, stream anywhere, lose nothing.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {
                **{name: _failure(schema_of[kind]) for name, kind in FAILURES.items()},
                "EitherError": _failure({"anyOf": [schema_of[kind] for kind in FAILURES.values()]}),
            },
        },
    }


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


def _failure(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "Error", "content": {"application/json": {"schema": schema}}}


def _failures(key: Key, body: type | None, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    """The failures that a client should expect of an operation; any other has the same shape."""
    path = key[1]
    statuses: set[int] = set()
    if body is not None or parameters:
        statuses.add(400)
    if body is not None:
        statuses |= {413, 415}
    if body is not None and issubclass(body, JobBody):
        statuses |= {404, 422, 429, 503}
    if "{" in path:
        statuses.add(404)
    name = "MessageError" if path.startswith("/v1/messages") else "EitherError" if key in FOR_ANTHROPIC else "Error"
    error = {"$ref": f"#/components/responses/{name}"}
    return {**{str(status): error for status in sorted(statuses)}, "default": error}


@functools.cache
def page() -> str:
    """The same as one self-contained HTML page: no script, no network."""
    rows = []
    for path, operations in document()["paths"].items():
        for method, operation in operations.items():
            fields = "".join(_parameter(parameter) for parameter in operation.get("parameters", []))
            body = operation.get("requestBody")
            if body is not None:
                fields += "".join(_fields(content["schema"]) for content in body["content"].values())
            rows.append(
                f"<details><summary><code><b>{method.upper()}</b> {html.escape(path)}</code> "
                f"{html.escape(operation['summary'])}</summary><table>{fields}</table></details>"
            )
    return _PAGE.format(version=__version__, rows="\n".join(rows))


def _parameter(parameter: dict[str, Any]) -> str:
    return _row(
        parameter["name"], f"{parameter['in']}, {parameter['schema']['type']}", parameter.get("required", False)
    )


def _fields(schema: dict[str, Any]) -> str:
    components = document()["components"]["schemas"]
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
