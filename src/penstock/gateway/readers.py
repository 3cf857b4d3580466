"""Who listens to a job, and what becomes of it when nobody does any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator

import structlog

from penstock.core.errors import BrokerUnavailable, PenstockError
from penstock.core.events import Event
from penstock.core.job import Job
from penstock.core.ports import Broker
from penstock.gateway.sse import Streams

log = structlog.get_logger("penstock.gateway")


class Readers:
    """Counts who listens to a job, and cancels one that nobody listens to any more, after a grace."""

    def __init__(self, broker: Broker, grace: float) -> None:
        self._broker = broker
        self._grace = grace
        self._count: Counter[str] = Counter()
        self._timers: dict[str, asyncio.Task[None]] = {}

    def attach(self, job: str) -> None:
        self._count[job] += 1
        if (timer := self._timers.pop(job, None)) is not None:
            timer.cancel()

    def detach(self, tenant: str, job: str, *, cancel: bool) -> None:
        self._count[job] -= 1
        if self._count[job] <= 0:
            del self._count[job]
            if cancel:
                self._timers[job] = asyncio.create_task(self._cancel_later(tenant, job))

    async def _cancel_later(self, tenant: str, job: str) -> None:
        """A reader that has come back through another gateway counts as long as it stays there."""
        pause = self._grace
        while True:
            await asyncio.sleep(pause)
            pause = max(1.0, self._grace)
            try:
                found = await self._broker.get(tenant, job)
                if found.readers > 0 and not found.status.terminal:
                    continue
                if not found.status.terminal:
                    await self._broker.cancel(tenant, job)
                    log.info("job_abandoned", job_id=job, tenant=tenant)
            except BrokerUnavailable:
                continue
            except PenstockError:
                pass  # gone already
            break
        self._timers.pop(job, None)

    def close(self) -> None:
        """The gateway goes: jobs run on, their clients come back to the next one."""
        for timer in self._timers.values():
            timer.cancel()


class Following:
    """A job's events from one position on, with the first one fetched ahead. Iterate it once; then `close`."""

    def __init__(self, job: Job, events: AsyncGenerator[Event], readers: Readers, streams: Streams) -> None:
        self.job = job
        self._events = events
        self._readers = readers
        self._streams = streams
        self._first: asyncio.Task[Event] = asyncio.create_task(_next(events))
        readers.attach(job.id)
        self._open = True

    async def first_event(self, wait: float) -> Event | None:
        """The first event if it comes within *wait* seconds. Raises what `Broker.tail` raises."""
        await asyncio.wait([self._first], timeout=wait)
        if not self._first.done():
            return None
        try:
            return self._first.result()
        except StopAsyncIteration:
            return None

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            yield await self._first
        except StopAsyncIteration:
            return
        async for event in self._events:
            yield event

    async def close(self, complete: bool) -> None:
        """Stop following. Unless the stream was *complete*, the job's disconnect policy applies."""
        if not self._open:
            return
        self._open = False
        if not self._first.done():
            self._first.cancel()
            with contextlib.suppress(BaseException):
                await self._first
        elif not self._first.cancelled():
            self._first.exception()
        await self._events.aclose()
        cancel = not complete and self.job.on_disconnect == "cancel" and not self._streams.closing
        self._readers.detach(self.job.tenant, self.job.id, cancel=cancel)


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)
