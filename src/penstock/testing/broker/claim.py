"""Claim: who gets which job, exactly once, and how long a claim waits."""

from __future__ import annotations

import asyncio
import contextlib

from penstock.core.job import Priority, Request, Status
from penstock.core.ports import WorkerInfo
from penstock.testing.broker.driver import BRIEF, PATIENCE, Contract, Driver, model, wide
from penstock.testing.broker.harness import BrokerHarness, total_order


class ClaimContract(Contract):
    async def test_claim_takes_at_most_the_limit(self, d: Driver) -> None:
        await d.submit_many(5)
        assert len(await d.claim(3)) == 3
        assert len(await d.claim(3)) == 2
        assert await d.claim(3) == []

    @total_order
    async def test_a_choice_takes_a_slot(self, d: Driver) -> None:
        jobs = [await d.submit(request=wide(n)) for n in (3, 2, 1, 2, 8)]
        assert [lease.job.id for lease in await d.claim(6, slots=8)] == [job.id for job in jobs[:3]]
        assert [lease.job.id for lease in await d.claim(3, slots=8)] == [jobs[3].id]
        assert await d.claim(7, slots=8) == []
        assert [lease.job.id for lease in await d.claim(8, slots=8)] == [jobs[4].id]

    async def test_eight_wide_jobs_are_leased_one_by_one(self, d: Driver) -> None:
        jobs = [await d.submit(request=wide(8)) for _ in range(8)]
        leases = [await d.claim(8, slots=8) for _ in range(8)]
        assert [len(each) for each in leases] == [1] * 8
        assert {lease.job.id for (lease,) in leases} == {job.id for job in jobs}

    async def test_a_job_that_is_wider_than_the_engine_runs_alone(self, d: Driver) -> None:
        job = await d.submit(request=wide(8))
        assert await d.claim(3, slots=4) == []
        other = await d.submit()
        assert [lease.job.id for lease in await d.claim(4, slots=4)] == [job.id]
        assert [lease.job.id for lease in await d.claim(4, slots=4)] == [other.id]

    async def test_what_does_not_fit_is_not_overtaken_for_ever(self, d: Driver) -> None:
        """However many narrow jobs come, and also where order is not total."""
        first = await d.submit(request=wide(8))
        await d.submit_many(12)
        running = await d.claim(7, slots=8)
        for _ in range(40):
            running += await d.claim(8 - len(running), slots=8)
            if first.id in (lease.job.id for lease in running):
                break
            if running:
                await d.finish(running.pop(0), 1)
            await d.submit()
        assert [lease.job.id for lease in running] == [first.id]

    async def test_a_waiting_claim_is_given_what_fits(self, d: Driver) -> None:
        few = asyncio.create_task(d.claim(3, slots=8, wait=BRIEF * 10, worker="w1"))
        await asyncio.sleep(BRIEF)
        job = await d.submit(request=wide(4))
        assert await few == []
        assert [lease.job.id for lease in await d.claim(4, slots=8, worker="w2")] == [job.id]

    async def test_a_repeated_attempt_is_as_wide(self, d: Driver) -> None:
        await d.submit(request=wide(3))
        (lease,) = await d.claim(3)
        await d.release(lease)
        assert await d.claim(2, slots=8) == []
        (lease,) = await d.claim(3, slots=8)
        await d.lose_leases()
        assert await d.claim(2, slots=8) == []
        assert len(await d.claim(3, slots=8)) == 1

    async def test_claim_makes_the_job_running(self, d: Driver) -> None:
        lease = await d.start()
        job = await d.get(lease)
        assert (job.status, job.attempt, job.queue_position) == (Status.RUNNING, 1, None)
        assert (lease.attempt, lease.job.attempt, lease.job.status) == (1, 1, Status.RUNNING)
        assert job.started_at is not None

    async def test_claim_is_durable_once_it_returned(self, d: Driver) -> None:
        """After a crash the attempt number is not given a second time."""
        await d.start()
        await d.crash()
        await d.lose_leases()
        assert (await d.next()).attempt == 2

    async def test_claim_takes_only_the_asked_models(self, d: Driver) -> None:
        await d.submit(name="big")
        small = await d.submit(name="small")
        other = await d.submit(name="other")
        assert [lease.job.id for lease in await d.claim(5, models=["small"])] == [small.id]
        assert await d.claim(5, models=["absent"]) == []
        assert await d.claim(5, models=[]) == []
        assert {lease.job.request.model for lease in await d.claim(5, models=["big", "other"])} == {"big", "other"}
        assert (await d.get(other)).status is Status.RUNNING

    async def test_each_job_goes_to_one_of_twenty_concurrent_claimers(self, d: Driver) -> None:
        jobs = [*await d.submit_many(40, "a"), *await d.submit_many(40, "b"), *await d.submit_many(20, "c")]

        async def worker(number: int) -> list[str]:
            mine: list[str] = []
            while leases := await d.claim(3, worker=f"w{number}"):
                mine += [lease.job.id for lease in leases]
            return mine

        shares = await asyncio.gather(*(worker(i) for i in range(20)))
        taken = [job for share in shares for job in share]
        assert sorted(taken) == sorted(job.id for job in jobs)

    async def test_a_waiting_claim_returns_when_a_job_arrives(self, d: Driver) -> None:
        claim = asyncio.create_task(d.claim(wait=PATIENCE * 3))
        await asyncio.sleep(BRIEF)
        assert not claim.done()
        job = await d.submit()
        async with asyncio.timeout(PATIENCE):
            assert [lease.job.id for lease in await claim] == [job.id]

    async def test_a_waiting_claim_returns_nothing_on_timeout(self, d: Driver) -> None:
        assert await d.claim(wait=BRIEF) == []

    async def test_a_waiting_claim_does_not_wait_for_its_limit(self, d: Driver) -> None:
        await d.submit()
        async with asyncio.timeout(PATIENCE):
            assert len(await d.claim(8, wait=PATIENCE * 3)) == 1

    async def test_one_arriving_job_goes_to_one_of_many_waiting_claimers(self, d: Driver) -> None:
        claims = [asyncio.create_task(d.claim(wait=BRIEF * 6, worker=f"w{i}")) for i in range(10)]
        await asyncio.sleep(BRIEF)
        await d.submit()
        results = await asyncio.gather(*claims)
        assert sorted(len(leases) for leases in results) == [0] * 9 + [1]

    async def test_a_job_wakes_the_claimer_that_serves_its_model(self, d: Driver) -> None:
        """The wake-up must not be swallowed by a waiter who can't use it."""
        first = asyncio.create_task(d.claim(models=["a"], wait=BRIEF * 10, worker="wa"))
        second = asyncio.create_task(d.claim(models=["b"], wait=PATIENCE * 3, worker="wb"))
        await asyncio.sleep(BRIEF)
        job = await d.submit(name="b")
        async with asyncio.timeout(PATIENCE):
            assert [lease.job.id for lease in await second] == [job.id]
        assert await first == []

    async def test_a_waiting_claim_gets_a_job_whose_lease_was_lost(self, d: Driver) -> None:
        lease = await d.start()
        claim = asyncio.create_task(d.claim(wait=PATIENCE * 3, worker="w2"))
        await asyncio.sleep(BRIEF)
        await d.lose_leases()
        async with asyncio.timeout(PATIENCE):
            (again,) = await claim
        assert (again.job.id, again.attempt) == (lease.job.id, 2)

    async def test_a_waiting_claim_gets_a_released_job(self, d: Driver) -> None:
        lease = await d.start()
        claim = asyncio.create_task(d.claim(wait=PATIENCE * 3, worker="w2"))
        await asyncio.sleep(BRIEF)
        await d.release(lease)
        async with asyncio.timeout(PATIENCE):
            assert [again.job.id for again in await claim] == [lease.job.id]

    async def test_a_cancelled_claim_loses_no_job(self, d: Driver) -> None:
        """A claimer that goes away while its claim is in flight may cost a lease's time, never a job."""
        jobs: set[str] = set()
        for _ in range(10):
            claim = asyncio.create_task(d.claim(wait=PATIENCE))
            await asyncio.sleep(0)
            jobs.add((await d.submit()).id)
            claim.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                jobs -= {lease.job.id for lease in await claim}
        await d.lose_leases()
        left = {lease.job.id for lease in await d.claim(20)}
        assert left >= jobs

    async def test_a_job_submitted_with_a_claim_is_not_missed_by_it(self, d: Driver) -> None:
        """A claim that finds nothing, and a job that arrives before the claim has begun to wait."""
        for _ in range(20):
            leases, job = await asyncio.gather(d.claim(wait=0.5), d.submit())
            assert [lease.job.id for lease in leases] == [job.id]
            await d.finish(leases[0])

    async def test_a_claim_that_timed_out_holds_no_lease(self, d: Driver) -> None:
        """A job that arrives just as a claim gives up is either in its answer or still in the queue."""
        for i in range(60):
            claim = asyncio.create_task(d.claim(wait=0.0005 * (1 + i % 10)))
            await asyncio.sleep(0.0004 * (i % 13))
            job = await d.submit()
            leases = await claim
            status = (await d.get(job)).status
            assert status is (Status.RUNNING if leases else Status.QUEUED)
            lease = leases[0] if leases else await d.next()
            await d.finish(lease, 1)

    async def test_attempts_count_up_over_successive_leases(self, d: Driver) -> None:
        await d.submit()
        for attempt in (1, 2, 3, 4):
            lease = await d.next()
            assert lease.attempt == attempt
            assert (await d.get(lease)).attempt == attempt
            await d.lose_leases()

    async def test_the_lease_carries_the_log_so_far(self, d: Driver) -> None:
        lease = await d.start()
        assert (list(lease.ids), list(lease.texts), lease.choices) == ([], [], None)
        await d.write(lease, 10, 11)
        await d.write(lease, 12)
        written = [text for event in await d.head(lease, 3) for text in getattr(event, "texts", ())]
        await d.lose_leases()
        lease = await d.next()
        assert lease.ids == [10, 11, 12]
        assert lease.texts == written
        await d.write(lease, 13)
        await d.release(lease)
        assert (await d.next()).ids == [10, 11, 12, 13]

    async def test_the_lease_carries_the_choices_of_the_prefix(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=3))
        await d.write(lease, 10, 11, 12, choices=[0, 1, 2])
        await d.write(lease, 13, choices=[2])
        await d.lose_leases()
        lease = await d.next()
        assert (lease.ids, lease.choices) == ([10, 11, 12, 13], [0, 1, 2, 2])

    @total_order
    async def test_priority_classes_are_strict(self, d: Driver) -> None:
        """Even a tenant that has had a lot goes first with an interactive job."""
        lease = await d.start("busy", size=500)
        await d.finish(lease, *range(100))
        batch = await d.submit("idle", priority=Priority.BATCH)
        normal = await d.submit("idle")
        interactive = await d.submit("busy", priority=Priority.INTERACTIVE)
        assert [(await d.next()).job.id for _ in range(3)] == [interactive.id, normal.id, batch.id]

    @total_order
    async def test_priority_classes_are_strict_within_one_claim(self, d: Driver) -> None:
        for _ in range(2):
            for priority in (Priority.BATCH, Priority.INTERACTIVE, Priority.NORMAL):
                await d.submit(priority=priority)
        assert [lease.job.priority for lease in await d.claim(6)] == [0, 0, 1, 1, 2, 2]

    @total_order
    async def test_a_tenants_jobs_are_first_in_first_out(self, d: Driver) -> None:
        """Also when they are submitted in the same instant of the clock."""
        jobs = [await d.submit() for _ in range(12)]
        assert [(await d.next()).job.id for _ in range(6)] == [job.id for job in jobs[:6]]
        assert [lease.job.id for lease in await d.claim(6)] == [job.id for job in jobs[6:]]

    @total_order
    async def test_a_lost_job_goes_to_the_head_of_its_tenants_queue(self, d: Driver) -> None:
        jobs = [await d.submit() for _ in range(3)]
        lost = await d.next()
        await d.lose_leases()
        assert (await d.get(lost)).queue_position == 1
        assert [(await d.next()).job.id for _ in range(3)] == [lost.job.id, jobs[1].id, jobs[2].id]

    async def test_a_job_past_its_deadline_is_never_handed_out(self, d: Driver) -> None:
        """Not even before a sweep has seen it."""
        late = await d.submit(deadline_at=d.harness.clock.now() + 10)
        good = await d.submit(deadline_at=d.harness.clock.now() + 100)
        await d.harness.advance(20)
        assert [lease.job.id for lease in await d.claim(5)] == [good.id]
        await d.settle()
        assert (await d.get(late)).status is Status.EXPIRED

    @total_order
    async def test_a_tenant_runs_no_more_than_its_share(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_running_per_tenant=2)
        await d.submit_many(6, "a")
        leases = await d.claim(10)
        assert len(leases) == 2
        await d.submit_many(1, "b")
        assert [lease.job.tenant for lease in await d.claim(10)] == ["b"], "a full tenant must not block another"
        await d.finish(leases[0], 1)
        assert len(await d.claim(10)) == 1
        await d.cancel(leases[1])
        assert len(await d.claim(10)) == 1
        await d.lose_leases()
        assert len([lease for lease in await d.claim(10) if lease.job.tenant == "a"]) == 2

    @total_order
    async def test_a_waiting_claim_gets_the_job_that_a_finish_let_through(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_running_per_tenant=1)
        lease = await d.start()
        second = await d.submit()
        claim = asyncio.create_task(d.claim(wait=PATIENCE * 3, worker="w2"))
        await asyncio.sleep(BRIEF)
        assert not claim.done()
        await d.finish(lease, 1)
        async with asyncio.timeout(PATIENCE):
            assert [lease.job.id for lease in await claim] == [second.id]

    async def test_a_claim_of_nothing_gets_nothing(self, d: Driver) -> None:
        job = await d.submit()
        assert await d.claim(0) == []
        assert await d.claim(1, models=()) == []
        assert (await d.get(job)).status is Status.QUEUED

    async def test_a_worker_that_only_registers_is_known_and_gets_nothing(self, d: Driver) -> None:
        job = await d.submit()
        await d.broker.register(WorkerInfo(id="shy", models=(model(),), slots=8, state="loading"))
        assert (await d.get(job)).status is Status.QUEUED
        [known] = (await d.broker.stats()).workers
        assert (known.id, known.state, known.slots) == ("shy", "loading", 8)
        await d.broker.register(WorkerInfo(id="shy", models=(model(),), slots=4))
        [known] = (await d.broker.stats()).workers
        assert (known.id, known.state, known.slots) == ("shy", "ready", 4)
