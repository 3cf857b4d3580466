"""What a broker still knows after a crash."""

from __future__ import annotations

import pytest

from penstock.core.errors import IdempotencyMismatch, NotFound, Overloaded
from penstock.core.job import Priority
from penstock.core.ports import Finish, Verdict
from penstock.testing.broker.driver import ERROR, Contract, Driver
from penstock.testing.broker.harness import BrokerHarness, total_order
from penstock.testing.oracle import check_log, check_views


class RestartContract(Contract):
    @total_order
    async def test_queued_jobs_stay_queued_in_order(self, d: Driver) -> None:
        jobs = [await d.submit() for _ in range(6)]
        urgent = await d.submit(priority=Priority.INTERACTIVE)
        await d.cancel(jobs[2])
        await d.crash()
        expected = [urgent, jobs[0], jobs[1], *jobs[3:]]
        assert [(await d.next()).job.id for _ in expected] == [job.id for job in expected]
        assert await d.claim(5) == []

    @total_order
    async def test_a_requeued_job_stays_at_the_head(self, d: Driver) -> None:
        jobs = [await d.submit() for _ in range(3)]
        await d.release(await d.next())
        await d.crash()
        assert [(await d.next()).job.id for _ in range(3)] == [job.id for job in jobs]

    async def test_a_running_job_continues_under_the_next_attempt(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2, prompt_tokens=4)
        await d.crash()
        await d.lose_leases()
        again = await d.next()
        assert (again.job.id, again.attempt, again.ids) == (lease.job.id, 2, [1, 2])
        assert await d.write(lease, 666, at=3) is Verdict.LOST
        await d.finish(again, 3)
        assert [(token.id, token.attempt) for token in check_log(await d.log(lease))] == [(1, 1), (2, 1), (3, 2)]

    async def test_ended_jobs_stay_ended(self, d: Driver) -> None:
        done = await d.start()
        await d.finish(done, 1, 2)
        failed = await d.start()
        await d.write(failed, 1, finish=Finish(error=ERROR))
        gone = await d.submit()
        await d.cancel(gone)
        before = [await d.get(done), await d.get(failed), await d.get(gone)]
        logs = [await d.log(job) for job in before]
        await d.crash()
        await d.lose_leases()
        assert [await d.get(job) for job in before] == before
        for job, log in zip(before, logs, strict=True):
            check_log(await d.log(job))
            check_views([log, await d.log(job)])
        assert await d.claim(5) == []

    async def test_idempotency_keys_stay(self, d: Driver) -> None:
        lease = await d.start(idempotency_key="k")
        await d.finish(lease, 1)
        waiting = await d.submit(idempotency_key="q")
        await d.crash()
        assert (await d.submit(idempotency_key="k")).id == lease.job.id
        assert (await d.submit(idempotency_key="q")).id == waiting.id
        with pytest.raises(IdempotencyMismatch):
            await d.submit(idempotency_key="k", body="other")

    @total_order
    async def test_what_tenants_were_served_stays(self, d: Driver) -> None:
        await d.submit_many(10, "greedy", size=10)
        await d.submit_many(10, "modest", size=10)
        for _ in range(2):
            lease = await d.next()
            await d.finish(lease, *range(200 if lease.job.tenant == "greedy" else 1))
        await d.crash()
        assert [(await d.next()).job.tenant for _ in range(6)] == ["modest"] * 6

    @total_order
    async def test_the_bounds_stay(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued=3, max_queued_per_tenant=2)
        await d.submit("a")
        await d.submit("a")
        await d.crash()
        with pytest.raises(Overloaded):
            await d.submit("a")
        await d.submit("b")
        with pytest.raises(Overloaded):
            await d.submit("c")

    async def test_the_tenants_stay_apart(self, d: Driver) -> None:
        job = await d.submit("acme")
        await d.crash()
        with pytest.raises(NotFound):
            await d.broker.get("umbrella", job.id)

    async def test_many_crashes_in_a_row_tear_no_log(self, d: Driver) -> None:
        job = await d.submit()
        for token in range(6):
            lease = await d.next()
            assert lease.ids == list(range(token))
            await d.write(lease, token)
            await d.crash()
            await d.lose_leases()
        lease = await d.next()
        await d.finish(lease)
        tokens = check_log(await d.log(job))
        assert [token.attempt for token in tokens] == [1, 2, 3, 4, 5, 6]
