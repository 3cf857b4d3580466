"""Clocks that are set while jobs run, and clocks that disagree: durations stay what has passed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core import ports
from penstock.core.job import Job, Request, Sampling, new_job_id
from penstock.core.ports import Append, Finish, SystemClock, WorkerInfo, elapsed
from penstock.gateway.dialects.native.answers import timings
from penstock.observability.jobs import JobRecord, JobWatch
from penstock.observability.telemetry import Publisher
from penstock.testing.clock import ManualClock
from tests.support.telemetry import Recorder

HOUR = 3600.0


class Machine:
    """Its two clocks: one that is set, one that is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = 1_700_000_000.0
        self.steady = 5.0
        monkeypatch.setattr(ports.time, "time", lambda: self.wall)
        monkeypatch.setattr(ports, "_steady", lambda: self.steady)

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


class TestSystemClock:
    @given(
        st.lists(st.tuples(st.floats(0, 1e5), st.sampled_from([0, 0, 0, -HOUR, HOUR, 1e8, -1e8, 0.01])), max_size=30)
    )
    def test_what_lies_between_two_times_is_what_has_passed(self, moves: Sequence[tuple[float, float]]) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            machine = Machine(monkeypatch)
            clock = SystemClock()
            before = clock.now()
            for passed, step in moves:
                machine.wall += step
                machine.passes(passed)
                now = clock.now()
                # A microsecond: what a float can tell of seconds since the epoch.
                assert passed * (1 - ports.SLEW) - 1e-6 <= now - before <= passed * (1 + ports.SLEW) + 1e-6
                before = now

    @pytest.mark.parametrize("step", [-HOUR, HOUR, -0.5, 86_400.0])
    def test_it_comes_back_to_the_wall_clock(self, monkeypatch: pytest.MonkeyPatch, step: float) -> None:
        machine = Machine(monkeypatch)
        clock = SystemClock()
        machine.wall += step
        for _ in range(20):
            machine.passes(abs(step))
            clock.now()
        assert clock.now() == pytest.approx(machine.wall, abs=1e-3)

    def test_it_is_the_wall_clock_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = Machine(monkeypatch)
        clock = SystemClock()
        for _ in range(1000):
            machine.passes(0.3)
            assert clock.now() == pytest.approx(machine.wall, abs=1e-6)


async def life(store: ManualClock, ours: ManualClock, folder: Path, step: float) -> tuple[Job, JobRecord]:
    """A job that waits 2 s, begins to write after 5 s more, and ends 3 s later; the store's clock is set by *step* in
    between. How the store tells it, and how who ran it does."""
    told = Recorder()
    store_broker = EmbeddedBroker(folder, clock=store)
    await store_broker.open()
    broker = JobWatch(store_broker, Publisher(told), ours).broker

    def passes(seconds: float) -> None:
        store.advance(seconds)
        ours.advance(seconds)

    request = Request(model="m", prompt="x", sampling=Sampling(max_tokens=9))
    job = await broker.submit(Job(id=new_job_id(), tenant="t", request=request))
    passes(2)
    (lease,) = await broker.claim(WorkerInfo(id="w", slots=1), ["m"], 1, 0)
    passes(5)
    await broker.append([Append(lease.key, 1, [1], ["a"])])
    passes(1)
    store.advance(step)
    passes(2)
    await broker.append([Append(lease.key, 2, [2], ["b"], finish=Finish(("stop",)))])
    stored = await broker.get("t", job.id)
    await store_broker.close()
    (facts,) = told.happened("job.ended")
    return stored, JobRecord.of(facts)


class TestTwoClocks:
    @pytest.mark.parametrize("step", [0, -HOUR], ids=["steady", "set back"])
    @pytest.mark.parametrize("apart", [0, HOUR, -HOUR, 0.4])
    async def test_a_record_tells_what_has_passed(self, tmp_path: Path, apart: float, step: float) -> None:
        """The store has a clock of its own (over Redis); a worker measures what it sees by one that is not set."""
        start = 1_700_000_000.0
        _, record = await life(ManualClock(start), ManualClock(start + apart), tmp_path, step)
        assert record.queue_wait == pytest.approx(2)
        assert record.time_to_first_token == pytest.approx(7)
        assert record.processing_time == pytest.approx(8)
        assert record.total_time == pytest.approx(10)
        assert record.time_per_token == pytest.approx(3)

    @pytest.mark.parametrize("step", [-1.0, -HOUR, -1e6])
    async def test_what_is_stored_is_told_without_negative_durations(self, tmp_path: Path, step: float) -> None:
        """As after a restart with the clock set back, or another Redis server's clock."""
        job, _ = await life(ManualClock(), ManualClock(), tmp_path, step)
        assert all(value is None or value >= 0 for value in msgspec.structs.astuple(timings(job)))

    @given(st.floats(0, 2e9), st.floats(0, 2e9))
    def test_nothing_takes_less_than_no_time(self, one: float, other: float) -> None:
        assert elapsed(one, other) == max(0.0, other - one)
