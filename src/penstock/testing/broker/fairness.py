"""Fairness among tenants and classes, and the slots that batch jobs leave free."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest

from penstock.core.job import Priority, Request, Status
from penstock.core.ports import Lease, QueuePolicy, WorkerInfo
from penstock.testing.broker.driver import PATIENCE, Contract, Driver, model, wide
from penstock.testing.broker.harness import BrokerHarness, total_order


@dataclass
class Service:
    """What each tenant has been given, in weighted tokens, as the paper counts it."""

    policy: QueuePolicy
    given: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    largest: float = 0.0

    def charge(self, tenant: str, *, inputs: int = 0, outputs: int = 0) -> None:
        cost = inputs * self.policy.input_cost + outputs * self.policy.output_cost
        self.given[tenant] += cost / self.policy.weights.get(tenant, 1.0)

    def spread(self, *tenants: str) -> float:
        values = [self.given[tenant] for tenant in tenants]
        return max(values) - min(values)

    def bound(self, inputs: int, outputs: int, slots: int = 1, weight: float = 1.0) -> float:
        """U of the paper: nobody in the backlog is ahead of another by more than what can run at once."""
        return slots * (inputs * self.policy.input_cost + outputs * self.policy.output_cost) / weight


class ReserveContract(Contract):
    """Jobs of the batch class leave some of a worker's slots free."""

    async def claim(self, d: Driver, limit: int, reserve: int = 2, wait: float = 0.0) -> list[Lease]:
        info = WorkerInfo(id="w1", models=(model(),), slots=8, reserve=reserve, seen_at=d.harness.clock.now())
        async with asyncio.timeout(PATIENCE):
            return await d.broker.claim(info, ["m"], limit, wait)

    async def test_batch_jobs_leave_the_reserve(self, d: Driver) -> None:
        await d.submit_many(9, priority=Priority.BATCH)
        assert len(await self.claim(d, 5)) == 3
        assert await self.claim(d, 2) == []
        assert len(await self.claim(d, 3)) == 1
        assert len(await self.claim(d, 2, reserve=0)) == 2

    async def test_choices_of_batch_jobs_leave_the_reserve_too(self, d: Driver) -> None:
        jobs = [await d.submit(priority=Priority.BATCH, request=wide(3)) for _ in range(2)]
        assert len(await d.claim(7, slots=8, reserve=2)) == 1
        assert await d.claim(4, slots=8, reserve=2) == []
        assert len(await d.claim(5, slots=8, reserve=2)) == 1
        assert [(await d.get(job)).status for job in jobs] == [Status.RUNNING] * 2

    @total_order
    async def test_a_batch_job_that_is_wider_than_what_it_may_have_runs_alone(self, d: Driver) -> None:
        job = await d.submit(priority=Priority.BATCH, request=wide(8))
        await d.submit(priority=Priority.BATCH)
        assert await d.claim(7, slots=8, reserve=2) == []
        assert [lease.job.id for lease in await d.claim(8, slots=8, reserve=2)] == [job.id]

    @total_order
    @pytest.mark.parametrize("priority", [Priority.INTERACTIVE, Priority.NORMAL])
    async def test_others_take_all_and_come_first(self, d: Driver, priority: Priority) -> None:
        await d.submit_many(9, priority=Priority.BATCH)
        await d.submit_many(4, priority=priority)
        taken = [lease.job.priority for lease in await self.claim(d, 5)]
        assert taken == [priority] * 4, "one slot is left, which is in the reserve"
        await d.submit(priority=priority)
        assert [lease.job.priority for lease in await self.claim(d, 1)] == [priority]

    async def test_a_claim_that_waits_for_others_leaves_batch_jobs_alone(self, d: Driver) -> None:
        waiting = asyncio.create_task(self.claim(d, 2, wait=PATIENCE))
        await asyncio.sleep(0.01)
        await d.submit(priority=Priority.BATCH)
        urgent = await d.submit(priority=Priority.NORMAL)
        assert [lease.job.id for lease in await waiting] == [urgent.id]


class FairnessContract(Contract):
    """The Virtual Token Counter: the next job is the one of the tenant who was served least ("Fairness in Serving
    Large Language Models", OSDI'24)."""

    @total_order
    async def test_backlogged_tenants_stay_within_the_bound_at_every_moment(self, d: Driver) -> None:
        """Two tenants whose requests differ ten times in size; one job at a time."""
        outputs = {"large": 8, "small": 2}
        for _ in range(12):
            await d.submit("large", size=64)
        for _ in range(60):
            await d.submit("small", size=4)
        service = Service(d.policy)
        bound = service.bound(64, 8)
        served: Counter[str] = Counter()
        for _ in range(55):
            lease = await d.next()
            tenant = lease.job.tenant
            served[tenant] += 1
            service.charge(tenant, inputs=len(lease.job.request.prompt_ids or ()))
            assert service.spread("large", "small") <= bound
            await d.finish(lease, *range(outputs[tenant]))
            service.charge(tenant, outputs=outputs[tenant])
            assert service.spread("large", "small") <= bound
        assert served["large"] >= 4
        assert served["small"] >= 40

    @total_order
    async def test_the_bound_holds_with_several_running_and_random_sizes(self, d: Driver) -> None:
        rng = random.Random(7)
        tenants, slots = ["a", "b", "c"], 4
        for _ in range(40):
            for tenant in tenants:
                await d.submit(tenant, size=rng.randint(1, 40))
        service = Service(d.policy)
        bound = service.bound(40, 12, slots)
        running: list[tuple[Lease, int]] = []
        for _ in range(45):
            for lease in await d.claim(slots - len(running)):
                service.charge(lease.job.tenant, inputs=len(lease.job.request.prompt_ids or ()))
                running.append((lease, rng.randint(1, 12)))
            assert len(running) == slots
            still: list[tuple[Lease, int]] = []
            for lease, left in running:
                if left <= 4:
                    await d.finish(lease, *range(left))
                else:
                    await d.write(lease, *range(4))
                    still.append((lease, left - 4))
                service.charge(lease.job.tenant, outputs=min(left, 4))
            running = still
            assert service.spread(*tenants) <= bound
        assert {job.tenant for tenant in tenants for job in await d.jobs(tenant, status=(Status.QUEUED,))} == {*tenants}

    @total_order
    async def test_weights_share_in_proportion(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, weights={"gold": 2.0})
        for _ in range(40):
            await d.submit("gold", size=10)
            await d.submit("plain", size=10)
        service = Service(d.policy)
        served: Counter[str] = Counter()
        for _ in range(30):
            lease = await d.next()
            await d.finish(lease, *range(5))
            service.charge(lease.job.tenant, inputs=10, outputs=5)
            served[lease.job.tenant] += 1
            assert service.spread("gold", "plain") <= service.bound(10, 5)
        assert 19 <= served["gold"] <= 21

    @total_order
    async def test_one_claim_shares_its_slots_among_tenants(self, d: Driver) -> None:
        """The input is charged with each pick, not once the claim is over."""
        await d.submit_many(10, "a")
        await d.submit_many(10, "b")
        await d.submit_many(10, "c")
        assert Counter(lease.job.tenant for lease in await d.claim(9)) == {"a": 3, "b": 3, "c": 3}

    @total_order
    async def test_the_output_is_charged(self, d: Driver) -> None:
        await d.submit_many(10, "talker")
        await d.submit_many(10, "mute")
        for _ in range(2):
            lease = await d.next()
            await d.finish(lease, *range(100 if lease.job.tenant == "talker" else 1))
        assert [(await d.next()).job.tenant for _ in range(6)] == ["mute"] * 6

    @total_order
    async def test_the_output_is_charged_while_it_is_made(self, d: Driver) -> None:
        await d.submit_many(10, "talker")
        await d.submit_many(10, "mute")
        for lease in await d.claim(2):
            await d.write(lease, *range(100 if lease.job.tenant == "talker" else 1))
        assert [(await d.next()).job.tenant for _ in range(6)] == ["mute"] * 6

    @total_order
    async def test_a_repeated_append_is_charged_once(self, d: Driver) -> None:
        await d.submit_many(20, "a")
        await d.submit_many(20, "b")
        for lease in await d.claim(2):
            append = d.append(lease, *range(10), at=1)
            for _ in range(5 if lease.job.tenant == "a" else 1):
                await d.send(append)
        assert Counter([(await d.next()).job.tenant for _ in range(8)]) == {"a": 4, "b": 4}

    @total_order
    async def test_the_workers_count_corrects_the_estimated_input(self, d: Driver) -> None:
        short = Request(model="m", prompt="word")
        await d.submit_many(10, "dense", request=short)
        await d.submit_many(10, "plain", request=short)
        for lease in await d.claim(2):
            await d.finish(lease, 1, prompt_tokens=1000 if lease.job.tenant == "dense" else 2)
        assert [(await d.next()).job.tenant for _ in range(6)] == ["plain"] * 6

    @total_order
    async def test_an_idle_tenant_banks_no_credit(self, d: Driver) -> None:
        lease = await d.start("idler", size=10)
        await d.finish(lease, 1)
        await d.submit_many(60, "steady", size=10)
        for _ in range(30):
            await d.finish(await d.next(), 1)
        await d.submit_many(20, "idler", size=10)
        served: Counter[str] = Counter()
        for _ in range(10):
            lease = await d.next()
            served[lease.job.tenant] += 1
            await d.finish(lease, 1)
        assert 4 <= served["idler"] <= 6

    @total_order
    async def test_a_newcomer_owes_nothing_and_is_owed_nothing(self, d: Driver) -> None:
        await d.submit_many(60, "steady", size=10)
        for _ in range(30):
            await d.finish(await d.next(), 1)
        await d.submit_many(20, "newcomer", size=10)
        served: Counter[str] = Counter()
        for _ in range(10):
            lease = await d.next()
            served[lease.job.tenant] += 1
            await d.finish(lease, 1)
        assert 4 <= served["newcomer"] <= 6

    @total_order
    async def test_no_credit_is_banked_through_an_empty_queue(self, d: Driver) -> None:
        """Algorithm 2 of the paper, line 8: with nobody waiting, a tenant is lifted to the last one that left."""
        for _ in range(20):
            await d.finish(await d.start("steady", size=10), 1)
        await d.submit_many(20, "newcomer", size=10)
        await d.submit_many(20, "steady", size=10)
        served: Counter[str] = Counter()
        for _ in range(10):
            lease = await d.next()
            served[lease.job.tenant] += 1
            await d.finish(lease, 1)
        assert 4 <= served["newcomer"] <= 6

    @total_order
    async def test_a_late_tenants_single_job_is_the_next_claim(self, d: Driver) -> None:
        await d.submit_many(40, "flood")
        await d.submit_many(20, "b")
        await d.submit_many(20, "c")
        for served in range(13):
            await d.finish(await d.next(), *range(served % 4))
        for name in ("late", "later", "latest"):
            job = await d.submit(name)
            lease = await d.next()
            assert lease.job.id == job.id
            await d.finish(lease, 1)

    @total_order
    async def test_a_flood_of_one_tenant_delays_no_other(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued_per_tenant=5000)
        await d.submit_many(3000, "flood")
        for _ in range(3):
            for lease in await d.claim(4):
                await d.finish(lease, 1, 2)
        job = await d.submit("late")
        assert (await d.next()).job.id == job.id
        await d.submit_many(3, "late")
        assert Counter(lease.job.tenant for lease in await d.claim(6)) == {"flood": 3, "late": 3}

    @total_order
    async def test_fairness_counts_across_priority_classes(self, d: Driver) -> None:
        """What a tenant took as interactive work counts when its normal work is compared."""
        lease = await d.start("busy", priority=Priority.INTERACTIVE, size=200)
        await d.submit_many(5, "calm")
        await d.submit_many(5, "busy")
        await d.finish(lease, *range(50))
        assert [(await d.next()).job.tenant for _ in range(5)] == ["calm"] * 5
