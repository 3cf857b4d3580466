"""Deadlines, lost leases, releases, and the search for a job that kills its engine."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.errors import ErrorInfo
from penstock.core.job import Status, new_job_id
from penstock.core.ports import LeaseKey, Release, Verdict
from penstock.testing.broker.driver import ERROR, PATIENCE, Contract, Driver, ended, ids
from penstock.testing.broker.harness import BrokerHarness, total_order
from penstock.testing.oracle import check_log


class DeadlineContract(Contract):
    async def test_a_queued_job_expires(self, d: Driver) -> None:
        job = await d.submit(deadline_at=d.harness.clock.now() + 10)
        assert await d.pass_time(9) == 0
        assert (await d.get(job)).status is Status.QUEUED
        assert await d.pass_time(2) >= 1
        expired = await d.get(job)
        assert expired.status is Status.EXPIRED
        assert expired.error is not None
        assert expired.error.code == "expired"
        check_log(await d.log(job))

    async def test_a_running_job_expires_and_its_worker_learns(self, d: Driver) -> None:
        lease = await d.start(deadline_at=d.harness.clock.now() + 10)
        await d.write(lease, 1)
        for _ in range(3):
            await d.pass_time(3)
            assert await d.write(lease) is Verdict.OK
        await d.pass_time(2)
        assert (await d.get(lease)).status is Status.EXPIRED
        assert await d.write(lease, 2) is Verdict.EXPIRED
        assert await d.finish(lease, 2) is Verdict.EXPIRED
        log = await d.log(lease)
        check_log(log)
        assert (ids(log), ended(log).status, ended(log).position) == ([1], Status.EXPIRED, 2)

    async def test_a_requeued_and_a_delayed_job_expire(self, d: Driver) -> None:
        lost = await d.start(deadline_at=d.harness.clock.now() + 30)
        await d.lose_leases()
        delayed = await d.next()
        assert delayed.job.id == lost.job.id
        await d.release(delayed, retry=ERROR, delay=1000.0)
        await d.pass_time(40)
        assert (await d.get(lost)).status is Status.EXPIRED
        assert await d.claim(5) == []

    async def test_a_deadline_does_not_touch_an_ended_job(self, d: Driver) -> None:
        lease = await d.start(deadline_at=d.harness.clock.now() + 10)
        await d.finish(lease, 1)
        before = await d.get(lease)
        await d.pass_time(20)
        assert await d.get(lease) == before

    async def test_a_deadline_outlives_a_restart(self, d: Driver) -> None:
        job = await d.submit(deadline_at=d.harness.clock.now() + 10)
        await d.crash()
        await d.pass_time(20)
        assert (await d.get(job)).status is Status.EXPIRED

    async def test_an_expired_job_frees_its_place_in_the_queue(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued=1)
        await d.submit(deadline_at=harness.clock.now() + 10)
        await d.pass_time(20)
        await d.submit()


class LeaseContract(Contract):
    async def test_a_lost_lease_requeues_the_job_under_the_next_attempt(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        assert await d.pass_time(d.policy.lease_ttl * 2) >= 1
        assert (await d.get(lease)).status is Status.QUEUED
        again = await d.next(worker="w2")
        assert (again.job.id, again.attempt, again.ids) == (lease.job.id, 2, [1])
        assert (await d.broker.stats()).leases_lost >= 1

    async def test_a_live_lease_is_left_alone(self, d: Driver) -> None:
        lease = await d.start()
        assert await d.pass_time(d.policy.lease_ttl * 0.8) == 0
        assert (await d.get(lease)).status is Status.RUNNING
        assert await d.claim(5) == []

    async def test_losing_leases_costs_no_retry(self, harness: BrokerHarness) -> None:
        """Workers may die as often as they like: that is not the job's fault."""
        d = await Driver.open(harness, max_attempts=1)
        await d.submit()
        for attempt in range(1, 7):
            assert (await d.next()).attempt == attempt
            await d.lose_leases()
        lease = await d.next()
        assert (lease.job.retries, lease.job.crashes) == (0, 0)
        assert await d.finish(lease, 1) is Verdict.OK

    async def test_a_lost_lease_of_one_job_leaves_the_others(self, d: Driver) -> None:
        await d.submit_many(2)
        alive, dead = await d.claim(2)
        await d.pass_time(d.policy.lease_ttl * 0.7)
        await d.write(alive)
        await d.pass_time(d.policy.lease_ttl * 0.7)
        assert [(await d.get(lease)).status for lease in (alive, dead)] == [Status.RUNNING, Status.QUEUED]

    async def test_sweeping_is_idempotent(self, d: Driver) -> None:
        await d.start()
        await d.harness.advance(d.policy.lease_ttl * 2)
        counts = [await d.broker.sweep() for _ in range(3)]
        assert counts[-1] == 0
        assert sum(counts) >= 1
        assert len(await d.claim(5)) == 1

    async def test_concurrent_sweeps_and_claims_give_a_lost_job_to_one(self, d: Driver) -> None:
        await d.start()
        for attempt in range(2, 12):
            await d.harness.advance(d.policy.lease_ttl * 2)
            results = await asyncio.gather(*(f() for _ in range(4) for f in (d.broker.sweep, d.claim)))
            leases = [lease for result in results if isinstance(result, list) for lease in result]
            leases += await d.claim(5)
            assert [lease.attempt for lease in leases] == [attempt]

    @total_order
    async def test_a_drained_job_goes_to_the_head_at_no_cost(self, d: Driver) -> None:
        jobs = [await d.submit() for _ in range(3)]
        lease = await d.next()
        await d.write(lease, 1)
        await d.release(lease)
        job = await d.get(lease)
        assert (job.status, job.retries, job.crashes, job.queue_position) == (Status.QUEUED, 0, 0, 1)
        again = await d.next()
        assert (again.job.id, again.attempt, again.ids) == (jobs[0].id, 2, [1])

    async def test_draining_is_free_any_number_of_times(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_attempts=1)
        await d.submit()
        for _ in range(5):
            await d.release(await d.next())
        lease = await d.next()
        assert lease.job.retries == 0
        await d.finish(lease, 1)

    async def test_a_released_lease_is_fenced(self, d: Driver) -> None:
        lease = await d.start()
        await d.release(lease)
        assert await d.write(lease, 666) is Verdict.LOST
        assert await d.finish(lease, 666) is Verdict.LOST
        assert (await d.get(lease)).tokens == 0

    async def test_a_release_of_a_lease_not_held_is_ignored(self, d: Driver) -> None:
        old = await d.start()
        await d.lose_leases()
        new = await d.next()
        before = await d.get(new)
        unknown = LeaseKey("acme", new_job_id(), 1)
        foreign = LeaseKey("umbrella", new.job.id, new.attempt)
        future = LeaseKey("acme", new.job.id, new.attempt + 1)
        for key in (old.key, unknown, foreign, future):
            await d.broker.release(
                [
                    Release(key),
                    Release(key, retry=ERROR),
                    Release(key, crashed_beside=1),
                    Release(key, crashed_beside=1),
                ]
            )
        assert await d.get(new) == before
        assert await d.write(new, 1) is Verdict.OK

    async def test_a_release_after_the_end_is_ignored(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        before = await d.get(lease)
        for fields in ({}, {"retry": ERROR}, {"crashed_beside": 1}):
            await d.release(lease, **fields)
        assert await d.get(lease) == before
        assert await d.claim(5) == []

    async def test_a_release_sent_twice_counts_once(self, d: Driver) -> None:
        """The reply of the first was lost."""
        lease = await d.start()
        for _ in range(2):
            await d.release(lease, retry=ERROR)
        assert (await d.get(lease)).retries == 1
        lease = await d.next()
        for _ in range(3):
            await d.release(lease, crashed_beside=1)
        assert (await d.get(lease)).status is Status.QUEUED

    async def test_many_leases_are_released_in_one_call(self, d: Driver) -> None:
        await d.submit_many(4)
        leases = await d.claim(4)
        await d.broker.release([Release(lease.key) for lease in leases])
        assert {lease.job.id for lease in await d.claim(5)} == {lease.job.id for lease in leases}

    async def test_a_retry_counts_and_the_last_one_fails_with_its_error(self, harness: BrokerHarness) -> None:
        """``max_attempts`` is the number of retries: that many releases requeue, the next one ends the job."""
        d = await Driver.open(harness, max_attempts=2)
        lease = await d.start()
        await d.write(lease, 1)
        for retries in (1, 2):
            await d.release(lease, retry=ErrorInfo(message=f"cough {retries}", code="timeout"))
            job = await d.get(lease)
            assert (job.status, job.retries) == (Status.QUEUED, retries)
            lease = await d.next()
            assert lease.attempt == retries + 1
        await d.release(lease, retry=ERROR)
        job = await d.get(lease)
        assert (job.status, job.error) == (Status.FAILED, ERROR)
        log = await d.log(lease)
        check_log(log)
        assert (ids(log), ended(log).status, ended(log).error, ended(log).position) == ([1], Status.FAILED, ERROR, 2)
        assert await d.claim(5) == []

    async def test_a_delay_is_respected(self, d: Driver) -> None:
        lease = await d.start()
        await d.release(lease, retry=ERROR, delay=10.0)
        assert (await d.get(lease)).status is Status.QUEUED
        assert await d.claim(5) == []
        await d.pass_time(9)
        assert await d.claim(5) == []
        await d.pass_time(2)
        assert (await d.next()).attempt == 2

    async def test_a_delayed_job_holds_up_no_other(self, d: Driver) -> None:
        lease = await d.start()
        second = await d.submit()
        await d.release(lease, retry=ERROR, delay=10.0)
        assert [lease.job.id for lease in await d.claim(5)] == [second.id]

    async def test_a_waiting_claim_gets_a_delayed_job_when_it_wakes(self, d: Driver) -> None:
        lease = await d.start()
        await d.release(lease, retry=ERROR, delay=10.0)
        claim = asyncio.create_task(d.claim(wait=PATIENCE * 3))
        await asyncio.sleep(0.01)
        await d.pass_time(11)
        async with asyncio.timeout(PATIENCE):
            assert [lease.attempt for lease in await claim] == [2]

    async def test_a_delay_outlives_a_restart(self, d: Driver) -> None:
        lease = await d.start()
        await d.release(lease, retry=ERROR, delay=100.0)
        await d.crash()
        await d.settle()
        assert await d.claim(5) == []
        await d.pass_time(101)
        assert (await d.next()).job.id == lease.job.id

    @pytest.mark.parametrize(("beside", "suspects"), [(8, 4), (5, 2), (3, 1), (2, 1), (1, 1)])
    async def test_a_crash_makes_its_group_suspects_of_half_the_size(
        self, d: Driver, beside: int, suspects: int
    ) -> None:
        lease = await d.start()
        assert lease.job.suspects == 0
        await d.release(lease, crashed_beside=beside)
        job = await d.get(lease)
        assert (job.status, job.suspects, job.retries) == (Status.QUEUED, suspects, 0)
        again = await d.next()
        assert (again.job.suspects, again.attempt) == (suspects, 2)

    async def test_a_job_that_dies_alone_twice_is_quarantined(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        await d.release(lease, crashed_beside=1)
        assert (await d.get(lease)).status is Status.QUEUED
        await d.release(await d.next(), crashed_beside=1)
        job = await d.get(lease)
        assert job.status is Status.FAILED
        assert job.error is not None
        assert job.error.code == "poisoned"
        log = await d.log(lease)
        check_log(log)
        assert ended(log).error == job.error
        assert await d.claim(5) == []

    async def test_a_job_that_crashes_only_in_groups_is_never_quarantined(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_attempts=1)
        await d.submit()
        for _ in range(8):
            await d.release(await d.next(), crashed_beside=3)
        lease = await d.next()
        assert lease.attempt == 9
        await d.finish(lease, 1)
        assert (await d.get(lease)).status is Status.COMPLETED

    async def test_a_first_death_alone_after_group_deaths_is_not_the_second(self, d: Driver) -> None:
        lease = await d.start()
        for beside in (8, 4, 2, 1):
            await d.release(lease, crashed_beside=beside)
            assert (await d.get(lease)).status is Status.QUEUED
            lease = await d.next()
        await d.release(lease, crashed_beside=1)
        assert (await d.get(lease)).status is Status.FAILED

    async def test_suspicion_outlives_a_restart(self, d: Driver) -> None:
        lease = await d.start()
        await d.release(lease, crashed_beside=1)
        await d.crash()
        lease = await d.next()
        assert lease.job.suspects == 1
        await d.release(lease, crashed_beside=1)
        assert (await d.get(lease)).status is Status.FAILED

    async def test_a_poison_is_found_and_its_neighbours_complete(self, d: Driver) -> None:
        """Groups of at most ``suspects`` run beside each other; whichever holds the poison dies."""
        jobs = [await d.submit(user="poison" if i == 5 else "good") for i in range(8)]
        group = await d.claim(8)
        for _ in range(60):
            if not group:
                break
            if any(lease.job.user == "poison" for lease in group):
                await d.broker.release([Release(lease.key, crashed_beside=len(group)) for lease in group])
            else:
                for lease in group:
                    await d.finish(lease, 1)
            group = await d.claim(1)
            while group and len(group) < min(lease.job.suspects or 8 for lease in group):
                more = await d.claim(1)
                if not more:
                    break
                group += more
        statuses = [(await d.get(job)).status for job in jobs]
        assert statuses == [Status.FAILED if i == 5 else Status.COMPLETED for i in range(8)]
