"""One shard: its connections, its scripts, and the logs that this process follows in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import structlog
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, NoPermissionError

from penstock.brokers.live import LiveLog
from penstock.brokers.record import rewound
from penstock.brokers.redis.link import BROKEN, Address, Command, Inbox, Link, Word, ask
from penstock.brokers.redis.scripts import SHA, SOURCES
from penstock.brokers.redis.server import Tier, inspect
from penstock.core.errors import (
    BrokerUnavailable,
    ExpiredResult,
    InvalidRequest,
    LogRewound,
    NotFound,
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
#: Scripts that change nothing which has to be durable.
READS = frozenset({"follow", "get", "list", "read", "stats"})

_pack = msgspec.msgpack.Encoder().encode
_events = msgspec.msgpack.Decoder(list[tuple[str, Tokens | None, Ended | None]])
_tokens = msgspec.msgpack.Decoder(Tokens)
_ended = msgspec.msgpack.Decoder(Ended)


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
    """Everything of one shard. *inbox_id* names this process among those that follow logs or wait for jobs."""

    def __init__(
        self,
        address: Address,
        number: int,
        shards: int,
        prefix: str,
        inbox_id: str,
        policy: QueuePolicy,
        tier: Tier,
        clock: Clock | None,
        timeout: float,
        telemetry: Telemetry,
        on_ring: Callable[[int, str], None],
        on_arrival: Callable[[bytes, str], None],
    ) -> None:
        self.number = number
        self.base = f"{{{prefix}:{number}}}:".encode()
        self._shards = shards
        self._tier = tier
        self._clock = clock
        self._telemetry = telemetry
        self._on_ring = on_ring
        self._on_arrival = on_arrival
        self._policy = _pack(
            [
                policy.lease_ttl, policy.result_ttl, policy.max_attempts, policy.max_losses, policy.input_cost,
                policy.output_cost, policy.max_running_per_tenant, int(tier.name == "replicated"), number, shards,
            ]
        )  # fmt: skip
        self.inbox_id = inbox_id.encode()
        self._own_channel = self.base + b"inbox:" + self.inbox_id
        self.link = Link(address, self._greet, timeout=timeout)
        self._address = address
        self._timeout = timeout
        self.inbox = Inbox(address, on_message=self._hear, on_up=self._resync, on_down=self._doubt)
        self._followed: dict[str, FollowedLog] = {}
        self._left: set[str] = set()
        self._doubts = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._repairing: asyncio.Task[None] | None = None

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
            self.link.failure = error
            raise self.link.unavailable() from error
        self.link.start()
        self.inbox.subscribe(self._own_channel)
        self.inbox.start()
        self._repairing = asyncio.create_task(self._repair(), name="redis: repair")
        try:
            async with asyncio.timeout(self._timeout):
                while not self.link.up.is_set():
                    await _first_of(self.link.up, self.link.failed)
                    if isinstance(self.link.failure, InvalidRequest):
                        raise self.link.failure
                    self.link.failed.clear()
                await self.inbox.up.wait()
        except TimeoutError:
            raise self.link.unavailable() from None

    async def close(self) -> None:
        tasks = [task for task in (self._repairing, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.inbox.close()
        await self.link.close()

    async def _greet(self, connection: AbstractConnection) -> None:
        """Every new connection: is this (still) the server that we were promised? Load the scripts, enter the shard."""
        server = await inspect(connection, self._tier)
        for source in SOURCES.values():
            await ask(connection, "SCRIPT", "LOAD", source)
        entering = (server.run_id, int(self._tier.name != "strict"), self._tier.name, self._shards)
        _, shards = await ask(connection, *self._command("enter", *entering))
        if int(shards) != self._shards:
            raise InvalidRequest(
                f"Other processes have split this queue into {int(shards)} shards; this one is set to {self._shards}. "
                "Give all of them the same number (--shards), or another --broker-prefix."
            )
        self._doubt()
        await self.link.wait_for_replicas(connection, self._tier.replicas, server.waiting(self._tier))
        self._resync()

    # ------------------------------------------------------------------------------------ scripts

    def _command(self, script: str, *arguments: Word) -> Command:
        now = "" if self._clock is None else repr(self._clock.now())
        return ["EVALSHA", SHA[script], 1, self.base, now, self._policy, *arguments]

    async def run(self, script: str, *arguments: Word) -> Any:
        """The answer of a script, once what it wrote is as durable as the tier promises."""
        with self._telemetry.span("store.read" if script in READS else "store.commit", script=script):
            result, deferred = await self.link.call(self._command(script, *arguments))
        if deferred:
            for inbox, message in zip(deferred[::2], deferred[1::2], strict=True):
                self.link.send(["SPUBLISH", self.base + b"inbox:" + inbox, message])
        return result

    def post(self, script: str, *arguments: Word) -> None:
        """Run a script whose answer nobody needs."""
        self.link.send(self._command(script, *arguments)).add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )

    # ------------------------------------------------------------------------------------ following

    def _hear(self, channel: bytes, message: bytes) -> None:
        if channel != self._own_channel:
            self._on_arrival(channel, message.decode())
        elif message[:1] == b"r":
            claimant, _, model = message[1:].decode().partition("/")
            self._on_ring(int(claimant), model)
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
        self._spawn(self._look())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
        epoch, answers = await self.run("follow", self.inbox_id, _pack(list(before)), _pack(list(left)))
        for job, (head, *rest) in zip(before, answers, strict=True):
            followed = self._followed.get(job)
            if followed is None or followed.ended:
                continue
            if head < 0:
                followed.fail(ExpiredResult("This job ended, and its result has expired."))
                continue
            status, claimed_in, floor = rest
            if _is_rewound(followed, before[job], head, int(claimed_in), int(floor)):
                followed.fail(lost(before[job], head))
                continue
            if doubts == self._doubts:
                followed.epoch = int(epoch)
                followed.doubted = False
            if head > followed.head or status not in (b"queued", b"running") or followed.missed:
                self.catch_up(job, followed)

    def catch_up(self, job: str, followed: FollowedLog) -> None:
        """Read what is missing, once; nothing while it is in doubt whether our beginning is still the store's."""
        if followed.catching_up is None and not followed.doubted:
            followed.catching_up = self._spawn(self._read_missing(job, followed))

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

    async def read(
        self, tenant: str, job: str, after: int, *, follow: bool = False
    ) -> tuple[list[Event], bool, int, bool]:
        """(events beyond *after*, open, floor, more): a page of a log; with *follow*, its news come from now on.

        Raises `NotFound`, `ExpiredResult`, `LogRewound`.
        """
        kind, *rest = await self.run("read", tenant, job, after, PAGE, self.inbox_id if follow else b"")
        if kind == b"rewound":
            raise rewound(after, int(rest[0]))
        if kind != b"log":
            raise missing(kind)
        _, status, epoch, floor, runs = rest
        followed = self._followed.get(job)
        if follow and followed is not None and followed.epoch < 0:
            followed.epoch = int(epoch)
        events: list[Event] = []
        position = after
        for field, blob in runs:
            event: Event = _tokens.decode(blob) if field == b"t" else _ended.decode(blob)
            if isinstance(event, Tokens):
                event, position = event.after(position), event.last
            events.append(event)
        return events, status in (b"queued", b"running"), int(floor), len(runs) == PAGE

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


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def missing(kind: bytes) -> NotFound:
    if kind == b"expired":
        return ExpiredResult("This job ended, and its result has expired.")
    return NotFound("No such job.")


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
