"""Does a client that never reads cost the others anything?

Three arms in turn, round after round, under the same load: `none` (the load alone), `reads` (beside it one more client
that streams a long reply and reads it), `never` (the same client, which sends its request and never reads a byte). The
honest comparison is `never` with `reads`: both give the engine the same work.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from benchmarks.dialects import DIALECTS
from benchmarks.load import Plan, Result, Server, run_load
from benchmarks.workload import Workload

ARMS = ("none", "reads", "never")


def measure(
    server: Server,
    workload: Workload,
    plan: Plan,
    rounds: int = 5,
    slow_tokens: int = 4000,
    lead: float = 3.0,
    advance: Callable[[str, Result], None] = lambda *_: None,
) -> dict[str, list[Result]]:
    """Run all arms `rounds` times; the extra client starts `lead` seconds before each measurement."""
    results: dict[str, list[Result]] = {arm: [] for arm in ARMS}
    run_load(server, workload, Plan(plan.concurrency, requests=2 * plan.concurrency))
    for turn in range(rounds):
        for arm in ARMS:
            with _extra_client(arm, server, workload, slow_tokens):
                time.sleep(lead)
                own = Workload(**{**vars(workload), "seed": workload.seed + turn})
                results[arm].append(run_load(server, own, plan))
            advance(arm, results[arm][-1])
            time.sleep(0.5)
    return results


@contextmanager
def _extra_client(arm: str, server: Server, workload: Workload, tokens: int) -> Iterator[None]:
    if arm == "none":
        yield
        return
    dialect = DIALECTS[workload.dialect]()
    body = json.dumps(
        dialect.body(server.model, workload.prompt_list(1)[0], tokens, workload.body | server.body)
    ).encode()
    url = urlsplit(server.url)
    extra = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
    head = (
        f"POST {dialect.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"{extra}Content-Length: {len(body)}\r\n\r\n"
    )
    address, request = (url.hostname or "", url.port or 80), head.encode() + body
    if arm == "never":
        with _connect(address, receive_buffer=4096) as stalled:
            stalled.sendall(request)
            yield
        return
    reader = multiprocessing.get_context("spawn").Process(target=_read_all, args=(address, request), daemon=True)
    reader.start()
    try:
        yield
    finally:
        reader.terminate()
        reader.join()


def _connect(address: tuple[str, int], receive_buffer: int = 0) -> socket.socket:
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(address)
    return client


def _read_all(address: tuple[str, int], request: bytes) -> None:
    with _connect(address) as client:
        client.sendall(request)
        while client.recv(65536):
            pass
        time.sleep(600)  # keep the connection until the measurement is over
