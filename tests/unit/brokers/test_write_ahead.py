"""Write ahead: nothing is acknowledged, delivered or leased before its COMMIT; if that fails, nothing is left of it."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.errors import BrokerUnavailable, NotFound
from penstock.core.events import Ended, Event, Phase, Tokens
from penstock.core.job import Job, Request, Status, Usage, fingerprint, new_job_id
from penstock.core.ports import Append, Finish, Lease, Query, Verdict, WorkerInfo
from penstock.testing.oracle import check_log

WORKER = WorkerInfo(id="w", slots=8)


class Disk:
    """Stands between the store and its writer connection: COMMIT can be made to wait, or to fail."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._open = threading.Event()
        self._open.set()
        self.waiting = threading.Event()
        self.broken = False

    def hold(self) -> None:
        self.waiting.clear()
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    def execute(self, statement: str, *arguments: Any) -> Any:
        if statement == "COMMIT":
            self.waiting.set()
            self._open.wait(60)
            if self.broken:
                raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(statement, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(tmp_path)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
def disk(broker: EmbeddedBroker) -> Iterator[Disk]:
    disk = Disk(broker._store._writer)
    broker._store._writer = disk  # type: ignore[assignment]
    yield disk
    disk.broken = False
    disk.let_go()


def job(key: str | None = None, user: str = "u") -> Job:
    request = Request(model="m", prompt="hello")
    return Job(
        id=new_job_id(), tenant="t", user=user, request=request, idempotency_key=key, fingerprint=fingerprint(request)
    )


def tokens(lease: Lease, position: int, count: int, finish: Finish | None = None) -> Append:
    ids = list(range(position, position + count))
    return Append(lease.key, position, ids, [f"{n} " for n in ids], finish=finish)


class Reader:
    """Follows a job in a task of its own."""

    def __init__(self, broker: EmbeddedBroker, job: str) -> None:
        self.events: list[Event] = []
        self.task = asyncio.create_task(self._read(broker, job))

    async def _read(self, broker: EmbeddedBroker, job: str) -> None:
        async for event in broker.tail("t", job):
            self.events.append(event)


async def held(disk: Disk) -> None:
    """Until the store has run into the commit that waits; then give every task its chance."""
    assert await asyncio.to_thread(disk.waiting.wait, 60)
    for _ in range(50):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_submit_is_not_acknowledged_before_its_commit(broker: EmbeddedBroker, disk: Disk) -> None:
    heard: list[str] = []

    async def listen() -> None:
        async for arrived in broker.arrivals("t", "u"):
            heard.append(arrived)

    listening = asyncio.create_task(listen())
    claiming = asyncio.create_task(broker.claim(WORKER, ["m"], 1, 60))
    await asyncio.sleep(0.05)  # both are waiting now
    disk.hold()
    mine = job("key")
    submitting = asyncio.create_task(broker.submit(mine))
    await held(disk)
    assert not submitting.done()
    assert not claiming.done(), "leased before it was stored"
    assert heard == []
    with pytest.raises(NotFound):
        await broker.get("t", mine.id)
    assert (await broker.list(Query(tenant="t"))).jobs == []
    disk.let_go()
    assert (await submitting).id == mine.id
    assert [lease.job.id for lease in await claiming] == [mine.id]
    assert (await broker.get("t", mine.id)).status is Status.RUNNING
    await until(lambda: heard)
    assert heard == [mine.id]
    listening.cancel()


async def test_no_reader_sees_a_token_before_its_commit(broker: EmbeddedBroker, disk: Disk) -> None:
    mine = await broker.submit(job())
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    reader = Reader(broker, mine.id)
    disk.hold()
    appending = asyncio.create_task(broker.append([tokens(lease, 1, 3)]))
    await held(disk)
    late = Reader(broker, mine.id)
    for _ in range(50):
        await asyncio.sleep(0)
    assert reader.events == []
    assert late.events == []
    assert not appending.done(), "the worker may not go on as if it were stored"
    assert (await broker.get("t", mine.id)).tokens == 0
    disk.let_go()
    assert await appending == {mine.id: Verdict.OK}
    await until(lambda: reader.events and late.events)
    assert [event.ids for event in reader.events if isinstance(event, Tokens)] == [[1, 2, 3]]
    for each in (reader, late):
        each.task.cancel()


async def test_no_reader_sees_an_end_before_its_commit(broker: EmbeddedBroker, disk: Disk) -> None:
    mine = await broker.submit(job())
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    reader = Reader(broker, mine.id)
    disk.hold()
    appending = asyncio.create_task(broker.append([tokens(lease, 1, 1, Finish(("stop",)))]))
    await held(disk)
    assert reader.events == []
    assert (await broker.get("t", mine.id)).status is Status.RUNNING
    disk.let_go()
    await appending
    await reader.task
    check_log(reader.events)


async def test_a_cancellation_is_not_told_before_its_commit(broker: EmbeddedBroker, disk: Disk) -> None:
    mine = await broker.submit(job())
    reader = Reader(broker, mine.id)
    disk.hold()
    cancelling = asyncio.create_task(broker.cancel("t", mine.id))
    await held(disk)
    assert reader.events == []
    assert not cancelling.done()
    disk.let_go()
    assert (await cancelling).status is Status.CANCELLED
    await reader.task
    assert isinstance(reader.events[-1], Ended)


async def test_a_submit_whose_commit_fails_leaves_nothing(broker: EmbeddedBroker, disk: Disk) -> None:
    disk.broken = True
    mine = job("key")
    with pytest.raises(BrokerUnavailable, match="full"):
        await broker.submit(mine)
    with pytest.raises(NotFound):
        await broker.get("t", mine.id)
    assert (await broker.stats()).queued == 0
    assert sum((await broker.stats()).jobs.values()) == 0
    disk.broken = False
    # The same request again, as a client would: now it is stored, once.
    again = await broker.submit(mine)
    assert [each.id for each in (await broker.list(Query(tenant="t"))).jobs] == [again.id]
    assert len(await broker.claim(WORKER, ["m"], 5, 0)) == 1


async def test_one_failed_commit_among_many_submits_acknowledges_none_of_them(
    broker: EmbeddedBroker, disk: Disk
) -> None:
    disk.broken = True
    results = await asyncio.gather(*(broker.submit(job()) for _ in range(20)), return_exceptions=True)
    assert {type(result) for result in results} == {BrokerUnavailable}
    disk.broken = False
    assert (await broker.list(Query(tenant="t"))).jobs == []


async def test_an_append_whose_commit_fails_can_be_sent_again(broker: EmbeddedBroker, disk: Disk) -> None:
    mine = await broker.submit(job())
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    reader = Reader(broker, mine.id)
    await broker.append([tokens(lease, 1, 2)])
    disk.broken = True
    for _ in range(3):
        with pytest.raises(BrokerUnavailable):
            await broker.append([tokens(lease, 3, 4, Finish(("length",)))])
    for _ in range(50):
        await asyncio.sleep(0)
    assert sum(len(event.ids) for event in reader.events if isinstance(event, Tokens)) == 2
    assert (await broker.get("t", mine.id)).status is Status.RUNNING
    disk.broken = False
    assert await broker.append([tokens(lease, 3, 4, Finish(("length",)))]) == {mine.id: Verdict.OK}
    await reader.task
    assert len(check_log(reader.events)) == 6
    ended = await broker.get("t", mine.id)
    assert ended.tokens == 6
    assert ended.status is Status.COMPLETED


async def test_what_appends_counted_is_forgotten_if_their_commit_fails(broker: EmbeddedBroker, disk: Disk) -> None:
    mine = await broker.submit(job())
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    thought = [Phase.REASONING] * 2
    first = Append(
        lease.key, 1, [1, 2], ["", "a"], phases=thought, reasoning_tokens=2, prompt_tokens=9, cached_tokens=4
    )
    second = Append(lease.key, 3, [3, 4], ["b", "c"], phases=thought, reasoning_tokens=4)
    disk.broken = True
    with pytest.raises(BrokerUnavailable):
        await broker.append([first, second])
    disk.broken = False
    assert await broker.append([msgspec.structs.replace(first, prompt_tokens=8, cached_tokens=3)]) == {
        mine.id: Verdict.OK
    }
    assert (await broker.get("t", mine.id)).usage == Usage(8, 2, 2, 3)
    await broker.cancel("t", mine.id)
    *_, ended = [event async for event in broker.tail("t", mine.id)]
    assert isinstance(ended, Ended)
    assert ended.usage == Usage(8, 2, 2, 3)


async def test_a_claim_whose_commit_fails_leases_nothing(broker: EmbeddedBroker, disk: Disk) -> None:
    mine = await broker.submit(job())
    disk.broken = True
    with pytest.raises(BrokerUnavailable):
        await broker.claim(WORKER, ["m"], 1, 0)
    disk.broken = False
    assert (await broker.get("t", mine.id)).attempt == 0
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    assert lease.attempt == 1
    assert await broker.append([tokens(lease, 1, 1)]) == {mine.id: Verdict.OK}


async def test_a_waiting_claim_survives_a_failed_commit(broker: EmbeddedBroker, disk: Disk) -> None:
    """The submit that would have served it failed: it goes on waiting, and gets the next one."""
    claiming = asyncio.create_task(broker.claim(WORKER, ["m"], 1, 60))
    await asyncio.sleep(0.05)
    disk.broken = True
    with pytest.raises(BrokerUnavailable):
        await broker.submit(job())
    disk.broken = False
    assert not claiming.done()
    mine = await broker.submit(job())
    assert [lease.job.id for lease in await claiming] == [mine.id]


async def test_the_books_stay_right_over_failed_commits(broker: EmbeddedBroker, disk: Disk) -> None:
    """Counters in memory mirror the store: after failures they still agree with it."""
    kept = [await broker.submit(job()) for _ in range(3)]
    disk.broken = True
    for attempt in (broker.submit(job()), broker.cancel("t", kept[0].id), broker.claim(WORKER, ["m"], 3, 0)):
        with pytest.raises(BrokerUnavailable):
            await attempt
    disk.broken = False
    stats = await broker.stats()
    assert stats.jobs[Status.QUEUED] == stats.queued == 3
    assert stats.jobs[Status.RUNNING] == stats.jobs[Status.CANCELLED] == 0
    for lease in await broker.claim(WORKER, ["m"], 9, 0):
        await broker.append([tokens(lease, 1, 1, Finish(("stop",)))])
    stats = await broker.stats()
    assert stats.jobs[Status.COMPLETED] == 3
    assert stats.queued == 0
