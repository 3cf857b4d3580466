"""The tools of `penstock.core.aio`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from penstock.core.aio import Backoff, TaskSet, first_done, merge, run_until, wait_for_event


async def forever(ended: list[str] | None = None) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)  # an end takes its time
        if ended is not None:
            ended.append("ended")


async def soon(result: str = "result") -> str:
    await asyncio.sleep(0)
    return result


async def fails() -> None:
    await asyncio.sleep(0)
    raise LookupError("no")


class TestBackoff:
    def test_pauses_double_up_to_the_longest(self) -> None:
        backoff = Backoff(0.5, 3.0, jitter=0)
        assert [backoff.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
        backoff.reset()
        assert backoff.next() == 0.5
        assert [backoff.after(failures) for failures in (1, 3, 10_000)] == [0.5, 2.0, 3.0]

    def test_full_jitter_reaches_all_of_a_pause(self) -> None:
        pauses = [Backoff(8.0, 8.0).next() for _ in range(300)]
        assert 0 <= min(pauses) < 1 < 7 < max(pauses) <= 8

    def test_half_a_jitter_leaves_half_a_pause(self) -> None:
        pauses = [Backoff(8.0, 8.0, jitter=0.5).next() for _ in range(300)]
        assert 4 <= min(pauses) < 5 < 7 < max(pauses) <= 8


class TestFirstDone:
    async def test_the_others_have_ended(self) -> None:
        ended: list[str] = []
        slow, quick = await first_done(forever(ended), soon())
        assert (slow.cancelled(), quick.result(), ended) == (True, "result", ["ended"])

    async def test_all_that_are_done_at_once_count(self) -> None:
        assert [task.result() for task in await first_done(soon("a"), soon("b"))] == ["a", "b"]

    async def test_a_failure_is_left_in_its_task(self) -> None:
        failed, other = await first_done(fails(), forever())
        assert isinstance(failed.exception(), LookupError)
        assert other.cancelled()

    async def test_nothing_is_left_behind_by_who_is_cancelled(self) -> None:
        ended: list[str] = []
        task = asyncio.create_task(first_done(forever(ended), forever(ended)))
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["ended", "ended"]


class TestRunUntil:
    async def test_work_that_is_done_first(self) -> None:
        event = asyncio.Event()
        assert await run_until(event, soon())
        with pytest.raises(LookupError):
            await run_until(event, fails())

    async def test_an_event_breaks_it_off(self) -> None:
        event, ended = asyncio.Event(), list[str]()
        asyncio.get_running_loop().call_later(0.001, event.set)
        assert not await run_until(event, forever(ended))
        assert ended == ["ended"]

    async def test_work_that_was_cancelled_by_itself_was_not_broken_off(self) -> None:
        async def gives_up() -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await run_until(asyncio.Event(), gives_up())


async def test_an_event_is_waited_for_so_long() -> None:
    event = asyncio.Event()
    assert not await wait_for_event(event, 0.001)
    asyncio.get_running_loop().call_later(0.001, event.set)
    assert await wait_for_event(event, 60)
    assert await wait_for_event(event, 0), "it is set already"


class TestTaskSet:
    async def test_tasks_leave_it_as_they_end(self) -> None:
        tasks = TaskSet()
        task = tasks.spawn(soon(), name="its name")
        assert (len(tasks), task.get_name()) == (1, "its name")
        assert await task == "result"
        assert len(tasks) == 0

    async def test_closed_all_have_ended(self) -> None:
        tasks, ended = TaskSet(), list[str]()

        async def leaves_another() -> None:
            try:
                await forever()
            finally:
                tasks.spawn(forever(ended))

        tasks.spawn(forever(ended))
        tasks.spawn(leaves_another())
        await asyncio.sleep(0.001)
        await tasks.aclose()
        assert len(tasks) == 0
        assert ended[:1] == ["ended"]
        await tasks.aclose()  # once more is nothing

    async def test_joined_those_have_ended_that_others_begin(self) -> None:
        tasks, ended = TaskSet(), list[str]()

        async def last() -> None:
            await asyncio.sleep(0.001)
            ended.append("last")

        tasks.spawn(soon()).add_done_callback(lambda _: tasks.spawn(last()))
        await tasks.join(10)
        assert (ended, len(tasks)) == (["last"], 0)

    async def test_joined_for_a_while_what_goes_on_goes_on(self) -> None:
        tasks = TaskSet()
        task = tasks.spawn(forever())
        await tasks.join(0.001)
        assert not task.done()
        await tasks.aclose()

    async def test_failures_are_told(self) -> None:
        failures: list[BaseException] = []
        tasks = TaskSet(failures.append)
        task = tasks.spawn(fails())
        tasks.spawn(forever())
        await asyncio.wait([task])
        await tasks.aclose()
        assert [str(failure) for failure in failures] == ["no"], "to be cancelled is no failure"


class TestMerge:
    async def test_everything_comes(self) -> None:
        async def count(to: int) -> AsyncGenerator[int]:
            for number in range(to):
                yield number

        assert sorted([item async for item in merge([count(3), count(2), count(0)])]) == [0, 0, 1, 1, 2]

    async def test_the_first_failure_is_all_streams(self) -> None:
        closed: list[str] = []

        async def endless() -> AsyncGenerator[int]:
            try:
                while True:
                    yield 1
                    await asyncio.sleep(0)
            finally:
                closed.append("closed")

        async def broken() -> AsyncGenerator[int]:
            yield 0
            await fails()

        with pytest.raises(LookupError):
            async for _ in merge([endless(), broken()]):
                pass
        assert closed == ["closed"]
