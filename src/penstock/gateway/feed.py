"""All of one user's jobs over one stream: browsers allow six connections per origin, a user has more jobs than that.

Every block carries a cursor from which any gateway can go on exactly there: how far each unfinished job was told, and
which jobs were told to the end. The latter is a moment in time (what ended before it was told, or is older than the
stream) plus the few that ended since, so a cursor stays small however many jobs a user has had.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple

import msgspec

from penstock.core.aio import TaskSet, wait_for_event
from penstock.core.errors import BrokerUnavailable, InvalidRequest, LogRewound, NotFound
from penstock.core.events import Ended, Event, Tokens
from penstock.core.job import Job, Status
from penstock.core.ports import Broker, Query

#: Events waiting for a slow reader; then the jobs' followers wait (the logs are kept anyway).
BUFFER = 64
#: How often the list of jobs repairs a lost hint, in seconds. Rare: with many idle readers it is all the work there is.
REPAIR = 10.0
#: Told jobs that a cursor names one by one before the list is looked at, so that a moment in time can stand for them.
MAX_TOLD = 32
#: Seconds by which this clock and the broker's may differ.
SKEW = 1.0

#: Seconds between attempts while the broker is away.
PAUSE = 1.0


class Rendering(NamedTuple):
    """How events are written: a run of tokens (given the ``id`` of each position), a job's end, a log that rewound."""

    tokens: Callable[[str, Tokens, Callable[[int], str]], bytes]
    end: Callable[[str, Ended, str], bytes]
    rewound: Callable[[str, LogRewound, str], bytes]


class Cursor(msgspec.Struct, array_like=True):
    """Where a multiplexed stream stands. Job ids are their 16 random bytes. Times are seconds since the epoch."""

    until: float
    """What ended before this moment needs no telling."""
    since: float
    """No job created before this moment is unfinished."""
    read: dict[bytes, int] = {}
    """Position told, of unfinished jobs of which any token was told."""
    told: list[bytes] = []
    """Jobs told to the end that may have ended at or after ``until``."""
    current: bytes = b""
    """The job whose position follows the dot of the ``id``."""

    @classmethod
    def parse(cls, text: str) -> Cursor:
        try:
            body, _, position = text.partition(".")
            cursor = msgspec.msgpack.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=cls)
            if position:
                cursor.read[cursor.current] = int(position)
            return cursor
        except (ValueError, RecursionError) as error:
            raise InvalidRequest("This Last-Event-ID is not one of this stream's.", param="after") from error

    def encode(self) -> str:
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")


async def feed(
    broker: Broker, now: Callable[[], float], tenant: str, user: str, cursor: Cursor | None, rendering: Rendering
) -> AsyncIterator[bytes]:
    """Event blocks of the user's jobs. *now* is the broker's clock.

    Without a cursor: every unfinished job from its beginning, and every job to come.
    """
    following = _UserFeed(broker, now, tenant, user, cursor)
    try:
        while True:
            events = await following.batch()
            yield b"".join(following.render(events, rendering))
    finally:
        await following.close()


class _UserFeed:
    def __init__(
        self, broker: Broker, clock: Callable[[], float], tenant: str, user: str, cursor: Cursor | None
    ) -> None:
        now = clock()
        self._now = clock
        self._broker = broker
        self._tenant = tenant
        self._user = user
        self._fresh = cursor is None
        self._until = cursor.until if cursor is not None else now
        self._since = cursor.since if cursor is not None else now
        self._read = {_name(key): position for key, position in cursor.read.items()} if cursor is not None else {}
        self._told = {_name(key): now for key in cursor.told} if cursor is not None else {}
        self._created: dict[str, float] = {}
        self._ready: deque[tuple[str, Event | LogRewound]] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._look = asyncio.Event()
        self._arrivals = broker.arrivals(tenant, user)  # from now on, before the first look at the list
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskSet(self._failed)
        self._failure: BaseException | None = None
        self._tasks.spawn(self._listen())
        self._tasks.spawn(self._poll())

    def _failed(self, failure: BaseException) -> None:
        self._failure = failure
        self._wake.set()

    async def close(self) -> None:
        await self._tasks.aclose()

    # ------------------------------------------------------------------------------------ finding jobs

    async def _listen(self) -> None:
        async for job in self._arrivals:
            self._follow(job, self._now() - SKEW)

    async def _poll(self) -> None:
        """Find what no hint told of: what is there at the start, and later jobs whose hint was lost."""
        while True:
            pause = REPAIR
            self._look.clear()
            try:
                await self._add_jobs()
            except BrokerUnavailable:
                pause = PAUSE
            await wait_for_event(self._look, pause)

    async def _add_jobs(self) -> None:
        told_until = self._now() - SKEW
        if self._fresh:
            # Whatever is unfinished now matters, however old; what ended before now does not.
            async for job in self._list(status=(Status.QUEUED, Status.RUNNING)):
                self._follow(job.id, job.created_at)
            self._fresh = False
        else:
            async for job in self._list():
                if job.created_at < self._since - SKEW:
                    break
                if job.id in self._told or (job.ended_at is not None and job.ended_at < self._until):
                    continue
                self._follow(job.id, job.created_at)
                if job.ended_at is not None:
                    told_until = min(told_until, job.ended_at)
        # Every job that ended before this moment was found by the look, and has been told.
        self._until = max(self._until, told_until)
        self._told = {job: at for job, at in self._told.items() if at >= self._until}
        self._since = min((self._created[job] for job in self._followers), default=self._until)

    async def _list(self, status: tuple[Status, ...] = ()) -> AsyncIterator[Job]:
        query = Query(tenant=self._tenant, user=self._user, status=status, limit=200)
        while True:
            page = await self._broker.list(query)
            for job in page.jobs:
                yield job
            if page.cursor is None:
                return
            query = msgspec.structs.replace(query, cursor=page.cursor)

    def _follow(self, job: str, created_at: float) -> None:
        if job not in self._followers and job not in self._told:
            self._created[job] = created_at
            self._followers[job] = self._tasks.spawn(self._read_log(job))

    async def _read_log(self, job: str) -> None:
        after = self._read.get(job, 0)
        while True:
            try:
                async for event in self._broker.tail(self._tenant, job, after):
                    await self._put(job, event)
                    after = event.last if isinstance(event, Tokens) else event.position
                return
            except NotFound:  # its retention ended while the reader was away
                self._forget(job)
                return
            except LogRewound as error:  # the store lost what was told: tell that, and then all of it again
                await self._put(job, error)
                after = 0
            except BrokerUnavailable:
                await asyncio.sleep(PAUSE)

    async def _put(self, job: str, event: Event | LogRewound) -> None:
        while len(self._ready) >= BUFFER:
            self._room.clear()
            await self._room.wait()
        self._ready.append((job, event))
        self._wake.set()

    # ------------------------------------------------------------------------------------ telling

    async def batch(self) -> list[tuple[str, Event | LogRewound]]:
        while not self._ready:
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            await self._wake.wait()
        events = list(self._ready)
        self._ready.clear()
        self._room.set()
        return events

    def render(self, events: list[tuple[str, Event | LogRewound]], rendering: Rendering) -> Iterator[bytes]:
        for job, event in events:
            if isinstance(event, LogRewound):
                self._read.pop(job, None)
                yield rendering.rewound(job, event, self._cursor("").encode())
            elif isinstance(event, Ended):
                self._forget(job)
                self._told[job] = self._now()
                if len(self._told) > MAX_TOLD:
                    self._look.set()
                yield rendering.end(job, event, self._cursor("").encode())
            else:
                self._read[job] = event.last
                prefix = self._cursor(job).encode() + "."
                yield rendering.tokens(job, event, lambda position, prefix=prefix: f"{prefix}{position}")  # type: ignore[misc]

    def _forget(self, job: str) -> None:
        self._followers.pop(job, None)
        self._created.pop(job, None)
        self._read.pop(job, None)

    def _cursor(self, current: str) -> Cursor:
        return Cursor(
            self._until,
            self._since,
            {_key(job): position for job, position in self._read.items() if job != current},
            [_key(job) for job in self._told],
            _key(current) if current else b"",
        )


def _key(job: str) -> bytes:
    return bytes.fromhex(job.removeprefix("job_"))


def _name(key: bytes) -> str:
    return "job_" + key.hex()
