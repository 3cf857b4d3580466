"""What a worker owes to the jobs that it was given, with a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from tests.support.engine import FakeEngine

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.job import Job, Request, Sampling, Status, new_job_id
from penstock.core.ports import Lease, QueuePolicy, WorkerInfo
from penstock.worker.worker import Worker


class StopsAtClaim(EmbeddedBroker):
    """The worker is told to stop at the very moment when a claim of its is served."""

    worker: Worker

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        leases = await super().claim(worker, models, limit, wait)
        if leases:
            self.worker.stop()
        return leases


async def test_what_was_claimed_when_the_drain_began_is_given_back(tmp_path: Path) -> None:
    broker = StopsAtClaim(tmp_path, policy=QueuePolicy(lease_ttl=60))
    await broker.open()
    try:
        worker = Worker(broker, FakeEngine("s"), lease_ttl=60)
        broker.worker = worker
        request = Request(model="s", prompt="x", sampling=Sampling(max_tokens=3))
        jobs = [await broker.submit(Job(id=new_job_id(), tenant="t", request=request)) for _ in range(3)]
        async with asyncio.timeout(30):
            await worker.run()
        stats = await broker.stats()
        assert stats.jobs[Status.RUNNING] == 0
        assert [(await broker.get("t", job.id)).status for job in jobs] == [Status.QUEUED] * 3
    finally:
        await broker.close()
