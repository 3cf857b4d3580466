"""An OpenAI-compatible server that does what it is told: ``python -m tests.chaos.upstream PORT``.

It streams ``max_tokens`` chunks, one every 20 ms, unless a word of `DEFECTS` is in the prompt: then the reply has that
defect, and is otherwise as it should be.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

PACE = 0.02
DEFECTS = ("BAD-BYTES", "DEEP-NESTING", "PLAIN-JSON", "SPLIT-SURROGATES", "CONTENT-PARTS", "NULL-USAGE")


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            method, path, _ = head.split(b" ", 2)
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await reader.readexactly(int(lengths[0][15:])) if lengths else b""
            if method == b"POST" and path == b"/v1/chat/completions":
                await _reply(writer, json.loads(body))
            elif path == b"/v1/models":
                _send(writer, {"object": "list", "data": [{"id": "up", "object": "model"}]})
            else:
                _send(writer, {"error": {"message": "no such route"}}, status=b"404 Not Found")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def _send(writer: asyncio.StreamWriter, value: Any, status: bytes = b"200 OK") -> None:
    text = json.dumps(value).encode()
    writer.write(b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(text)))
    writer.write(text)


async def _reply(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    prompt, tokens = json.dumps(body["messages"]), body.get("max_tokens") or body.get("max_completion_tokens") or 4
    defect = next((word for word in DEFECTS if word in prompt), "")
    if defect == "PLAIN-JSON" or not body.get("stream"):
        message = {"role": "assistant", "content": "".join(f"{number} " for number in range(1, tokens + 1))}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        _send(writer, {"id": "c", "object": "chat.completion", "choices": [choice], "usage": _usage(tokens)})
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    async for event in _events(tokens, defect):
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await writer.drain()
        await asyncio.sleep(PACE)
    writer.write(b"0\r\n\r\n")


async def _events(tokens: int, defect: str) -> AsyncIterator[bytes]:
    for number in range(1, tokens + 1):
        text = json.dumps(f"{number} ").encode()
        if number == 2:
            match defect:
                case "BAD-BYTES":
                    text = b'"\xff\xfe"'
                case "DEEP-NESTING":
                    text = b'"x", "extra": ' + b"[" * 20_000 + b"]" * 20_000
                case "SPLIT-SURROGATES":
                    text = rb'"\ud83d"'
                case "CONTENT-PARTS":
                    text = b'[{"type": "text", "text": "2 "}]'
        elif number == 3 and defect == "SPLIT-SURROGATES":
            text = rb'"\ude00"'
        yield _event(b'{"index": 0, "delta": {"content": %b}, "finish_reason": null}' % text)
    yield _event(b'{"index": 0, "delta": {}, "finish_reason": "length"}')
    usage = {"prompt_tokens": None, "completion_tokens": None} if defect == "NULL-USAGE" else _usage(tokens)
    yield _event(b"", usage)
    yield b"data: [DONE]\n\n"


def _event(choice: bytes, usage: dict[str, Any] | None = None) -> bytes:
    told = json.dumps(usage).encode()
    return b'data: {"id": "c", "object": "chat.completion.chunk", "model": "up", "choices": [%b], "usage": %b}\n\n' % (
        choice,
        told,
    )


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}


async def main(port: int) -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
