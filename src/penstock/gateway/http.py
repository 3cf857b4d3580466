"""What every route needs of HTTP: the call, its body read under limits, answers and errors in one shape."""

from __future__ import annotations

import codecs
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.api.errors import ErrorBody
from penstock.core.errors import (
    InvalidRequest,
    PenstockError,
    RequestTooLarge,
    Unsupported,
    UnsupportedEncoding,
)
from penstock.core.job import Priority, Request
from penstock.core.tasks import Tokenized
from penstock.core.trace import TraceContext
from penstock.gateway import lenient
from penstock.gateway.identity import Identity
from penstock.gateway.jobs import Jobs, Submission

T = TypeVar("T")

_encoder = msgspec.json.Encoder()
_AT_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")


class Resource(Generic[T]):
    """The key of something that a server may have or not, as its files. *missing*: what who asks for it is told."""

    def __init__(self, missing: str) -> None:
        self.missing = missing


Resources = Mapping[Resource[Any], Any]


class Call:
    """One HTTP request on its way through a route, and what its handler may use: the jobs of who sent it."""

    def __init__(self, jobs: Jobs, resources: Resources, scope: Scope, receive: Receive) -> None:
        self.jobs = jobs
        self.catalogue = jobs.catalogue
        self.config = jobs.config
        self.streams = jobs.streams
        self.scope = scope
        self.receive = receive
        self._resources = resources
        self.headers = Headers(scope=scope)
        self.query = QueryParams(scope["query_string"])
        self.path: dict[str, str] = scope.get("path_params", {})
        self.request_id: str = scope.get("penstock.request_id", "")
        self.is_head: bool = scope["method"] == "HEAD"
        """Only the head of the answer is asked for: nothing needs to be followed, nor waited for."""

    @property
    def identity(self) -> Identity:
        return self.jobs.identity

    @property
    def trace(self) -> str | None:
        """The trace that the request is part of, with the span that asked (W3C's ``traceparent``)."""
        given = TraceContext.parse(", ".join(self.headers.getlist("traceparent")) or None)
        return str(given) if given is not None else None

    def use(self, resource: Resource[T]) -> T:
        """What this server has under *resource*. Raises `Unsupported` (501) where it has none."""
        found: T | None = self._resources.get(resource)
        if found is None:
            error = Unsupported(resource.missing)
            error.status = 501
            raise error
        return found

    def has(self, resource: Resource[Any]) -> bool:
        return self._resources.get(resource) is not None

    async def body(self, kind: type[T]) -> T:
        """The JSON body as *kind*. Raises `InvalidRequest`, `RequestTooLarge`, `UnsupportedEncoding`."""
        return decode(await self.raw_body(), kind)

    async def raw_body(self) -> bytes:
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise UnsupportedEncoding(f"Content-Encoding {encoding[:40]!r} is not accepted: send the body as it is.")
        limit = self.config.max_body
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise InvalidRequest("The body is incomplete, or its chunks are malformed.")
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise RequestTooLarge(f"The body is larger than {limit} bytes.")
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def tokens_of(self, request: Request) -> Tokenized:
        """What an engine makes of a *request* to tokenize: a job, dropped once it is answered. It takes next to
        nothing, so it goes before what takes long."""
        submission = Submission(
            priority=Priority.INTERACTIVE, request_id=self.request_id, trace=self.trace, on_disconnect="cancel"
        )
        _, completion = await self.jobs.run_once(request, submission, self.disconnected)
        return Tokenized.of(completion)

    async def disconnected(self) -> None:
        """Returns when the client has left."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    @property
    def last_event_id(self) -> int | None:
        """Where to resume: the ``Last-Event-ID`` header, or ``?after=``."""
        text = self.headers.get("last-event-id") or self.query.get("after")
        if text is None or text == "":
            return None
        position = whole_number(text, digits=15)
        if position is None:
            raise InvalidRequest("Last-Event-ID (or ?after=) is a position: a whole number from 0.", param="after")
        return position


def whole_number(text: str, *, digits: int) -> int | None:
    """What *text* says, of a header or the query; None where that is no whole number from 0, or longer."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def decode(raw: bytes, kind: type[T]) -> T:
    """The JSON text *raw* as *kind*, as `lenient` has it. Raises `InvalidRequest`."""
    raw = raw.removeprefix(codecs.BOM_UTF8)  # some clients' mark at the beginning (RFC 8259, 8.1)
    try:
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.ValidationError as error:
            return _leniently(raw, kind, error)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(_not_json(raw, error)) from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error


def _leniently(raw: bytes, kind: type[T], strictly: msgspec.ValidationError) -> T:
    try:
        value = msgspec.json.decode(raw)
    except msgspec.ValidationError:  # a number that is none anywhere; the typed reader knows where it is
        raise strictly from None
    return msgspec.convert(lenient.plain(value, kind), kind)


#: The escapes in a JSON text; half of a surrogate pair is the group 1.
_ESCAPES = re.compile(rb"\\(?:ud[89ab]..\\ud[c-f]..|(ud[89a-f]..)|.)", re.IGNORECASE | re.DOTALL)


def _not_json(raw: bytes, error: Exception) -> str:
    """Why *raw* cannot be read, in other words than the decoder's where those don't help."""
    try:
        raw.decode()
    except UnicodeDecodeError as wrong:
        return f"The body is not valid UTF-8: byte {wrong.start} is 0x{raw[wrong.start]:02x}."
    if half := next((escape[1] for escape in _ESCAPES.finditer(raw) if escape[1]), None):
        return (
            f'The body is not valid JSON: "\\{half.decode()}" is half a character: the other half of its surrogate '
            "pair is missing. It may be a text that was cut within an emoji."
        )
    return f"The body is not valid JSON: {error}"


def _explain(message: str) -> InvalidRequest:
    """msgspec's "Expected `int` >= 1 - at `$.max_tokens`", with the field as ``param``."""
    found = _AT_PATH.search(message)
    if found is None:
        field = re.search(r"(?:unknown|missing required) field `(.*?)`", message)
        return InvalidRequest(message, param=field[1] if field else None)
    return InvalidRequest(f"{found[1]}: {message[: found.start()]}", param=found[1] or None)


def json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encoder.encode(value), status, headers, "application/json")


def error_reply(error: PenstockError, headers: dict[str, str] | None = None, body: Any = None) -> Response:
    """The one error shape (or a dialect's *body* around it). 429 and 503 say when to come back."""
    headers = dict(headers or {})
    if error.status in (429, 503):
        seconds = error.retry_after if error.retry_after is not None else 1.0
        headers["retry-after"] = str(max(1, round(seconds)))
        headers["retry-after-ms"] = str(max(1, round(seconds * 1000)))
    return json_reply(body or ErrorBody.of(error.info), error.status, headers)


class Dialect(msgspec.Struct, frozen=True):
    """How clients of one kind are spoken to where their request fails, at whatever point.

    *failure* is the body's type. *refuse* writes a failure, given the request's id and headers of the answer.
    """

    failure: type
    refuse: Callable[[str, PenstockError, dict[str, str] | None], Response]


NATIVE = Dialect(ErrorBody, lambda request_id, error, headers: error_reply(error, headers))


async def refuse(
    error: PenstockError, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None
) -> None:
    """Answer with *error*, in the words of the dialect in which was asked. The metrics count it too."""
    scope["penstock.error"] = error.code
    dialect: Dialect = scope.get("penstock.dialect", NATIVE)
    await dialect.refuse(scope.get("penstock.request_id", ""), error, headers)(scope, receive, send)


Handler = Callable[[Call], Awaitable[ASGIApp]]
