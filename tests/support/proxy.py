"""A bad network: a TCP proxy between one process and Redis that drops, delays, stalls, swallows, or loses one reply.

It runs on the test's own event loop. What it was told to do holds for open connections and for new ones, until `heal`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from tests.support.server import free_port

#: Commands whose connection is sent more than replies from then on.
_SUBSCRIBING = frozenset({b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE", b"MONITOR"})

Words = list[bytes]


class Proxy:
    """Listens on a loopback port of its own and passes everything on to *port* of the same host.

    Only with *redis* does it know what passes, for `lose_reply`.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", *, redis: bool = True) -> None:
        self.redis = redis
        self.host = host
        self.upstream = port
        self.port = free_port()
        self.accepted = 0
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self.latency = 0.0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.passing = asyncio.Event()
        self.passing.set()
        self._lose: tuple[Callable[[Words], bool], Callable[[bytes], bool], asyncio.Future[Words]] | None = None

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def start(self) -> Self:
        await self.accept()
        return self

    async def close(self) -> None:
        await self.refuse()
        self.passing.set()
        self.flowing.set()
        self.drop()
        await asyncio.gather(*(connection.gone.wait() for connection in list(self._connections)))

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------ faults

    def drop(self) -> None:
        """Cut every connection; new ones are accepted."""
        for connection in list(self._connections):
            connection.cut()

    async def refuse(self) -> None:
        """Nobody listens any more; open connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """The end of `refuse`."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, self.host, self.port)

    def delay(self, seconds: float) -> None:
        """Everything arrives later, in order; throughput stays."""
        self.latency = seconds

    def stall(self) -> None:
        """Nothing arrives until `heal`, and then all of it does, even from a client that has hung up meanwhile: how a
        write of a process that was given up comes late."""
        self.flowing.clear()

    def blackhole(self) -> None:
        """Whatever is sent vanishes, both ways; connections stay open. (`heal` cuts those that lost something.)"""
        self.passing.clear()

    def lose_reply(
        self, request: Callable[[Words], bool], reply: Callable[[bytes], bool] = lambda reply: True
    ) -> asyncio.Future[Words]:
        """Let Redis execute the next *request* that has such a *reply*, and cut its connection instead of passing the
        reply on. The future has the request's words when that has happened; cancel it to give up."""
        lost: asyncio.Future[Words] = asyncio.get_running_loop().create_future()
        self._lose = (request, reply, lost)
        return lost

    async def heal(self) -> None:
        self.latency = 0.0
        self._lose = None
        if not self.passing.is_set():
            self.passing.set()
            for connection in list(self._connections):
                if connection.mutilated:
                    connection.cut()
        self.flowing.set()
        await self.accept()

    # ------------------------------------------------------------------------------------ connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def wants(self, words: Words) -> bool:
        return self._lose is not None and not self._lose[2].done() and self._lose[0](words)

    def loses(self, words: Words, reply: bytes) -> bool:
        if not self.wants(words):
            return False
        assert self._lose is not None
        _, matches, lost = self._lose
        if not matches(reply):
            return False
        lost.set_result(words)
        return True


class _Connection:
    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = (reader, writer)
        self._task: asyncio.Task[None] | None = None
        self._transports = [writer.transport]
        self._requests = Frames()
        self._replies = Frames()
        self._unanswered: deque[Words | None] = deque()
        """One for each request on its way: its words, if its reply may have to be lost."""
        self._counting = self._proxy.redis
        self.mutilated = False
        self._cut = False
        self.gone = asyncio.Event()

    async def run(self) -> None:
        try:
            try:
                reader, writer = await asyncio.open_connection(self._proxy.host, self._proxy.upstream)
            except OSError:
                return
            self._transports.append(writer.transport)
            if self._cut:
                return
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(self._client[0], writer, self._note_requests))
                tasks.create_task(self._pump(reader, self._client[1], self._without_lost))
        finally:
            self.cut()
            self.gone.set()

    def cut(self) -> None:
        self._cut = True
        for transport in self._transports:
            transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look: Callable[[bytes], bytes | None]
    ) -> None:
        """One direction: take in what comes, pass it on when it is due."""
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def take_in() -> None:
            data = b"-"
            while data:
                try:
                    data = await reader.read(1 << 16)
                except OSError:
                    data = b""
                due.put_nowait((loop.time() + self._proxy.latency, data))

        taking = asyncio.create_task(take_in())
        try:
            while True:
                at, data = await due.get()
                await self._proxy.flowing.wait()
                if (early := at - loop.time()) > 0:
                    await asyncio.sleep(early)
                if not self._proxy.passing.is_set():
                    self.mutilated = True
                    if data:
                        continue
                    await self._proxy.passing.wait()  # nobody hears of a hang-up either
                passed = look(data) if data else None
                if passed is None:  # the end of it, or the reply that is lost
                    break
                if not writer.is_closing():
                    with contextlib.suppress(OSError):
                        writer.write(passed)
                        await writer.drain()
            # What was passed on last is still delivered; then both sides hang up.
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._client[1].transport.abort()
        finally:
            taking.cancel()

    def _note_requests(self, data: bytes) -> bytes:
        if self._counting:
            for frame, _ in self._requests.feed(data):
                words = words_of(frame)
                if words[0].upper() in _SUBSCRIBING:
                    self._counting = False
                self._unanswered.append(words if self._proxy.wants(words) else None)
        return data

    def _without_lost(self, data: bytes) -> bytes | None:
        if self._counting:
            for frame, start in self._replies.feed(data):
                words = self._unanswered.popleft()
                if words is not None and self._proxy.loses(words, frame):
                    self._client[1].write(data[: max(0, start)])
                    return None
        return data


class Frames:
    """Cuts one direction of a Redis connection into requests or replies."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Every frame that is complete now, and where in *data* it begins (negative: before it)."""
        carried = len(self._buffer)
        self._buffer += data
        at = 0
        try:
            while (end := _end(self._buffer, at)) is not None:
                yield self._buffer[at:end], at - carried
                at = end
        finally:
            self._buffer = self._buffer[at:]


def _end(buffer: bytes, at: int) -> int | None:
    """Where the frame that begins *at* ends; None while it is not complete."""
    line = buffer.find(b"\r\n", at)
    if line < 0:
        return None
    kind, after = buffer[at : at + 1], line + 2
    if kind in b"$=!":
        length = int(buffer[at + 1 : line])
        after += length + 2 if length >= 0 else 0
        return after if after <= len(buffer) else None
    if kind in b"*~>%":
        for _ in range(int(buffer[at + 1 : line]) * (2 if kind == b"%" else 1)):
            inner = _end(buffer, after)
            if inner is None:
                return None
            after = inner
    return after


def words_of(request: bytes) -> Words:
    """The words of a request (an array of strings, or a line typed by a person)."""
    if request[:1] != b"*":
        return request.split()
    words = []
    at = request.index(b"\r\n") + 2
    while at < len(request):
        line = request.index(b"\r\n", at)
        end = line + 2 + int(request[at + 1 : line])
        words.append(request[line + 2 : end])
        at = end + 2
    return words
