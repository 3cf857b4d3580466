"""A server that replays canned streams and does nothing else: the other end of the harness, and of proxies.

It writes the same reply to every request, `burst` events a write, each event its own HTTP chunk, as servers do; with
burst 1 the streams take turns event by event, as they do behind a batching engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from benchmarks.load import loop_factory

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_LIST = b'{"object":"list","data":[{"id":"synthetic","object":"model","owned_by":"benchmarks"}]}'
_MODELS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_LIST), _LIST)


def reply(dialect: str, tokens: int) -> list[bytes]:
    """The events of one reply, as HTTP chunks."""
    usage = {"prompt_tokens": 24, "completion_tokens": tokens, "total_tokens": 24 + tokens}
    events = []
    if dialect == "generate":
        for position in range(1, tokens + 1):
            data = {"job_id": "01JD0000000000000000000000", "token": " word", "token_id": 1234, "attempt": 1}
            events.append(f"id: {position}\nevent: token\ndata: {json.dumps(data)}\n\n")
        done = {"job_id": "01JD0000000000000000000000", "status": "completed", "finish_reason": "length"}
        events.append(f"id: {tokens + 1}\nevent: done\ndata: {json.dumps(done | {'usage': usage})}\n\n")
    else:
        chat = dialect == "chat"
        common = {
            "id": "cmpl-0123456789abcdef",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1790000000,
            "model": "canned",
        }

        def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
            content = {"delta": {"content": text}} if chat else {"text": text}
            return common | {"choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish}]}

        chunks = [chunk(" word") for _ in range(tokens)]
        chunks += [chunk("", "length"), common | {"choices": [], "usage": usage}]
        events = [f"data: {json.dumps(each, separators=(',', ':'))}\n\n" for each in chunks] + ["data: [DONE]\n\n"]
    return [b"%x\r\n%b\r\n" % (len(event), event.encode()) for event in events]


def serve(replies: dict[str, list[bytes]], burst: int, port: int, ready: Callable[[int], None]) -> None:
    """Answer every POST with the reply whose key its path ends with; *ready* is told the port. For ever."""
    pieces_of = {}
    for path, chunks in replies.items():
        pieces = [b"".join(chunks[start : start + burst]) for start in range(0, len(chunks), burst)]
        pieces[0] = _HEAD + pieces[0]
        pieces[-1] += b"0\r\n\r\n"
        pieces_of[path.encode()] = pieces

    class Replay(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            # Requests are small and never pipelined: what starts with POST is one, anything else its remainder.
            if data.startswith(b"POST"):
                path = data.split(b" ", 2)[1]
                pieces = next(pieces for end, pieces in pieces_of.items() if path.endswith(end))
                turns.append((self.transport, iter(pieces)))
                if len(turns) == 1:
                    loop.call_soon(step)
            elif data.startswith(b"GET"):
                self.transport.write(_MODELS)

    turns: deque[tuple[Any, Any]] = deque()

    def step() -> None:
        """Every stream in turn gets one write, as after one step of an engine."""
        for _ in range(len(turns)):
            transport, rest = turns.popleft()
            piece = next(rest, None)
            if piece is not None and not transport.is_closing():
                transport.write(piece)
                turns.append((transport, rest))
        if turns:
            loop.call_soon(step)

    async def main() -> None:
        server = await loop.create_server(Replay, "127.0.0.1", port, backlog=1024)
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        loop = runner.get_loop()
        runner.run(main())


def main() -> None:
    """``python -m benchmarks.canned PORT TOKENS``: the upstream of the proxies that are measured."""
    port, tokens = map(int, sys.argv[1:])
    # The longer path first: the other one is its end.
    replies = {
        f"/{path}completions": reply(dialect, tokens) for path, dialect in (("chat/", "chat"), ("", "completions"))
    }
    serve(replies, 1, port, lambda port: None)


if __name__ == "__main__":
    main()
