"""All of one user's jobs over one stream: browsers allow six connections per origin, a user has more jobs than that.

The cursor is opaque to clients: how far each unfinished job was read, and which jobs beyond a moment in time were
finished. It survives reconnects to any gateway, since it depends on nothing but the logs.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable

import msgspec

from penstock.core.errors import InvalidRequest, NotFound
from penstock.core.events import Ended, Event, Tokens
from penstock.core.job import Status
from penstock.core.ports import Broker, Query

#: Blocks waiting for a slow reader; then its jobs' readers wait (their logs are kept anyway).
BUFFER = 64
#: How often the list of jobs repairs a lost hint, in seconds. Rare: with many idle readers it is all the work there is.
REPAIR = 10.0


class Cursor(msgspec.Struct, array_like=True):
    """``since``: when the oldest job that still matters was made; ``read``: positions by job; ``done``: ended jobs."""

    since: float = 0.0
    read: dict[str, int] = {}
    done: dict[str, float] = {}

    @classmethod
    def parse(cls, text: str) -> Cursor:
        try:
            return msgspec.msgpack.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=cls)
        except (ValueError, msgspec.MsgspecError) as error:
            raise InvalidRequest("This Last-Event-ID is not one of this stream's.", param="after") from error

    def encode(self) -> str:
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")


async def feed(
    broker: Broker,
    tenant: str,
    user: str,
    cursor: Cursor | None,
    tokens: Callable[[str, Tokens], bytes],
    complete: Callable[[str, Ended], bytes],
) -> AsyncIterator[bytes]:
    """Event blocks of the user's jobs, each batch with the cursor as its ``id``.

    Without a cursor: every unfinished job from its beginning, and every job to come.
    """
    async with asyncio.TaskGroup() as tasks:
        following = _Feed(broker, tenant, user, cursor, tasks)
        discovery = [tasks.create_task(following.hear()), tasks.create_task(following.repair())]
        try:
            while True:
                yield following.render(await following.batch(), tokens, complete)
        finally:
            for task in [*discovery, *following.readers.values()]:
                task.cancel()


class _Feed:
    def __init__(self, broker: Broker, tenant: str, user: str, cursor: Cursor | None, tasks: asyncio.TaskGroup) -> None:
        self._broker = broker
        self._tenant = tenant
        self._user = user
        self._resumed = cursor is not None
        self._cursor = cursor or Cursor()
        self._created: dict[str, float] = {}
        self._tasks = tasks
        self._queue: asyncio.Queue[tuple[str, Event]] = asyncio.Queue(BUFFER)
        self.readers: dict[str, asyncio.Task[None]] = {}

    # ------------------------------------------------------------------------------------ finding jobs

    async def hear(self) -> None:
        async for job in self._broker.arrivals(self._tenant, self._user):
            self._follow(job, None)

    async def repair(self) -> None:
        """Find what no hint told of: at the start, and jobs whose hint was lost."""
        while True:
            await self._discover()
            await asyncio.sleep(REPAIR)

    async def _discover(self) -> None:
        active = () if self._resumed else (Status.QUEUED, Status.RUNNING)
        query = Query(tenant=self._tenant, user=self._user, status=active, limit=200)
        while True:
            page = await self._broker.list(query)
            for job in page.jobs:
                if job.id in self._cursor.done:
                    self._cursor.done[job.id] = job.created_at
                if job.created_at >= self._cursor.since and job.id not in self._cursor.done:
                    self._follow(job.id, job.created_at)
            oldest = page.jobs[-1].created_at if page.jobs else 0.0
            if page.cursor is None or oldest < self._cursor.since:
                break
            query = msgspec.structs.replace(query, cursor=page.cursor)
        if not self._resumed:
            # From now on new jobs count even if they end before the next look: start the clock at the oldest known.
            self._resumed = True
            self._cursor.since = max(
                self._cursor.since, min(self._created.values(), default=0.0) or await self._newest()
            )

    async def _newest(self) -> float:
        page = await self._broker.list(Query(tenant=self._tenant, user=self._user, limit=1))
        newest = page.jobs[0] if page.jobs else None
        if newest is not None and newest.id not in self.readers:
            self._cursor.done[newest.id] = newest.created_at
            return newest.created_at
        return 0.0

    def _follow(self, job: str, created_at: float | None) -> None:
        if created_at is not None:
            self._created[job] = created_at
        if job not in self.readers and job not in self._cursor.done:
            self._cursor.read.setdefault(job, 0)
            self.readers[job] = self._tasks.create_task(self._read(job))

    async def _read(self, job: str) -> None:
        try:
            async for event in self._broker.tail(self._tenant, job, self._cursor.read.get(job, 0)):
                await self._queue.put((job, event))
        except NotFound:
            self._cursor.read.pop(job, None)  # its retention ended while we were away

    # ------------------------------------------------------------------------------------ writing

    async def batch(self) -> list[tuple[str, Event]]:
        events = [await self._queue.get()]
        while not self._queue.empty():
            events.append(self._queue.get_nowait())
        return events

    def render(
        self,
        events: list[tuple[str, Event]],
        tokens: Callable[[str, Tokens], bytes],
        complete: Callable[[str, Ended], bytes],
    ) -> bytes:
        blocks = []
        for job, event in events:
            if isinstance(event, Ended):
                blocks.append(complete(job, event))
                self._cursor.read.pop(job, None)
                self._cursor.done[job] = self._created.get(job, float("inf"))
                self.readers.pop(job, None)
            else:
                blocks.append(tokens(job, event))
                self._cursor.read[job] = event.last
        self._forget()
        # A block without an id keeps the last one: the cursor is written once, into the last block of the batch.
        *earlier, last = b"".join(blocks)[:-2].split(b"\n\n")
        identified = b"id: " + self._cursor.encode().encode() + b"\n" + last
        return b"\n\n".join([*earlier, identified]) + b"\n\n"

    def _forget(self) -> None:
        """Ended jobs matter only while the list may still show them as newer than an unfinished one."""
        if len(self._cursor.done) <= 100:
            return
        horizon = min((self._created.get(job, 0.0) for job in self._cursor.read), default=float("inf"))
        newest_done = max((at for at in self._cursor.done.values() if at != float("inf")), default=0.0)
        since = min(horizon, newest_done)
        if since > self._cursor.since:
            self._cursor.since = since
            self._cursor.done = {job: at for job, at in self._cursor.done.items() if at >= since}
