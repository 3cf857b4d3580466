"""Is service fair while one tenant floods the queue? A gateway, two workers and Redis, each a real process.

Four tenants always have jobs waiting; their requests differ in size, and one has submitted thousands first. What each
is served (input tokens once + output tokens twice, divided by its weight) is read from the logs of all jobs, as their
readers see it, not from the scheduler's own counters. The bound is that of the Virtual Token Counter ("Fairness in
Serving Large Language Models", OSDI'24, theorem 4.4): over any span of time in which two tenants have jobs waiting,
what they are served differs by at most 2 max(w_in L_in, w_out M), L_in the longest prompt and M the tokens that run at
once. With weights, each of the two halves is divided by its tenant's.

Now and then a tenant never seen before submits a single job: it has to be the next that is claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from time import perf_counter
from urllib.parse import urlsplit

import msgspec

from benchmarks import report
from benchmarks.load import loop_factory
from benchmarks.stats import Times
from benchmarks.targets import Running, load_targets
from penstock.brokers.redis import RedisBroker
from penstock.core.events import Tokens
from penstock.core.job import Job, Request, Sampling, Status, new_job_id
from penstock.core.ports import Query, QueuePolicy

INPUT_COST, OUTPUT_COST = 1, 2
SLOTS = 32
"""Of both workers (`fleet-fair` in targets.toml)."""
FLOOD = "default"
"""The tenant of a gateway that asks nobody who they are: its jobs come over HTTP, the others' through the broker."""


@dataclass(frozen=True)
class Tenant:
    name: str
    jobs: int
    prompt: tuple[int, int]
    """Shortest and longest, in tokens."""
    reply: tuple[int, int]


TENANTS = (
    Tenant(FLOOD, 3000, (16, 64), (16, 64)),
    Tenant("writer", 1000, (4, 8), (64, 128)),
    Tenant("reader", 2500, (64, 128), (4, 16)),
    Tenant("mixed", 1000, (4, 128), (4, 128)),
)
WEIGHTS: dict[str, dict[str, float]] = {
    "equal": {tenant.name: 1.0 for tenant in TENANTS},
    "unequal": {FLOOD: 1.0, "writer": 2.0, "reader": 4.0, "mixed": 1.0},
}


def half_bound(tenants: Sequence[Tenant], slots: int) -> float:
    """max(w_in L_in, w_out M): by how much a tenant of weight 1 may run ahead."""
    longest = max(tenant.prompt[1] for tenant in tenants)
    running = slots * (longest + max(tenant.reply[1] for tenant in tenants))
    return max(INPUT_COST * longest, OUTPUT_COST * running)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Over all spans between two samples: how far apart did service grow? The range of the difference of the sums."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return max(differences) - min(differences)


@dataclass(frozen=True)
class Fairness:
    """One run. `samples[tenant]` is weighted service so far, every 20 ms, while all tenants had jobs waiting."""

    weights: dict[str, float]
    seconds: float
    samples: dict[str, list[float]]
    late: list[tuple[float, int]]
    """Of each late tenant's job: seconds until it was claimed, jobs that were claimed in between."""

    @property
    def holds(self) -> bool:
        """Within the bound, and every late job was the next."""
        return all(difference <= bound for *_, difference, bound in self.pairs()) and not any(
            between for _, between in self.late
        )

    def pairs(self) -> Iterator[tuple[str, str, float, float]]:
        """(tenant, tenant, largest difference, bound)."""
        half = half_bound(TENANTS, SLOTS)
        for ours, theirs in itertools.combinations(self.samples, 2):
            bound = half / self.weights[ours] + half / self.weights[theirs]
            yield ours, theirs, largest_difference(self.samples[ours], self.samples[theirs]), bound


def measure(variables: Mapping[str, str], weights: dict[str, float], seconds: float) -> Fairness:
    variables = {**variables, "weights": json.dumps(weights)}
    with (
        Running(load_targets()["fleet-fair"], variables) as fleet,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        assert fleet.redis is not None
        return runner.run(_Watch(weights).run(fleet.server().url, fleet.redis.url, seconds))


def markdown(runs: Mapping[str, Fairness]) -> str:
    served, pairs, notes = [], [], []
    for name, run in runs.items():
        for tenant in TENANTS:
            samples, weight = run.samples[tenant.name], run.weights[tenant.name]
            sizes = [f"{low}–{high}" for low, high in (tenant.prompt, tenant.reply)]
            rate = (samples[-1] - samples[0]) / run.seconds
            figures = map(report.number, (weight, rate * weight, rate))
            served.append([name, tenant.name, f"{tenant.jobs:,}", *sizes, *figures])
        for ours, theirs, difference, bound in run.pairs():
            pairs.append(
                [name, f"{ours}, {theirs}", f"{difference:,.0f}", f"{bound:,.0f}", f"{difference / bound:.0%}"]
            )
        whole = sum((samples[-1] - samples[0]) * run.weights[tenant] for tenant, samples in run.samples.items())
        waits = Times.of(wait for wait, _ in run.late)
        notes.append(
            f"{name.capitalize()} weights, {run.seconds:.0f} s: service in all {whole:,.0f}, which a queue in order of "
            f"arrival would have given to one tenant. {len(run.late)} single jobs of new tenants were claimed after "
            f"{waits.p50:.0f} ms (median), {waits.p99:.0f} ms (longest); jobs of others claimed in between: "
            f"{max((between for _, between in run.late), default=0)} at most."
        )
    return "\n\n".join(
        [
            "# Fairness",
            report.table(
                ["weights", "tenant", "jobs", "prompt", "reply", "weight", "service/s", "÷ weight"],
                served,
            ),
            report.table(["weights", "tenants", "largest difference", "bound", "of the bound"], pairs),
            *notes,
        ]
    )


class _Watch:
    """Submits, and follows every job's log."""

    def __init__(self, weights: dict[str, float]) -> None:
        self._weights = weights
        self._served = {tenant.name: 0.0 for tenant in TENANTS}
        self._begun = {tenant.name: 0 for tenant in TENANTS}
        self._following: list[asyncio.Task[None]] = []
        self._late = 0
        self._rng = random.Random(1)

    async def run(self, gateway: str, redis: str, seconds: float) -> Fairness:
        policy = QueuePolicy(max_queued=0, max_queued_per_tenant=0, weights=self._weights)
        self._broker = RedisBroker(redis, policy=policy)
        await self._broker.open()
        try:
            await self._submit_all(gateway)
            await asyncio.sleep(1.0)
            samples, spent = await self._sample(seconds)
            await asyncio.sleep(1.0)
            late = await self._late_jobs({f"late-{number}" for number in range(self._late)})
        finally:
            for task in self._following:
                task.cancel()
            await asyncio.gather(*self._following, return_exceptions=True)
            await self._broker.close()
        return Fairness(self._weights, spent, samples, late)

    # submitting

    async def _submit_all(self, gateway: str) -> None:
        flood, *others = TENANTS
        requests = [self._request(flood) for _ in range(flood.jobs)]
        ids = await asyncio.to_thread(_post, gateway, requests)
        for request, job in zip(requests, ids, strict=True):
            self._watch(flood.name, request, job)
        for tenant in others:
            waiting = iter([self._request(tenant) for _ in range(tenant.jobs)])
            await asyncio.gather(*(self._put(tenant.name, waiting) for _ in range(64)))

    async def _put(self, tenant: str, requests: Iterator[Request]) -> None:
        for request in requests:
            job = await self._broker.submit(Job(id=new_job_id(), tenant=tenant, request=request))
            if tenant in self._served:
                self._watch(tenant, request, job.id)

    def _watch(self, tenant: str, request: Request, job: str) -> None:
        cost = INPUT_COST * (request.prompt or "").count(" ")
        self._following.append(asyncio.create_task(self._follow(tenant, job, cost)))

    def _request(self, tenant: Tenant) -> Request:
        prompt, reply = self._rng.randint(*tenant.prompt), self._rng.randint(*tenant.reply)
        return Request(model="synthetic", prompt="tok " * prompt, sampling=Sampling(max_tokens=reply))

    # watching

    async def _follow(self, tenant: str, job: str, input_cost: float) -> None:
        """Count what the job is served, when its reader sees it."""
        async for event in self._broker.tail(tenant, job):
            if isinstance(event, Tokens):
                if event.position == 1:
                    self._begun[tenant] += 1
                    self._served[tenant] += input_cost / self._weights[tenant]
                self._served[tenant] += OUTPUT_COST * len(event.ids) / self._weights[tenant]

    async def _sample(self, seconds: float) -> tuple[dict[str, list[float]], float]:
        samples: dict[str, list[float]] = {tenant.name: [] for tenant in TENANTS}
        started = perf_counter()
        while (spent := perf_counter() - started) < seconds:
            if any(self._begun[tenant.name] == tenant.jobs for tenant in TENANTS):
                break  # one has nothing waiting any more: from here on nothing is promised
            for name, served in self._served.items():
                samples[name].append(served)
            if spent > 0.5 + self._late:
                await self._put(f"late-{self._late}", iter([self._request(TENANTS[0])]))
                self._late += 1
            await asyncio.sleep(0.02)
        return samples, spent

    async def _late_jobs(self, late: set[str]) -> list[tuple[float, int]]:
        jobs = [job for tenant in (*self._served, *late) for job in await self._jobs(tenant)]
        begun = [job.started_at for job in jobs if job.started_at is not None]
        return [
            (job.started_at - job.created_at, sum(job.created_at < each < job.started_at for each in begun))
            for job in jobs
            if job.tenant in late and job.started_at is not None
        ]

    async def _jobs(self, tenant: str) -> list[Job]:
        """Those that have been claimed."""
        query = Query(tenant=tenant, status=(Status.RUNNING, Status.COMPLETED), limit=500)
        page = await self._broker.list(query)
        jobs = page.jobs
        while page.cursor is not None:
            page = await self._broker.list(msgspec.structs.replace(query, cursor=page.cursor))
            jobs += page.jobs
        return jobs


def _post(gateway: str, requests: Sequence[Request]) -> list[str]:
    """Submit over HTTP, eight at once; the jobs' ids."""

    def some(share: Sequence[Request]) -> list[str]:
        ids = []
        with contextlib.closing(HTTPConnection(urlsplit(gateway).netloc)) as connection:
            for request in share:
                body = {"model": request.model, "prompt": request.prompt, "max_tokens": request.sampling.max_tokens}
                connection.request("POST", "/v1/jobs", json.dumps(body), {"Content-Type": "application/json"})
                reply = connection.getresponse()
                text = reply.read()
                if reply.status != 202:
                    raise RuntimeError(f"the gateway answered {reply.status}: {text[:300]!r}")
                ids.append(json.loads(text)["id"])
        return ids

    size = -(-len(requests) // 8)
    with ThreadPoolExecutor(8) as pool:
        shares = pool.map(some, [requests[i : i + size] for i in range(0, len(requests), size)])
        return [job for share in shares for job in share]
