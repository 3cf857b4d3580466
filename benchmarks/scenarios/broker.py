"""The brokers alone: submit, claim and append against real stores, side by side, without HTTP and without an engine.

Three parts. `queue`: submit and claim by how many tenants and jobs wait. `append`: one engine step of 64 running jobs.
`workers`: many that claim and append at once, from a few processes. All stores are measured in turn, block by block.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from benchmarks import report
from benchmarks.load import loop_factory
from benchmarks.processes import RedisServer
from benchmarks.stats import Times
from penstock.brokers.embedded import EmbeddedBroker
from penstock.brokers.redis import RedisBroker, RedisOptions
from penstock.core.job import Job, Request, Sampling, new_job_id
from penstock.core.ports import Append, Finish, Lease, QueuePolicy, Verdict, WorkerInfo

PARTS = ("queue", "append", "workers")
STORES = ("embedded", "redis", "redis-fast")
MODEL = "synthetic"
#: Nothing is refused and no lease runs out while it is measured.
POLICY = QueuePolicy(max_queued=0, max_queued_per_tenant=0, lease_ttl=600.0)
#: Jobs that run at once, and calls of each kind in one block.
RUNNING = 64
BLOCK = 64

Advance = Callable[[], None]


@dataclass
class Cost:
    """What calls cost, added up over blocks. `client_s` is this process's CPU time, `redis_s` the server's."""

    seconds: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    client_s: float = 0.0
    redis_s: float = 0.0
    script_s: float = 0.0

    @property
    def times(self) -> Times:
        return Times.of(self.seconds)


@dataclass(frozen=True)
class Row:
    """One kind of call to one store."""

    load: str
    """What waited, or how much one call carried."""
    call: str
    store: str
    units: int
    """Jobs or tokens in one call."""
    cost: Cost


@dataclass
class Store:
    """An open broker, and the server behind it."""

    name: str
    broker: EmbeddedBroker | RedisBroker
    server: RedisServer | None = None

    @contextmanager
    def block(self, cost: Cost) -> Iterator[None]:
        """Add what happens meanwhile to *cost*."""
        redis_s, script_s = self.server.spent() if self.server else (0.0, 0.0)
        started, own = perf_counter(), process_time()
        yield
        cost.client_s += process_time() - own
        cost.wall_s += perf_counter() - started
        if self.server:
            spent = self.server.spent()
            cost.redis_s += spent[0] - redis_s
            cost.script_s += spent[1] - script_s

    async def call(self, cost: Cost, calls: Iterable[Awaitable[Any]], flight: int = 1) -> list[Any]:
        """Make *calls*, *flight* of them at once, as one block; their answers."""
        waiting, answers = iter(calls), []

        async def caller() -> None:
            for call in waiting:
                started = perf_counter()
                answers.append(await call)
                cost.seconds.append(perf_counter() - started)

        with self.block(cost):
            await asyncio.gather(*(caller() for _ in range(flight)))
        return answers


@asynccontextmanager
async def opened(names: Iterable[str]) -> AsyncIterator[list[Store]]:
    """The stores, empty; what they keep goes away with them."""
    async with AsyncExitStack() as stack:
        stores = []
        for name in names:
            server = None
            if name == "embedded":
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-"))
                broker: EmbeddedBroker | RedisBroker = EmbeddedBroker(Path(folder), policy=POLICY)
            else:
                server = stack.enter_context(RedisServer(_durability(name)))
                broker = RedisBroker(server.url, RedisOptions(durability=_durability(name)), policy=POLICY)
            await broker.open()
            stack.push_async_callback(broker.close)
            stores.append(Store(name, broker, server))
        yield stores


def _durability(store: str) -> Any:
    return "fast" if store.endswith("-fast") else "strict"


# ---------------------------------------------------------------------------------------------- queue


async def measure_queue(names: Iterable[str], tenants: int, queued: int, blocks: int, advance: Advance) -> list[Row]:
    """Submit and claim while *queued* jobs of *tenants* tenants wait."""
    costs: dict[tuple[str, str, int], Cost] = {}
    rng = random.Random(1)
    async with opened(names) as stores:
        for store in stores:
            await store.call(Cost(), (store.broker.submit(_job(i % tenants)) for i in range(queued)), flight=BLOCK)
        for _ in range(blocks):
            for store, flight in itertools.product(stores, (1, BLOCK)):
                jobs = [_job(rng.randrange(tenants)) for _ in range(BLOCK)]
                cost = costs.setdefault((store.name, f"submit, {flight} at once", 1), Cost())
                await store.call(cost, (store.broker.submit(job) for job in jobs), flight)
            for store, limit in itertools.product(stores, (1, BLOCK)):
                cost = costs.setdefault((store.name, f"claim of {limit}", limit), Cost())
                claims = (_claim(store.broker, limit) for _ in range(BLOCK // limit))
                leases = [lease for answer in await store.call(cost, claims) for lease in answer]
                if len(leases) != BLOCK:
                    raise RuntimeError(f"{store.name} gave {len(leases)} jobs of {BLOCK}")
                await _finish(store.broker, leases)
                advance()
    load = f"{tenants:,} tenants, {queued:,} jobs"
    rows = [Row(load, call, store, units, cost) for (store, call, units), cost in costs.items()]
    return sorted(rows, key=lambda row: (row.call.split()[0] == "claim", row.units, row.call))


# ---------------------------------------------------------------------------------------------- append


async def measure_append(names: Iterable[str], tokens: int, blocks: int, advance: Advance) -> list[Row]:
    """Engine steps: *tokens* new tokens of each of `RUNNING` jobs in one call."""
    async with opened(names) as stores:
        costs = {store.name: Cost() for store in stores}
        leases = {store.name: await _running(store.broker) for store in stores}
        position = 1
        for _ in range(blocks):
            for store in stores:
                steps = (
                    store.broker.append([_append(lease, position + i * tokens, tokens) for lease in leases[store.name]])
                    for i in range(BLOCK)
                )
                for verdicts in await store.call(costs[store.name], steps):
                    _all_ok(verdicts)
                advance()
            position += BLOCK * tokens
        units = RUNNING * tokens
        return [Row(f"{RUNNING} × {tokens} tokens", "append", store, units, cost) for store, cost in costs.items()]


async def _running(broker: EmbeddedBroker | RedisBroker) -> list[Lease]:
    for _ in range(RUNNING):
        await broker.submit(_job(0))
    return await _claim(broker, RUNNING)


# ---------------------------------------------------------------------------------------------- workers


@dataclass(frozen=True)
class Crowd:
    """What many workers did together: every job is claimed, gets `STEPS` appends, and is ended by the last."""

    store: str
    workers: int
    processes: int
    jobs: int
    wall_s: float
    claims: Times
    appends: Times
    redis_share: float
    """Of one core."""


STEPS = 4
TOKENS = 16


async def measure_workers(names: Sequence[str], workers: int, jobs: int, advance: Advance) -> list[Crowd]:
    """*workers* of one slot each, by store the median of three rounds."""
    crowds: dict[str, list[Crowd]] = {name: [] for name in names}
    for _ in range(3):
        for name in names:
            crowds[name].append(await _crowd(name, workers, jobs))
            advance()
    return [sorted(each, key=lambda crowd: crowd.wall_s)[1] for each in crowds.values()]


async def _crowd(name: str, workers: int, jobs: int) -> Crowd:
    """Those over Redis are in two processes, as far as there are two."""
    async with opened([name]) as [store]:
        submits = (store.broker.submit(_job(i % 100)) for i in range(jobs))
        await store.call(Cost(), submits, flight=BLOCK)
        processes = 1 if store.server is None else min(2, workers)
        used = Cost()
        with store.block(used):
            if store.server is None:
                shares = [await _work(store.broker, workers)]
            else:
                arguments = (store.server.url, _durability(name), workers // processes)
                shares = await asyncio.to_thread(_in_processes, processes, arguments)
    claims = [each for share in shares for each in share[0]]
    appends = [each for share in shares for each in share[1]]
    if len(claims) != jobs:
        raise RuntimeError(f"{name}: {len(claims)} jobs were claimed, {jobs} submitted")
    wall = max(share[2] for share in shares)
    return Crowd(name, workers, processes, jobs, wall, Times.of(claims), Times.of(appends), used.redis_s / wall)


Share = tuple[list[float], list[float], float]


async def _work(broker: EmbeddedBroker | RedisBroker, workers: int) -> Share:
    """Times of claims and appends, and how long it took until nothing was left."""
    claims: list[float] = []
    appends: list[float] = []

    async def worker(number: int) -> None:
        while True:
            started = perf_counter()
            leases = await _claim(broker, 1, f"w{number}")
            if not leases:
                return
            claims.append(perf_counter() - started)
            for step in range(STEPS):
                started = perf_counter()
                append = _append(leases[0], 1 + step * TOKENS, TOKENS, last=step == STEPS - 1)
                _all_ok(await broker.append([append]))
                appends.append(perf_counter() - started)

    started = perf_counter()
    await asyncio.gather(*(worker(number) for number in range(workers)))
    return claims, appends, perf_counter() - started


def _in_processes(processes: int, arguments: tuple[str, Any, int]) -> list[Share]:
    context = multiprocessing.get_context("spawn")
    ends, children = [], []
    for _ in range(processes):
        ours, theirs = context.Pipe()
        child = context.Process(target=_process, args=(theirs, *arguments), daemon=True)
        child.start()
        ends.append(ours)
        children.append(child)
    for end in ends:
        end.recv()  # connected
    for end in ends:
        end.send("go")
    shares = [end.recv() for end in ends]
    for child in children:
        child.join()
    return shares


def _process(end: Connection, url: str, durability: Any, workers: int) -> None:
    async def main() -> Share:
        broker = RedisBroker(url, RedisOptions(durability=durability), policy=POLICY)
        await broker.open()
        try:
            end.send("connected")
            end.recv()
            return await _work(broker, workers)
        finally:
            await broker.close()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        end.send(runner.run(main()))


# ---------------------------------------------------------------------------------------------- all of it


#: (tenants, jobs) that wait, tokens of each job in one append, workers.
QUEUES = ((10, 100), (100, 100), (10, 10_000), (100, 10_000), (1_000, 10_000), (10_000, 10_000))
STEP_TOKENS = (1, 4, 16)
CROWDS = (1, 10, 100)


async def measure(
    parts: Sequence[str], names: Sequence[str], blocks: int, advance: Advance
) -> dict[str, list[Row] | list[Crowd]]:
    """The results of each part."""
    results: dict[str, list[Row] | list[Crowd]] = {}
    if "queue" in parts:
        results["queue"] = [row for load in QUEUES for row in await measure_queue(names, *load, blocks, advance)]
    if "append" in parts:
        results["append"] = [row for each in STEP_TOKENS for row in await measure_append(names, each, blocks, advance)]
    if "workers" in parts:
        results["workers"] = [c for each in CROWDS for c in await measure_workers(names, each, 50 * blocks, advance)]
    return results


def markdown(results: Mapping[str, Sequence[Row | Crowd]]) -> str:
    parts = ["# The brokers alone"]
    for name, rows in results.items():
        parts.append(f"## {name.capitalize()}\n")
        parts.append(_crowd_table(rows) if name == "workers" else _call_table(rows, name == "append"))  # type: ignore[arg-type]
    return "\n\n".join(parts)


def _call_table(rows: Sequence[Row], tokens: bool) -> str:
    unit = "token" if tokens else "job"
    headers = ["load", "call", "store", f"{unit}s/s", "p50 ms", "p99 ms"]
    headers += [f"client CPU µs a {unit}", f"Redis CPU µs a {unit}", "script µs a call"]
    lines = []
    for row in rows:
        cost, calls = row.cost, len(row.cost.seconds)
        redis = [cost.redis_s / row.units, cost.script_s] if row.store != "embedded" else [math.nan, math.nan]
        figures = [
            calls * row.units / cost.wall_s,
            cost.times.p50,
            cost.times.p99,
            *(each / calls * 1e6 for each in (cost.client_s / row.units, *redis)),
        ]
        lines.append([row.load, row.call, row.store, *map(report.number, figures)])
    return report.table(headers, lines)


def _crowd_table(crowds: Sequence[Crowd]) -> str:
    headers = ["workers", "store", "processes", "jobs/s", "tokens/s", "claim p50 ms", "p99", "append p50 ms", "p99"]
    lines = []
    for crowd in crowds:
        rate = crowd.jobs / crowd.wall_s
        figures = [rate, rate * STEPS * TOKENS, crowd.claims.p50, crowd.claims.p99, crowd.appends.p50]
        redis = crowd.redis_share if crowd.store != "embedded" else math.nan
        numbers = map(report.number, [*figures, crowd.appends.p99, redis])
        lines.append([str(crowd.workers), crowd.store, str(crowd.processes), *numbers])
    return report.table([*headers, "Redis, cores"], lines)


# ---------------------------------------------------------------------------------------------- calls


def _job(tenant: int) -> Job:
    request = Request(model=MODEL, prompt="some twenty tokens of a prompt " * 3, sampling=Sampling(max_tokens=64))
    return Job(id=new_job_id(), tenant=f"tenant-{tenant}", request=request)


async def _claim(broker: EmbeddedBroker | RedisBroker, limit: int, worker: str = "bench") -> list[Lease]:
    return await broker.claim(WorkerInfo(id=worker, slots=limit), [MODEL], limit, 0.0)


def _append(lease: Lease, position: int, tokens: int, last: bool = False) -> Append:
    ids = list(range(position, position + tokens))
    finish = Finish(("length",)) if last else None
    return Append(lease.key, position, ids, [f"{i}@{lease.attempt} " for i in ids], finish=finish)


async def _finish(broker: EmbeddedBroker | RedisBroker, leases: list[Lease]) -> None:
    _all_ok(await broker.append([_append(lease, 1, 16, last=True) for lease in leases]))


def _all_ok(verdicts: dict[str, Verdict]) -> None:
    if any(verdict is not Verdict.OK for verdict in verdicts.values()):
        raise RuntimeError(f"an append was refused: {set(verdicts.values())}")
