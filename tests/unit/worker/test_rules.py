"""What the worker's loop decides, on a fake engine and a real broker: no process, no model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.engine import FakeEngine

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.errors import BrokerUnavailable
from penstock.core.events import Phase
from penstock.core.job import Job, Priority, Request, Sampling, Status, Usage, new_job_id
from penstock.core.ports import Append, Lease, QueuePolicy, Release, Verdict, WorkerInfo
from penstock.testing.clock import ManualClock
from penstock.testing.oracle import check_log
from penstock.worker.worker import PARTIAL_WAIT, RESERVED_WAIT, SUSPECTS_INTERVAL, Worker

PATIENCE = 10.0
#: Seconds of the broker's clock, which only tests move.
TTL = 60.0
#: Real seconds: of a worker that sends a heartbeat four times as often, or that does not wait when it claims.
BRISK = 0.02


class RecordingBroker(EmbeddedBroker):
    """Knows what was asked of it by workers other than ``w0``, and can make them wait."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self.claims: list[tuple[WorkerInfo, int, float]] = []
        self.claiming = 0
        self.appends: list[tuple[str, Verdict]] = []
        """(job, what it was answered), of each append that was tried."""
        self.away = 0
        """So many appends fail."""
        self.gate = asyncio.Event()
        self.gate.set()

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        if worker.id != "w0":
            await self.gate.wait()
            self.claims.append((worker, limit, wait))
        self.claiming += 1
        try:
            return await super().claim(worker, models, limit, wait)
        finally:
            self.claiming -= 1

    async def append(self, appends: Sequence[Append]) -> dict[str, Verdict]:
        if self.away:
            self.away -= 1
            raise BrokerUnavailable("away")
        verdicts = await super().append(appends)
        self.appends += verdicts.items()
        return verdicts


class Host:
    def __init__(self, broker: RecordingBroker, clock: ManualClock) -> None:
        self.broker, self.clock = broker, clock
        self.engine = FakeEngine("s")

    async def submit(self, n: int = 1, priority: Priority = Priority.NORMAL) -> Job:
        request = Request(model="s", prompt="x", sampling=Sampling(max_tokens=500), n=n)
        return await self.broker.submit(Job(id=new_job_id(), tenant="t", request=request, priority=priority))

    async def status(self, job: Job) -> Status:
        return (await self.broker.get("t", job.id)).status

    async def suspects(self, count: int, *beside: int) -> list[Job]:
        """Jobs that were together in so many engines' deaths, each among so many jobs."""
        jobs = [await self.submit() for _ in range(count)]
        for each in beside:
            leases = await self.broker.claim(WorkerInfo(id="w0"), ["s"], count, 0)
            assert {lease.job.id for lease in leases} == {job.id for job in jobs}
            await self.broker.release([Release(lease.key, crashed_beside=each) for lease in leases])
        return jobs

    @contextlib.asynccontextmanager
    async def worker(self, **options: Any) -> AsyncIterator[Worker]:
        worker = Worker(
            self.broker,
            self.engine,
            drain_timeout=BRISK,
            restart_backoff=0.01,
            clock=self.clock,
            **{"lease_ttl": TTL, "claim_wait": 0.5, **options},
        )
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            await running

    async def until(self, check: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not check():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def written(self, job: Job, count: int) -> None:
        """Until the log has so many tokens."""
        async with asyncio.timeout(PATIENCE):
            while (await self.broker.get("t", job.id)).tokens < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def reached(self, job: Job, status: Status) -> None:
        async with asyncio.timeout(PATIENCE):
            while await self.status(job) is not status:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def heartbeat(self, job: Job, verdict: Verdict = Verdict.OK) -> None:
        """Until the worker has appended for *job* once more, and was answered *verdict*."""
        seen = len(self.broker.appends)
        await self.until(lambda: (job.id, verdict) in self.broker.appends[seen:])

    async def claims(self, count: int = 2) -> None:
        """Until the worker has asked so often again: whatever it would take, it has taken."""
        seen = len(self.broker.claims)
        await self.until(lambda: len(self.broker.claims) >= seen + count)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    clock = ManualClock()
    broker = RecordingBroker(tmp_path, policy=QueuePolicy(lease_ttl=TTL), clock=clock)
    await broker.open()
    yield Host(broker, clock)
    await broker.close()


# ------------------------------------------------------------------------------------------ slots


async def test_each_choice_takes_a_slot(host: Host) -> None:
    """Eight jobs of eight choices are eight rounds of an engine with eight slots, not 64 sequences in it."""
    jobs = [await host.submit(n=8) for _ in range(8)]
    async with host.worker():
        for job in jobs:
            await host.until(lambda: host.engine.jobs)
            assert host.engine.jobs == {job.id}
            host.engine.emit(job.id, end=True)
    assert host.engine.most == 8


async def test_what_fits_beside_is_taken(host: Host) -> None:
    first, second, third = [await host.submit(n=n) for n in (5, 3, 1)]
    async with host.worker():
        await host.until(lambda: host.engine.jobs == {first.id, second.id})
        host.engine.emit(second.id, end=True)
        await host.until(lambda: host.engine.jobs == {first.id, third.id})
    assert host.engine.most == 8


async def test_a_job_that_is_wider_than_the_engine_runs_alone(host: Host) -> None:
    host.engine.slots = 4
    narrow, wide, last = [await host.submit(n=n) for n in (1, 8, 1)]
    async with host.worker(claim_wait=BRISK):
        await host.until(lambda: host.engine.jobs == {narrow.id})
        await host.claims()
        assert host.engine.jobs == {narrow.id}, "the wide one is not overtaken"
        host.engine.emit(narrow.id, end=True)
        await host.until(lambda: host.engine.jobs == {wide.id})
        host.engine.emit(wide.id, end=True)
        await host.until(lambda: host.engine.jobs == {last.id})
    assert host.engine.most == 8


async def test_a_wide_job_gets_the_slots_that_come_free_while_a_claim_waits(host: Host) -> None:
    running = await host.submit()
    async with host.worker(claim_wait=3600.0):
        await host.until(lambda: host.engine.jobs == {running.id})
        await host.until(lambda: host.broker.claims[-1][1:] == (7, PARTIAL_WAIT))
        wide = await host.submit(n=8)
        host.engine.emit(running.id, end=True)
        await host.until(lambda: host.engine.jobs == {wide.id})


async def test_a_claim_for_reserved_slots_is_short(host: Host) -> None:
    jobs = [await host.submit(priority=Priority.BATCH) for _ in range(6)]
    async with host.worker(batch_reserve=0.25):
        await host.until(lambda: host.engine.jobs == {job.id for job in jobs})
        await host.until(lambda: host.broker.claims[-1][1:] == (2, RESERVED_WAIT))


# ------------------------------------------------------------------------------------------ leases


async def test_a_cancelled_job_is_aborted_in_the_engine(host: Host) -> None:
    job = await host.submit()
    async with host.worker():
        await host.until(lambda: job.id in host.engine.jobs)
        await host.broker.cancel("t", job.id)
        host.engine.emit(job.id)
        await host.until(lambda: host.engine.aborted == [job.id])


async def test_a_silent_job_keeps_its_lease(host: Host) -> None:
    job = await host.submit()
    async with host.worker(lease_ttl=BRISK):
        await host.until(lambda: job.id in host.engine.jobs)
        for _ in range(3):
            host.clock.advance(TTL * 0.9)
            await host.heartbeat(job)
            await host.broker.sweep()
        assert (await host.broker.get("t", job.id)).attempt == 1


async def test_a_job_that_was_cancelled_while_it_was_silent_is_aborted(host: Host) -> None:
    job = await host.submit()
    async with host.worker(lease_ttl=BRISK):
        await host.until(lambda: job.id in host.engine.jobs)
        await host.broker.cancel("t", job.id)
        await host.until(lambda: host.engine.aborted == [job.id])


async def test_a_lease_that_was_lost_while_it_waited_is_not_begun(host: Host) -> None:
    running = await host.submit()
    async with host.worker(lease_ttl=BRISK, claim_wait=BRISK):
        await host.until(lambda: running.id in host.engine.jobs)
        host.broker.gate.clear()
        await host.until(lambda: not host.broker.claiming)
        (suspect,) = await host.suspects(1, 2)
        host.broker.gate.set()
        await host.heartbeat(suspect)
        assert suspect.id not in host.engine.jobs, "it waits for the bystander to end"
        await host.broker.cancel("t", suspect.id)
        await host.heartbeat(suspect, Verdict.CANCELLED)
        last = await host.submit()  # for which it asks again
        await host.until(lambda: host.engine.jobs == {running.id, last.id})
        host.engine.emit(running.id, end=True)
        host.engine.emit(last.id, end=True)
        await host.until(lambda: not host.engine.jobs)
        await host.claims()
        assert not host.engine.jobs


async def test_what_it_cannot_run_any_more_is_given_back(host: Host) -> None:
    job = await host.submit()
    async with host.worker() as worker:
        await host.until(lambda: job.id in host.engine.jobs)
        host.engine.emit(job.id, 3)
        await host.written(job, 3)
        worker.stop()
        await host.until(lambda: worker.info.state == "draining")
    left = await host.broker.get("t", job.id)
    assert (left.status, left.tokens, left.retries, left.crashes) == (Status.QUEUED, 3, 0, 0)


async def test_a_failure_that_a_retry_may_cure_is_tried_again(host: Host) -> None:
    job = await host.submit()
    async with host.worker(claim_wait=BRISK):
        await host.until(lambda: job.id in host.engine.jobs)
        host.engine.fail(job.id, retryable=True)
        await host.reached(job, Status.QUEUED)
        host.clock.advance(1)  # its pause
        await host.broker.sweep()
        await host.until(lambda: job.id in host.engine.jobs)
        assert (await host.broker.get("t", job.id)).retries == 1
        host.engine.fail(job.id, retryable=False)
        await host.reached(job, Status.FAILED)


async def test_an_append_is_repeated_while_the_broker_is_away(host: Host) -> None:
    job = await host.submit()
    async with host.worker():
        await host.until(lambda: job.id in host.engine.jobs)
        host.broker.away = 2
        host.engine.emit(job.id, 3)
        host.engine.emit(job.id, 2, end=True)
        await host.written(job, 5)
        assert await host.status(job) is Status.COMPLETED


# ------------------------------------------------------------------------------------------ suspects


async def test_suspects_do_not_share_the_engine_with_who_came_along(host: Host) -> None:
    (suspect,) = await host.suspects(1, 2)
    other = await host.submit()
    async with host.worker():
        await host.until(lambda: host.engine.jobs)
        assert host.engine.jobs == {suspect.id}
        assert await host.status(other) is Status.QUEUED
        host.engine.emit(suspect.id, end=True)
        await host.until(lambda: host.engine.jobs == {other.id})


async def test_a_suspect_beside_a_cleared_one_does_not_die_alone(host: Host) -> None:
    a, b = await host.suspects(2, 4)
    async with host.worker():
        await host.until(lambda: {a.id, b.id} <= host.engine.jobs)
        host.engine.emit(a.id, 16)
        await host.written(a, 16)  # a is cleared, b is on trial
        host.engine.die()
        await host.until(lambda: host.engine.starts == 2)
        for _ in range(2):  # b runs alone now, before or after a
            await host.until(lambda: host.engine.jobs)
            if host.engine.jobs == {b.id}:
                break
            host.engine.emit(a.id, end=True)
        await host.until(lambda: host.engine.jobs == {b.id})
        host.engine.die()  # the first death that is surely its own: not yet poisoned
        await host.until(lambda: host.engine.jobs == {b.id} and host.engine.starts == 3)
        assert await host.status(b) is Status.RUNNING


async def test_who_was_at_three_deaths_is_not_cleared(host: Host) -> None:
    (job,) = await host.suspects(1, 8, 8, 8)
    async with host.worker():
        await host.until(lambda: job.id in host.engine.jobs)
        host.engine.emit(job.id, 40)
        other = await host.submit()
        await host.written(job, 40)
        host.engine.emit(job.id)
        await host.written(job, 41)
        assert host.engine.jobs == {job.id}
        assert await host.status(other) is Status.QUEUED


async def test_a_busy_worker_leaves_suspects_to_others(host: Host) -> None:
    """But where all are busy, each takes them now and then."""
    job = await host.submit()
    async with host.worker(claim_wait=BRISK):
        await host.until(lambda: job.id in host.engine.jobs)
        assert host.broker.claims[0][0].takes_suspects
        await host.until(lambda: not host.broker.claims[-1][0].takes_suspects)
        host.clock.advance(SUSPECTS_INTERVAL)
        seen = len(host.broker.claims)
        await host.claims(3)
        assert [worker.takes_suspects for worker, *_ in host.broker.claims[seen:][:3]].count(True) == 1


async def test_thoughts_are_counted_over_all_attempts(host: Host) -> None:
    thought, text = Phase.REASONING, Phase.TEXT
    async with host.worker():
        job = await host.submit()
        await host.until(lambda: host.engine.running)
        host.engine.emit(job.id, 3, prompt_tokens=9, cached_tokens=4, phases=[thought, thought, text])
        host.engine.emit(job.id, 2)
        await host.written(job, 5)
        host.engine.die()
        await host.until(lambda: host.engine.running)
        [lease] = host.engine.running.values()
        assert lease.phases == [thought, thought, text, text, text]
        host.engine.emit(job.id, 2, prompt_tokens=9, cached_tokens=8, phases=[text, [(thought, 1), (text, 0)]])
        host.engine.emit(job.id, 1, end=True)
        await host.reached(job, Status.COMPLETED)
    assert (await host.broker.get("t", job.id)).usage == Usage(9, 8, 3, 4)
    log = [event async for event in host.broker.tail("t", job.id)]
    check_log(log)
