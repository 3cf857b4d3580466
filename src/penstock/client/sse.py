"""Server-sent events: bytes in, events out."""

from __future__ import annotations

from typing import NamedTuple


class ServerEvent(NamedTuple):
    event: str
    data: str
    id: str


class SSEDecoder:
    """Bytes in, events out, after the WHATWG rules, wherever the bytes are cut. One decoder per connection: what is
    left of a torn block goes with it."""

    def __init__(self) -> None:
        self.retry: int | None = None
        """The reconnection time last asked for, in milliseconds."""
        self.comments = 0
        """How many comment lines (heartbeats) have come."""
        self._rest = b""
        self._after_cr = False
        self._at_start = True
        self._id = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that *chunk* completes."""
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")  # the second half of a CRLF
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        lines = (self._rest + chunk).splitlines(keepends=True)  # of bytes: at CR, LF and CRLF, nothing else
        self._rest = b"" if lines[-1].endswith((b"\r", b"\n")) else lines.pop()
        events = []
        for line in lines:
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        return events

    def _line(self, line: bytes) -> ServerEvent | None:
        if self._at_start:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        if not line:
            return self._dispatch()
        name, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value)
        elif name == "":
            self.comments += 1
        return None

    def _dispatch(self) -> ServerEvent | None:
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return ServerEvent(event, "\n".join(data), self._id) if data else None
