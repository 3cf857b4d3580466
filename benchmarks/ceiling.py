"""How fast the harness itself is: it drives a server that replays canned streams and does nothing else.

The server runs in a process of its own. It writes the same reply to every request, `burst` events a write, each event
its own HTTP chunk, as servers do; with burst 1 the streams take turns event by event, as they do behind a batching
engine. The figure that counts is the harness's own CPU time per event: with it, the harness's share of any other
measurement can be worked out.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from benchmarks.load import Plan, Server, loop_factory, run_load
from benchmarks.workload import Workload

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Ceiling:
    """One row of the answer."""

    dialect: str
    concurrency: int
    burst: int
    events: int
    events_per_read: float
    """Less of the burst is seen one by one when the canned server is ahead: reads cost more than events."""
    events_per_s: float
    """As measured, the canned server beside it."""
    cpu_us_per_event: float
    """Of the harness alone."""
    own_events_per_s: float
    """What one core gives to the harness alone: 1 / cpu_us_per_event."""
    errors: int


def measure(dialect: str, concurrency: int, burst: int, events: int, tokens: int = 64) -> Ceiling:
    """Stream about `events` events through the harness."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, dialect, tokens, burst), daemon=True)
    server.start()
    try:
        port = ours.recv()
        workload = Workload(dialect=dialect, prompts="text", max_tokens=tokens)
        plan = Plan(concurrency=concurrency, requests=max(concurrency, events // tokens))
        result = run_load(Server(f"http://127.0.0.1:{port}"), workload, plan, warmup=2 * concurrency)
    finally:
        server.terminate()
        server.join()
    cpu = result.processes[-1].cpu_s / max(result.events, 1)
    return Ceiling(
        dialect,
        concurrency,
        burst,
        result.events,
        result.events_per_read,
        result.events / result.wall_s,
        cpu * 1e6,
        1 / cpu,
        sum(result.errors.values()) + result.short_replies,
    )


def _canned(dialect: str, tokens: int) -> list[bytes]:
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


def _serve(pipe: Pipe, dialect: str, tokens: int, burst: int) -> None:
    """The canned server: runs until it is terminated."""
    chunks = _canned(dialect, tokens)
    end = b"0\r\n\r\n"
    pieces = [b"".join(chunks[start : start + burst]) for start in range(0, len(chunks), burst)]
    pieces[0] = _HEAD + pieces[0]
    pieces[-1] += end

    class Replay(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            # Requests are small and never pipelined: what starts with POST is one, anything else its remainder.
            if data.startswith(b"POST"):
                turns.append((self.transport, iter(pieces)))
                if len(turns) == 1:
                    loop.call_soon(step)

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
        server = await loop.create_server(Replay, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        loop = runner.get_loop()
        runner.run(main())
