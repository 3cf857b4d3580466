"""How fast the harness itself is: it drives a server that replays canned streams and does nothing else.

The server runs in a process of its own. It writes the same reply to every request, `burst` events a write, each event
its own HTTP chunk, as servers do; with burst 1 the streams take turns event by event, as they do behind a batching
engine. The figure that counts is the harness's own CPU time per event: with it, the harness's share of any other
measurement can be worked out.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe

from benchmarks import canned
from benchmarks.load import Plan, Server, run_load
from benchmarks.workload import Workload


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


def _serve(pipe: Pipe, dialect: str, tokens: int, burst: int) -> None:
    canned.serve({"": canned.reply(dialect, tokens)}, burst, 0, pipe.send)
