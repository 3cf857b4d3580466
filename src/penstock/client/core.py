"""The one implementation behind both clients, as coroutines over a `Wire`."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from penstock.api import JobPage, JobSummary, JobView, ModelList, ModelView, Submitted
from penstock.client.errors import RETRYABLE, ErrorBody, ProtocolError, Retryable, Unreachable, failure_of
from penstock.client.results import (
    End,
    JobRef,
    Messages,
    OnProgress,
    OnRetry,
    Options,
    Prompt,
    Result,
    Token,
)
from penstock.client.resume import ResumePoint, RetryBudget
from penstock.client.sse import SSEDecoder
from penstock.client.wire import Wire
from penstock.core.errors import PenstockError, error_from_info
from penstock.core.foreign import Malformed, decode
from penstock.core.ports import LoadProgress

T = TypeVar("T")

#: Seconds that cancelling an abandoned job may take.
ABANDON_TIMEOUT = 2.0


class Core:
    def __init__(self, wire: Wire, give_up: float, on_retry: OnRetry | None) -> None:
        self._wire = wire
        self._give_up = give_up
        self._on_retry = on_retry

    # ------------------------------------------------------------------------------------ jobs

    async def submit(self, prompt: Prompt | None, messages: Messages | None, options: Options) -> Submitted:
        fields: dict[str, Any] = {"prompt": prompt, "messages": messages, **options}
        # A retry after a lost answer carries the same key, so it finds the job that the first attempt made.
        key = fields.pop("idempotency_key", None) or "auto-" + secrets.token_hex(16)
        body = {name: value for name, value in fields.items() if value is not None}
        return await self._call(
            "POST", "/v1/jobs", Submitted, content=msgspec.json.encode(body), headers={"idempotency-key": key}
        )

    async def job(self, job: JobRef) -> JobView:
        return await self._call("GET", _path(job), JobView)

    async def cancel(self, job: JobRef) -> JobView:
        return await self._call("POST", _path(job, "/cancel"), JobView)

    async def jobs(
        self, status: Sequence[str], model: str | None, user_id: str | None, limit: int | None
    ) -> AsyncGenerator[JobSummary, None]:
        given = {"status": ",".join(status) or None, "model": model, "user_id": user_id}
        query = {name: value for name, value in given.items() if value is not None}
        left = limit
        while left is None or left > 0:
            query["limit"] = str(min(left or 500, 500))
            page = await self._call("GET", "/v1/jobs", JobPage, params=query)
            for view in page.data[:left]:
                yield view
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor
            left = left - len(page.data) if left is not None else None

    async def stream(self, job: JobRef, after: int) -> AsyncGenerator[Token | End, None]:
        point = ResumePoint(after)
        budget = RetryBudget(self._give_up)
        ended = False
        while True:
            decoder = SSEDecoder()
            try:
                async with self._opened(self._events_request(job, point)) as response:
                    if response.status_code == 204:
                        return  # everything up to the end had been delivered before
                    await self._expect_events(response)
                    point.reconnected()
                    comments = 0
                    async for chunk in self._wire.chunks(response):
                        events = decoder.feed(chunk)
                        if events or decoder.comments > comments:
                            comments = decoder.comments
                            budget.progress()
                        for event in events:
                            item = point.take(event)
                            if item is not None:
                                # Nothing follows the end but the end of the answer: it is still read, so that the
                                # connection can be used again.
                                ended = isinstance(item, End)
                                yield item
                failure: PenstockError = Unreachable("The server ended the stream early and did not come back.")
            except httpx.TransportError as error:
                failure = self._unreachable(error)
            except Retryable as refusal:
                failure = refusal.failure
            if ended:
                return
            await self._pause(budget, failure, failure.retry_after or (decoder.retry or 0) / 1000)

    def _events_request(self, job: JobRef, point: ResumePoint) -> httpx.Request:
        # Identity: a compressed stream would come in lumps.
        headers = {"accept": "text/event-stream", "accept-encoding": "identity"}
        if point.position:
            headers["last-event-id"] = str(point.position)
        return self._wire.http.build_request("GET", _path(job, "/events"), headers=headers)

    async def _expect_events(self, response: httpx.Response) -> None:
        await self._expect_success(response)
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise ProtocolError(f"{response.url} answers with {kind or 'no content type'}, not with an event stream.")

    # ------------------------------------------------------------------------------------ in one call

    async def result(self, job: JobRef) -> Result:
        parts: dict[int, list[Token]] = {}
        end: End | None = None
        async for event in self.stream(job, 0):
            if isinstance(event, End):
                end = event
            else:
                parts.setdefault(event.index, []).append(event)
        if end is None:
            raise ProtocolError(f"The stream of {_id(job)} has no end.")
        end.raise_for_status()
        assert end.usage is not None, "the end of a job that completed"
        choices = [parts.get(choice, []) for choice in range(len(end.finish_reasons))]
        return Result(
            _id(job),
            tuple("".join(token.text for token in choice) for choice in choices),
            end.finish_reasons,
            end.usage,
            tuple("".join(token.reasoning for token in choice) for choice in choices),
            tuple("".join(token.calls for token in choice) for choice in choices),
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
    async def _owned(self, job: Submitted) -> AsyncIterator[None]:
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
        return (await self._call("GET", "/v1/models", ModelList)).data

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
                            raise error_from_info(decode(event.data, ErrorBody).error)
                        if event.event == "done":
                            done = decode(event.data, ModelView)
                        elif event.event == "progress" and on_progress is not None:
                            on_progress(decode(event.data, LoadProgress))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        except Malformed as error:
            raise ProtocolError(f"An event of the stream cannot be read: {error}") from error
        except Retryable as refusal:
            raise refusal.failure from None
        if done is None:
            raise Unreachable(f"The server went away before the model was {verb}ed.")
        return done

    # ------------------------------------------------------------------------------------ inside

    async def _call(self, method: str, path: str, kind: type[T], **arguments: Any) -> T:
        """One answer as *kind*, however often it takes to get it: every call of ours may be repeated."""
        budget = RetryBudget(self._give_up)
        while True:
            try:
                async with self._opened(self._wire.http.build_request(method, path, **arguments)) as response:
                    await self._expect_success(response)
                    return _decoded(await self._wire.read(response), kind, response)
            except httpx.TransportError as error:
                failure: PenstockError = self._unreachable(error)
            except Retryable as refusal:
                failure = refusal.failure
            await self._pause(budget, failure, failure.retry_after or 0.0)

    @contextlib.asynccontextmanager
    async def _opened(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        response = await self._wire.open(request)
        try:
            yield response
        finally:
            await self._wire.end(response)

    async def _pause(self, budget: RetryBudget, failure: PenstockError, asked: float) -> None:
        seconds = budget.pause(failure, asked)
        if self._on_retry is not None:
            self._on_retry(failure, seconds)
        await self._wire.sleep(seconds)

    async def _expect_success(self, response: httpx.Response) -> None:
        """Raise what the server answered instead, as `Retryable` where another attempt may help."""
        if response.is_success:
            return
        failure = failure_of(response, await self._wire.read(response))
        if response.status_code in RETRYABLE:
            raise Retryable(failure)
        raise failure

    def _unreachable(self, error: httpx.TransportError) -> Unreachable:
        url = str(self._wire.http.base_url).rstrip("/")
        return Unreachable(f"Cannot reach {url}: {str(error) or type(error).__name__}.")


def _id(job: JobRef) -> str:
    return job if isinstance(job, str) else job.id


def _path(job: JobRef, rest: str = "") -> str:
    return f"/v1/jobs/{quote(_id(job), safe='')}{rest}"


def _decoded(body: bytes, kind: type[T], response: httpx.Response) -> T:
    try:
        return decode(body, kind)
    except Malformed as error:
        raise ProtocolError(f"{response.url} does not answer like a Penstock server: {error}") from error


def as_messages(messages: str | Messages) -> Messages:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
