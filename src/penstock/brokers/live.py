"""The logs of jobs that have not ended, in memory, as far as they are durable: what followers read.

There is no queue per reader: the log is the buffer, a reader is an index into it. A slow reader costs nothing but
its own place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from penstock.core.errors import PenstockError
from penstock.core.events import Ended, Event, Phase, Tokens

#: Appends that one run of a replay joins at most: bounds what a single send puts into a socket's buffer.
MAX_JOINED = 256


class LiveLog:
    """Events beyond position ``base`` (what was logged before this process opened the store stays on disk)."""

    __slots__ = ("_waiters", "base", "ended", "events", "failure", "head", "tenant")

    def __init__(self, tenant: str, base: int = 0) -> None:
        self.tenant = tenant
        self.base = base
        self.head = base
        self.ended = False
        self.failure: PenstockError | None = None
        self.events: list[Event] = []
        self._waiters: list[asyncio.Future[None]] = []

    def publish(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Ended):
            self.ended = True
        else:
            self.head = event.last
        self._wake()

    def fail(self, error: PenstockError) -> None:
        """End every follower with *error*: what it was given can no longer be continued."""
        self.failure = error
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def follow(self, after: int) -> AsyncGenerator[Event]:
        """Events beyond *after* (≥ base) until the terminal one; what is ready at once comes as one run."""
        index = 0
        while True:
            if self.failure is not None:
                raise self.failure
            ready = len(self.events)
            while index < ready:
                event = self.events[index]
                index += 1
                if isinstance(event, Ended):
                    yield event
                    return
                if event.last <= after:
                    continue
                first = index
                until = min(ready, first + MAX_JOINED)
                while index < until and _continues(event, self.events[index]):
                    index += 1
                if index > first:
                    event = _join([event, *self.events[first:index]])
                yield event.after(after)
                after = event.last
            if index == len(self.events) and self.failure is None:
                await self._changed()

    async def _changed(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if not waiter.done() or waiter.cancelled():
                self._waiters = [other for other in self._waiters if other is not waiter]


def _continues(run: Tokens, event: Event) -> bool:
    return (
        isinstance(event, Tokens)
        and event.attempt == run.attempt
        and (event.choices is None) == (run.choices is None)
        and (event.logprobs is None) == (run.logprobs is None)
    )


def _join(events: list[Event]) -> Tokens:
    runs = [event for event in events if isinstance(event, Tokens)]
    first = runs[0]
    return Tokens(
        first.position,
        first.attempt,
        [i for run in runs for i in run.ids],
        [text for run in runs for text in run.texts],
        None if first.choices is None else [c for run in runs for c in run.choices or ()],
        None if first.logprobs is None else [p for run in runs for p in run.logprobs or ()],
        None
        if all(run.phases is None for run in runs)
        else [phase for run in runs for phase in run.phases or [Phase.TEXT] * len(run.ids)],
    )
