"""Load generation: a closed loop (so many always in flight) or an open one (Poisson arrivals), and its figures."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from benchmarks.client import Connection, Exchange, Gaps
from benchmarks.dialects import DIALECTS, Dialect
from benchmarks.resources import Meter, ProcessUse
from benchmarks.stats import Times
from benchmarks.workload import Workload

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Server:
    """Where requests go."""

    url: str
    model: str = "default"
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    pids: tuple[int, ...] = ()
    """Processes whose CPU and memory are reported, with their children."""


@dataclass(frozen=True)
class Plan:
    """How the load is offered. Either `requests` or `duration` ends it; `rate` > 0 makes an open loop."""

    concurrency: int = 8
    rate: float = 0.0
    requests: int = 0
    duration: float = 0.0
    timeout: float = 300.0
    verify: bool = False

    @property
    def label(self) -> str:
        return f"{self.rate:g}/s" if self.rate else f"c={self.concurrency}"


@dataclass(frozen=True)
class Result:
    """The figures of one run. Rates count the replies without error, over the whole wall time."""

    label: str
    requests: int
    errors: dict[str, int]
    short_replies: int
    """Replies with fewer tokens than asked for: a comparison with any is not one of equals."""
    wall_s: float
    tokens: int
    events: int
    events_per_read: float
    """Token events that arrived together, on average: they share one timestamp."""
    tokens_per_s: float
    requests_per_s: float
    ttft_ms: Times
    inter_token_ms: Times
    latency_ms: Times
    processes: list[ProcessUse]
    foreign_cores: float = 0.0
    """Cores kept busy by everything else on the machine meanwhile."""
    samples: list[str] = field(default_factory=list)
    """The beginning of a few bad replies."""

    @property
    def cpu_s_per_million_tokens(self) -> dict[str, float]:
        """By process, in the order of `processes`; equal names are added up."""
        costs: dict[str, float] = {}
        for use in self.processes:
            costs[use.name] = costs.get(use.name, 0.0) + (use.cpu_s / self.tokens * 1e6 if self.tokens else 0.0)
        return costs


def run_load(
    server: Server, workload: Workload, plan: Plan, progress: Progress | None = None, warmup: int = 0
) -> Result:
    """Run one load to its end, in an event loop of its own, after `warmup` requests that count for nothing."""

    async def main() -> Result:
        dialect = DIALECTS[workload.dialect]()
        if warmup:
            other = Workload(**{**vars(workload), "seed": workload.seed + 7919})
            quiet = Plan(concurrency=min(plan.concurrency, warmup), requests=warmup, timeout=plan.timeout)
            await _Run(server, dialect, other, quiet).execute(None)
        return await _Run(server, dialect, workload, plan).execute(progress)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main())


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class _Run:
    def __init__(self, server: Server, dialect: Dialect, workload: Workload, plan: Plan) -> None:
        if not (plan.requests or plan.duration):
            raise ValueError("a run ends after a number of requests or a duration: give one")
        url = urlsplit(server.url)
        if url.scheme != "http" or not url.hostname:
            raise ValueError(f"{server.url}: the harness speaks plain http:// only")
        self._server, self._dialect, self._plan = server, dialect, plan
        self._address = (url.hostname, url.port or 80)
        path = url.path.rstrip("/").removesuffix("/v1") + dialect.path
        headers = {"Host": url.netloc, "Content-Type": "application/json", "Accept": "text/event-stream"}
        lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in (headers | server.headers).items())]
        self._head = ("\r\n".join(lines) + "\r\nContent-Length: ").encode()
        self._exchanges: Iterator[Exchange] = workload.exchanges(dialect, server.model, server.body, plan.requests)
        self._gaps = Gaps()
        self._done: list[Exchange] = []
        self._busy: set[Connection] = set()
        self._idle: list[Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._issued = 0
        self._outstanding = 0
        self._stop_at = float("inf")
        self._issuing = True

    async def execute(self, progress: Progress | None) -> Result:
        loop = self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        connections = [] if self._plan.rate else [await self._connect() for _ in range(self._plan.concurrency)]
        housekeeping = loop.create_task(self._keep_house(progress))
        gc.collect()
        gc.disable()
        meter = Meter(list(self._server.pids))
        started = perf_counter()
        if self._plan.duration:
            self._stop_at = started + self._plan.duration
        try:
            if self._plan.rate:
                self._tasks.add(loop.create_task(self._arrivals(started)))
            for connection in connections:
                self._next(connection)
            await self._over
            wall = meter.elapsed()
            processes = meter.read()
            foreign = meter.foreign(processes)
        finally:
            gc.enable()
            housekeeping.cancel()
            for task in self._tasks:
                task.cancel()
            self._outstanding += 1  # closing connections must not end the run twice
            for connection in [*self._busy, *self._idle]:
                connection.exchange = None
                connection.close()
        return self._result(wall, processes, foreign)

    # issuing

    def _draw(self) -> Exchange | None:
        """The next request, or None when the run is to end."""
        if (self._plan.requests and self._issued >= self._plan.requests) or (perf_counter() >= self._stop_at):
            self._issuing = False
            return None
        self._issued += 1
        self._outstanding += 1
        return next(self._exchanges)

    def _next(self, connection: Connection) -> None:
        """Closed loop: a free connection sends its next request at once."""
        exchange = self._draw()
        if exchange is None:
            self._idle.append(connection)
            self._check_over()
        elif connection.closing:
            self._spawn(self._reopen(exchange))
        else:
            self._send(connection, exchange)

    def _send(self, connection: Connection, exchange: Exchange) -> None:
        self._busy.add(connection)
        connection.send(exchange)

    async def _arrivals(self, started: float) -> None:
        """Open loop: requests are due at Poisson times, whether or not earlier ones have been answered."""
        rng = random.Random(0)
        due = started
        while True:
            due += rng.expovariate(self._plan.rate)
            delay = due - perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            exchange = self._draw()
            if exchange is None:
                self._check_over()
                return
            exchange.due = due
            while self._idle and self._idle[-1].closing:
                self._idle.pop()
            if self._idle:
                self._send(self._idle.pop(), exchange)
            else:
                self._spawn(self._reopen(exchange))

    async def _reopen(self, exchange: Exchange) -> None:
        try:
            connection = await self._connect()
        except OSError as error:
            exchange.error = f"connect: {type(error).__name__}"
            exchange.sent = exchange.due = exchange.due or perf_counter()
            await asyncio.sleep(0.05)
            exchange.ended = perf_counter()
            self._record(exchange)
            if not self._plan.rate:
                following = self._draw()
                if following is not None:
                    self._spawn(self._reopen(following))
            self._check_over()
            return
        self._send(connection, exchange)

    async def _connect(self) -> Connection:
        _, connection = await self._loop.create_connection(
            lambda: Connection(self._head, self._dialect, self._gaps, self._finished, self._lost), *self._address
        )
        return connection

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ends

    def _finished(self, connection: Connection, exchange: Exchange) -> None:
        self._busy.discard(connection)
        self._record(exchange)
        if self._plan.rate:
            if not connection.closing:
                self._idle.append(connection)
            self._check_over()
        else:
            self._next(connection)

    def _lost(self, connection: Connection, exchange: Exchange | None, unanswered: bool) -> None:
        self._busy.discard(connection)
        if exchange is None:
            return
        if unanswered:
            self._spawn(self._reopen(exchange))
            return
        exchange.error = exchange.error or "connection lost"
        exchange.ended = perf_counter()
        self._record(exchange)
        if self._plan.rate:
            self._check_over()
        else:
            self._next(connection)

    def _record(self, exchange: Exchange) -> None:
        self._outstanding -= 1
        self._done.append(exchange)
        if not (self._plan.verify or exchange.error):
            exchange.blocks = []  # free the reply: only its figures are needed

    def _check_over(self) -> None:
        if not self._issuing and not self._outstanding and not self._over.done():
            self._over.set_result(None)

    async def _keep_house(self, progress: Progress | None) -> None:
        """Once or twice a second: progress, and requests that take too long."""
        while True:
            await asyncio.sleep(0.5)
            if progress is not None:
                progress(len(self._done))
            late = perf_counter() - self._plan.timeout
            for connection in list(self._busy):
                if connection.exchange is not None and connection.exchange.sent < late:
                    connection.exchange.error = "timeout"
                    connection.close()

    def _result(self, wall: float, processes: list[ProcessUse], foreign: float) -> Result:
        if self._plan.verify:
            for exchange in self._done:
                if not exchange.error:
                    problem = self._dialect.verify(exchange)
                    exchange.error = f"verify: {problem}" if problem else ""
        good = [exchange for exchange in self._done if not exchange.error]
        bad = [exchange for exchange in self._done if exchange.error]
        tokens = sum(exchange.tokens for exchange in good)
        reads = len(self._gaps.seconds) + sum(exchange.events > 0 for exchange in self._done)
        return Result(
            label=self._plan.label,
            requests=len(self._done),
            errors=dict(Counter(exchange.error for exchange in bad)),
            short_replies=sum(exchange.tokens < exchange.expected_tokens for exchange in good),
            wall_s=wall,
            tokens=tokens,
            events=sum(exchange.events for exchange in good),
            events_per_read=sum(exchange.events for exchange in self._done) / max(reads, 1),
            tokens_per_s=tokens / wall,
            requests_per_s=len(good) / wall,
            ttft_ms=Times.of(exchange.first - exchange.due for exchange in good if exchange.first),
            inter_token_ms=Times.of(self._gaps.seconds, self._gaps.zeros),
            latency_ms=Times.of(exchange.ended - exchange.due for exchange in good),
            processes=processes,
            foreign_cores=foreign,
            samples=[exchange.reply()[:300].decode(errors="replace") for exchange in bad[:3]],
        )
