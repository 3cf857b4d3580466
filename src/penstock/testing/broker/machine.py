"""A hypothesis machine that compares the broker with a simple model of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

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

from penstock.core.errors import ExpiredResult, IdempotencyMismatch, LogRewound, NotFound, Overloaded, PenstockError
from penstock.core.events import Phase, count_reasoning
from penstock.core.job import Job, Priority, Status
from penstock.core.ports import Append, Finish, Lease, QueuePolicy, Verdict
from penstock.testing.broker.driver import ERROR, PATIENCE, Contract, Driver, ended
from penstock.testing.broker.harness import BrokerHarness
from penstock.testing.oracle import check_log

T = TypeVar("T")


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


def phase_at(token: int) -> Phase:
    """Of every eight tokens three are thoughts."""
    return Phase.REASONING if 3 <= token % 8 <= 5 else Phase.TEXT


def thoughts(log: Iterable[tuple[int, int]]) -> int:
    return count_reasoning(phase_at(token) for token, _ in log)


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
            phases = lease.phases if lease.phases is not None else [Phase.TEXT] * len(lease.ids)
            assert phases == [phase_at(token) for token in lease.ids]
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
        fresh = [(token, known.attempt) for token in tokens[len(known.log) + 1 - at :]]
        append = self.d.append(
            known.leases[-1],
            *tokens,
            at=at,
            finish=finish,
            phases=[phase_at(token) for token in tokens] if any(phase_at(token) for token in tokens) else None,
            reasoning_tokens=thoughts([*known.log, *fresh]),
        )
        assert self.run(self.d.send(append)) is Verdict.OK
        known.log += fresh
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
        assert job.reasoning_tokens == thoughts(known.log)
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
        assert [token.phase for token in tokens] == [phase_at(token) for token, _ in known.log[after:]]
        if complete:
            end = ended(events)
            assert (end.status, end.position, end.attempt) == (known.status, head + 1, known.attempt)
            assert end.usage.completion_tokens == head
            assert end.usage.reasoning_tokens == thoughts(known.log)
            assert (end.error.code if end.error else None) == known.error


class _Quiet:
    """A drawn job whose printed form is short and does not depend on random ids."""

    def __init__(self, value: ModelJob) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"job {self.value.order}"


def machine_settings() -> settings:
    """Half as many examples as Hypothesis's profile asks for: one is a whole life of a broker."""
    return settings(
        max_examples=max(1, settings().max_examples // 2),
        stateful_step_count=25,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


class ModelContract(Contract):
    @pytest.mark.hypothesis
    @pytest.mark.timeout(7200)
    def test_the_broker_does_what_the_model_does(self, make_harness: Callable[[], BrokerHarness]) -> None:
        if not make_harness().total_order:
            pytest.skip("this store is split into parts")
        machine = type("Machine", (BrokerMachine,), {"make_harness": staticmethod(make_harness)})
        run_state_machine_as_test(machine, settings=machine_settings())
