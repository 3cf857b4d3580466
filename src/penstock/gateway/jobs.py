"""What a handler may do with jobs: submit, follow and fold those of who asks. It never sees the broker behind them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any

import msgspec

from penstock.core.aio import first_done
from penstock.core.errors import (
    BrokerUnavailable,
    IdempotencyMismatch,
    InvalidRequest,
    PenstockError,
    error_from_info,
)
from penstock.core.events import Completion, Ended, Event, fold
from penstock.core.job import Job, OnDisconnect, Priority, Request, new_job_id
from penstock.core.ports import Broker, Clock, Page, Query, SystemClock
from penstock.gateway import feed
from penstock.gateway.catalogue import Catalogue
from penstock.gateway.config import GatewayConfig
from penstock.gateway.identity import Identity
from penstock.gateway.readers import Following, Readers
from penstock.gateway.sse import EventStream, Streams

#: Seconds for which the job of an answer that was given stays where it could not be dropped at once.
RUN_ONCE_RETENTION = 60.0

#: Returns when the client has left.
Disconnected = Callable[[], Coroutine[Any, Any, None]]


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of a job but the request itself, and whose it is."""

    user: str | None = None
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    idempotency_key: str | None = None
    fingerprint: bytes = b""
    request_id: str | None = None
    trace: str | None = None
    metadata: dict[str, str] = {}
    on_disconnect: OnDisconnect = "continue"
    view: bytes = b""
    retain_for: float | None = None
    """Seconds that it is kept once it has ended; None: as long as all are."""


class Jobs:
    """The jobs of one tenant. A gateway has one of these that is nobody's; `of` binds it to who asks."""

    identity: Identity

    def __init__(
        self,
        broker: Broker,
        config: GatewayConfig,
        catalogue: Catalogue,
        streams: Streams,
        *,
        clock: Clock | None = None,
        on_submit: Callable[[str], None] = lambda model: None,
    ) -> None:
        """*on_submit* is told the model of each job that was queued."""
        self.config = config
        self.catalogue = catalogue
        self.streams = streams
        self._broker = broker
        self._clock = clock or SystemClock()
        self._on_submit = on_submit
        self._readers = Readers(broker, config.disconnect_grace)
        self._draining = asyncio.Event()
        self._over = asyncio.Event()

    def of(self, identity: Identity) -> Jobs:
        """Those of *identity*'s tenant."""
        bound = copy.copy(self)
        bound.identity = identity
        return bound

    @property
    def tenant(self) -> str:
        return self.identity.tenant

    def drain(self) -> None:
        """Replies in one piece get ``drain_timeout`` seconds; then they are refused, and their jobs go on."""
        self._draining.set()
        asyncio.get_running_loop().call_later(self.config.drain_timeout, self._over.set)

    def close(self) -> None:
        self._readers.close()

    # ------------------------------------------------------------------------------------ the broker's verbs

    async def get(self, job: str) -> Job:
        """Raises `NotFound`, `ExpiredResult`."""
        return await self._broker.get(self.tenant, job)

    async def page(self, query: Query) -> Page:
        """A page of a list; the query's own tenant makes no difference."""
        return await self._broker.list(msgspec.structs.replace(query, tenant=self.tenant))

    async def cancel(self, job: str) -> Job:
        return await self._broker.cancel(self.tenant, job)

    async def forget(self, job: str) -> None:
        await self._broker.forget(self.tenant, job)

    def log(self, job: str, after: int = 0) -> AsyncGenerator[Event]:
        """A job's log beyond the position *after*, to its end (`Broker.tail`)."""
        return self._broker.tail(self.tenant, job, after)

    async def completion(self, job: Job) -> Completion:
        """The folded log of a job that has ended."""
        return fold([event async for event in self.log(job.id)], job.request.n)

    def feed(self, user: str, cursor: feed.Cursor | None, writing: feed.Rendering) -> AsyncIterator[bytes]:
        """All jobs of a *user* as one stream."""
        return feed.feed(self._broker, self.catalogue.now, self.tenant, user, cursor, writing)

    # ------------------------------------------------------------------------------------ submit

    async def submit(self, request: Request, submission: Submission) -> Job:
        """Admit and store a job; returns once it is durable."""
        if self.streams.closing:
            raise BrokerUnavailable("The server is shutting down. Try again in a moment.", retry_after=2.0)
        try:
            self.catalogue.check(request)
            self.catalogue.check_serving(request.model)
        except PenstockError:  # the model may have been there when the same was asked first
            if (known := await self.repeated(submission)) is None:
                raise
            return known
        deadline = submission.deadline
        job = Job(
            id=new_job_id(),
            tenant=self.tenant,
            request=request,
            user=submission.user,
            priority=submission.priority,
            idempotency_key=submission.idempotency_key,
            fingerprint=submission.fingerprint,
            request_id=submission.request_id,
            trace=submission.trace,
            metadata=submission.metadata,
            on_disconnect=submission.on_disconnect,
            view=submission.view,
            retain_for=submission.retain_for,
            deadline_at=self._clock.now() + deadline if deadline is not None else None,
        )
        stored = await self._broker.submit(job)
        self._on_submit(request.model)
        return stored

    async def submit_all(self, requests: Sequence[Request], submission: Submission) -> list[Job]:
        """A job for each of *requests*, all of them or none. Under an idempotency key each has one of its own; without
        one, what is no reply is not kept: nobody comes back for it."""
        key = submission.idempotency_key
        jobs: list[Job] = []
        try:
            for number, request in enumerate(requests):
                retain_for = submission.retain_for if key or request.task == "generate" else RUN_ONCE_RETENTION
                one = msgspec.structs.replace(
                    submission, idempotency_key=key and f"{key}/{number}", retain_for=retain_for
                )
                jobs.append(await self.submit(request, one))
        except PenstockError as error:
            if key is None:
                for job in jobs:
                    await self.cancel(job.id)
            elif not isinstance(error, BrokerUnavailable):  # else they may be running for who asked first, or ask again
                for job in jobs:
                    await self.forget(job.id)  # the key is to be free for the next try
            raise
        return jobs

    async def repeated(self, submission: Submission) -> Job | None:
        """The job that this is a repetition of, if it is: for what could not be accepted (any more) as a new one.

        Raises `IdempotencyMismatch` if another request had its idempotency key.
        """
        if submission.idempotency_key is None:
            return None
        query = Query(tenant=self.tenant, idempotency_key=submission.idempotency_key)
        for job in (await self.page(query)).jobs:
            if job.fingerprint != submission.fingerprint:
                raise IdempotencyMismatch
            return job
        return None

    # ------------------------------------------------------------------------------------ follow

    def follow(self, job: Job, after: int = 0) -> Following:
        """The log of *job* beyond the position *after*; the job has a reader until this is closed."""
        return Following(job, self.log(job.id, after), self._readers, self.streams)

    async def stream(
        self,
        following: Following,
        render: Callable[[AsyncIterator[Event]], AsyncIterator[bytes]],
        headers: dict[str, str] | None = None,
    ) -> EventStream:
        """An SSE response of *following*; a refusal that comes at once is raised instead of streamed."""
        headers = {"x-penstock-job": following.job.id, **(headers or {})}
        return await self.stream_all([following], render(aiter(following)), headers)

    async def stream_all(
        self, followings: Sequence[Following], blocks: AsyncIterator[bytes], headers: dict[str, str]
    ) -> EventStream:
        """The same of *blocks* that are made of several."""

        async def close(complete: bool) -> None:
            for following in followings:
                await following.close(complete)

        try:
            for first in await asyncio.gather(*map(self._first_event, followings)):
                if isinstance(first, Ended) and first.error is not None and first.position == 1:
                    raise error_from_info(first.error)
        except BaseException:
            await close(complete=True)
            raise
        return EventStream(self.streams, blocks, headers=headers, on_close=close)

    def _may_not_fit(self, request: Request) -> bool:
        """Can the prompt be more than the model's context holds? A token is a byte at least."""
        info = self.catalogue.info(request.model)
        return info is not None and 0 < info.context_length <= _most_tokens(request)

    async def _first_event(self, following: Following) -> Event | None:
        """If it comes soon; one that may be a refusal is waited for longer."""
        first = await following.first_event(self.config.first_event_wait)
        if first is None and self._may_not_fit(following.job.request):
            first = await self._first_event_within(following, self.config.first_event_wait_long_prompt)
        return first

    async def _first_event_within(self, following: Following, seconds: float) -> Event | None:
        """The first event if it comes in time, and before the drain."""
        waiting, _ = await first_done(following.first_event(seconds), self._draining.wait())
        return None if waiting.cancelled() else waiting.result()

    # ------------------------------------------------------------------------------------ fold

    async def run_once(
        self, request: Request, submission: Submission, disconnected: Disconnected
    ) -> tuple[Job, Completion]:
        """Submit and `fold`, for an answer that nobody comes back for: its job is dropped, whatever becomes of it."""
        job = await self.submit(request, msgspec.structs.replace(submission, retain_for=RUN_ONCE_RETENTION))
        try:
            return job, await self.fold(job, disconnected)
        finally:
            with contextlib.suppress(BrokerUnavailable):  # then it is dropped a little later
                await self.forget(job.id)

    async def fold(self, job: Job, disconnected: Disconnected) -> Completion:
        """Wait for a job's end and fold its log. Raises the job's error."""
        following = self.follow(job)
        complete = False
        try:
            _, over, folding = await first_done(disconnected(), self._over.wait(), _collect(following))
            complete = not folding.cancelled()
        finally:
            await following.close(complete)
        if not complete:
            if over.cancelled():
                raise InvalidRequest("The client left before the reply was complete.")
            raise BrokerUnavailable(
                "The server is shutting down; the job goes on. Ask again with the same idempotency key.",
                retry_after=2.0,
            )
        completion = fold(folding.result(), job.request.n)
        ended = completion.ended
        assert ended is not None
        if ended.error is not None:
            raise error_from_info(ended.error)
        return completion

    async def fold_all(self, jobs: Iterable[Job], disconnected: Disconnected) -> list[Completion | PenstockError]:
        """`fold` of several, once all have ended: what one failed with stands in its place.

        Raises `BrokerUnavailable` where it is the server that ends, not a job.
        """
        leaving = asyncio.create_task(disconnected())

        async def left() -> None:
            await asyncio.shield(leaving)

        try:
            results = await asyncio.gather(*(self.fold(job, left) for job in jobs), return_exceptions=True)
        finally:
            leaving.cancel()
        found: list[Completion | PenstockError] = []
        for result in results:
            if isinstance(result, BrokerUnavailable) or not isinstance(result, Completion | PenstockError):
                raise result
            found.append(result)
        return found


def _most_tokens(request: Request) -> int:
    """What the prompt of *request* can have of tokens, but for those of a chat template."""
    if request.prompt_ids is not None:
        return len(request.prompt_ids)
    texts = [request.prompt or ""]
    for message in request.messages or ():
        texts += [message.content, *(call.arguments for call in message.tool_calls)]
    tools = len(msgspec.json.encode(request.tools)) if request.tools else 0
    return tools + sum(len(text.encode(errors="replace")) for text in texts)


async def _collect(following: Following) -> list[Event]:
    return [event async for event in following]
