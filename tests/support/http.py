"""HTTP/1.1 by hand: requests that no well-behaved client would send, and answers byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 60.0


class Answer:
    """Status line, headers, and the body as it comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.torn = False
        """The connection ended before the body did."""

    async def read_head(self) -> None:
        line = await self._reader.readline()
        if not line:
            raise ConnectionResetError("the server closed the connection without an answer")
        self.status = int(line.split(b" ", 2)[1])
        while (line := await self._reader.readline()) not in (b"\r\n", b"\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()

    async def body_parts(self) -> AsyncIterator[bytes]:
        """The body's bytes, without the transfer coding. Sets `torn` when it was cut short."""
        if self.status == 204:
            return
        try:
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int((await self._line()).split(b";")[0], 16):
                    yield await self._reader.readexactly(size)
                    await self._reader.readexactly(2)
                await self._line()
            elif "content-length" in self.headers:
                yield await self._reader.readexactly(int(self.headers["content-length"]))
            else:
                while part := await self._reader.read(65536):
                    yield part
        except (ConnectionError, asyncio.IncompleteReadError):
            self.torn = True

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise asyncio.IncompleteReadError(line, None)
        return line

    async def body(self) -> bytes:
        return b"".join([part async for part in self.body_parts()])

    async def json(self) -> Any:
        return json.loads(await self.body())

    def close(self) -> None:
        """Leave without a word."""
        self._writer.transport.abort()

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        with contextlib.suppress(Exception):
            await self._writer.wait_closed()


async def send(
    url: str,
    method: str = "GET",
    *,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes | None = None,
    chunks: Iterable[bytes] | None = None,
    json_body: Any = None,
    timeout: float = PATIENCE,
    limit: int = 1 << 20,
) -> Answer:
    """Send one request and read the answer's head. *chunks* are sent in chunked coding, without a length."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = dict(headers)
    names = {name.lower() for name in fields}
    if json_body is not None:
        body = json.dumps(json_body).encode()
        if "content-type" not in names:
            fields["content-type"] = "application/json"
    if "host" not in names:
        fields["host"] = parts.netloc
    if chunks is not None:
        fields["transfer-encoding"] = "chunked"
    elif body is not None and "content-length" not in names:
        fields["content-length"] = str(len(body))
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=limit)
        answer = Answer(reader, writer)
        try:
            lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
            writer.write("\r\n".join(lines).encode("latin-1") + (body or b""))
            # The server may answer (413) and close before it has read everything: that is not our failure.
            with contextlib.suppress(ConnectionError):
                for chunk in chunks or ():
                    writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                    await writer.drain()
                if chunks is not None:
                    writer.write(b"0\r\n\r\n")
                await writer.drain()
            await answer.read_head()
        except BaseException:
            answer.close()
            raise
    return answer
