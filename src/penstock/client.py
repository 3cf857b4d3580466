"""The Python client: submit once, stream anywhere, resume by itself.

`Client` and `AsyncClient` share one implementation, `_Core`, written as coroutines over a `_Wire`: the few things that
differ between blocking and asynchronous HTTP. The blocking wire's coroutines never suspend, so `Client` runs the same
code to its end in one step, without an event loop.

Everything is retried that a retry can cure: a dropped connection, a refused one, a server that restarts (502, 503,
504) or is full (429). A stream reconnects with ``Last-Event-ID`` and continues behind the last token it delivered; a
submit carries an idempotency key, so that one whose answer was lost makes no second job. Failures are the exceptions
of `penstock.core.errors`, rebuilt from the wire, and the two below.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
import msgspec

from penstock import __version__
from penstock.core.errors import ErrorInfo, InvalidRequest, LogRewound, PenstockError, error_from_info
from penstock.core.foreign import Malformed, decode
from penstock.core.job import Status, Usage
from penstock.core.ports import LoadProgress

__all__ = [
    "AsyncClient",
    "Client",
    "End",
    "JobView",
    "ModelView",
    "Options",
    "ProtocolError",
    "Result",
    "Timings",
    "Token",
    "Unreachable",
]

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"

#: Statuses that a later attempt may cure: overloaded, restarting, a proxy without its server.
RETRYABLE = frozenset({408, 429, 502, 503, 504})

#: Exponential backoff with full jitter, in seconds: the first pause is up to the first, no pause above the second
#: (both on top of what the server asks for).
BACKOFF, BACKOFF_MAX = 0.25, 8.0

#: Seconds that cancelling an abandoned job may take.
ABANDON_TIMEOUT = 2.0


class Unreachable(PenstockError):
    """The server cannot be reached, or went away and did not come back within *give_up* seconds."""

    status = 503
    code = "unreachable"


class ProtocolError(PenstockError):
    """What answers is no Penstock server, or its log has a gap, a repeat or a stale attempt."""

    status = 502
    code = "protocol_error"


# ---------------------------------------------------------------------------------------------- what comes back


class Token(msgspec.Struct, frozen=True):
    """One token of a job's log. ``text`` is what it completed (may be empty); ``index``: which of the n choices."""

    position: int
    text: str
    id: int
    attempt: int
    index: int = 0
    logprob: float | None = None
    top_logprobs: tuple[dict[str, Any], ...] = ()


class End(msgspec.Struct, frozen=True):
    """The end of a job's log: ``error`` is set unless the job completed."""

    position: int
    status: Status
    finish_reasons: tuple[str, ...] = ()
    usage: Usage | None = None
    error: ErrorInfo | None = None

    @property
    def finish_reason(self) -> str | None:
        return self.finish_reasons[0] if self.finish_reasons else None

    def raise_for_status(self) -> None:
        """Raise the job's error unless it completed."""
        if self.error is not None:
            raise error_from_info(self.error)


class Result(msgspec.Struct, frozen=True):
    """A completed job: the text of each of its n choices, why each ended, and what it used."""

    job_id: str
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def finish_reason(self) -> str:
        return self.finish_reasons[0]


class Output(msgspec.Struct, frozen=True):
    """The result part of a `JobView`."""

    text: str
    texts: tuple[str, ...] | None = None


class Timings(msgspec.Struct, frozen=True):
    """Of a job that has ended; in seconds, None where it never got that far."""

    queue_wait_time: float | None = None
    processing_time: float | None = None
    total_time: float | None = None
    time_to_first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_second: float | None = None


class JobView(msgspec.Struct, frozen=True):
    """A job as the server shows it. A fresh submit has ``id``, ``status``, ``position_in_queue`` and ``links`` only;
    ``result``, ``usage`` and ``timings`` come with ``Client.job`` once it has ended. Times are seconds since the epoch.
    """

    id: str
    status: Status
    position_in_queue: int | None = None
    model: str | None = None
    user_id: str | None = None
    priority: str | None = None
    attempt: int = 0
    tokens: int = 0
    created_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    deadline_at: float | None = None
    request_id: str | None = None
    metadata: dict[str, str] = {}
    finish_reason: str | None = None
    finish_reasons: tuple[str, ...] | None = None
    error: ErrorInfo | None = None
    result: Output | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    links: dict[str, str] = {}


class ModelView(msgspec.Struct, frozen=True):
    """A served model. ``state``: ready, loading, restarting, unloading, draining, unloaded, failed, or unavailable (no
    worker, or nobody behind it); what comes after ``engine`` is known once a worker has had it up."""

    id: str
    state: str = "ready"
    engine: str | None = None
    context_length: int | None = None
    precision: str | None = None
    deterministic: bool | None = None
    chat: bool | None = None
    unsupported: tuple[str, ...] | None = None
    """Request fields that it cannot honour."""


class Options(TypedDict, total=False):
    """How to generate: the optional fields of ``POST /v1/jobs``. None means the server's default."""

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | None
    ignore_eos: bool | None
    n: int | None
    logprobs: int | None
    user_id: str | None
    priority: Literal["interactive", "normal", "batch"] | None
    deadline: float | None
    metadata: Mapping[str, str] | None
    idempotency_key: str | None
    """Of the caller's own; by default every submit gets a fresh one."""


Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]
OnRetry = Callable[[PenstockError, float], None]
OnProgress = Callable[[LoadProgress], None]


# ---------------------------------------------------------------------------------------------- server-sent events


class ServerEvent(NamedTuple):
    event: str
    data: str
    id: str


class SSEDecoder:
    """Bytes in, events out, after the WHATWG rules, wherever the bytes are cut. One decoder per connection: what is
    left of a torn block goes with it."""

    def __init__(self) -> None:
        self.retry: int | None = None
        """The reconnection time last asked for, in milliseconds."""
        self.comments = 0
        """How many comment lines (heartbeats) have come."""
        self._rest = b""
        self._after_cr = False
        self._at_start = True
        self._id = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that *chunk* completes."""
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")  # the second half of a CRLF
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        lines = (self._rest + chunk).splitlines(keepends=True)  # of bytes: at CR, LF and CRLF, nothing else
        self._rest = b"" if lines[-1].endswith((b"\r", b"\n")) else lines.pop()
        events = []
        for line in lines:
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        return events

    def _line(self, line: bytes) -> ServerEvent | None:
        if self._at_start:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        if not line:
            return self._dispatch()
        name, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value)
        elif name == "":
            self.comments += 1
        return None

    def _dispatch(self) -> ServerEvent | None:
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return ServerEvent(event, "\n".join(data), self._id) if data else None


# ---------------------------------------------------------------------------------------------- resuming


class _TokenData(msgspec.Struct):
    token: str
    token_id: int
    attempt: int
    index: int = 0
    logprob: float | None = None
    top_logprobs: tuple[dict[str, Any], ...] = ()


class _EndData(msgspec.Struct):
    status: Status
    finish_reason: str | None = None
    finish_reasons: tuple[str, ...] = ()
    usage: Usage | None = None
    error: ErrorInfo | None = None


class Cursor:
    """How far a log was delivered. Checks that every connection continues it, and drops what was delivered before."""

    def __init__(self, after: int) -> None:
        self.position = after
        self._attempt = 0
        self._here: int | None = None
        self._ended = False

    def reconnected(self) -> None:
        self._here = None

    def take(self, event: ServerEvent) -> Token | End | None:
        """*event* as the next token or the end; None if it is old, or of a kind that we don't know.

        Raises `LogRewound` when the server's log is shorter than what was delivered, `ProtocolError` when the log has
        a gap, a repeat or an attempt that was over.
        """
        if self._ended:
            raise ProtocolError(f"The stream goes on after its end, with {event.event[:40]!r}.")
        try:
            if event.event == "token":
                token = decode(event.data, _TokenData)
                position = self._advance(event.id)
                if position is None:
                    return None
                if token.attempt < self._attempt:
                    raise ProtocolError(f"Attempt {token.attempt} wrote at {position}, after attempt {self._attempt}.")
                self._attempt = token.attempt
                return Token(
                    position, token.token, token.token_id, token.attempt, token.index, token.logprob, token.top_logprobs
                )
            if event.event in ("done", "error"):
                end = decode(event.data, _EndData)
                if end.error is not None and end.error.code == LogRewound.code:
                    raise LogRewound(end.error.message, param=end.error.param)
                position = self._advance(event.id)
                if position is None:
                    raise ProtocolError(f"The log ends at {event.id}, but {self.position} was delivered before.")
                self._ended = True
                reasons = end.finish_reasons or ((end.finish_reason,) if end.finish_reason else ())
                return End(position, end.status, reasons, end.usage, end.error)
        except Malformed as error:
            raise ProtocolError(f"An event of the stream cannot be read: {error}") from error
        return None

    def _advance(self, id: str) -> int | None:
        """The event's position if it is the next one, None if it was delivered by an earlier connection."""
        if not (id.isascii() and id.isdigit()):
            raise ProtocolError(f"An event of the stream has the id {id[:40]!r}, which is not a position.")
        position = int(id)
        here, self._here = self._here, position
        in_order = position == here + 1 if here is not None else 1 <= position <= self.position + 1
        if not in_order:
            raise ProtocolError(f"The stream jumps to position {position} after {here or self.position}.")
        if position <= self.position:
            return None
        self.position = position
        return position


class Patience:
    """How long to wait before the next attempt, and when to give up: after *limit* seconds without any progress."""

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._failing_since: float | None = None
        self._failures = 0

    def progress(self) -> None:
        self._failing_since = None
        self._failures = 0

    def pause(self, error: PenstockError, asked: float = 0.0) -> float:
        """Seconds to wait after *error*, at least those that the server *asked* for. Raises *error* when it is over.

        The clock starts at the first failure, not at the last progress: a caller may take its time between two tokens.
        """
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        left = self._limit - (now - self._failing_since)
        if left <= 0 or asked > left:
            raise error
        jitter = random.uniform(0, min(BACKOFF_MAX, BACKOFF * 2 ** min(self._failures, 10)))
        self._failures += 1
        return min(asked + jitter, left)


# ---------------------------------------------------------------------------------------------- the wire


class _Wire(Protocol):
    """What differs between the two clients."""

    @property
    def http(self) -> httpx.Client | httpx.AsyncClient: ...
    async def open(self, request: httpx.Request) -> httpx.Response:
        """Send *request* and return when the headers have come."""
        ...

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]: ...
    async def read(self, response: httpx.Response) -> bytes: ...
    async def end(self, response: httpx.Response) -> None: ...
    async def sleep(self, seconds: float) -> None: ...


class _BlockingWire:
    """Coroutines that never suspend: `_run` takes them to their end in one step."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    async def open(self, request: httpx.Request) -> httpx.Response:
        return self.http.send(request, stream=True)

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_bytes():
            yield chunk

    async def read(self, response: httpx.Response) -> bytes:
        return response.read()

    async def end(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # there is no event loop here


class _AsyncWire:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def open(self, request: httpx.Request) -> httpx.Response:
        return await self.http.send(request, stream=True)

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    async def read(self, response: httpx.Response) -> bytes:
        return await response.aread()

    async def end(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine over the blocking wire: it ends without ever suspending."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    raise AssertionError("a coroutine over the blocking wire suspended")


def _iterate(source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    try:
        while True:
            try:
                item = _run(source.__anext__())
            except StopAsyncIteration:
                return
            yield item
    finally:
        _run(source.aclose())


# ---------------------------------------------------------------------------------------------- the one implementation


class _ErrorBody(msgspec.Struct):
    error: ErrorInfo


class _Page(msgspec.Struct):
    data: list[JobView]
    next_cursor: str | None = None


class _Models(msgspec.Struct):
    data: list[ModelView]


class _Retryable(Exception):
    """A failure that another attempt may cure, on its way to the loop that makes it."""

    def __init__(self, failure: PenstockError) -> None:
        self.failure = failure


class _Core:
    def __init__(self, wire: _Wire, give_up: float, on_retry: OnRetry | None) -> None:
        self._wire = wire
        self._give_up = give_up
        self._on_retry = on_retry

    # ------------------------------------------------------------------------------------ jobs

    async def submit(self, prompt: Prompt | None, messages: Messages | None, options: Options) -> JobView:
        fields: dict[str, Any] = {"prompt": prompt, "messages": messages, **options}
        # A retry after a lost answer carries the same key, so it finds the job that the first attempt made.
        key = fields.pop("idempotency_key", None) or "auto-" + secrets.token_hex(16)
        body = {name: value for name, value in fields.items() if value is not None}
        return await self._call(
            "POST", "/v1/jobs", JobView, content=msgspec.json.encode(body), headers={"idempotency-key": key}
        )

    async def job(self, job: str | JobView) -> JobView:
        return await self._call("GET", _path(job), JobView)

    async def cancel(self, job: str | JobView) -> JobView:
        return await self._call("POST", _path(job, "/cancel"), JobView)

    async def jobs(
        self, status: Sequence[str], model: str | None, user_id: str | None, limit: int | None
    ) -> AsyncGenerator[JobView, None]:
        given = {"status": ",".join(status) or None, "model": model, "user_id": user_id}
        query = {name: value for name, value in given.items() if value is not None}
        left = limit
        while left is None or left > 0:
            query["limit"] = str(min(left or 500, 500))
            page = await self._call("GET", "/v1/jobs", _Page, params=query)
            for view in page.data[:left]:
                yield view
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor
            left = left - len(page.data) if left is not None else None

    async def stream(self, job: str | JobView, after: int) -> AsyncGenerator[Token | End, None]:
        cursor = Cursor(after)
        patience = Patience(self._give_up)
        ended = False
        while True:
            decoder = SSEDecoder()
            try:
                async with self._opened(self._events_request(job, cursor)) as response:
                    if response.status_code == 204:
                        return  # everything up to the end had been delivered before
                    await self._expect_events(response)
                    cursor.reconnected()
                    comments = 0
                    async for chunk in self._wire.chunks(response):
                        events = decoder.feed(chunk)
                        if events or decoder.comments > comments:
                            comments = decoder.comments
                            patience.progress()
                        for event in events:
                            item = cursor.take(event)
                            if item is not None:
                                # Nothing follows the end but the end of the answer: it is still read, so that the
                                # connection can be used again.
                                ended = isinstance(item, End)
                                yield item
                failure: PenstockError = Unreachable("The server ended the stream early and did not come back.")
            except httpx.TransportError as error:
                failure = self._unreachable(error)
            except _Retryable as refusal:
                failure = refusal.failure
            if ended:
                return
            await self._pause(patience, failure, failure.retry_after or (decoder.retry or 0) / 1000)

    def _events_request(self, job: str | JobView, cursor: Cursor) -> httpx.Request:
        # Identity: a compressed stream would come in lumps.
        headers = {"accept": "text/event-stream", "accept-encoding": "identity"}
        if cursor.position:
            headers["last-event-id"] = str(cursor.position)
        return self._wire.http.build_request("GET", _path(job, "/events"), headers=headers)

    async def _expect_events(self, response: httpx.Response) -> None:
        await self._expect_success(response)
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise ProtocolError(f"{response.url} answers with {kind or 'no content type'}, not with an event stream.")

    # ------------------------------------------------------------------------------------ in one call

    async def result(self, job: str | JobView) -> Result:
        texts: dict[int, list[str]] = {}
        end: End | None = None
        async for event in self.stream(job, 0):
            if isinstance(event, End):
                end = event
            else:
                texts.setdefault(event.index, []).append(event.text)
        if end is None:
            raise ProtocolError(f"The stream of {_id(job)} has no end.")
        end.raise_for_status()
        choices = range(max(1, len(end.finish_reasons)))
        return Result(
            _id(job),
            tuple("".join(texts.get(choice, ())) for choice in choices),
            end.finish_reasons,
            end.usage or Usage(),
        )

    async def generate(self, prompt: Prompt | None, messages: Messages | None, options: Options) -> Result:
        job = await self.submit(prompt, messages, options)
        async with self._owned(job):
            return await self.result(job)

    async def generate_stream(
        self, prompt: Prompt | None, messages: Messages | None, options: Options
    ) -> AsyncGenerator[Token, None]:
        job = await self.submit(prompt, messages, options)
        async with self._owned(job), contextlib.aclosing(self.stream(job, 0)) as events:
            async for event in events:
                if isinstance(event, Token):
                    yield event
                else:
                    event.raise_for_status()

    @contextlib.asynccontextmanager
    async def _owned(self, job: JobView) -> AsyncIterator[None]:
        """The caller never saw the job's id: if it leaves early, nobody can want the rest."""
        try:
            yield
        except PenstockError as error:
            if isinstance(error, Unreachable):
                error.add_note(f"The job {job.id} is kept: stream({job.id!r}) continues it once the server is back.")
            raise
        except BaseException:
            with contextlib.suppress(httpx.HTTPError):
                request = self._wire.http.build_request("POST", _path(job, "/cancel"), timeout=ABANDON_TIMEOUT)
                async with self._opened(request):
                    pass
            raise

    # ------------------------------------------------------------------------------------ about the server

    async def models(self) -> list[ModelView]:
        return (await self._call("GET", "/v1/models", _Models)).data

    async def health(self) -> dict[str, Any]:
        return await self._call("GET", "/health", dict[str, Any])

    async def manage(self, model: str, verb: Literal["load", "unload"], on_progress: OnProgress | None) -> ModelView:
        """Load or unload; not repeated when it fails, since somebody watches."""
        done: ModelView | None = None
        request = self._wire.http.build_request("POST", f"/v1/models/{quote(model)}/{verb}", content=b'{"stream":true}')
        decoder = SSEDecoder()
        try:
            async with self._opened(request) as response:
                await self._expect_events(response)
                async for chunk in self._wire.chunks(response):
                    for event in decoder.feed(chunk):
                        if event.event == "error":
                            raise error_from_info(decode(event.data, _ErrorBody).error)
                        if event.event == "done":
                            done = decode(event.data, ModelView)
                        elif event.event == "progress" and on_progress is not None:
                            on_progress(decode(event.data, LoadProgress))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        except Malformed as error:
            raise ProtocolError(f"An event of the stream cannot be read: {error}") from error
        except _Retryable as refusal:
            raise refusal.failure from None
        if done is None:
            raise Unreachable(f"The server went away before the model was {verb}ed.")
        return done

    # ------------------------------------------------------------------------------------ inside

    async def _call(self, method: str, path: str, kind: type[T], **arguments: Any) -> T:
        """One answer as *kind*, however often it takes to get it: every call of ours may be repeated."""
        patience = Patience(self._give_up)
        while True:
            try:
                async with self._opened(self._wire.http.build_request(method, path, **arguments)) as response:
                    await self._expect_success(response)
                    return _decoded(await self._wire.read(response), kind, response)
            except httpx.TransportError as error:
                failure: PenstockError = self._unreachable(error)
            except _Retryable as refusal:
                failure = refusal.failure
            await self._pause(patience, failure, failure.retry_after or 0.0)

    @contextlib.asynccontextmanager
    async def _opened(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        response = await self._wire.open(request)
        try:
            yield response
        finally:
            await self._wire.end(response)

    async def _pause(self, patience: Patience, failure: PenstockError, asked: float) -> None:
        seconds = patience.pause(failure, asked)
        if self._on_retry is not None:
            self._on_retry(failure, seconds)
        await self._wire.sleep(seconds)

    async def _expect_success(self, response: httpx.Response) -> None:
        """Raise what the server answered instead, as `_Retryable` where another attempt may help."""
        if response.is_success:
            return
        failure = _failure(response, await self._wire.read(response))
        if response.status_code in RETRYABLE:
            raise _Retryable(failure)
        raise failure

    def _unreachable(self, error: httpx.TransportError) -> Unreachable:
        url = str(self._wire.http.base_url).rstrip("/")
        return Unreachable(f"Cannot reach {url}: {str(error) or type(error).__name__}.")


def _id(job: str | JobView) -> str:
    return job.id if isinstance(job, JobView) else job


def _path(job: str | JobView, rest: str = "") -> str:
    return f"/v1/jobs/{quote(_id(job), safe='')}{rest}"


def _decoded(body: bytes, kind: type[T], response: httpx.Response) -> T:
    try:
        return decode(body, kind)
    except Malformed as error:
        raise ProtocolError(f"{response.url} does not answer like a Penstock server: {error}") from error


def _failure(response: httpx.Response, body: bytes) -> PenstockError:
    try:
        failure = error_from_info(decode(body, _ErrorBody).error)
    except Malformed:
        failure = PenstockError(f"{response.url} answered {response.status_code} {response.reason_phrase}.")
    failure.status = response.status_code
    failure.retry_after = _retry_after(response.headers)
    return failure


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds to wait, from ``retry-after-ms``, or ``Retry-After`` as seconds or as a date."""
    with contextlib.suppress(ValueError):
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" in headers:
            return max(0.0, float(headers["retry-after"]))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    return None


# ---------------------------------------------------------------------------------------------- the two faces


def _http_options(url: str, headers: Mapping[str, str] | None, timeout: float) -> dict[str, Any]:
    try:
        base = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"{url!r} is not a URL: {error}") from error
    if base.scheme not in ("http", "https") or not base.host:
        raise InvalidRequest(f"{url!r} is not the URL of a server: it looks like {DEFAULT_URL}.")
    return {
        "base_url": base,
        "headers": {"user-agent": f"penstock/{__version__}", **(headers or {})},
        "timeout": httpx.Timeout(timeout, connect=5.0, pool=None),
        # Few idle connections: httpcore's pool looks at every connection for every idle one at every request, which
        # with 60 streams at once cost five times the throughput.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=10),
        # The environment's proxy is never meant for this very machine.
        "trust_env": base.host not in ("localhost", "127.0.0.1", "::1"),
    }


class Client:
    """A Penstock server, for ordinary (blocking) code. Threads may share one.

    *give_up*: seconds without any progress after which a call or a stream raises its last failure (0: at the first).
    *timeout*: seconds of silence on a connection after which it counts as lost; above the server's heartbeat (10 s).
    *headers* go with every request, for instance to a proxy that authenticates. *on_retry* is told of every failure
    that is retried, and of the seconds until then.

    Every method raises `penstock.core.errors.PenstockError`s: what the server answered, `Unreachable`, `ProtocolError`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        give_up: float = 60.0,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        on_retry: OnRetry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(transport=transport, **_http_options(url, headers, timeout))
        self._core = _Core(_BlockingWire(self._http), give_up, on_retry)

    def submit(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> JobView:
        """Queue a job; returns once the server has it for good. Give a *prompt* (text or token ids) or *messages*."""
        return _run(self._core.submit(prompt, messages, options))

    def job(self, job: str | JobView) -> JobView:
        """How the job stands; with result, usage and timings once it has ended."""
        return _run(self._core.job(job))

    def jobs(
        self,
        *,
        status: Sequence[str] = (),
        model: str | None = None,
        user_id: str | None = None,
        limit: int | None = None,
    ) -> Iterator[JobView]:
        """Jobs, the newest first, fetched page by page; at most *limit* of them."""
        return _iterate(self._core.jobs(status, model, user_id, limit))

    def cancel(self, job: str | JobView) -> JobView:
        """Stop the job, whatever it is doing; no-op for one that has ended. Returns how it stands."""
        return _run(self._core.cancel(job))

    def stream(self, job: str | JobView, after: int = 0) -> Generator[Token | End, None, None]:
        """The job's tokens behind position *after*, each exactly once, then its `End`. Resumes by itself.

        The end of a job that failed or was cancelled is an `End` with an ``error`` as well. A stream that had
        delivered its end before (*after* is its position) yields nothing.
        Raises `LogRewound` when the log is shorter than *after*, `NotFound` for an unknown job.
        """
        return _iterate(self._core.stream(job, after))

    def result(self, job: str | JobView) -> Result:
        """Wait for the job's end. Raises its error unless it completed."""
        return _run(self._core.result(job))

    def generate(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> Result:
        """Submit and wait. The job is cancelled if this is interrupted."""
        return _run(self._core.generate(prompt, messages, options))

    def generate_stream(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> Generator[Token, None, None]:
        """Submit and stream the tokens. Raises the job's error; the job is cancelled if the generator is closed early.

        For the usage or the finish reason, ``submit`` and ``stream`` instead.
        """
        return _iterate(self._core.generate_stream(prompt, messages, options))

    def chat(self, messages: str | Messages, **options: Unpack[Options]) -> Result:
        """The model's answer to *messages* (a text is one user message)."""
        return _run(self._core.generate(None, _messages(messages), options))

    def models(self) -> list[ModelView]:
        """What is served; the first is the default."""
        return _run(self._core.models())

    def load_model(self, model: str, on_progress: OnProgress | None = None) -> ModelView:
        """Load a model now and wait until it is ready. For its operator: ask the process whose worker has it.

        Raises `ModelLoadError`; `Unsupported` from a gateway without workers.
        """
        return _run(self._core.manage(model, "load", on_progress))

    def unload_model(self, model: str, on_progress: OnProgress | None = None) -> ModelView:
        """Unload a model, as `load_model` loads one. A job for it loads it again."""
        return _run(self._core.manage(model, "unload", on_progress))

    def health(self) -> dict[str, Any]:
        """The server's view of itself: broker, workers, models, queue."""
        return _run(self._core.health())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """A Penstock server, for asyncio. Everything as in `Client`, awaited.

    Close a stream that you leave early: ``async with contextlib.aclosing(client.stream(job)) as events``.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        give_up: float = 60.0,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        on_retry: OnRetry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(transport=transport, **_http_options(url, headers, timeout))
        self._core = _Core(_AsyncWire(self._http), give_up, on_retry)

    async def submit(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> JobView:
        return await self._core.submit(prompt, messages, options)

    async def job(self, job: str | JobView) -> JobView:
        return await self._core.job(job)

    def jobs(
        self,
        *,
        status: Sequence[str] = (),
        model: str | None = None,
        user_id: str | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[JobView, None]:
        return self._core.jobs(status, model, user_id, limit)

    async def cancel(self, job: str | JobView) -> JobView:
        return await self._core.cancel(job)

    def stream(self, job: str | JobView, after: int = 0) -> AsyncGenerator[Token | End, None]:
        return self._core.stream(job, after)

    async def result(self, job: str | JobView) -> Result:
        return await self._core.result(job)

    async def generate(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> Result:
        return await self._core.generate(prompt, messages, options)

    def generate_stream(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Token, None]:
        return self._core.generate_stream(prompt, messages, options)

    async def chat(self, messages: str | Messages, **options: Unpack[Options]) -> Result:
        return await self._core.generate(None, _messages(messages), options)

    async def models(self) -> list[ModelView]:
        return await self._core.models()

    async def load_model(self, model: str, on_progress: OnProgress | None = None) -> ModelView:
        return await self._core.manage(model, "load", on_progress)

    async def unload_model(self, model: str, on_progress: OnProgress | None = None) -> ModelView:
        return await self._core.manage(model, "unload", on_progress)

    async def health(self) -> dict[str, Any]:
        return await self._core.health()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _messages(messages: str | Messages) -> Messages:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
