"""Tail: a reader replays, follows, resumes and ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter

import msgspec
import pytest

from penstock.core.errors import LogRewound, NotFound
from penstock.core.events import Event, Logprob, Tokens
from penstock.core.job import Request, Sampling, Status
from penstock.core.ports import Finish
from penstock.testing.broker.driver import BRIEF, ERROR, PATIENCE, Contract, Driver, closing, ended, ids, soon
from penstock.testing.broker.harness import BrokerHarness
from penstock.testing.oracle import check_log, check_views


class TailContract(Contract):
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
