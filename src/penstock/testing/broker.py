"""The broker contract: every promise of `penstock.core.ports.Broker` as a test that any broker must pass unchanged.

To run it on a broker of your own, with pytest, pytest-asyncio (``asyncio_mode = "auto"``), pytest-timeout and
hypothesis installed::

    # conftest.py: readable assertion messages
    pytest.register_assert_rewrite("penstock.testing.broker")

    # test_my_broker.py
    from penstock.testing.broker import BrokerContract, BrokerHarness

    class MyHarness(BrokerHarness): ...

    class TestMyBroker(BrokerContract):
        @pytest.fixture
        def make_harness(self, tmp_path_factory):
            return lambda: MyHarness(tmp_path_factory.mktemp("store"))

The suite never sleeps for a lease: time is the harness's clock, and `Broker.sweep` is what acts on it. ``wait`` of a
claim is the one real duration. Where the ports leave a choice, the test says which answers it accepts.

``PENSTOCK_HYPOTHESIS_PROFILE=long`` makes the model comparison run for minutes instead of seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from penstock.core.errors import (
    ErrorInfo,
    ExpiredResult,
    IdempotencyMismatch,
    InvalidRequest,
    LogRewound,
    NotFound,
    Overloaded,
    PenstockError,
)
from penstock.core.events import Ended, Event, Logprob, Tokens, TopLogprob
from penstock.core.job import (
    TERMINAL,
    TRANSITIONS,
    Job,
    Message,
    Priority,
    Request,
    Sampling,
    Status,
    fingerprint,
    new_job_id,
)
from penstock.core.ports import (
    PAGE_BYTES,
    Append,
    Broker,
    Finish,
    Lease,
    LeaseKey,
    ModelInfo,
    Query,
    QueuePolicy,
    Release,
    Verdict,
    WorkerInfo,
)
from penstock.testing.oracle import check_log, check_views, tokens_of

PATIENCE = 10.0
"""Seconds of real time after which something that should have happened counts as never happening."""

BRIEF = 0.05
"""Seconds of real time that a test is willing to spend on seeing that nothing happens."""

T = TypeVar("T")


# --------------------------------------------------------------------------------------------- harness


class AdjustableClock(Protocol):
    """The clock of the broker under test (`penstock.testing.clock.ManualClock`, or whatever moves its time)."""

    def now(self) -> float: ...

    def advance(self, seconds: float) -> None: ...


class BrokerHarness(ABC):
    """One store, empty at first, and the brokers opened on it one after another."""

    clock: AdjustableClock

    total_order = True
    """False for a store that is split into parts: order, classes, bounds and fairness are exact within a part only."""

    @abstractmethod
    async def broker(self, policy: QueuePolicy | None = None) -> Broker:
        """An opened broker on this harness's store, under *policy* (None: the defaults)."""

    @abstractmethod
    async def crash(self) -> None:
        """Lose every open broker as a kill -9 would; what was acknowledged is still in the store."""

    @abstractmethod
    async def close(self) -> None:
        """Tear everything down. Safe to call more than once."""

    async def advance(self, seconds: float) -> None:
        """Let *seconds* pass for the broker."""
        self.clock.advance(seconds)

    async def stored_bytes(self) -> int | None:
        """How much the store holds, or None where that can't be observed."""
        return None


F = TypeVar("F", bound=Callable[..., Any])


def total_order(test: F) -> F:
    """Mark a test of what only a store in one piece promises (`BrokerHarness.total_order`)."""
    test.total_order = True  # type: ignore[attr-defined]
    return test


# ---------------------------------------------------------------------------------------------- driver


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


class _Contract:
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


# ---------------------------------------------------------------------------------------------- submit


class SubmitContract(_Contract):
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


# ----------------------------------------------------------------------------------------------- claim


class ClaimContract(_Contract):
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

    async def test_a_claim_of_nothing_only_registers_the_worker(self, d: Driver) -> None:
        job = await d.submit()
        assert await d.claim(0, worker="shy") == []
        assert (await d.get(job)).status is Status.QUEUED
        assert "shy" in {worker.id for worker in (await d.broker.stats()).workers}


# -------------------------------------------------------------------------------------------- fairness


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


class ReserveContract(_Contract):
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


class FairnessContract(_Contract):
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


# ---------------------------------------------------------------------------------------------- append


class AppendContract(_Contract):
    async def test_appended_tokens_are_in_the_log_in_order(self, d: Driver) -> None:
        lease = await d.start()
        assert await d.write(lease, 10, 11) is Verdict.OK
        assert await d.write(lease, 12) is Verdict.OK
        assert await d.finish(lease, 13) is Verdict.OK
        log = await d.log(lease)
        assert [(token.position, token.id, token.text, token.attempt) for token in check_log(log)] == [
            (1, 10, "10 ", 1),
            (2, 11, "11 ", 1),
            (3, 12, "12 ", 1),
            (4, 13, "13 ", 1),
        ]

    async def test_append_keeps_texts_choices_and_logprobs(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=2, sampling=Sampling(logprobs=2)))
        texts = ["", "\u2028\n", "🦆", '"\\\x00']
        logprobs = [None, Logprob(-0.5), Logprob(-1.25, (TopLogprob(7, "a", -1.25), TopLogprob(8, "", -2.5))), None]
        await d.send(Append(lease.key, 1, [1, 2**31, 0, 4], texts, [0, 1, 1, 0], logprobs))
        await d.finish(lease)
        tokens = [event for event in await d.log(lease) if isinstance(event, Tokens)]
        assert [text for event in tokens for text in event.texts] == texts
        assert [choice for event in tokens for choice in event.choices or []] == [0, 1, 1, 0]
        assert [entry for event in tokens for entry in event.logprobs or []] == logprobs
        assert ids(tokens) == [1, 2**31, 0, 4]

    async def test_append_is_durable_once_it_returned(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2, 3)
        await d.crash()
        assert (await d.get(lease)).tokens == 3
        assert ids(await d.head(lease, 3)) == [1, 2, 3]

    async def test_a_finish_is_durable_once_it_returned(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1, 2)
        before = await d.get(lease)
        await d.crash()
        assert await d.get(lease) == before
        check_log(await d.log(lease))

    async def test_an_older_attempt_is_lost_and_writes_nothing(self, d: Driver) -> None:
        old = await d.start()
        await d.write(old, 1)
        await d.lose_leases()
        new = await d.next(worker="w2")
        await d.write(new, 2)
        for zombie in (d.append(old, 666), d.append(old, 666, at=2), d.append(old, at=2), d.append(old, 1, 666, at=1)):
            assert await d.send(zombie) is Verdict.LOST
        assert await d.finish(old, 666) is Verdict.LOST
        assert (await d.get(new)).status is Status.RUNNING
        await d.finish(new, 3)
        assert await d.finish(old, 666) is Verdict.LOST
        assert await d.write(old, 666, at=5) is Verdict.LOST
        assert ids(await d.log(new)) == [1, 2, 3]

    async def test_a_lost_lease_is_lost_before_anyone_else_has_it(self, d: Driver) -> None:
        """The job waits in the queue again: its old worker may not go on writing."""
        lease = await d.start()
        await d.write(lease, 1)
        await d.lose_leases()
        assert await d.write(lease, 666) is Verdict.LOST
        assert await d.write(lease) is Verdict.LOST
        assert await d.finish(lease) is Verdict.LOST
        job = await d.get(lease)
        assert (job.status, job.tokens) == (Status.QUEUED, 1)

    async def test_a_zombies_heartbeat_does_not_renew_its_successors_lease(self, d: Driver) -> None:
        old = await d.start()
        await d.lose_leases()
        new = await d.next(worker="w2")
        await d.pass_time(d.policy.lease_ttl * 0.7)
        await d.write(old)
        await d.pass_time(d.policy.lease_ttl * 0.7)
        assert (await d.get(new)).status is Status.QUEUED

    async def test_an_attempt_that_was_never_given_is_lost(self, d: Driver) -> None:
        job = await d.submit()
        for attempt in (0, 1, 2):
            key = LeaseKey(job.tenant, job.id, attempt)
            assert await d.send(Append(key, 1, [666], ["x"])) is Verdict.LOST
        lease = await d.next()
        for attempt in (0, 2, 99):
            key = LeaseKey(job.tenant, job.id, attempt)
            assert await d.send(Append(key, 1, [666], ["x"], finish=Finish(("stop",)))) is Verdict.LOST
        await d.finish(lease, 1)
        assert ids(await d.log(lease)) == [1]

    async def test_an_append_to_an_unknown_job_is_lost(self, d: Driver) -> None:
        key = LeaseKey("acme", new_job_id(), 1)
        assert await d.broker.append([Append(key, 1, [1], ["x"])]) == {key.job: Verdict.LOST}

    async def test_an_append_under_another_tenant_is_lost(self, d: Driver) -> None:
        lease = await d.start()
        key = LeaseKey("umbrella", lease.job.id, lease.attempt)
        assert await d.send(Append(key, 1, [666], ["x"], finish=Finish(("stop",)))) is Verdict.LOST
        await d.finish(lease, 1)
        assert ids(await d.log(lease)) == [1]

    async def test_the_same_append_twice_writes_once(self, d: Driver) -> None:
        lease = await d.start()
        append = d.append(lease, 10, 11)
        for _ in range(3):
            assert await d.send(append) is Verdict.OK
        assert (await d.get(lease)).tokens == 2
        await d.finish(lease, 12)
        assert ids(await d.log(lease)) == [10, 11, 12]

    async def test_the_same_append_at_the_same_time_writes_once(self, d: Driver) -> None:
        lease = await d.start()
        append = d.append(lease, 10, 11)
        assert set(await asyncio.gather(*(d.send(append) for _ in range(8)))) == {Verdict.OK}
        await d.finish(lease)
        assert ids(await d.log(lease)) == [10, 11]

    async def test_a_finish_sent_twice_ends_once(self, d: Driver) -> None:
        """The reply of the first was lost. Accepted for the second: OK, or LOST (nothing is left to generate)."""
        lease = await d.start()
        append = d.append(lease, 10, finish=Finish(("stop",)), prompt_tokens=4)
        assert await d.send(append) is Verdict.OK
        before = await d.get(lease)
        assert await d.send(append) in {Verdict.OK, Verdict.LOST}
        assert await d.get(lease) == before
        assert ids(await d.log(lease)) == [10]
        check_log(await d.log(lease))

    async def test_what_comes_after_the_end_is_never_acknowledged(self, d: Driver) -> None:
        """OK would say that the tokens are in the log."""
        lease = await d.start()
        await d.finish(lease, 1)
        for late in (d.append(lease, 2, at=2), d.append(lease, 2, at=3), d.append(lease, 1, 2, at=1)):
            assert await d.send(late) is Verdict.LOST
        assert ids(await d.log(lease)) == [1]

    async def test_an_overlapping_append_writes_only_its_new_part(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=2, sampling=Sampling(logprobs=1)))
        await d.write(lease, 10, 11, 12, choices=[0, 1, 0], logprobs=[Logprob(-1.0), Logprob(-2.0), Logprob(-3.0)])
        overlap = d.append(
            lease,
            *(11, 12, 13, 14),
            at=2,
            choices=[1, 0, 1, 1],
            logprobs=[Logprob(-2.0), Logprob(-3.0), Logprob(-4.0), Logprob(-5.0)],
            finish=Finish(("stop", "length")),
        )
        assert await d.send(overlap) is Verdict.OK
        log = await d.log(lease)
        assert [(token.id, token.choice) for token in check_log(log)] == [(10, 0), (11, 1), (12, 0), (13, 1), (14, 1)]
        logprobs = [entry.logprob for e in log if isinstance(e, Tokens) for entry in e.logprobs or [] if entry]
        assert logprobs == [-1.0, -2.0, -3.0, -4.0, -5.0]

    async def test_what_is_logged_is_never_rewritten(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 10, 11)
        await d.write(lease, 98, 99, 12, at=1)
        await d.finish(lease)
        assert ids(await d.log(lease)) == [10, 11, 12]

    async def test_an_append_beyond_the_head_writes_nothing(self, d: Driver) -> None:
        """Accepted: the verdict LOST, or a refusal (`PenstockError` or ValueError)."""
        lease = await d.start()
        await d.write(lease, 10, 11)
        for gap in (d.append(lease, 14, at=4), d.append(lease, 14, at=4, finish=Finish(("stop",)))):
            try:
                verdict = await d.send(gap)
            except (PenstockError, ValueError):
                verdict = Verdict.LOST
            assert verdict is Verdict.LOST
        job = await d.get(lease)
        assert (job.status in {Status.RUNNING, Status.QUEUED}, job.tokens) == (True, 2)
        assert ids(await d.head(lease, 2)) == [10, 11]
        await d.lose_leases()
        lease = await d.next()
        assert lease.ids == [10, 11]
        await d.finish(lease, 12)
        assert ids(await d.log(lease)) == [10, 11, 12]
        check_log(await d.log(lease))

    async def test_a_heartbeat_renews_the_lease(self, d: Driver) -> None:
        lease = await d.start()
        for _ in range(4):
            await d.pass_time(d.policy.lease_ttl * 0.7)
            assert await d.write(lease) is Verdict.OK
        assert (await d.get(lease)).status is Status.RUNNING
        assert await d.finish(lease, 1) is Verdict.OK
        assert ids(await d.log(lease)) == [1]

    async def test_tokens_renew_the_lease(self, d: Driver) -> None:
        lease = await d.start()
        for token in range(4):
            await d.pass_time(d.policy.lease_ttl * 0.7)
            assert await d.write(lease, token) is Verdict.OK
        assert (await d.get(lease)).status is Status.RUNNING

    async def test_a_repeated_append_renews_the_lease(self, d: Driver) -> None:
        lease = await d.start()
        append = d.append(lease, 1)
        for _ in range(4):
            assert await d.send(append) is Verdict.OK
            await d.pass_time(d.policy.lease_ttl * 0.7)
        assert (await d.get(lease)).status is Status.RUNNING

    async def test_a_finish_ends_the_job(self, d: Driver) -> None:
        lease = await d.start(size=5)
        await d.write(lease, 1, 2, prompt_tokens=7)
        await d.harness.advance(2)
        await d.send(d.append(lease, 3, finish=Finish(("length",))))
        job = await d.get(lease)
        assert (job.status, job.finish_reasons, job.error) == (Status.COMPLETED, ("length",), None)
        assert (job.tokens, job.prompt_tokens, job.usage.total_tokens) == (3, 7, 10)
        assert job.ended_at == pytest.approx(d.harness.clock.now())
        end = ended(await d.log(lease))
        assert (end.position, end.attempt, end.status, end.finish_reasons) == (4, 1, Status.COMPLETED, ("length",))
        assert end.usage == job.usage
        assert end.error is None

    async def test_a_finish_stores_a_reason_for_each_choice(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=3))
        reasons = ("stop", "length", "tool_calls")
        await d.write(lease, 1, 2, choices=[0, 2], finish=Finish(reasons))
        assert (await d.get(lease)).finish_reasons == ended(await d.log(lease)).finish_reasons == reasons

    async def test_a_finish_stores_which_stop_string_ended_a_choice(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=2))
        await d.write(lease, 1, 2, choices=[0, 1], finish=Finish.of([("stop", "END"), ("length", None)]))
        end = ended(await d.log(lease))
        assert (end.finish_reasons, end.stop(0), end.stop(1)) == (("stop", "length"), "END", None)
        other = await d.start()
        await d.finish(other)
        end = ended(await d.log(other))
        assert end.stop() is None

    async def test_a_finish_with_an_error_fails_the_job(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        assert await d.write(lease, 2, finish=Finish(error=ERROR)) is Verdict.OK
        job = await d.get(lease)
        assert (job.status, job.error, job.finish_reasons) == (Status.FAILED, ERROR, ())
        end = ended(await d.log(lease))
        assert (end.position, end.status, end.error) == (3, Status.FAILED, ERROR)

    async def test_a_job_may_end_without_a_token(self, d: Driver) -> None:
        lease = await d.start()
        assert await d.finish(lease) is Verdict.OK
        (end,) = await d.log(lease)
        assert (end.position, end.attempt) == (1, 1)

    async def test_the_prompts_length_is_recorded(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, prompt_tokens=12)
        assert (await d.get(lease)).prompt_tokens == 12
        await d.write(lease, 1)
        assert (await d.get(lease)).prompt_tokens == 12, "an append that does not tell must not forget it"
        await d.write(lease, finish=Finish(("stop",)))
        assert ended(await d.log(lease)).usage.prompt_tokens == 12

    async def test_the_prompt_is_counted_once_over_several_attempts(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2, prompt_tokens=12)
        await d.lose_leases()
        lease = await d.next()
        await d.finish(lease, 3, prompt_tokens=12)
        usage = (await d.get(lease)).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (12, 3)

    async def test_one_call_serves_many_jobs_with_a_verdict_each(self, d: Driver) -> None:
        for _ in range(6):
            await d.submit()
        good, stale, gone, done, beat, late = await d.claim(6)
        await d.release(stale)
        again = await d.next()
        await d.cancel(gone)
        verdicts = await d.broker.append(
            [
                d.append(good, 1, 2),
                d.append(stale, 666, at=1),
                d.append(gone, 666),
                d.append(done, 3, finish=Finish(("stop",))),
                d.append(beat),
                Append(LeaseKey("umbrella", late.job.id, 1), 1, [666], ["x"]),
            ]
        )
        assert verdicts == {
            good.job.id: Verdict.OK,
            stale.job.id: Verdict.LOST,
            gone.job.id: Verdict.CANCELLED,
            done.job.id: Verdict.OK,
            beat.job.id: Verdict.OK,
            late.job.id: Verdict.LOST,
        }
        assert again.job.id == stale.job.id
        assert [(await d.get(lease)).tokens for lease in (good, again, gone, done, beat, late)] == [2, 0, 0, 1, 0, 0]
        assert (await d.get(done)).status is Status.COMPLETED

    async def test_two_runs_of_one_job_may_share_a_call(self, d: Driver) -> None:
        lease = await d.start()
        verdicts = await d.broker.append([d.append(lease, 1, 2, at=1), d.append(lease, 3, at=3)])
        assert verdicts == {lease.job.id: Verdict.OK}
        assert ids(await d.head(lease, 3)) == [1, 2, 3]

    async def test_the_same_append_twice_in_one_call_writes_once(self, d: Driver) -> None:
        """And spoils nothing for the other jobs of the call."""
        await d.submit_many(2)
        lease, other = await d.claim(2)
        tokens = d.append(lease, 1, 2)
        last = d.append(lease, 3, at=3, finish=Finish(("stop",)))
        verdicts = await d.broker.append([tokens, tokens, last, last, d.append(other, 9)])
        assert verdicts[other.job.id] is Verdict.OK
        assert verdicts[lease.job.id] in {Verdict.OK, Verdict.LOST}
        log = await d.log(lease)
        check_log(log)
        assert ids(log) == [1, 2, 3]
        assert (await d.get(other)).tokens == 1

    async def test_an_append_of_nothing_is_nothing(self, d: Driver) -> None:
        assert await d.broker.append([]) == {}

    async def test_workers_append_side_by_side(self, d: Driver) -> None:
        await d.submit_many(8)
        leases = await d.claim(8)

        async def work(lease: Lease) -> None:
            for token in range(20):
                assert await d.write(lease, token) is Verdict.OK
            await d.finish(lease)

        await asyncio.gather(*(work(lease) for lease in leases))
        for lease in leases:
            assert ids(await d.log(lease)) == list(range(20))

    async def test_the_attempt_of_each_token_is_kept(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        await d.lose_leases()
        await d.lose_leases()
        lease = await d.next()
        await d.write(lease, 2)
        await d.release(lease)
        lease = await d.next()
        await d.finish(lease, 3)
        assert [token.attempt for token in check_log(await d.log(lease))] == [1, 2, 3]
        assert ended(await d.log(lease)).attempt == 3


# ------------------------------------------------------------------------------------------------ tail


class TailContract(_Contract):
    async def test_a_reader_replays_then_follows_then_ends(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2)
        seen: list[Event] = []

        async def read() -> None:
            async for event in d.broker.tail("acme", lease.job.id):
                seen.append(event)

        reader = asyncio.create_task(read())
        await soon(lambda: ids(seen) == [1, 2])
        await d.write(lease, 3)
        await soon(lambda: ids(seen) == [1, 2, 3])
        await d.finish(lease, 4)
        async with asyncio.timeout(PATIENCE):
            await reader
        assert ids(seen) == [1, 2, 3, 4]
        check_log(seen)

    async def test_a_reader_may_come_before_the_first_token_and_before_the_claim(self, d: Driver) -> None:
        job = await d.submit()
        reader = d.reader(job)
        await asyncio.sleep(BRIEF)
        assert not reader.done()
        lease = await d.next()
        await d.write(lease, 1)
        await d.finish(lease, 2)
        assert ids(await reader) == [1, 2]

    async def test_a_reader_may_come_after_the_end(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2)
        await d.finish(lease, 3)
        for after in range(4):
            log = await d.log(lease, after)
            check_log(log, after=after)
            assert ids(log) == [1, 2, 3][after:]
            assert ended(log).position == 4

    async def test_a_resume_after_the_end_is_empty(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1, 2)
        assert await d.log(lease, after=3) == []

    async def test_a_resume_begins_at_the_next_position(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2, 3)
        readers = [d.reader(lease, after) for after in range(4)]
        await asyncio.sleep(0.01)
        await d.write(lease, 4)
        await d.finish(lease, 5)
        for after, reader in enumerate(readers):
            log = await reader
            check_log(log, after=after)
            assert ids(log) == [1, 2, 3, 4, 5][after:]

    async def test_a_run_is_cut_where_a_resume_falls_in_its_middle(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=2, sampling=Sampling(logprobs=0)))
        logprobs: list[Logprob | None] = [Logprob(-float(i)) for i in range(5)]
        await d.write(lease, 10, 11, 12, 13, 14, choices=[0, 1, 0, 1, 0], logprobs=logprobs)
        await d.finish(lease)
        (run, end) = await d.log(lease, after=2)
        assert run == Tokens(3, 1, [12, 13, 14], ["12 ", "13 ", "14 "], [0, 1, 0], logprobs[2:])
        assert end.position == 6

    async def test_many_readers_see_the_same(self, d: Driver) -> None:
        lease = await d.start()
        readers = [d.reader(lease) for _ in range(25)]
        for token in range(30):
            await d.write(lease, token)
            if token % 10 == 0:
                readers += [d.reader(lease, after) for after in range(min(token, 5))]
        await d.finish(lease)
        views = [await reader for reader in readers]
        check_views([await d.log(lease), *views])
        for view in views[:25]:
            check_log(view)
            assert ids(view) == list(range(30))

    async def test_a_slow_reader_loses_nothing(self, d: Driver) -> None:
        lease = await d.start()
        seen: list[Event] = []

        async def read() -> None:
            async for event in d.broker.tail("acme", lease.job.id):
                seen.append(event)
                await asyncio.sleep(0.003)

        reader = asyncio.create_task(read())
        for token in range(60):
            await d.write(lease, token)
        await d.finish(lease)
        async with asyncio.timeout(PATIENCE):
            await reader
        assert ids(seen) == list(range(60))
        check_log(seen)

    async def test_a_stalled_reader_delays_no_append_and_no_other_reader(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 0)
        async with closing(d.broker.tail("acme", lease.job.id)) as stalled:
            await anext(stalled)
            for token in range(1, 200):
                await d.write(lease, token)
            await d.finish(lease)
            assert ids(await d.log(lease)) == list(range(200))
            rest = [event async for event in stalled]
        assert ids(rest) == list(range(1, 200))
        check_log(rest, after=1)

    async def test_a_long_log_is_replayed_whole(self, d: Driver) -> None:
        lease = await d.start()
        for start in range(0, 5000, 100):
            await d.write(lease, *range(start, start + 100))
        await d.finish(lease)
        assert ids(await d.log(lease)) == list(range(5000))
        assert ids(await d.log(lease, after=4321)) == list(range(4321, 5000))

    async def test_a_replay_lets_other_tasks_run(self, d: Driver) -> None:
        """A reader of a long log must really suspend now and then, or it blocks the whole server."""
        lease = await d.start()
        for token in range(300):
            await d.write(lease, token)
        await d.finish(lease)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        async with asyncio.timeout(PATIENCE):
            seen = [turns async for _ in d.broker.tail("acme", lease.job.id)]
        task.cancel()
        longest = max(Counter(seen).values())
        assert longest <= 64, f"{longest} events in a row without letting anyone else run"

    async def test_a_reader_across_a_lost_lease_sees_one_log(self, d: Driver) -> None:
        lease = await d.start()
        reader = d.reader(lease)
        await d.write(lease, 1, 2)
        await d.lose_leases()
        lease = await d.next()
        await d.finish(lease, 3)
        assert [(token.id, token.attempt) for token in check_log(await reader)] == [(1, 1), (2, 1), (3, 2)]

    @pytest.mark.parametrize("how", ["cancel", "expire", "fail", "quarantine", "retries"])
    async def test_a_reader_sees_exactly_one_end_however_it_came(self, harness: BrokerHarness, how: str) -> None:
        d = await Driver.open(harness, max_attempts=1)
        lease = await d.start(deadline_at=harness.clock.now() + 100)
        reader = d.reader(lease)
        await d.write(lease, 1, 2)
        if how == "cancel":
            await d.cancel(lease)
        elif how == "expire":
            await d.pass_time(101)
        elif how == "fail":
            await d.write(lease, finish=Finish(error=ERROR))
        elif how == "quarantine":
            await d.release(lease, crashed_beside=1)
            await d.release(await d.next(), crashed_beside=1)
        else:
            await d.release(lease, retry=ERROR)
            await d.release(await d.next(), retry=ERROR)
        log = await reader
        check_log(log)
        assert ended(log).position == 3
        assert ended(log).usage.completion_tokens == 2
        assert ended(log).status is (await d.get(lease)).status
        assert ended(log).error == (await d.get(lease)).error
        assert await d.log(lease) == log or ids(await d.log(lease)) == ids(log)
        check_views([log, await d.log(lease)])

    async def test_a_reader_of_a_queued_job_sees_its_cancellation(self, d: Driver) -> None:
        job = await d.submit()
        reader = d.reader(job)
        await asyncio.sleep(0.01)
        await d.cancel(job)
        (end,) = await reader
        assert (end.position, end.attempt, ended([end]).status) == (1, 0, Status.CANCELLED)

    async def test_a_reader_of_a_queued_job_sees_it_expire(self, d: Driver) -> None:
        job = await d.submit(deadline_at=d.harness.clock.now() + 5)
        reader = d.reader(job)
        await asyncio.sleep(0.01)
        await d.pass_time(6)
        (end,) = await reader
        assert (end.position, ended([end]).status) == (1, Status.EXPIRED)

    async def test_a_reader_beyond_the_head_is_told_that_the_log_rewound(self, d: Driver) -> None:
        job = await d.submit()
        with pytest.raises(LogRewound):
            await d.log(job, after=1)
        lease = await d.next()
        await d.write(lease, 1, 2)
        with pytest.raises(LogRewound):
            await d.log(lease, after=3)
        await d.finish(lease, 3)
        with pytest.raises(LogRewound):
            await d.log(lease, after=5)

    async def test_a_reader_of_an_unknown_job_is_refused(self, d: Driver) -> None:
        with pytest.raises(NotFound):
            await d.log(d.job())

    async def test_a_reader_of_a_foreign_job_is_refused(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        foreign = msgspec.structs.replace(lease.job, tenant="umbrella")
        with pytest.raises(NotFound):
            await d.log(foreign)
        await d.finish(lease)
        with pytest.raises(NotFound):
            await d.log(foreign)

    async def test_a_reader_across_a_restart_resumes_where_it_was(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2, 3)
        first = await d.head(lease, 3)
        await d.crash()
        await d.lose_leases()
        lease = await d.next()
        await d.finish(lease, 4, 5)
        joined = [*first, *await d.log(lease, after=3)]
        check_log(joined)
        assert ids(joined) == [1, 2, 3, 4, 5]

    async def test_a_long_log_is_followed_across_a_restart(self, d: Driver) -> None:
        lease = await d.start()
        for start in range(0, 5000, 100):
            await d.write(lease, *range(start, start + 100))
        await d.crash()
        await d.lose_leases()
        lease = await d.next()
        followed = d.broker.tail("acme", lease.job.id)
        events: list[Event] = [await anext(followed)]
        await d.finish(lease, 5000)
        async with asyncio.timeout(PATIENCE):
            events += [event async for event in followed]
        check_log(events)
        assert ids(events) == list(range(5001))

    async def test_readers_that_leave_early_leave_nothing_behind(self, d: Driver) -> None:
        """A thousand readers come and go, half of them while they wait: no task and no object stays."""
        lease = await d.start()
        await d.write(lease, 1)

        async def visit(after: int) -> None:
            async with closing(d.broker.tail("acme", lease.job.id, after)) as events:
                pending = asyncio.ensure_future(anext(events))
                if after == 0:
                    await pending
                else:
                    await asyncio.sleep(0)
                    pending.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await pending

        for i in range(100):
            await visit(i % 2)
        await asyncio.sleep(BRIEF)
        gc.collect()
        tasks, objects = len(asyncio.all_tasks()), len(gc.get_objects())
        for i in range(1000):
            await visit(i % 2)
        await asyncio.sleep(BRIEF)
        gc.collect()
        assert len(asyncio.all_tasks()) <= tasks
        assert len(gc.get_objects()) < objects + 800
        reader = d.reader(lease)
        await d.finish(lease, 2)
        assert ids(await reader) == [1, 2]


# ---------------------------------------------------------------------------------------------- cancel


class CancelContract(_Contract):
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


# ------------------------------------------------------------------------------- deadlines and leases


class DeadlineContract(_Contract):
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


class LeaseContract(_Contract):
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


# --------------------------------------------------------------------------- retention and restarts


class RetentionContract(_Contract):
    async def test_a_result_is_kept_until_its_time_is_over(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.pass_time(d.policy.result_ttl * 0.9)
        assert ids(await d.log(lease)) == [1]
        await d.pass_time(d.policy.result_ttl * 0.2)
        with pytest.raises(ExpiredResult):
            await d.get(lease)
        with pytest.raises(ExpiredResult):
            await d.log(lease)
        assert await d.jobs() == []

    @pytest.mark.parametrize("how", ["cancelled", "failed", "expired"])
    async def test_retention_applies_however_the_job_ended(self, d: Driver, how: str) -> None:
        job = await d.submit(deadline_at=d.harness.clock.now() + 10)
        if how == "cancelled":
            await d.cancel(job)
        elif how == "failed":
            await d.write(await d.next(), finish=Finish(error=ERROR))
        else:
            await d.pass_time(11)
        assert (await d.get(job)).status == how
        await d.pass_time(d.policy.result_ttl * 1.1)
        with pytest.raises(ExpiredResult):
            await d.get(job)

    async def test_retention_counts_from_the_end(self, d: Driver) -> None:
        """A job that waited for longer than the retention is not dropped with its end."""
        job = await d.submit()
        await d.pass_time(d.policy.result_ttl * 2)
        assert (await d.get(job)).status is Status.QUEUED
        lease = await d.next()
        await d.finish(lease, 1)
        await d.settle()
        assert ids(await d.log(lease)) == [1]

    async def test_an_expired_result_cannot_be_cancelled_or_appended_to(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.pass_time(d.policy.result_ttl * 1.1)
        with pytest.raises(NotFound):
            await d.cancel(lease)
        assert await d.write(lease, 2) is Verdict.LOST
        await d.release(lease)
        assert await d.claim(5) == []

    async def test_an_expired_result_tells_a_foreigner_nothing(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.pass_time(d.policy.result_ttl * 1.1)
        with pytest.raises(NotFound) as caught:
            await d.broker.get("umbrella", lease.job.id)
        assert not isinstance(caught.value, ExpiredResult)

    async def test_the_idempotency_key_is_free_again(self, d: Driver) -> None:
        lease = await d.start(idempotency_key="k", body="one")
        await d.finish(lease, 1)
        await d.pass_time(d.policy.result_ttl * 1.1)
        again = await d.submit(idempotency_key="k", body="two")
        assert again.id != lease.job.id
        assert again.status is Status.QUEUED
        assert (await d.submit(idempotency_key="k", body="two")).id == again.id

    async def test_retention_outlives_a_restart(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.crash()
        await d.pass_time(d.policy.result_ttl * 1.1)
        with pytest.raises(ExpiredResult):
            await d.get(lease)

    @pytest.mark.parametrize("factor", [0.5, 3.0])
    async def test_a_job_may_be_kept_for_a_time_of_its_own(self, d: Driver, factor: float) -> None:
        keep = d.policy.result_ttl * factor
        lease = await d.start(keep=keep, view=b"of its route")
        other = await d.start()
        await d.finish(lease, 1)
        await d.finish(other, 1)
        await d.pass_time(keep * 0.9)
        found = await d.get(lease)
        assert (found.status, found.keep, found.view) == (Status.COMPLETED, keep, b"of its route")
        assert ids(await d.log(lease)) == [1]
        await d.pass_time(keep * 0.2)
        with pytest.raises(ExpiredResult):
            await d.get(lease)
        kept = {job.id for job in await d.jobs()}
        assert kept == ({other.job.id} if factor < 1 else set()), "the others' retention is not touched"

    async def test_the_store_shrinks(self, d: Driver) -> None:
        before = await d.harness.stored_bytes()
        if before is None:
            pytest.skip("this store's size can't be observed")
        for lease in [await d.start() for _ in range(4)]:
            for _ in range(10):
                await d.write(lease, *range(1000))
            await d.finish(lease)
        full = await d.harness.stored_bytes()
        assert full is not None
        await d.pass_time(d.policy.result_ttl * 1.1)
        after = await d.harness.stored_bytes()
        assert after is not None
        assert after - before < (full - before) / 4


class ForgetContract(_Contract):
    @pytest.mark.parametrize("state", ["queued", "delayed", "running", "completed", "cancelled"])
    async def test_it_is_gone_whatever_its_state(self, d: Driver, state: str) -> None:
        job = await d.submit(idempotency_key="k", user="ann")
        if state in ("delayed", "running", "completed"):
            lease = await d.next()
            await d.write(lease, 1, 2)
            if state == "delayed":
                await d.release(lease, retry=ERROR, delay=30)
            elif state == "completed":
                await d.finish(lease, 3)
        elif state == "cancelled":
            await d.cancel(job)
        other = await d.submit(idempotency_key="other")
        await d.broker.forget(job.tenant, job.id)
        for asking in (d.get, d.cancel, d.log):
            with pytest.raises(NotFound):
                await asking(job)
        assert [each.id for each in await d.jobs()] == [other.id]
        assert await d.jobs(user="ann") == []
        await d.pass_time(60)
        assert (await d.next()).job.id == other.id
        assert await d.claim(5) == []
        counts = (await d.broker.stats()).jobs
        assert {status: count for status, count in counts.items() if count} == {Status.RUNNING: 1}

    async def test_its_worker_is_fenced(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        await d.broker.forget("acme", lease.job.id)
        assert await d.write(lease, 2) in (Verdict.LOST, Verdict.CANCELLED)
        await d.release(lease)
        await d.lose_leases()
        assert await d.claim(5) == []

    async def test_a_reader_sees_its_end(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        reader = d.reader(lease)
        await d.head(lease, 1)
        await d.broker.forget("acme", lease.job.id)
        events = await reader
        assert ids(events) == [1]
        assert ended(events).status is Status.CANCELLED

    async def test_its_key_is_free_again(self, d: Driver) -> None:
        job = await d.submit(idempotency_key="k", body="one")
        await d.broker.forget("acme", job.id)
        again = await d.submit(idempotency_key="k", body="two")
        assert again.id != job.id
        await d.broker.forget("acme", job.id)
        assert (await d.submit(idempotency_key="k", body="two")).id == again.id

    async def test_it_is_idempotent_and_nobody_elses(self, d: Driver) -> None:
        job = await d.submit()
        await d.broker.forget("umbrella", job.id)
        await d.broker.forget("acme", new_job_id())
        assert (await d.get(job)).status is Status.QUEUED
        await d.broker.forget("acme", job.id)
        await d.broker.forget("acme", job.id)
        with pytest.raises(NotFound):
            await d.get(job)

    async def test_it_is_durable(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.broker.forget("acme", lease.job.id)
        await d.crash()
        with pytest.raises(NotFound):
            await d.get(lease)
        assert await d.jobs() == []


class RestartContract(_Contract):
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


# ------------------------------------------------------------------------- get, list, arrivals, stats


class QueryContract(_Contract):
    async def test_get_of_an_unknown_or_foreign_job_is_not_found(self, d: Driver) -> None:
        job = await d.submit()
        for tenant, name in (("umbrella", job.id), ("acme", new_job_id()), ("", job.id), ("acme", "")):
            with pytest.raises(NotFound) as caught:
                await d.broker.get(tenant, name)
            assert not isinstance(caught.value, ExpiredResult)

    async def test_get_tells_each_step_of_a_life_in_order(self, d: Driver) -> None:
        async def step(job: Job) -> Job:
            await d.harness.advance(1)
            return await d.get(job)

        job = await d.submit(user="ann", metadata={"k": "v"})
        queued = await step(job)
        lease = await d.next()
        running = await step(job)
        await d.write(lease, 1)
        writing = await step(job)
        await d.finish(lease, 2)
        done = await step(job)
        assert [j.status for j in (queued, running, writing, done)] == ["queued", "running", "running", "completed"]
        assert [j.tokens for j in (queued, running, writing, done)] == [0, 0, 1, 2]
        assert running.first_token_at is None
        assert writing.first_token_at is not None
        assert writing.ended_at is None
        times = [done.created_at, done.started_at, done.first_token_at, done.ended_at]
        assert times == pytest.approx([job.created_at + i for i in range(4)])
        for j in (queued, running, writing, done):
            assert (j.user, j.metadata, j.request) == ("ann", {"k": "v"}, job.request)

    async def test_the_first_token_is_timed_once(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        first = (await d.get(lease)).first_token_at
        await d.lose_leases()
        lease = await d.next()
        await d.write(lease, 2)
        assert (await d.get(lease)).first_token_at == first

    async def test_only_legal_transitions_are_seen(self, d: Driver) -> None:
        """An ended job resists every verb."""
        ends: dict[Status, Lease] = {}
        for status in sorted(TERMINAL):
            lease = ends[status] = await d.start(deadline_at=d.harness.clock.now() + 100)
            await d.write(lease, 1)
            if status is Status.COMPLETED:
                await d.finish(lease)
            elif status is Status.FAILED:
                await d.write(lease, finish=Finish(error=ERROR))
            elif status is Status.CANCELLED:
                await d.cancel(lease)
            else:
                await d.harness.advance(101)
                await d.settle()
        for status, lease in ends.items():
            before = await d.get(lease)
            assert before.status is status
            assert TRANSITIONS[status] == frozenset()
            for append in (d.append(lease), d.append(lease, 2), d.append(lease, finish=Finish(("stop",)))):
                await d.send(append)
            for fields in ({}, {"retry": ERROR}, {"crashed_beside": 1}, {"crashed_beside": 1}):
                await d.release(lease, **fields)
            await d.cancel(lease)
            await d.pass_time(200)
            assert await d.get(lease) == before
            assert ids(await d.log(lease)) == [1]
            check_log(await d.log(lease))
        assert await d.claim(5) == []

    async def test_list_is_newest_first(self, d: Driver) -> None:
        jobs = []
        for _ in range(5):
            jobs.append(await d.submit())
            await d.harness.advance(1)
        assert [job.id for job in await d.jobs()] == [job.id for job in reversed(jobs)]

    async def test_list_shows_jobs_as_get_does(self, d: Driver) -> None:
        lease = await d.start(user="ann", metadata={"k": "v"})
        await d.finish(lease, 1)
        assert await d.jobs() == [await d.get(lease)]

    @total_order
    async def test_list_filters(self, d: Driver) -> None:
        ann = await d.submit(user="ann")
        bob = await d.submit(user="bob", name="big")
        none = await d.submit()
        running = await d.next()
        await d.cancel(none)

        async def found(**filters: Any) -> set[str]:
            return {job.id for job in await d.jobs(**filters)}

        assert running.job.id == ann.id
        assert await found(user="ann") == {ann.id}
        assert await found(user="nobody") == set()
        assert await found(model="big") == {bob.id}
        assert await found(status=(Status.RUNNING,)) == {ann.id}
        assert await found(status=(Status.QUEUED, Status.CANCELLED)) == {bob.id, none.id}
        assert await found(user="bob", model="big", status=(Status.QUEUED,)) == {bob.id}
        assert await found(user="bob", model="m") == set()
        assert await found() == {ann.id, bob.id, none.id}

    async def test_a_list_of_one_idempotency_key(self, d: Driver) -> None:
        keyed = await d.submit(user="ann", idempotency_key="k")
        other = await d.submit(user="ann", idempotency_key="l")
        foreign = await d.submit("umbrella", idempotency_key="k")
        await d.submit(user="ann")

        async def found(tenant: str = "acme", **filters: Any) -> list[str]:
            return [job.id for job in await d.jobs(tenant, idempotency_key="k", **filters)]

        assert await found() == await found(user="ann", model="m", status=(Status.QUEUED,), limit=1) == [keyed.id]
        assert await found("umbrella") == [foreign.id]
        assert [job.id for job in await d.jobs(idempotency_key="l")] == [other.id]
        for filters in ({"user": "bob"}, {"model": "big"}, {"status": (Status.RUNNING,)}):
            assert await found(**filters) == []
        assert await d.jobs(idempotency_key="nobody's") == []
        assert (await d.jobs(idempotency_key="k"))[0].fingerprint == keyed.fingerprint
        await d.broker.forget("acme", keyed.id)
        assert await found() == []

    @pytest.mark.parametrize("ticking", [True, False])
    async def test_pages_have_no_gap_and_no_duplicate_while_jobs_arrive(self, d: Driver, ticking: bool) -> None:
        """Also when all jobs were submitted in the same instant."""
        jobs = []
        for _ in range(11):
            jobs.append((await d.submit()).id)
            await d.harness.advance(1.0 if ticking else 0.0)
        seen: list[str] = []
        cursor: str | None = None
        while True:
            page = await d.broker.list(Query(tenant="acme", limit=3, cursor=cursor))
            assert len(page.jobs) <= 3
            seen += [job.id for job in page.jobs]
            cursor = page.cursor
            if cursor is None:
                break
            await d.submit()
        assert len(seen) == len(set(seen))
        assert set(seen) >= set(jobs)
        if d.harness.total_order:
            assert sorted(seen) == sorted(jobs)
        if ticking:
            assert seen == jobs[::-1]

    async def test_a_page_brings_few_large_jobs(self, d: Driver) -> None:
        """A list of all that a tenant has must not be all of it in memory."""
        jobs = [(await d.submit(request=Request(model="m", prompt="x" * (PAGE_BYTES // 8)))).id for _ in range(20)]
        small = await d.submit()
        seen: list[str] = []
        cursor: str | None = None
        while True:
            page = await d.broker.list(Query(tenant="acme", limit=500, cursor=cursor))
            assert sum(len(job.request.prompt or "") for job in page.jobs) <= PAGE_BYTES * 2
            seen += [job.id for job in page.jobs]
            cursor = page.cursor
            if cursor is None:
                break
        assert len(seen) == len(set(seen)) == 21
        assert set(seen) == {*jobs, small.id}

    async def test_pages_of_a_filtered_list_are_complete(self, d: Driver) -> None:
        mine = []
        for i in range(12):
            job = await d.submit(user="ann" if i % 3 == 0 else "bob")
            if i % 3 == 0:
                mine.append(job.id)
        assert sorted(job.id for job in await d.jobs(user="ann", limit=1)) == sorted(mine)

    async def test_list_and_cursor_stay_within_the_tenant(self, d: Driver) -> None:
        for tenant in ("acme", "umbrella"):
            await d.submit_many(4, tenant)
        page = await d.broker.list(Query(tenant="acme", limit=2))
        assert page.cursor is not None
        foreign = await d.broker.list(Query(tenant="umbrella", limit=50, cursor=page.cursor))
        assert {job.tenant for job in foreign.jobs} <= {"umbrella"}
        assert {job.tenant for job in await d.jobs("acme")} == {"acme"}
        assert await d.jobs("nobody") == []

    @pytest.mark.parametrize("cursor", ["x", "'; drop table jobs; --", "🦆", "AAAA", "-1", "1e999"])
    async def test_a_made_up_cursor_is_an_invalid_request_or_harmless(self, d: Driver, cursor: str) -> None:
        """It comes from a client: it must not become a server error."""
        await d.submit()
        try:
            page = await d.broker.list(Query(tenant="acme", cursor=cursor))
        except InvalidRequest:
            return
        assert len(page.jobs) <= 1

    async def test_a_tampered_cursor_is_an_invalid_request_or_harmless(self, d: Driver) -> None:
        await d.submit_many(3)
        cursor = (await d.broker.list(Query(tenant="acme", limit=1))).cursor
        assert cursor is not None
        for end in ("9" * 30, "5" + "OTk5" * 8, "!", "=", "\x00", cursor):
            for tampered in (cursor + end, cursor[:-1] + end, end + cursor, end):
                with contextlib.suppress(InvalidRequest):
                    page = await d.broker.list(Query(tenant="acme", cursor=tampered))
                    assert {job.tenant for job in page.jobs} <= {"acme"}

    async def test_arrivals_tell_a_users_new_jobs_from_the_call_on(self, d: Driver) -> None:
        await d.submit(user="ann")
        async with closing(d.broker.arrivals("acme", "ann")) as arrivals, asyncio.timeout(PATIENCE):
            jobs = [(await d.submit(user="ann")).id for _ in range(3)]
            assert [await anext(arrivals) for _ in range(3)] == jobs

    async def test_arrivals_tell_nothing_of_others(self, d: Driver) -> None:
        async with closing(d.broker.arrivals("acme", "ann")) as arrivals, asyncio.timeout(PATIENCE):
            first = asyncio.ensure_future(anext(arrivals))
            await asyncio.sleep(0.01)
            await d.submit("acme", user="bob")
            await d.submit("umbrella", user="ann")
            await d.submit("acme")
            await asyncio.sleep(BRIEF)
            assert not first.done()
            job = await d.submit("acme", user="ann")
            assert await first == job.id

    async def test_arrivals_reach_every_listener(self, d: Driver) -> None:
        listeners = [d.broker.arrivals("acme", "ann") for _ in range(3)]
        firsts = [asyncio.ensure_future(anext(listener)) for listener in listeners]
        await asyncio.sleep(0.01)
        job = await d.submit(user="ann")
        async with asyncio.timeout(PATIENCE):
            assert await asyncio.gather(*firsts) == [job.id] * 3
        for listener in listeners:
            async with closing(listener):
                pass

    async def test_a_duplicate_submit_is_no_arrival(self, d: Driver) -> None:
        await d.submit(user="ann", idempotency_key="k")
        async with closing(d.broker.arrivals("acme", "ann")) as arrivals, asyncio.timeout(PATIENCE):
            first = asyncio.ensure_future(anext(arrivals))
            await asyncio.sleep(0.01)
            await d.submit(user="ann", idempotency_key="k")
            job = await d.submit(user="ann")
            assert await first == job.id

    async def test_stats_of_an_empty_broker(self, d: Driver) -> None:
        stats = await d.broker.stats()
        assert stats.queued == 0
        assert sum(stats.jobs.values()) == 0
        assert stats.workers == []
        assert stats.durability

    @total_order
    async def test_stats_count_the_depth_by_model_and_priority(self, d: Driver) -> None:
        await d.submit_many(3, "a")
        await d.submit_many(2, "b", priority=Priority.BATCH)
        await d.submit("b", name="big", priority=Priority.INTERACTIVE)
        await d.claim(1)
        depth = {key: count for key, count in (await d.broker.stats()).depth.items() if count}
        assert sum(depth.values()) == 5
        assert depth == {("m", Priority.NORMAL): 2, ("m", Priority.BATCH): 2, ("big", Priority.INTERACTIVE): 1}

    async def test_stats_count_jobs_by_status(self, d: Driver) -> None:
        expiring = await d.submit(deadline_at=d.harness.clock.now() + 1)
        await d.pass_time(2)
        assert (await d.get(expiring)).status is Status.EXPIRED
        await d.finish(await d.start(), 1)
        await d.write(await d.start(), finish=Finish(error=ERROR))
        await d.cancel(await d.start())
        await d.start()
        await d.submit()
        await d.submit()
        counts = {status: count for status, count in (await d.broker.stats()).jobs.items() if count}
        assert counts == {
            Status.QUEUED: 2,
            Status.RUNNING: 1,
            Status.COMPLETED: 1,
            Status.FAILED: 1,
            Status.CANCELLED: 1,
            Status.EXPIRED: 1,
        }
        await d.crash()
        again = {status: count for status, count in (await d.broker.stats()).jobs.items() if count}
        assert sum(again.values()) == 7
        assert {status: again[status] for status in TERMINAL} == {status: counts[status] for status in TERMINAL}

    async def test_stats_tell_the_workers_and_what_they_serve(self, d: Driver) -> None:
        await d.claim(1, worker="w1", models=["m"], slots=8)
        await d.claim(1, worker="w2", models=["m", "big"])
        workers = {worker.id: worker for worker in (await d.broker.stats()).workers}
        assert set(workers) == {"w1", "w2"}
        assert {info.name for info in workers["w2"].models} == {"m", "big"}
        assert workers["w2"].models[0].context_length == 4096
        assert (workers["w1"].state, workers["w1"].slots) == ("ready", 8)

    async def test_stats_tell_a_draining_worker(self, d: Driver) -> None:
        await d.claim(1, worker="w1")
        leaving = WorkerInfo(id="w1", models=(model(),), slots=8, state="draining", seen_at=d.harness.clock.now())
        await d.broker.claim(leaving, [], 0, 0.0)
        assert [worker.state for worker in (await d.broker.stats()).workers] == ["draining"]

    async def test_stats_tell_the_drain_rate(self, d: Driver) -> None:
        assert (await d.broker.stats()).drain_rate == 0
        for _ in range(6):
            await d.finish(await d.start(), 1)
        assert 6 / 60 < (await d.broker.stats()).drain_rate <= 6 / 5, "by the seconds in which they ended"
        await d.pass_time(300)
        assert (await d.broker.stats()).drain_rate == 0


# ------------------------------------------------------------------------------------------- the model


@dataclass
class ModelJob:
    """What the ports say of one job, written plainly."""

    job: Job
    order: int
    status: Status = Status.QUEUED
    attempt: int = 0
    log: list[tuple[int, int]] = field(default_factory=list)  # (token id, attempt) by position
    lease_until: float = 0.0
    not_before: float = 0.0
    ended_at: float = 0.0
    error: str | None = None
    retries: int = 0
    suspects: int = 0
    crashes: int = 0
    lonely_deaths: int = 0
    dropped: bool = False
    forgotten: bool = False
    leases: list[Lease] = field(default_factory=list)
    sent: list[Append] = field(default_factory=list)

    def end(self, status: Status, now: float, error: str | None = None) -> None:
        self.status, self.ended_at, self.error = status, now, error


TENANTS = ("acme", "umbrella")

# No sum of steps meets a limit exactly, so that "at" and "after" a limit need not be told apart.
STEPS = (1.1, 2.3, 6.1, 70.9)
MACHINE_POLICY = QueuePolicy(lease_ttl=5.05, result_ttl=60.55, max_attempts=2, max_queued=9, max_queued_per_tenant=6)
DEADLINE = 7.77
DELAY = 3.33
RELEASES = ("drain", "retry", "delayed", "alone", "pair", "group")
STORY = (
    *("submit", "submit", "claim", "claim", "write", "write", "write", "write", "finish", "overlap", "repeat", "stale"),
    *("release", "release", "tail", "tick", "tick", "lose", "age"),
)


class BrokerMachine(RuleBasedStateMachine):
    """Drives a broker and a plain model of it side by side; any difference is a failure.

    The model does not say which tenant is next (that is tested by `FairnessContract`), only what may be handed out.
    """

    make_harness: Callable[[], BrokerHarness]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.harness = type(self).make_harness()
        self.jobs: dict[str, ModelJob] = {}
        self.keys: dict[tuple[str, str], str] = {}
        self.touched: set[str] = set()
        self.token = 0

    def run(self, action: Coroutine[Any, Any, T]) -> T:
        async def patient() -> T:
            async with asyncio.timeout(PATIENCE):
                return await action

        return self.runner.run(patient())

    @initialize(classes=st.lists(st.sampled_from(list(Priority)), min_size=2, max_size=5))
    def begin(self, classes: list[Priority]) -> None:
        """Some jobs to begin with: hypothesis switches whole rules off at times, and a queue must be there even so."""
        self.d = self.run(Driver.open(self.harness, **msgspec.structs.asdict(MACHINE_POLICY)))
        for i, priority in enumerate(classes):
            self.submit(TENANTS[i % 2], None, "x", priority, 3, "m")

    def teardown(self) -> None:
        try:
            if hasattr(self, "d"):
                for known in self.jobs.values():
                    self.run(self.audit(known))
        finally:
            try:
                self.runner.run(self.harness.close())
            finally:
                self.runner.close()

    @property
    def now(self) -> float:
        return self.harness.clock.now()

    # ---- choosing

    def pick(self, data: st.DataObject, jobs: Iterable[ModelJob]) -> ModelJob:
        # The list is in order of submission, so that an example shrinks and replays (ids are random).
        return data.draw(st.sampled_from(sorted(jobs, key=lambda known: known.order)).map(_Quiet)).value

    def with_status(self, *statuses: Status) -> list[ModelJob]:
        return [known for known in self.jobs.values() if known.status in statuses and not known.dropped]

    def leased(self) -> list[ModelJob]:
        return [known for known in self.jobs.values() if known.leases]

    def claimable(self, names: Collection[str]) -> list[ModelJob]:
        return [
            known
            for known in self.queued()
            if known.job.request.model in names and known.not_before <= self.now and not self.overdue(known)
        ]

    def queued(self, tenant: str | None = None) -> list[ModelJob]:
        return [known for known in self.with_status(Status.QUEUED) if tenant in (None, known.job.tenant)]

    # ---- rules

    @rule(
        tenant=st.sampled_from(TENANTS),
        key=st.sampled_from([None, None, "k1", "k2"]),
        body=st.sampled_from(["x", "x", "y"]),
        priority=st.sampled_from(list(Priority)),
        mortal=st.integers(0, 3),
        name=st.sampled_from(["m", "m", "big"]),
    )
    def submit(self, tenant: str, key: str | None, body: str, priority: Priority, mortal: int, name: str) -> None:
        job = self.d.job(
            tenant,
            name=name,
            body=body,
            idempotency_key=key,
            priority=priority,
            deadline_at=self.now + DEADLINE if mortal == 0 else None,
        )
        first = None if key is None else self.keys.get((tenant, key))
        if first is not None:
            if self.jobs[first].job.fingerprint == job.fingerprint:
                again = self.run(self.d.broker.submit(job))
                assert again.id == first
            else:
                with pytest.raises(IdempotencyMismatch):
                    self.run(self.d.broker.submit(job))
            self.touched.add(first)
        elif (
            len(self.queued()) >= MACHINE_POLICY.max_queued
            or len(self.queued(tenant)) >= MACHINE_POLICY.max_queued_per_tenant
        ):
            with pytest.raises(Overloaded):
                self.run(self.d.broker.submit(job))
        else:
            assert self.run(self.d.broker.submit(job)).id == job.id
            self.jobs[job.id] = ModelJob(job, len(self.jobs))
            self.touched.add(job.id)
            if key is not None:
                self.keys[tenant, key] = job.id

    def working(self) -> list[ModelJob]:
        """The running jobs; claimed, or even submitted first, where there are none."""
        if not self.with_status(Status.RUNNING):
            if not self.claimable(("m", "big")):
                self.submit(TENANTS[self.token % 2], None, "x", Priority.NORMAL, 3, "m")
            self.claim(20, ("m", "big"))
        return self.with_status(Status.RUNNING)

    @rule(limit=st.integers(1, 3), names=st.sampled_from([("m",), ("m", "big"), ("big",)]))
    def claim(self, limit: int, names: tuple[str, ...]) -> None:
        ready = self.claimable(names)
        leases = self.run(self.d.claim(limit, models=names))
        assert len(leases) == min(limit, len(ready)), "claimed too few or too many"
        classes = sorted(known.job.priority for known in ready)
        assert sorted(lease.job.priority for lease in leases) == classes[: len(leases)], "priorities are not strict"
        for lease in leases:
            known = self.jobs[lease.job.id]
            assert known in ready, f"claimed a job that is {known.status}"
            ready.remove(known)
            known.status = Status.RUNNING
            known.attempt += 1
            known.lease_until = self.now + MACHINE_POLICY.lease_ttl
            known.leases.append(lease)
            assert lease.attempt == known.attempt
            assert list(lease.ids) == [token for token, _ in known.log]
            assert lease.job.suspects == known.suspects
            self.touched.add(lease.job.id)

    @rule(data=st.data(), count=st.integers(0, 4), end=st.sampled_from([None, None, None, None, "stop", "error"]))
    def append(self, data: st.DataObject, count: int, end: str | None) -> None:
        """What a healthy worker does: tokens or a heartbeat, sometimes the end."""
        known = self.pick(data, self.working())
        self.write(known, count, len(known.log) + 1, end)

    @precondition(lambda self: any(known.log for known in self.with_status(Status.RUNNING)))
    @rule(data=st.data(), count=st.integers(0, 3), end=st.sampled_from([None, None, "stop"]))
    def overlapping_append(self, data: st.DataObject, count: int, end: str | None) -> None:
        """An append that begins within the log: only what lies beyond the head is new."""
        known = self.pick(data, [known for known in self.with_status(Status.RUNNING) if known.log])
        back = data.draw(st.integers(1, len(known.log)))
        self.write(known, back + count, len(known.log) + 1 - back, end)

    def write(self, known: ModelJob, count: int, at: int, end: str | None) -> None:
        tokens = list(range(self.token + 1, self.token + 1 + count))
        self.token += count
        finish = {None: None, "stop": Finish(("stop",)), "error": Finish(error=ERROR)}[end]
        append = self.d.append(known.leases[-1], *tokens, at=at, finish=finish)
        assert self.run(self.d.send(append)) is Verdict.OK
        known.log += [(token, known.attempt) for token in tokens[len(known.log) + 1 - at :]]
        known.sent.append(append)
        known.lease_until = self.now + MACHINE_POLICY.lease_ttl
        if end == "stop":
            known.end(Status.COMPLETED, self.now)
        elif end == "error":
            known.end(Status.FAILED, self.now, ERROR.code)
        self.touched.add(known.job.id)

    @precondition(lambda self: any(known.sent for known in self.jobs.values()))
    @rule(data=st.data())
    def repeated_append(self, data: st.DataObject) -> None:
        """Any append that was ever sent, once more: nothing is written twice."""
        known = self.pick(data, [known for known in self.jobs.values() if known.sent])
        append = known.sent[data.draw(st.integers(0, len(known.sent) - 1))]
        verdict = self.run(self.d.send(append))
        assert verdict in self.allowed(known, append.lease.attempt, new=False), verdict
        self.renew(known, append.lease.attempt)

    @precondition(lambda self: self.leased())
    @rule(data=st.data(), count=st.integers(0, 2), end=st.booleans())
    def stale_append(self, data: st.DataObject, count: int, end: bool) -> None:
        """A worker that was fenced, or whose job has ended, goes on writing."""
        known = self.pick(data, self.leased())
        lease = known.leases[data.draw(st.integers(0, len(known.leases) - 1))]
        if known.status is Status.RUNNING and lease.attempt == known.attempt:
            return
        append = self.d.append(
            lease, *range(-count, 0), at=len(known.log) + 1, finish=Finish(("stop",)) if end else None
        )
        assert self.run(self.d.send(append)) in self.allowed(known, lease.attempt, new=count > 0)
        self.touched.add(known.job.id)

    @precondition(lambda self: self.with_status(Status.RUNNING))
    @rule(data=st.data(), hole=st.integers(1, 3), end=st.booleans())
    def append_with_a_gap(self, data: st.DataObject, hole: int, end: bool) -> None:
        known = self.pick(data, self.with_status(Status.RUNNING))
        append = self.d.append(
            known.leases[-1], -1, at=len(known.log) + 1 + hole, finish=Finish(("stop",)) if end else None
        )
        try:
            verdict = self.run(self.d.send(append))
        except (PenstockError, ValueError):
            verdict = Verdict.LOST
        assert verdict is Verdict.LOST
        self.touched.add(known.job.id)
        # Whether the lease was renewed by it is left open: renew it now in any case.
        self.write(known, 0, len(known.log) + 1, None)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), foreign=st.booleans())
    def cancel(self, data: st.DataObject, foreign: bool) -> None:
        known = self.pick(data, self.jobs.values())
        if foreign or known.dropped:
            tenant = "stranger" if foreign else known.job.tenant
            with pytest.raises(NotFound):
                self.run(self.d.broker.cancel(tenant, known.job.id))
        else:
            answer = self.run(self.d.cancel(known.job))
            if not known.status.terminal:
                known.end(Status.CANCELLED, self.now, "cancelled")
            assert answer.status is known.status
        self.touched.add(known.job.id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        known = self.pick(data, self.jobs.values())
        self.run(self.d.broker.forget(known.job.tenant, known.job.id))
        if not known.dropped:
            if not known.status.terminal:
                known.end(Status.CANCELLED, self.now, "cancelled")
            known.dropped = known.forgotten = True
            self.keys = {key: job for key, job in self.keys.items() if job != known.job.id}
        self.touched.add(known.job.id)

    @rule(data=st.data(), how=st.sampled_from(RELEASES))
    def release(self, data: st.DataObject, how: str) -> None:
        """Mostly a lease that is held, sometimes an older one."""
        known = self.pick(data, self.working())
        lease = known.leases[-1 if data.draw(st.integers(0, 3)) or len(known.leases) < 2 else -2]
        fields: dict[str, dict[str, Any]] = {
            "drain": {},
            "retry": {"retry": ERROR},
            "delayed": {"retry": ERROR, "delay": DELAY},
            "alone": {"crashed_beside": 1},
            "pair": {"crashed_beside": 2},
            "group": {"crashed_beside": 8},
        }
        self.run(self.d.release(lease, **fields[how]))
        self.touched.add(known.job.id)
        if known.status is not Status.RUNNING or lease.attempt != known.attempt:
            return
        known.status = Status.QUEUED
        if how in {"retry", "delayed"}:
            if known.retries == MACHINE_POLICY.max_attempts:
                known.end(Status.FAILED, self.now, ERROR.code)
                return
            known.retries += 1
            known.not_before = self.now + (DELAY if how == "delayed" else 0.0)
        elif how != "drain":
            known.crashes += 1
            known.lonely_deaths += how == "alone"
            poisoned = known.lonely_deaths == 2
            if known.lonely_deaths == 1 and how == "alone" and known.crashes > 1:
                # Whether deaths in a group count towards the second one is another test's question.
                poisoned = self.run(self.d.get(known.job)).status is Status.FAILED
            if poisoned:
                known.end(Status.FAILED, self.now, "poisoned")
            else:
                known.suspects = {"alone": 1, "pair": 1, "group": 4}[how]

    @rule(seconds=st.sampled_from([*STEPS, *STEPS, *STEPS[:2], *STEPS[:2]]))
    def time_passes(self, seconds: float) -> None:
        self.run(self.d.pass_time(seconds))
        self.let_time_act()

    @rule()
    def crash(self) -> None:
        """kill -9 and a restart; then long enough for every lease of the time before to be over."""
        self.run(self.d.crash())
        self.run(self.d.pass_time(6.1))
        for known in self.with_status(Status.RUNNING):
            known.lease_until = 0.0
        self.let_time_act()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def tail(self, data: st.DataObject) -> None:
        """Read from a random position: to the end if there is one, else up to the head."""
        known = self.pick(data, self.jobs.values())
        after = data.draw(st.integers(0, len(known.log) + 3))
        self.run(self.check_tail(known, after))

    @rule(data=st.data(), actions=st.lists(st.sampled_from(STORY), min_size=4, max_size=12))
    def story(self, data: st.DataObject, actions: list[str]) -> None:
        """Several steps at once, the common ones more often: so that many jobs get a long history."""
        for action in actions:
            if action == "submit":
                self.submit(data.draw(st.sampled_from(TENANTS)), None, "x", Priority.NORMAL, 3, "m")
            elif action == "claim":
                self.claim(data.draw(st.integers(1, 4)), ("m", "big"))
            elif action == "write":
                self.append(data, data.draw(st.integers(1, 3)), None)
            elif action == "finish":
                self.append(data, 1, "stop")
            elif action == "overlap" and any(known.log for known in self.with_status(Status.RUNNING)):
                self.overlapping_append(data, 1, None)
            elif action == "repeat" and any(known.sent for known in self.jobs.values()):
                self.repeated_append(data)
            elif action == "stale" and self.leased():
                self.stale_append(data, 1, False)
            elif action == "release":
                self.release(data, data.draw(st.sampled_from(RELEASES)))
            elif action == "tail":
                self.tail(data)
            elif action == "tick":
                self.time_passes(data.draw(st.sampled_from(STEPS[:2])))
            elif action == "lose":
                self.time_passes(STEPS[2])
            elif action == "age":
                self.time_passes(STEPS[3])
            self.what_was_touched_is_equal()

    # ---- the model's side

    def overdue(self, known: ModelJob) -> bool:
        return known.job.deadline_at is not None and known.job.deadline_at <= self.now

    def let_time_act(self) -> None:
        for known in self.jobs.values():
            if known.dropped:
                continue
            if known.status.terminal:
                if known.ended_at + MACHINE_POLICY.result_ttl <= self.now:
                    known.dropped = True
                    self.keys = {key: job for key, job in self.keys.items() if job != known.job.id}
            elif self.overdue(known):
                known.end(Status.EXPIRED, self.now, "expired")
            elif known.status is Status.RUNNING and known.lease_until <= self.now:
                known.status = Status.QUEUED
            self.touched.add(known.job.id)

    def allowed(self, known: ModelJob, attempt: int, *, new: bool) -> set[Verdict]:
        """Which verdicts an append under *attempt* may get; *new*: it has tokens that the log has not."""
        if known.dropped:
            return {Verdict.LOST}
        if known.status is Status.CANCELLED:
            return {Verdict.CANCELLED} if attempt == known.attempt else {Verdict.CANCELLED, Verdict.LOST}
        if known.status is Status.EXPIRED:
            return {Verdict.EXPIRED} if attempt == known.attempt else {Verdict.EXPIRED, Verdict.LOST}
        if attempt < known.attempt or known.status is Status.QUEUED:
            return {Verdict.LOST}
        if known.status is Status.RUNNING:
            return {Verdict.OK}
        return {Verdict.LOST} if new else {Verdict.LOST, Verdict.OK}

    def renew(self, known: ModelJob, attempt: int) -> None:
        if known.status is Status.RUNNING and attempt == known.attempt:
            known.lease_until = self.now + MACHINE_POLICY.lease_ttl
        self.touched.add(known.job.id)

    # ---- comparing

    @invariant()
    def what_was_touched_is_equal(self) -> None:
        for name in sorted(self.touched, key=lambda name: self.jobs[name].order):
            self.run(self.audit(self.jobs[name]))
        self.touched.clear()

    async def audit(self, known: ModelJob) -> None:
        tenant, name = known.job.tenant, known.job.id
        with pytest.raises(NotFound):
            await self.d.broker.get("stranger", name)
        if known.dropped:
            with pytest.raises(NotFound) as gone:
                await self.d.broker.get(tenant, name)
            assert isinstance(gone.value, ExpiredResult) == (not known.forgotten)
            return
        job = await self.d.broker.get(tenant, name)
        assert (job.status, job.attempt, job.tokens) == (known.status, known.attempt, len(known.log))
        if not known.status.terminal:
            assert (job.retries, job.suspects) == (known.retries, known.suspects)
        assert (job.error.code if job.error else None) == known.error
        assert (job.queue_position is not None) == (known.status is Status.QUEUED) or known.not_before > self.now
        await self.check_tail(known, 0)

    async def check_tail(self, known: ModelJob, after: int) -> None:
        head = len(known.log)
        if known.dropped:
            with pytest.raises(NotFound):
                await self.d.log(known.job, after)
            return
        if after > head + (1 if known.status.terminal else 0):
            with pytest.raises(LogRewound):
                await self.d.log(known.job, after)
            return
        if known.status.terminal:
            events = await self.d.log(known.job, after)
        elif after < head:
            events = await self.d.head(known.job, head, after)
        else:
            return
        complete = known.status.terminal and after <= head
        tokens = check_log(events, after=after, complete=complete)
        assert [(token.id, token.attempt) for token in tokens] == known.log[after:]
        if complete:
            end = ended(events)
            assert (end.status, end.position, end.attempt) == (known.status, head + 1, known.attempt)
            assert end.usage.completion_tokens == head
            assert (end.error.code if end.error else None) == known.error


class _Quiet:
    """A drawn job whose printed form is short and does not depend on random ids."""

    def __init__(self, value: ModelJob) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"job {self.value.order}"


def machine_settings() -> settings:
    """Seconds and the same examples each time in the normal run; minutes and new examples with the profile ``long``."""
    profile = os.environ.get("PENSTOCK_HYPOTHESIS_PROFILE", "normal")
    sizes = {"normal": (60, 25), "long": (4000, 40)}
    if profile not in sizes:
        raise ValueError(f"PENSTOCK_HYPOTHESIS_PROFILE is {profile!r}; known are {', '.join(sizes)}")
    examples, steps = sizes[profile]
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=profile == "normal",
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


class ModelContract(_Contract):
    @pytest.mark.timeout(7200)
    def test_the_broker_does_what_the_model_does(self, make_harness: Callable[[], BrokerHarness]) -> None:
        if not make_harness().total_order:
            pytest.skip("this store is split into parts")
        machine = type("Machine", (BrokerMachine,), {"make_harness": staticmethod(make_harness)})
        run_state_machine_as_test(machine, settings=machine_settings())


class BrokerContract(
    SubmitContract,
    ClaimContract,
    ReserveContract,
    FairnessContract,
    AppendContract,
    TailContract,
    CancelContract,
    DeadlineContract,
    LeaseContract,
    RetentionContract,
    ForgetContract,
    RestartContract,
    QueryContract,
    ModelContract,
):
    """Everything. Override the fixture ``make_harness``."""
