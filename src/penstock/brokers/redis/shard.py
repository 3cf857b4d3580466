"""One shard: its connections, its scripts, and the logs that this process follows in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import structlog
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, NoPermissionError

from penstock.brokers.live import LiveLog
from penstock.brokers.record import result_expired, rewound
from penstock.brokers.redis import scripts
from penstock.brokers.redis.connection import (
    BROKEN,
    Address,
    Command,
    CommandConnection,
    Subscriber,
    run_once,
)
from penstock.brokers.redis.scripts import SHA, SOURCES, Answer, Script
from penstock.brokers.redis.server import Tier, inspect
from penstock.core.aio import TaskSet, first_done
from penstock.core.errors import (
    BrokerUnavailable,
    InvalidRequest,
    LogRewound,
    PenstockError,
)
from penstock.core.events import Ended, Event, Tokens
from penstock.core.ports import Clock, QueuePolicy
from penstock.core.telemetry import Telemetry

log = structlog.get_logger("penstock.redis")

#: Seconds between two looks at the logs that are followed, for news that was lost on its way.
REPAIR_INTERVAL = 1.0
#: Runs that one read of a log answers with, ids that one look at heads asks for.
PAGE = 512

_pack = msgspec.msgpack.Encoder().encode
_events = msgspec.msgpack.Decoder(list[tuple[str, Tokens | None, Ended | None]])
_tokens = msgspec.msgpack.Decoder(Tokens)
_ended = msgspec.msgpack.Decoder(Ended)


class LogPart(NamedTuple):
    """The next events of a log.

    ``open``: its job has not ended. ``floor``: see `scripts.Head`. ``more``: there may be some.
    """

    events: list[Event]
    open: bool
    floor: int
    more: bool

    @property
    def ends(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Ended)


class FollowedLog(LiveLog):
    """A log that readers of this process follow. *epoch*: the store's when ours was last known to be its beginning (-1:
    never yet)."""

    __slots__ = ("catching_up", "doubted", "epoch", "missed", "readers")

    def __init__(self, tenant: str, base: int) -> None:
        super().__init__(tenant, base)
        self.readers = 0
        self.epoch = -1
        self.missed = False
        self.doubted = False
        self.catching_up: asyncio.Task[None] | None = None

    def offer(self, event: Event) -> None:
        """Take *event* in if it is the next one, or the part of it that is; note it if some before it are missing."""
        if self.ended or self.failure is not None:
            return
        if isinstance(event, Ended):
            if event.position == self.head + 1:
                self.publish(event)
            else:
                self.missed = True
        elif event.position > self.head + 1:
            self.missed = True
        elif event.last > self.head:
            self.publish(event.after(self.head))


class Shard:
    """Everything of one shard. *inbox* names this process among those that follow logs or wait for jobs."""

    def __init__(
        self,
        address: Address,
        number: int,
        shards: int,
        prefix: str,
        inbox: str,
        policy: QueuePolicy,
        tier: Tier,
        clock: Clock | None,
        timeout: float,
        telemetry: Telemetry,
        on_notified: Callable[[int, str], None],
        on_arrival: Callable[[bytes, str], None],
    ) -> None:
        self.number = number
        self.base = f"{{{prefix}:{number}}}:".encode()
        self._shards = shards
        self._tier = tier
        self._clock = clock
        self._telemetry = telemetry
        self._on_notified = on_notified
        self._on_arrival = on_arrival
        self._policy = _pack(scripts.Policy.of(policy, defer=tier.name == "replicated", shard=number, shards=shards))
        self._inbox = inbox.encode()
        self._own_channel = self.base + b"inbox:" + self._inbox
        self.commands = CommandConnection(address, self._greet, timeout=timeout)
        self._address = address
        self._timeout = timeout
        self.subscriber = Subscriber(address, on_message=self._hear, on_up=self._resync, on_down=self._doubt)
        self._followed: dict[str, FollowedLog] = {}
        self._left: set[str] = set()
        self._doubts = 0
        self._tasks = TaskSet()

    # ------------------------------------------------------------------------------------ life

    async def open(self) -> None:
        """Connect. Raises `BrokerUnavailable`, `InvalidRequest` for a server that keeps less than the tier asks."""
        try:
            connection = await self._address.connect()
            try:
                await inspect(connection, self._tier)
            finally:
                await connection.disconnect(nowait=True)
        except (AuthenticationError, NoPermissionError) as error:
            raise InvalidRequest(f"Redis at {self._address.urls} refuses this user or password: {error}") from None
        except BROKEN as error:
            self.commands.failure = error
            raise self.commands.unavailable() from error
        self.commands.start()
        self.subscriber.subscribe(self._own_channel)
        self.subscriber.start()
        self._tasks.spawn(self._repair(), name="redis: repair")
        try:
            async with asyncio.timeout(self._timeout):
                while not self.commands.up.is_set():
                    await first_done(self.commands.up.wait(), self.commands.failed.wait())
                    if isinstance(self.commands.failure, InvalidRequest):
                        raise self.commands.failure
                    self.commands.failed.clear()
                await self.subscriber.up.wait()
        except TimeoutError:
            raise self.commands.unavailable() from None

    async def close(self) -> None:
        await self._tasks.aclose()
        await self.subscriber.close()
        await self.commands.close()

    async def _greet(self, connection: AbstractConnection) -> None:
        """Every new connection: is this (still) the server that we were promised? Load the scripts, enter the shard."""
        server = await inspect(connection, self._tier)
        for source in SOURCES.values():
            await run_once(connection, "SCRIPT", "LOAD", source)
        can_lose = self._tier.name != "strict"
        enter = scripts.Enter(run_id=server.run_id, can_lose=can_lose, shards=self._shards)
        reply, _ = await run_once(connection, *self._command(enter))
        entered = enter.parse(reply)
        if entered.shards != self._shards:
            raise InvalidRequest(
                f"Other processes have split this queue into {entered.shards} shards; "
                f"this one is set to {self._shards}. "
                "Give all of them the same number (--shards), or another --broker-prefix."
            )
        self._doubt()
        await self.commands.wait_for_replicas(connection, self._tier.replicas, server.waiting(self._tier))
        self._resync()

    # ------------------------------------------------------------------------------------ scripts

    def _command(self, script: Script[Any]) -> Command:
        now = "" if self._clock is None else repr(self._clock.now())
        return ["EVALSHA", SHA[script.name], 1, self.base, now, self._policy, *script.words()]

    async def run(self, script: Script[Answer]) -> Answer:
        """What the script answers, once what it wrote is as durable as the tier promises."""
        with self._telemetry.span("store.read" if script.only_reads else "store.commit", script=script.name):
            reply, deferred = await self.commands.call(self._command(script))
        if deferred:
            for inbox, message in zip(deferred[::2], deferred[1::2], strict=True):
                self.commands.send(["SPUBLISH", self.base + b"inbox:" + inbox, message])
        return script.parse(reply)

    def post(self, script: Script[Any]) -> None:
        """Run a script whose answer nobody needs."""
        self.commands.send(self._command(script)).add_done_callback(lambda done: done.cancelled() or done.exception())

    # ------------------------------------------------------------------------------------ following

    def _hear(self, channel: bytes, message: bytes) -> None:
        if channel != self._own_channel:
            self._on_arrival(channel, message.decode())
        elif message[:1] == b"r":
            claimant, _, model = message[1:].decode().partition("/")
            self._on_notified(int(claimant), model)
        else:
            for job, tokens, ended in _events.decode(message[1:]):
                followed = self._followed.get(job)
                if followed is None:
                    continue
                if followed.doubted:
                    followed.missed = True
                    continue
                followed.offer(tokens or ended)  # type: ignore[arg-type]
                if followed.missed:
                    self.catch_up(job, followed)

    def _doubt(self) -> None:
        """A connection broke, perhaps because Redis did: nothing new is believed until the logs are compared."""
        self._doubts += 1
        for followed in self._followed.values():
            followed.doubted = True

    def _resync(self) -> None:
        self._tasks.spawn(self._look())

    async def _repair(self) -> None:
        """Messages are hints: look at all followed logs now and then, and read what a lost message would have told."""
        while True:
            await asyncio.sleep(REPAIR_INTERVAL)
            try:
                await self._look()
            except Exception:  # whatever it was, the next look may see more
                log.exception("redis_look_failed")

    async def _look(self) -> None:
        left, self._left = self._left, set()
        ids = list(self._followed)
        try:
            for i in range(0, len(ids), PAGE) if ids or not left else [0]:
                await self._look_at(ids[i : i + PAGE], left)
                left = set()
        except BrokerUnavailable:
            self._left |= left

    async def _look_at(self, ids: list[str], left: set[str]) -> None:
        doubts = self._doubts
        before = {job: self._followed[job].head for job in ids if job in self._followed}
        answer = await self.run(scripts.Follow(inbox=self._inbox, ids=[*before], left=[*left]))
        for job, (head, status, claimed_in, floor) in zip(before, answer.heads, strict=True):
            followed = self._followed.get(job)
            if followed is None or followed.ended:
                continue
            if head < 0:
                followed.fail(result_expired())
                continue
            if _is_rewound(followed, before[job], head, claimed_in, floor):
                followed.fail(lost(before[job], head))
                continue
            if doubts == self._doubts:
                followed.epoch = answer.epoch
                followed.doubted = False
            if head > followed.head or status not in (b"queued", b"running") or followed.missed:
                self.catch_up(job, followed)

    def catch_up(self, job: str, followed: FollowedLog) -> None:
        """Read what is missing, once; nothing while it is in doubt whether our beginning is still the store's."""
        if followed.catching_up is None and not followed.doubted:
            followed.catching_up = self._tasks.spawn(self._read_missing(job, followed))

    async def _read_missing(self, job: str, followed: FollowedLog) -> None:
        """Read from our head on until nothing is missing."""
        try:
            more = True
            while more or followed.missed:
                followed.missed = False
                doubts = self._doubts
                events, _, _, more = await self.read(followed.tenant, job, followed.head)
                if doubts != self._doubts:
                    followed.missed = True
                    return
                for event in events:
                    followed.offer(event)
                if not events and not followed.ended:
                    return  # the next look decides
        except BrokerUnavailable:
            followed.missed = True
        except PenstockError as error:
            followed.fail(error)
        finally:
            followed.catching_up = None

    async def read(self, tenant: str, job: str, after: int, *, follow: bool = False) -> LogPart:
        """The next part of a log beyond *after*; with *follow*, its news come from now on.

        Raises `NotFound`, `ExpiredResult`, `LogRewound`.
        """
        inbox = self._inbox if follow else None
        page = await self.run(scripts.Read(tenant=tenant, id=job, after=after, max_runs=PAGE, inbox=inbox))
        if isinstance(page, scripts.Beyond):
            raise rewound(after, page.head)
        followed = self._followed.get(job)
        if follow and followed is not None and followed.epoch < 0:
            followed.epoch = page.epoch
        events: list[Event] = []
        position = after
        for kind, blob in page.runs:
            event: Event = _tokens.decode(blob) if kind == b"t" else _ended.decode(blob)
            if isinstance(event, Tokens):
                event, position = event.after(position), event.last
            events.append(event)
        return LogPart(events, page.status in (b"queued", b"running"), page.floor, len(page.runs) == PAGE)

    def follow(self, tenant: str, job: str, after: int) -> FollowedLog:
        """The log as this process follows it, with one more reader."""
        followed = self._followed.get(job)
        if followed is None or followed.failure is not None:
            followed = self._followed[job] = FollowedLog(tenant, after)
            self._left.discard(job)
        followed.readers += 1
        return followed

    def leave(self, job: str, followed: FollowedLog) -> None:
        followed.readers -= 1
        if followed.readers == 0 and self._followed.get(job) is followed:
            del self._followed[job]
            if not followed.ended:
                self._left.add(job)


def _is_rewound(followed: FollowedLog, ours: int, head: int, claimed_in: int, floor: int) -> bool:
    """Has the store lost what we have already given out? *ours* is our head when the store was asked.

    If the job was claimed anew since a crash of the store that may have lost its last tokens, what is beyond *floor* is
    not what we have.
    """
    return ours > head or (claimed_in > followed.epoch >= 0 and 0 <= floor < ours)


def lost(ours: int, head: int) -> LogRewound:
    return LogRewound(
        f"Redis lost the end of this log: you were given {ours} tokens, of which {head} are left. Read on from there.",
        param="after",
    )
