"""The verbs of a broker in short form, and the base of every part of the suite."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import pytest

from penstock.core.errors import ErrorInfo
from penstock.core.events import Ended, Event, Tokens
from penstock.core.job import Job, Request, fingerprint, new_job_id
from penstock.core.ports import (
    Append,
    Broker,
    Finish,
    Lease,
    ModelInfo,
    Query,
    QueuePolicy,
    Release,
    Verdict,
    WorkerInfo,
)
from penstock.testing.broker.harness import BrokerHarness
from penstock.testing.oracle import tokens_of

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds of real time after which something that should have happened counts as never happening."""

BRIEF = 0.05
"""Seconds of real time that a test is willing to spend on seeing that nothing happens."""


def model(name: str = "m") -> ModelInfo:
    return ModelInfo(name=name, engine="synthetic", context_length=4096)


def wide(n: int) -> Request:
    """A request of *n* choices."""
    return Request(model="m", prompt_ids=(1, 2, 3, 4), n=n)


class Driver:
    """The verbs in short form, with the write position of every job kept."""

    def __init__(self, harness: BrokerHarness, broker: Broker, policy: QueuePolicy) -> None:
        self.harness = harness
        self.broker = broker
        self.policy = policy
        self._next: dict[str, int] = {}

    @classmethod
    async def open(cls, harness: BrokerHarness, **policy: Any) -> Driver:
        chosen = QueuePolicy(**policy)
        return cls(harness, await harness.broker(chosen), chosen)

    def job(
        self, tenant: str = "acme", *, size: int = 4, body: str | None = None, name: str = "m", **fields: Any
    ) -> Job:
        """A job of *size* prompt tokens; *body* is what its idempotency fingerprint stands for."""
        fields.setdefault("request", Request(model=name, prompt_ids=tuple(range(1, size + 1))))
        fields.setdefault("created_at", self.harness.clock.now())
        if body is not None or "idempotency_key" in fields:
            fields["fingerprint"] = fingerprint(body or "body")
        return Job(id=new_job_id(), tenant=tenant, **fields)

    async def submit(self, tenant: str = "acme", **fields: Any) -> Job:
        return await self.broker.submit(self.job(tenant, **fields))

    async def submit_many(self, count: int, tenant: str = "acme", **fields: Any) -> list[Job]:
        """*count* jobs whose order in the queue does not matter to the test."""
        return list(await asyncio.gather(*(self.submit(tenant, **fields) for _ in range(count))))

    async def claim(
        self,
        limit: int = 1,
        *,
        models: Collection[str] = ("m",),
        wait: float = 0.0,
        worker: str = "w1",
        slots: int = 0,
        reserve: int = 0,
    ) -> list[Lease]:
        """By a worker of as many *slots*, or of as many as it asks for."""
        info = WorkerInfo(
            id=worker,
            models=tuple(model(name) for name in models),
            slots=slots or limit,
            reserve=reserve,
            seen_at=self.harness.clock.now(),
        )
        async with asyncio.timeout(PATIENCE + wait):
            leases = await self.broker.claim(info, models, limit, wait)
        for lease in leases:
            self._next[lease.job.id] = len(lease.ids) + 1
        return leases

    async def next(self, **options: Any) -> Lease:
        """The one lease that must be there."""
        leases = await self.claim(1, **options)
        assert len(leases) == 1, "nothing to claim"
        return leases[0]

    async def start(self, tenant: str = "acme", **fields: Any) -> Lease:
        """Submit one job to an otherwise empty queue and claim it."""
        job = await self.submit(tenant, **fields)
        lease = await self.next()
        assert lease.job.id == job.id
        return lease

    def append(self, lease: Lease, *ids: int, at: int | None = None, **fields: Any) -> Append:
        position = self._next[lease.job.id] if at is None else at
        return Append(lease.key, position, list(ids), [f"{i} " for i in ids], **fields)

    async def send(self, append: Append) -> Verdict:
        verdicts = await self.broker.append([append])
        assert set(verdicts) == {append.lease.job}
        verdict = verdicts[append.lease.job]
        if verdict is Verdict.OK:
            head = append.position + len(append.ids)
            self._next[append.lease.job] = max(self._next.get(append.lease.job, 1), head)
        return verdict

    async def write(self, lease: Lease, *ids: int, **fields: Any) -> Verdict:
        return await self.send(self.append(lease, *ids, **fields))

    async def finish(self, lease: Lease, *ids: int, **fields: Any) -> Verdict:
        fields.setdefault("prompt_tokens", len(lease.job.request.prompt_ids or ()))
        return await self.write(lease, *ids, finish=Finish(("stop",)), **fields)

    async def release(self, lease: Lease, **fields: Any) -> None:
        await self.broker.release([Release(lease.key, **fields)])

    async def get(self, job: Job | Lease) -> Job:
        job = job.job if isinstance(job, Lease) else job
        return await self.broker.get(job.tenant, job.id)

    async def cancel(self, job: Job | Lease) -> Job:
        job = job.job if isinstance(job, Lease) else job
        return await self.broker.cancel(job.tenant, job.id)

    async def log(self, job: Job | Lease, after: int = 0) -> list[Event]:
        """The whole log of a job that has ended (or ends while we read)."""
        job = job.job if isinstance(job, Lease) else job
        async with asyncio.timeout(PATIENCE):
            return [event async for event in self.broker.tail(job.tenant, job.id, after)]

    async def head(self, job: Job | Lease, count: int, after: int = 0) -> list[Event]:
        """The log from *after* until position *count* was seen."""
        job = job.job if isinstance(job, Lease) else job
        seen: list[Event] = []
        async with asyncio.timeout(PATIENCE), closing(self.broker.tail(job.tenant, job.id, after)) as events:
            async for event in events:
                seen.append(event)
                if (event.last if isinstance(event, Tokens) else event.position) >= count:
                    break
        return seen

    def reader(self, job: Job | Lease, after: int = 0) -> asyncio.Task[list[Event]]:
        return asyncio.create_task(self.log(job, after))

    async def settle(self) -> int:
        """Sweep until there is nothing left to do; how many jobs were touched."""
        total = 0
        for _ in range(1000):
            touched = await self.broker.sweep()
            total += touched
            if touched == 0:
                return total
        raise AssertionError("sweep never ends: it keeps touching jobs although no time passes")

    async def pass_time(self, seconds: float) -> int:
        await self.harness.advance(seconds)
        return await self.settle()

    async def lose_leases(self) -> None:
        await self.pass_time(self.policy.lease_ttl * 2)

    async def crash(self) -> None:
        await self.harness.crash()
        self.broker = await self.harness.broker(self.policy)

    async def jobs(self, tenant: str = "acme", **filters: Any) -> list[Job]:
        """Every page of a listing."""
        found: list[Job] = []
        cursor: str | None = None
        for _ in range(1000):
            page = await self.broker.list(Query(tenant=tenant, cursor=cursor, **filters))
            found += page.jobs
            cursor = page.cursor
            if cursor is None:
                return found
        raise AssertionError("the listing never ends")


@contextlib.asynccontextmanager
async def closing(events: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close an iterator that is left early, whatever made it."""
    try:
        yield events
    finally:
        aclose = getattr(events, "aclose", None)
        if aclose is not None:
            await aclose()


def ids(events: Iterable[Event]) -> list[int]:
    return [token.id for token in tokens_of(events)]


def ended(events: Sequence[Event]) -> Ended:
    assert events, "the stream ended without a terminal event"
    last = events[-1]
    assert isinstance(last, Ended)
    return last


async def soon(check: Callable[[], bool]) -> None:
    """Wait (really, but briefly) until *check* holds."""
    async with asyncio.timeout(PATIENCE):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


ERROR = ErrorInfo(message="the engine coughed", type="server_error", code="engine_error")


class Contract:
    @pytest.fixture
    def make_harness(self) -> Callable[[], BrokerHarness]:
        raise NotImplementedError("override the fixture make_harness: a function that returns a new BrokerHarness")

    @pytest.fixture
    async def harness(
        self, make_harness: Callable[[], BrokerHarness], request: pytest.FixtureRequest
    ) -> AsyncIterator[BrokerHarness]:
        harness = make_harness()
        if getattr(request.function, "total_order", False) and not harness.total_order:
            pytest.skip("this store is split into parts")
        yield harness
        await harness.close()

    @pytest.fixture
    async def d(self, harness: BrokerHarness) -> Driver:
        """A driver of a broker under the default policy."""
        return await Driver.open(harness)
