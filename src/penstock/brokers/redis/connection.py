"""Connections that reconnect by themselves: `CommandConnection` for scripts, `Subscriber` for news.

Each process has one of each per shard.

redis-py opens the connections (TLS, ACLs, sockets, the protocol); what is here is what its pool does not do: all calls
of a process share one connection and travel together, a call that was sent is never cancelled, one whose reply was lost
is sent again (the scripts are idempotent), and in the tier ``replicated`` a batch is answered once replicas have it.
Where they do not confirm in time nothing is answered until they do, and what was not answered is sent again, as after a
break.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import structlog
from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from penstock.core.aio import Backoff
from penstock.core.errors import BrokerUnavailable, InsufficientStorage, InvalidRequest, first_of

log = structlog.get_logger("penstock.redis")

#: Seconds a connection attempt, and a reply, may take before the connection counts as dead.
CONNECT_TIMEOUT = 3.0
REPLY_TIMEOUT = 3.0
#: Longest pause between two attempts to connect.
MAX_BACKOFF = 1.0
#: Seconds between pings on a connection that only listens.
PING_INTERVAL = 1.0
#: Bytes that one write takes at most.
MAX_BATCH = 1 << 20

#: The command was not executed, and this node (or moment) is the wrong one: connect anew, then send it again.
_ELSEWHERE = (
    MovedError, AskError, TryAgainError, ClusterDownError, MasterDownError, ReadOnlyError, BusyLoadingError,
    NoScriptError,
)  # fmt: skip

#: What a broken connection raises (RuntimeError: uvloop, when it writes to one that was reset a moment ago).
BROKEN = (RedisError, OSError, asyncio.IncompleteReadError, TimeoutError, RuntimeError)

Word = bytes | str | int | float
Command = Sequence[Word]


class Unconfirmed(RedisError):
    """Fewer replicas than the tier promises have what was written: in memory, or (*synced*) in their files."""

    def __init__(self, reached: int, wanted: int, synced: bool) -> None:
        have = "have written it to their files" if synced else "have received what was written"
        hint = "writes its copy first, and each needs appendonly yes" if synced else "loads its copy first"
        super().__init__(f"waiting for replicas, only {reached} of {wanted} {have} (one that has just joined {hint})")


def masked(urls: str) -> str:
    """Addresses without user and password, for people and logs."""
    shown = []
    for url in urls.split(","):
        parts = urlsplit(url.strip())
        shown.append(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
    return ",".join(shown)


class Address:
    """Where the node is that holds *key*: the server of the URL, or the owner of the key's slot in a cluster."""

    def __init__(self, urls: str, key: str) -> None:
        self._seeds = []
        for url in urls.split(","):
            try:
                self._seeds.append(dict(parse_url(url.strip())))
            except ValueError as error:
                raise InvalidRequest(f"{masked(url)} is not the address of a Redis: {error}") from None
        self._slot = key_slot(key.encode())
        self.urls = masked(urls)

    async def connect(self) -> AbstractConnection:
        """A connection to that node. Raises what redis-py raises."""
        failure: BaseException | None = None
        for seed in random.sample(self._seeds, len(self._seeds)):
            try:
                connection = await _open(seed)
            except (AuthenticationError, NoPermissionError):
                raise
            except BROKEN as error:
                failure = error
                continue
            try:
                owner = await self._owner(connection)
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            if owner is None:
                return connection
            await connection.disconnect(nowait=True)
            host, port = owner
            return await _open({**seed, "host": host or seed.get("host", "localhost"), "port": port})
        assert failure is not None
        raise failure

    async def _owner(self, connection: AbstractConnection) -> tuple[str, int] | None:
        """(host, port) of the key's node in a cluster; None when there is no cluster."""
        if b"cluster_enabled:1" not in await run_once(connection, "INFO", "cluster"):
            return None
        for first, last, owner, *_ in await run_once(connection, "CLUSTER", "SLOTS"):
            if first <= self._slot <= last:
                return owner[0].decode(), owner[1]
        raise ClusterDownError(f"slot {self._slot} is served by nobody")


async def _open(arguments: dict[str, Any]) -> AbstractConnection:
    kind = arguments.get("connection_class", Connection)
    options = {name: value for name, value in arguments.items() if name != "connection_class"}
    connection: AbstractConnection = kind(
        **{
            "socket_connect_timeout": CONNECT_TIMEOUT,
            # We watch it ourselves. redis-py would write under wait_for, which may lose a cancellation (Python 3.11).
            "socket_timeout": None,
            "socket_keepalive": True,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            **options,
        }
    )
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await connection.connect()  # type: ignore[no-untyped-call]
            if not connection.is_connected:
                raise ConnectionError("connecting was broken off")  # redis-py takes a cancellation for an answer
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return connection


async def run_once(connection: AbstractConnection, *command: Word) -> Any:
    """One command and its reply, on a connection that nobody else uses yet."""
    async with asyncio.timeout(REPLY_TIMEOUT):
        await connection.send_packed_command([_packed(command)], check_health=False)
        return await connection.read_response(timeout=math.inf)


def _packed(command: Command) -> bytes:
    packed: bytes = pack_command(tuple(command))  # type: ignore[arg-type]
    return packed


class _Call:
    __slots__ = ("future", "number", "packed", "reply", "sent_at")

    def __init__(self, number: int, packed: bytes, future: asyncio.Future[Any]) -> None:
        self.number = number
        self.packed = packed
        self.future = future
        self.sent_at = 0.0
        self.reply: Any = None

    def answer(self, reply: Any) -> None:
        if self.future.done():
            return  # nobody waits any more
        if isinstance(reply, Exception):
            self.future.set_exception(reply)
        else:
            self.future.set_result(reply)


class _Wait:
    """*calls*, which were written before it, are answered once replicas have them."""

    __slots__ = ("calls", "sent_at")

    def __init__(self, calls: list[_Call], sent_at: float) -> None:
        self.calls = calls
        self.sent_at = sent_at


class ReconnectingConnection:
    """Keeps one connection: connect, work until it breaks, wait a little, connect again."""

    #: What it is for, in logs.
    role = ""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._backoff = Backoff(0.05, MAX_BACKOFF)
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self.up = asyncio.Event()
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"redis: {self.role}")

    async def close(self) -> None:
        self._closing = True
        while self._task is not None and not self._task.done():
            self._task.cancel()  # again, should one be swallowed on its way
            await asyncio.wait([self._task], timeout=0.1)

    async def _run(self) -> None:
        # Asked, not only waited for: a task group that fails just when it is cancelled raises only its failure.
        while not self._closing:
            connection = None
            try:
                connection = await self._address.connect()
                await self._work(connection)
            except* (*BROKEN, InvalidRequest) as group:
                self._broken(first_of(group))
            except* Exception as group:  # a fault of ours must not end the connection for good
                log.exception("redis_failed", connection=self.role)
                self._broken(first_of(group))
            finally:
                self.up.clear()
                if connection is not None:
                    await connection.disconnect(nowait=True)
            if not self._closing:
                await asyncio.sleep(self._backoff.next())

    def _broken(self, error: BaseException) -> None:
        if self.up.is_set() or self.failure is None:
            log.warning("redis_lost", connection=self.role, error=str(error) or type(error).__name__)
        self.failure = error
        self.failed.set()

    def _healthy(self) -> None:
        self._backoff.reset()
        if self.failure is not None:
            log.info("redis_found", connection=self.role)
        self.failure = None

    async def _work(self, connection: AbstractConnection) -> None:
        raise NotImplementedError


class CommandConnection(ReconnectingConnection):
    """Calls to one shard, in order, over one connection; *greet* prepares each new one."""

    role = "commands"

    def __init__(
        self,
        address: Address,
        greet: Callable[[AbstractConnection], Awaitable[None]],
        *,
        timeout: float,
    ) -> None:
        super().__init__(address)
        self._greet = greet
        self._timeout = timeout
        self._waits: list[bytes] = []
        self._replicas = 0
        self._heard_at = 0.0
        self._queue: deque[_Call] = deque()
        self._flight: deque[_Call | _Wait] = deque()
        self._numbers = itertools.count()
        self._wake = asyncio.Event()

    async def wait_for_replicas(self, connection: AbstractConnection, count: int, commands: Sequence[Command]) -> None:
        """Answer calls once *commands* (``WAIT…``, none or more) say that *count* replicas have what they wrote.

        Raises `Unconfirmed` while they do not have what *connection* wrote so far.
        """
        self._waits = [_packed(command) for command in commands]
        self._replicas = count
        for command in commands:
            self._check_replicas(await run_once(connection, *command))

    def _check_replicas(self, reply: Any) -> None:
        if isinstance(reply, Exception):
            raise ResponseError(str(reply))
        synced = isinstance(reply, list)  # WAITAOF answers [here, replicas]
        reached = reply[-1] if synced else reply
        if reached < self._replicas:
            raise Unconfirmed(reached, self._replicas, synced)

    def send(self, command: Command) -> asyncio.Future[Any]:
        """Queue *command*; its reply. Whoever waits for it may go away: the call is completed all the same."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append(_Call(next(self._numbers), _packed(command), future))
        self._wake.set()
        return future

    async def call(self, command: Command) -> Any:
        """The reply to *command*. Raises `BrokerUnavailable` when there is none in time."""
        future = self.send(command)
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            self._forget()
            raise self.unavailable() from None

    def _forget(self) -> None:
        """Let go of what was not sent and nobody waits for any more: an outage may be long."""
        if self._queue and self._queue[0].future.done():
            self._queue = deque(call for call in self._queue if not call.future.done())

    def _unanswered(self) -> list[_Call]:
        """What was sent, in that order; a call waits for its reply, or for the replicas behind it."""
        calls = {call for entry in self._flight for call in (entry.calls if isinstance(entry, _Wait) else [entry])}
        return sorted(calls, key=lambda call: call.number)

    async def close(self) -> None:
        await super().close()
        for call in [*self._unanswered(), *self._queue]:
            call.answer(BrokerUnavailable("The connection to Redis was closed."))

    def unavailable(self) -> BrokerUnavailable:
        why = str(self.failure or "").rstrip(".")
        state = "cannot keep what it is told" if isinstance(self.failure, Unconfirmed) else "does not answer"
        message = f"Redis at {self._address.urls} {state}{': ' if why else ''}{why}."
        return BrokerUnavailable(message, retry_after=2.0)

    async def _work(self, connection: AbstractConnection) -> None:
        await self._greet(connection)
        # What was sent and not answered goes again, before anything newer.
        self._queue.extendleft(call for call in reversed(self._unanswered()) if not call.future.done())
        self._flight.clear()
        self._wake.set()
        self.up.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(connection))
            tasks.create_task(self._read(connection))
            tasks.create_task(self._watch())

    async def _write(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                batch: list[_Call] = []
                size, now = 0, loop.time()
                while self._queue and size < MAX_BATCH:
                    call = self._queue.popleft()
                    if call.future.done():
                        continue  # never sent, and nobody waits any more
                    call.sent_at = now
                    size += len(call.packed)
                    batch.append(call)
                if not batch:
                    continue
                self._flight.extend(batch)
                packed = [call.packed for call in batch]
                for wait in self._waits:
                    self._flight.append(_Wait(batch if wait is self._waits[-1] else [], now))
                    packed.append(wait)
                await connection.send_packed_command([b"".join(packed)], check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                reply = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
            except _ELSEWHERE:
                raise
            except ResponseError as error:
                reply = _translate(error)
            self._heard_at = loop.time()
            entry = self._flight[0]
            if isinstance(entry, _Wait):
                self._check_replicas(reply)  # else what is behind the gate counts as unanswered
                for call in entry.calls:
                    call.answer(call.reply)
            elif self._waits:
                entry.reply = reply
            else:
                entry.answer(reply)
            self._flight.popleft()
            self._healthy()

    async def _watch(self) -> None:
        """A peer that swallows everything is as dead as one that hangs up."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(REPLY_TIMEOUT / 6)
            if self._flight and max(self._flight[0].sent_at, self._heard_at) < loop.time() - REPLY_TIMEOUT:
                raise TimeoutError(f"no reply within {REPLY_TIMEOUT:.0f} s")


def _translate(error: ResponseError) -> Exception:
    """An error reply to a call as one of ours."""
    if isinstance(error, OutOfMemoryError):
        return InsufficientStorage(
            "Redis has no memory left for another job. Wait for results to expire, or raise its maxmemory.",
            retry_after=10.0,
        )
    return BrokerUnavailable(f"Redis refused: {error}", retry_after=2.0)


class Subscriber(ReconnectingConnection):
    """Messages of sharded channels. *on_up* runs when (again) everything subscribed to is heard, *on_down* when not."""

    role = "news"

    def __init__(
        self,
        address: Address,
        *,
        on_message: Callable[[bytes, bytes], None],
        on_up: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        super().__init__(address)
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._channels: dict[bytes, asyncio.Future[None]] = {}
        self._connection: AbstractConnection | None = None
        self._unsent: list[bytes] = []
        self._wake = asyncio.Event()
        self._heard_at = 0.0

    def subscribe(self, channel: bytes) -> asyncio.Future[None]:
        """Hear *channel* from now on; done once Redis has confirmed it."""
        confirmed = self._channels.get(channel)
        if confirmed is None:
            confirmed = self._channels[channel] = asyncio.get_running_loop().create_future()
            self._say(b"SSUBSCRIBE", channel)
        return confirmed

    def unsubscribe(self, channel: bytes) -> None:
        if self._channels.pop(channel, None) is not None:
            self._say(b"SUNSUBSCRIBE", channel)

    def _say(self, *command: bytes) -> None:
        if self._connection is not None:
            self._unsent.append(_packed(command))
            self._wake.set()

    async def _work(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        try:
            waiting = set(self._channels)
            self._connection, self._unsent = connection, []
            for channel in waiting:
                self._say(b"SSUBSCRIBE", channel)
            self._heard_at = loop.time()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(connection))
                tasks.create_task(self._read(connection, waiting))
                tasks.create_task(self._ping())
        finally:
            self._connection = None
            if self.up.is_set():
                self._on_down()

    async def _write(self, connection: AbstractConnection) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            packed, self._unsent = b"".join(self._unsent), []
            if packed:
                await connection.send_packed_command([packed], check_health=False)

    async def _read(self, connection: AbstractConnection, waiting: set[bytes]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            kind, *rest = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
            self._heard_at = loop.time()
            if kind == b"smessage":
                self._on_message(rest[0], rest[1])
            elif kind == b"ssubscribe":
                self._healthy()
                confirmed = self._channels.get(rest[0])
                if confirmed is not None and not confirmed.done():
                    confirmed.set_result(None)
                waiting.discard(rest[0])
                if not waiting and not self.up.is_set():
                    self.up.set()
                    self._on_up()
            elif kind == b"sunsubscribe" and rest[0] in self._channels:
                raise ConnectionError("another node serves these channels now")

    async def _ping(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_INTERVAL)
            if self._heard_at < loop.time() - REPLY_TIMEOUT:
                raise TimeoutError(f"nothing heard for {REPLY_TIMEOUT:.0f} s")
            self._say(b"PING")
