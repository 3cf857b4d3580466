"""An event stream as it is on the wire: strict where the specification is strict, since a lenient reader sees no fault.

Bytes come in any division. What has come is kept whole and read again after each piece: a stream here is short.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec


class Block(msgspec.Struct, frozen=True):
    """One block: its lines as (name, value), in order. For `penstock.testing.oracle` it is a parsed event."""

    fields: tuple[tuple[str, str], ...]

    def _last(self, name: str) -> str | None:
        return next((value for key, value in reversed(self.fields) if key == name), None)

    @property
    def id(self) -> str | None:
        return self._last("id")

    @property
    def event(self) -> str | None:
        return self._last("event")

    @property
    def retry(self) -> str | None:
        return self._last("retry")

    @property
    def data(self) -> str:
        return "\n".join(value for name, value in self.fields if name == "data")

    @property
    def lines_of_data(self) -> int:
        return sum(name == "data" for name, _ in self.fields)

    def json(self) -> dict[str, Any]:
        """The data, or ValueError."""
        value = json.loads(self.data)
        if not isinstance(value, dict):
            raise ValueError(f"the data is no object: {self.data!r}")
        return value


class Text(msgspec.Struct, frozen=True):
    """What the bytes of a stream say."""

    blocks: list[Block]
    comments: list[str]
    """The comment lines (heartbeats), without the colon."""
    goodbye: str | None
    """The value of ``retry`` where a server that goes down ended the stream."""
    problems: list[str]
    """What is not as section 3 says."""


def read(raw: bytes, *, whole: bool) -> Text:
    """*raw* as blocks. *whole*: the response has ended, so a block must not be cut."""
    blocks: list[Block] = []
    comments: list[str] = []
    problems: list[str] = []
    fields: list[tuple[str, str]] = []
    before = ""
    if b"\r" in raw or b"\0" in raw:
        problems.append("a CR or a NUL in the stream")
    if not raw.isascii():
        problems.append("bytes that are not ASCII")
    *lines, rest = raw.decode("utf-8", "replace").split("\n")
    for line in lines:
        if line.startswith(":"):
            comments.append(line[1:].strip())
            if fields:
                problems.append(f"a comment inside a block: {line!r}")
        elif line:
            name, colon, value = line.partition(": ")
            if not colon or name not in ("id", "event", "data", "retry"):
                problems.append(f"a line that is no field: {line[:60]!r}")
            fields.append((name, value))
        elif fields:
            blocks.append(Block(tuple(fields)))
            fields = []
        else:
            problems.append("a blank line after a comment" if before.startswith(":") else "two blank lines in a row")
        before = line
    goodbye = fields[0][1] if len(fields) == 1 and fields[0][0] == "retry" and not rest else None
    if whole and (rest or (fields and goodbye is None)):
        problems.append(f"the stream ends inside a block: {(before + rest)[:60]!r}")
    return Text(blocks, comments, goodbye, problems)


class NoAnswer(AssertionError):
    """What had to come did not come in time, or is nothing that a Penstock server says."""


class Stream:
    """A response that is being read. *patience*: seconds after which what has not come counts as missing."""

    def __init__(self, response: httpx.Response, patience: float) -> None:
        self.response = response
        self.raw = b""
        self.ended = False
        """Has the server ended the response?"""
        self._patience = patience
        self._pieces = aiter(response.aiter_raw())

    async def read_until(self, condition: Callable[[Stream], bool]) -> None:
        """Read until *condition* holds, at most to the end."""
        try:
            async with asyncio.timeout(self._patience):
                while not self.ended and not condition(self):
                    piece = await anext(self._pieces, None)
                    if piece is None:
                        self.ended = True
                    else:
                        self.raw += piece
        except TimeoutError as error:
            raise NoAnswer(f"no more came within {self._patience:g} s, behind {self.raw[-80:]!r}") from error

    async def read_blocks(self, count: int) -> list[Block]:
        """The first *count* blocks."""
        await self.read_until(lambda stream: len(stream.blocks) >= count)
        return self.blocks[:count]

    async def read_all(self) -> Stream:
        await self.read_until(lambda stream: False)
        return self

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def job(self) -> str:
        return str(self.response.headers.get("x-penstock-job", ""))

    @property
    def text(self) -> Text:
        return read(self.raw, whole=self.ended)

    @property
    def blocks(self) -> list[Block]:
        return self.text.blocks
