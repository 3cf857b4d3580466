"""How long a model that is not loaded takes to its first token, and how long streams stand still when an engine dies.

Three servers with the same model, on demand, stay up side by side and take turns: `nothing` keeps nothing, `process` an
engine process that waits for a model (``--warm-processes 1``), `standby` a spare that has it loaded (``--standby 1``).
In each turn the model is unloaded for being idle; then come the first token of a request for it (cold), that of the
next one (loaded), and, when what is kept ready is there again, the longest gap between two tokens of a stream whose
engine process is killed in its middle. Every position of that stream must be there, once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks import report
from benchmarks.processes import TargetError
from benchmarks.stats import Spread
from benchmarks.targets import Running, Target

ARMS = {"nothing": [], "process": ["--warm-processes", "1"], "standby": ["--standby", "1"]}

#: The server. Idle models are unloaded soon, which leaves a spare where it is (unloading by hand would not).
SERVER = Target(
    name="cold-start",
    command=[
        *("{penstock}", "serve", "--engine", "openvino", "--model", "m={models}/{shape}", "--on-demand", "m"),
        *("--idle-unload", "10", "--port", "{port}", "--data-dir", "{data_dir}"),
    ],
    ready="/readyz",
    model="m",
)
TOKENS = 300
#: The engine is killed behind this position.
KILL_AT = 100
#: Seconds to wait for a state, and for the rest of what happens in the background before a measurement.
PATIENCE, SETTLE = 120.0, 3.0


@dataclass
class Times:
    """Milliseconds, one entry a round."""

    cold: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    crash: list[float] = field(default_factory=list)


def measure(
    variables: dict[str, str], rounds: int, advance: Callable[[str], None] = lambda arm: None
) -> dict[str, Times]:
    """By arm. The first turn of each warms caches up and is not counted."""
    results = {arm: Times() for arm in ARMS}
    with ExitStack() as stack:
        servers = {
            arm: stack.enter_context(Running(replace(SERVER, command=[*SERVER.command, *flags]), variables))
            for arm, flags in ARMS.items()
        }
        for turn in range(rounds + 1):
            for arm, server in servers.items():
                spares = int(arm == "standby")
                _wait_until(server, "unloaded", spares)
                times = [_first_token(server), _first_token(server)]
                _wait_until(server, "ready", spares)
                times.append(_pause(server))
                if turn:
                    for figures, seconds in zip(vars(results[arm]).values(), times, strict=True):
                        figures.append(1e3 * seconds)
                advance(arm)
    return results


def markdown(results: dict[str, dict[str, Times]]) -> str:
    """*results* by shape and arm."""
    rows = [
        [shape, arm, *(report.spread(Spread.of(figures)) for figures in (times.cold, times.loaded, times.crash))]
        for shape, arms in results.items()
        for arm, times in arms.items()
    ]
    headers = ["shape", "kept ready", "first token, cold (ms)", "first token, loaded (ms)", "gap when killed (ms)"]
    return f"# Cold start\n\n{report.table(headers, rows)}"


# ---------------------------------------------------------------------------------------------- one server


def _wait_until(server: Running, state: str, spares: int) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        [worker] = _call(server, "GET", "/health")["workers"]
        if worker["state"] == state and worker["standby"] == spares:
            time.sleep(SETTLE)  # processes that are kept ready import their library; kernels are compiled ahead
            return
        if state == "ready":
            _first_token(server)  # or it would be unloaded again while a spare takes its time
        time.sleep(0.5)
    raise TargetError(f"{server.target.name}: the model is still {worker['state']}, with {worker['standby']} spares")


def _first_token(server: Running) -> float:
    """Seconds from the request to its first token."""
    begun = time.perf_counter()
    return next(_tokens(server, 8))[1] - begun


def _pause(server: Running) -> float:
    """The longest gap, in seconds, between two tokens of a stream whose engine is killed."""
    before = _engines(server)
    last, longest, expected = time.perf_counter(), 0.0, 1
    for position, at in _tokens(server, TOKENS):
        if position != expected:
            raise TargetError(f"position {position} instead of {expected}")
        if position > 1:  # the first one's wait is another figure
            longest = max(longest, at - last)
        if position == KILL_AT:
            _busiest(server, before).kill()
        last, expected = at, position + 1
    if expected != TOKENS + 1:
        raise TargetError(f"the stream ended before position {expected}")
    return longest


def _tokens(server: Running, count: int) -> Iterator[tuple[int, float]]:
    """(position, when it came) of one reply. Closed early, its job is cancelled by the server, later."""
    body = {"prompt": "Once upon a time", "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
    with closing(HTTPConnection(urlsplit(server.server().url).netloc, timeout=PATIENCE)) as connection:
        connection.request("POST", "/v1/generate", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise TargetError(f"the server answered {reply.status}: {reply.read(300)!r}")
        position = 0
        for line in reply:
            if line.startswith(b"id: "):
                position = int(line[4:])
            elif line.startswith(b"data: ") and b'"token_id"' in line:
                yield position, time.perf_counter()


def _engines(server: Running) -> dict[int, float]:
    """CPU seconds of each engine process, by pid."""
    found = {}
    for child in psutil.Process(server.pids[0]).children():
        if "penstock.engines.child" in child.cmdline():
            times = child.cpu_times()
            found[child.pid] = times.user + times.system
    return found


def _busiest(server: Running, before: dict[int, float]) -> psutil.Process:
    """The engine process that runs the stream: a spare, or one without a model, does nothing."""
    now = _engines(server)
    return psutil.Process(max(now, key=lambda pid: now[pid] - before.get(pid, 0.0)))


def _call(server: Running, method: str, path: str) -> Any:
    with closing(HTTPConnection(urlsplit(server.server().url).netloc, timeout=PATIENCE)) as connection:
        connection.request(method, path)
        return json.loads(connection.getresponse().read())
