"""A plain reader of server-sent events, after the WHATWG rules: not the product's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tests.support.conformance import check_answer, check_event
from tests.support.http import PATIENCE, Answer, send


@dataclass(frozen=True)
class Event:
    """A dispatched event. ``id`` is the block's own (None without one); ``block`` its lines as they came."""

    id: str | None
    event: str
    text: str
    retry: int | None = None
    block: bytes = b""

    @property
    def data(self) -> Any:
        """The data as JSON (``[DONE]`` as it is)."""
        return self.text if self.text == "[DONE]" else json.loads(self.text)


@dataclass
class Parser:
    """Bytes in, events out. Keeps what a browser keeps: the last event id and the reconnection time."""

    last_event_id: str | None = None
    retry: int | None = None
    comments: list[str] = field(default_factory=list)
    empty_blocks: int = 0
    """Blocks with fields but without data: official SDKs fail on them."""
    _buffer: bytes = b""
    _lines: list[bytes] = field(default_factory=list)

    def feed(self, data: bytes) -> list[Event]:
        events = []
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                self._take(line)
                continue
            if (event := self._dispatch()) is not None:
                events.append(event)
            self._lines = []
        return events

    def _take(self, line: bytes) -> None:
        if line.startswith(b":"):
            self.comments.append(line[1:].decode().strip())
        else:
            if line.startswith(b"retry:"):
                self.retry = int(line[6:])
            self._lines.append(line)

    def _dispatch(self) -> Event | None:
        if not self._lines:
            return None
        id = retry = None
        name, data = "message", []
        for line in self._lines:
            key, _, value = line.decode().partition(":")
            value = value.removeprefix(" ")
            if key == "data":
                data.append(value)
            elif key == "event":
                name = value
            elif key == "id":
                id = value
            elif key == "retry":
                retry = int(value)
        if id is not None:
            self.last_event_id = id
        if not data:
            self.empty_blocks += 1
            return None
        return Event(id, name, "\n".join(data), retry, b"\n".join(self._lines))


class Stream:
    """One open event stream. Iterate it, or take the `next` event; ``raw`` is every byte of it so far.

    *request*: its method and path. Each event is checked against the API's description.
    """

    def __init__(self, answer: Answer, request: tuple[str, str]) -> None:
        self.answer = answer
        self.request = request
        self.status = answer.status
        self.headers = answer.headers
        self.parser = Parser()
        self.raw = b""
        self._parts = answer.body_parts()
        self._ready: list[Event] = []

    @property
    def torn(self) -> bool:
        return self.answer.torn

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._parts.aclose()  # type: ignore[attr-defined]
        await self.answer.__aexit__()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events()

    async def _events(self) -> AsyncIterator[Event]:
        while (event := await self.next()) is not None:
            yield event

    async def next(self, timeout: float = PATIENCE) -> Event | None:
        """The next event; None at the end of the stream."""
        async with asyncio.timeout(timeout):
            while not self._ready:
                if not await self.more():
                    return None
        return self._ready.pop(0)

    async def more(self) -> bool:
        """Read some bytes, whatever they are (heartbeats make no event). False at the end of the stream."""
        async for part in self._parts:
            self.raw += part
            for event in self.parser.feed(part):
                check_event(*self.request, event.event, event.text)
                self._ready.append(event)
            return True
        return False

    async def take(self, count: int) -> list[Event]:
        """Exactly *count* events."""
        events = []
        while len(events) < count:
            event = await self.next()
            assert event is not None, f"the stream ended after {len(events)} of {count} events"
            events.append(event)
        return events

    async def rest(self, timeout: float = PATIENCE) -> list[Event]:
        """Every event until the stream ends."""
        async with asyncio.timeout(timeout):
            return [event async for event in self]


async def open_stream(
    url: str,
    method: str = "GET",
    *,
    after: int | str | None = None,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    json_body: Any = None,
    limit: int = 1 << 20,
) -> Stream:
    """Open a stream; *after* is sent as ``Last-Event-ID``. Look at ``status`` before you read."""
    fields = {"accept": "text/event-stream", **dict(headers)}
    if after is not None:
        fields["last-event-id"] = str(after)
    answer = await send(url, method, headers=fields, json_body=json_body, limit=limit)
    path = urlsplit(url).path
    check_answer(method, path, answer.status, answer.headers.get("content-type", ""), None)
    return Stream(answer, (method, path))
