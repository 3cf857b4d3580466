"""What an engine process and its parent say to each other: length-prefixed msgpack over a socket pair.

msgpack, never pickle: a compromised engine can lie to its parent but not run code in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec

from penstock.core.errors import ErrorInfo
from penstock.core.events import Prefix
from penstock.core.job import Request
from penstock.core.ports import ModelInfo, Output
from penstock.core.telemetry import Fact

_HEADER = struct.Struct("!I")


class Load(msgspec.Struct, array_like=True, tag=True):
    """First word of the parent: which engine, model and options (strings, as typed by the operator)."""

    engine: str
    model: str
    path: str | None
    options: dict[str, str]


class Add(msgspec.Struct, array_like=True, tag=True):
    key: int
    request: Request
    prefixes: list[Prefix]
    attempt: int


class Abort(msgspec.Struct, array_like=True, tag=True):
    key: int


class Ping(msgspec.Struct, array_like=True, tag=True):
    pass


#: How a slow load goes: (what, fraction or None). What the child reports with `Loading`.
Progress = Callable[[str, float | None], None]


class Loading(msgspec.Struct, array_like=True, tag=True):
    what: str
    fraction: float | None


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The model is loaded; again when something of it has changed."""

    info: ModelInfo
    slots: int


class Failed(msgspec.Struct, array_like=True, tag=True):
    """The model could not be loaded, or the engine broke: the process ends after this."""

    error: ErrorInfo
    traceback: str


class Notice(msgspec.Struct, array_like=True, tag=True):
    """Something has happened in the child: an event for the telemetry (`penstock.core.telemetry`)."""

    name: str
    facts: dict[str, Fact]


class Outputs(msgspec.Struct, array_like=True, tag=True):
    outputs: list[Output]


class Pong(msgspec.Struct, array_like=True, tag=True):
    pass


ToChild = Load | Add | Abort | Ping
ToParent = Loading | Ready | Failed | Outputs | Notice | Pong

_encoder = msgspec.msgpack.Encoder()


def encode(message: ToChild | ToParent) -> bytes:
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


class Splitter:
    """Cuts a byte stream into messages of one union type."""

    def __init__(self, messages: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        buffer = self._buffer
        buffer += data
        found: list[Any] = []
        start = 0
        while len(buffer) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(buffer, start)
            end = start + _HEADER.size + length
            if end > len(buffer):
                break
            found.append(self._decoder.decode(memoryview(buffer)[start + _HEADER.size : end]))
            start = end
        if start:
            del buffer[:start]
        return found
