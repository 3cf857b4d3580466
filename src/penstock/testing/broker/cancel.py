"""Cancel: at once, for good, and nobody else's job."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.errors import NotFound
from penstock.core.job import Status, new_job_id
from penstock.core.ports import Verdict
from penstock.testing.broker.driver import ERROR, Contract, Driver, ended, ids
from penstock.testing.oracle import check_log


class CancelContract(Contract):
    async def test_a_queued_job_is_cancelled(self, d: Driver) -> None:
        job = await d.submit()
        cancelled = await d.cancel(job)
        assert (cancelled.id, cancelled.status) == (job.id, Status.CANCELLED)
        assert cancelled.ended_at is not None
        assert await d.claim(5) == []
        assert await d.get(job) == cancelled

    async def test_a_running_job_is_cancelled_at_once(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2)
        assert (await d.cancel(lease)).status is Status.CANCELLED
        end = ended(await d.log(lease))
        assert (end.position, end.attempt, end.status) == (3, 1, Status.CANCELLED)
        assert end.usage.completion_tokens == 2

    async def test_the_error_of_a_cancelled_job_says_so(self, d: Driver) -> None:
        job = await d.submit()
        error = (await d.cancel(job)).error
        assert error is not None
        assert error.code == "cancelled"
        assert ended(await d.log(job)).error == error

    async def test_the_worker_learns_of_a_cancellation_and_writes_nothing(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        await d.cancel(lease)
        assert await d.write(lease, 2) is Verdict.CANCELLED
        assert await d.write(lease) is Verdict.CANCELLED
        assert await d.finish(lease, 2) is Verdict.CANCELLED
        assert ids(await d.log(lease)) == [1]
        check_log(await d.log(lease))
        assert (await d.get(lease)).status is Status.CANCELLED

    async def test_a_requeued_job_is_cancelled(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        await d.lose_leases()
        assert (await d.cancel(lease)).status is Status.CANCELLED
        assert await d.claim(5) == []
        assert await d.write(lease, 2) in {Verdict.CANCELLED, Verdict.LOST}
        assert ids(await d.log(lease)) == [1]

    async def test_a_delayed_job_is_cancelled(self, d: Driver) -> None:
        lease = await d.start()
        await d.release(lease, retry=ERROR, delay=10.0)
        await d.cancel(lease)
        await d.pass_time(20)
        assert await d.claim(5) == []
        assert (await d.get(lease)).status is Status.CANCELLED

    async def test_cancel_is_idempotent(self, d: Driver) -> None:
        lease = await d.start()
        first = await d.cancel(lease)
        await d.harness.advance(1)
        assert await d.cancel(lease) == first
        check_log(await d.log(lease))

    async def test_an_ended_job_stays_as_it_ended(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        before = await d.get(lease)
        await d.harness.advance(1)
        assert await d.cancel(lease) == before
        assert await d.get(lease) == before
        check_log(await d.log(lease))

    async def test_a_foreign_or_unknown_job_cannot_be_cancelled(self, d: Driver) -> None:
        job = await d.submit()
        with pytest.raises(NotFound):
            await d.broker.cancel("umbrella", job.id)
        with pytest.raises(NotFound):
            await d.broker.cancel("acme", new_job_id())
        assert (await d.get(job)).status is Status.QUEUED

    async def test_cancel_and_finish_at_once_end_the_job_once(self, d: Driver) -> None:
        for _ in range(10):
            lease = await d.start()
            answers = await asyncio.gather(d.finish(lease, 1), d.cancel(lease), d.cancel(lease))
            job = await d.get(lease)
            log = await d.log(lease)
            check_log(log)
            assert ended(log).status is job.status
            assert job.status is (Status.COMPLETED if answers[0] is Verdict.OK else Status.CANCELLED)

    async def test_a_cancellation_is_durable(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        before = await d.cancel(lease)
        await d.crash()
        assert await d.get(lease) == before
        assert await d.claim(5) == []
        check_log(await d.log(lease))
