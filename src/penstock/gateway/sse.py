"""Server-sent events as a raw ASGI response: whatever is ready goes out in one ``send``.

The rules (docs/protocol.md): ``retry:`` only inside the first data block, never a block without data, a heartbeat is
a comment line with ONE line feed, CR/LF/NUL never reach ``id`` or ``event``.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from penstock.core.errors import PenstockError

log = structlog.get_logger("penstock.gateway")

#: One line feed: after an ``id`` some SDK decoders turn a blank line into an empty event.
PING = b": ping\n"

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]

#: A text as an ASCII-only JSON string: U+2028 and others break the line splitting of clients, here and in JSONL.
json_string: Callable[[str], str] = json.encoder.encode_basestring_ascii


_encode = msgspec.json.Encoder().encode
_NOT_ASCII = re.compile("[^\x00-\x7f]+")


def ascii_json(value: Any) -> str:
    """Any of our structures as one line of ASCII-only JSON."""
    try:
        text = _encode(value).decode()
    except UnicodeEncodeError:  # half a surrogate pair, which only the standard library writes
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":"))
    # Whatever is not ASCII stands within strings.
    return text if text.isascii() else _NOT_ASCII.sub(lambda found: json_string(found[0])[1:-1], text)


def frame(event: str, data: Any, id: str | int | None = None) -> bytes:
    """One event block. *event* and *id* are ours, never a client's text; *data* becomes one line of JSON."""
    head = f"id: {id}\n" if id is not None else ""
    return f"{head}event: {event}\ndata: {ascii_json(data)}\n\n".encode()


async def stream_of(*blocks: bytes) -> AsyncIterator[bytes]:
    """A stream that is known already; of none, where only its head is asked for."""
    for block in blocks:
        yield block


class Streams:
    """All open streams of a gateway, with one task for what would otherwise need a timer in each.

    Sends heartbeats to silent streams, drops readers whose socket took nothing for *send_deadline* seconds, and on
    `close` ends every stream with a jittered ``retry:``, so that the clients come back spread out.
    """

    def __init__(self, *, heartbeat: float = 10.0, send_deadline: float = 30.0) -> None:
        self.heartbeat = heartbeat
        self.send_deadline = send_deadline
        self.closing = False
        self._open: set[EventStream] = set()

    def __len__(self) -> int:
        return len(self._open)

    async def run(self) -> None:
        tick = min(1.0, self.heartbeat / 4, self.send_deadline / 4)
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            for stream in list(self._open):
                if stream.sending_since is not None:
                    if now - stream.sending_since > self.send_deadline:
                        stream.drop()
                elif now - stream.sent_at >= self.heartbeat:
                    stream.ping()

    def close(self) -> None:
        self.closing = True
        for stream in list(self._open):
            stream.finish()

    def add(self, stream: EventStream) -> None:
        self._open.add(stream)
        if self.closing:
            stream.finish()

    def discard(self, stream: EventStream) -> None:
        self._open.discard(stream)


class EventStream:
    """Sends *blocks* (each: ready event blocks, joined) until they end, the client leaves, or the gateway closes."""

    def __init__(
        self,
        streams: Streams,
        blocks: AsyncIterator[bytes],
        *,
        headers: dict[str, str] | None = None,
        on_close: Callable[[bool], Awaitable[None]] | None = None,
    ) -> None:
        """*on_close* is awaited at the end with True when every block was sent."""
        self._streams = streams
        self._blocks = blocks
        self._headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self._on_close = on_close
        self._send: Send | None = None
        self._task: asyncio.Task[None] | None = None
        self._ping: asyncio.Task[None] | None = None
        self._interrupted = False
        self._finishing = False
        self.sending_since: float | None = None
        self.sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        self._task = asyncio.current_task()
        complete = False
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *self._headers]})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body"})
            return
        watcher = asyncio.create_task(self._watch(receive))
        self._streams.add(self)
        try:
            count = 0
            async for block in self._blocks:
                await self._write(block)
                count += 1
                if count % 32 == 0:
                    await asyncio.sleep(0)  # a replay to a client that has gone must not spin the loop
            complete = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
            assert self._task is not None
            self._task.uncancel()
            if self._finishing:
                await self._farewell()
        except PenstockError as error:  # the job was deleted in the middle of a replay, or its retention ended
            log.info("stream_cut", path=scope["path"], code=error.code)
            await self._farewell()
        finally:
            self._streams.discard(self)
            watcher.cancel()
            if self._ping is not None:
                self._ping.cancel()
            close = getattr(self._blocks, "aclose", None)
            if close is not None:
                await close()
            if self._on_close is not None:
                await self._on_close(complete)

    async def _write(self, block: bytes) -> None:
        assert self._send is not None
        self.sent_at = self.sending_since = time.monotonic()
        await self._send({"type": "http.response.body", "body": block, "more_body": True})
        self.sending_since = None

    async def _farewell(self) -> None:
        """End the response properly. It is not complete: whoever resumes it later gets the rest, or is told why not."""
        assert self._send is not None
        retry = f"retry: {random.randint(500, 3000)}\n".encode()
        await self._send({"type": "http.response.body", "body": retry, "more_body": False})

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.drop()

    def ping(self) -> None:
        if not self._interrupted:
            # A task of its own: a client that takes nothing must not hold up the others' heartbeats.
            self._ping = asyncio.create_task(self._write(PING))

    def drop(self) -> None:
        """The client has gone, or takes nothing: stop. It can resume."""
        if not self._interrupted and self._task is not None:
            self._interrupted = True
            self._task.cancel()

    def finish(self) -> None:
        """The gateway is going: end the response properly, telling the client when to come back."""
        self._finishing = True
        self.drop()
