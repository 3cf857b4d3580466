"""Submit: durable once it returned, idempotent, bounded."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.errors import IdempotencyMismatch, NotFound, Overloaded
from penstock.core.job import Job, Message, Priority, Request, Sampling, Status
from penstock.testing.broker.driver import Contract, Driver
from penstock.testing.broker.harness import BrokerHarness, total_order


class SubmitContract(Contract):
    async def test_submit_is_durable_once_it_returned(self, d: Driver) -> None:
        job = await d.submit()
        await d.crash()
        assert (await d.get(job)).status is Status.QUEUED
        assert (await d.next()).job.id == job.id

    async def test_submit_keeps_every_field(self, d: Driver) -> None:
        request = Request(
            model="m",
            messages=(Message("system", "Be brief.\u2028"), Message("user", 'żółć 🦆 \x00 "quoted"')),
            sampling=Sampling(
                max_tokens=7,
                temperature=0.0,
                top_p=0.5,
                top_k=3,
                min_p=0.1,
                seed=-(2**63),
                stop=("\n", "🦆"),
                presence_penalty=-2.0,
                frequency_penalty=2.0,
                repetition_penalty=1.5,
                logit_bias={5: -100.0, 70000: 1.5},
                logprobs=20,
                ignore_eos=True,
            ),
            n=8,
        )
        given = d.job(
            request=request,
            user="ann",
            priority=Priority.INTERACTIVE,
            idempotency_key="k",
            request_id="req-1",
            metadata={"a": "1", "ü": "\u2028"},
            on_disconnect="cancel",
            deadline_at=d.harness.clock.now() + 100,
            trace="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
        returned = await d.broker.submit(given)
        got = await d.get(returned)
        assert returned.id == got.id
        if d.harness.total_order:  # elsewhere a key may decide in which part a job lives, and so its id
            assert got.id == given.id
        names = "tenant request user priority idempotency_key fingerprint request_id metadata on_disconnect created_at"
        for name in [*names.split(), "deadline_at", "trace"]:
            assert getattr(got, name) == getattr(given, name), name
        assert (got.status, got.attempt, got.tokens) == (Status.QUEUED, 0, 0)
        assert (got.started_at, got.first_token_at, got.ended_at, got.error) == (None, None, None, None)
        lease = await d.next()
        assert lease.job.request == request
        assert lease.job.metadata == given.metadata
        assert lease.job.trace == given.trace

    @total_order
    async def test_submit_answers_the_position_in_the_queue(self, d: Driver) -> None:
        """1 is the next one to be claimed; the position falls as jobs ahead leave, and is None once it runs."""
        jobs = [await d.submit() for _ in range(3)]
        assert [job.queue_position for job in jobs] == [1, 2, 3]
        await d.next()
        assert [(await d.get(job)).queue_position for job in jobs] == [None, 1, 2]
        await d.cancel(jobs[1])
        assert [(await d.get(job)).queue_position for job in jobs] == [None, None, 1]

    async def test_same_key_and_body_is_the_same_job(self, d: Driver) -> None:
        first = await d.submit(idempotency_key="k")
        again = await d.submit(idempotency_key="k")
        assert again.id == first.id
        assert len(await d.jobs()) == 1
        assert len(await d.claim(5)) == 1

    async def test_same_key_finds_a_running_and_an_ended_job(self, d: Driver) -> None:
        lease = await d.start(idempotency_key="k")
        assert (await d.submit(idempotency_key="k")).status is Status.RUNNING
        await d.finish(lease, 1)
        again = await d.submit(idempotency_key="k")
        assert (again.id, again.status) == (lease.job.id, Status.COMPLETED)

    async def test_same_key_with_another_body_is_refused(self, d: Driver) -> None:
        lease = await d.start(idempotency_key="k", body="one")
        with pytest.raises(IdempotencyMismatch):
            await d.submit(idempotency_key="k", body="two")
        await d.finish(lease, 1)
        with pytest.raises(IdempotencyMismatch):
            await d.submit(idempotency_key="k", body="two")
        assert len(await d.jobs()) == 1

    async def test_same_key_of_another_tenant_is_another_job(self, d: Driver) -> None:
        first = await d.submit("acme", idempotency_key="k", body="one")
        second = await d.submit("umbrella", idempotency_key="k", body="two")
        assert first.id != second.id
        assert (await d.submit("umbrella", idempotency_key="k", body="two")).id == second.id

    async def test_tenant_and_key_are_not_glued_together(self, d: Driver) -> None:
        """("a", "b:c") and ("a:b", "c") are two keys, whatever the separator."""
        for mark in [":", "/", "|", "\x1f", ","]:
            first = await d.submit("a", idempotency_key=f"b{mark}c")
            second = await d.submit(f"a{mark}b", idempotency_key="c")
            assert first.id != second.id

    async def test_jobs_without_a_key_are_never_merged(self, d: Driver) -> None:
        assert (await d.submit()).id != (await d.submit()).id

    async def test_concurrent_duplicates_are_one_job(self, d: Driver) -> None:
        jobs = await d.submit_many(20, idempotency_key="k")
        assert len({job.id for job in jobs}) == 1
        assert len(await d.claim(20)) == 1

    async def test_concurrent_submits_of_two_bodies_under_one_key_have_one_winner(self, d: Driver) -> None:
        results = await asyncio.gather(
            *(d.submit(idempotency_key="k", body=f"body {i}") for i in range(10)), return_exceptions=True
        )
        assert sum(isinstance(result, Job) for result in results) == 1
        assert sum(isinstance(result, IdempotencyMismatch) for result in results) == 9

    @total_order
    async def test_the_queue_is_bounded(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued=3)
        jobs = [await d.submit(tenant) for tenant in "abc"]
        with pytest.raises(Overloaded):
            await d.submit("d")
        await d.next()
        await d.submit("d")
        with pytest.raises(Overloaded):
            await d.submit("e")
        await d.cancel(jobs[-1])
        await d.submit("e")

    @total_order
    async def test_the_queue_of_a_tenant_is_bounded(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued_per_tenant=2)
        jobs = [await d.submit("a") for _ in range(2)]
        with pytest.raises(Overloaded):
            await d.submit("a")
        await d.submit("b")
        await d.cancel(jobs[0])
        await d.submit("a")
        with pytest.raises(Overloaded):
            await d.submit("a")

    @total_order
    async def test_concurrent_submits_respect_the_bounds(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued=7, max_queued_per_tenant=5)
        results = await asyncio.gather(*(d.submit("ab"[i % 2]) for i in range(40)), return_exceptions=True)
        assert sum(isinstance(result, Job) for result in results) == 7
        assert sum(isinstance(result, Overloaded) for result in results) == 33

    async def test_a_limit_of_zero_is_no_limit(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued=0, max_queued_per_tenant=0)
        await d.submit_many(5)

    @total_order
    async def test_a_refused_submit_leaves_nothing(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued=1)
        first = await d.submit()
        refused = d.job(idempotency_key="k")
        with pytest.raises(Overloaded):
            await d.broker.submit(refused)
        with pytest.raises(NotFound):
            await d.get(refused)
        await d.cancel(first)
        assert (await d.submit(idempotency_key="k", body="other")).id != refused.id

    async def test_a_duplicate_is_answered_even_when_the_queue_is_full(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued=1)
        first = await d.submit(idempotency_key="k")
        assert (await d.submit(idempotency_key="k")).id == first.id

    @total_order
    async def test_a_requeued_job_is_never_refused_by_the_bounds(self, harness: BrokerHarness) -> None:
        d = await Driver.open(harness, max_queued=1, max_queued_per_tenant=1)
        lease = await d.start()
        await d.submit()
        await d.lose_leases()
        assert (await d.next()).job.id == lease.job.id
