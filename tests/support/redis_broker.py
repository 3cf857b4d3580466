"""What tests of the Redis broker on real servers share: jobs, workers and readers of theirs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from penstock.brokers.redis import RedisBroker
from penstock.core.errors import (
    BrokerUnavailable,
    PenstockError,
)
from penstock.core.events import Event
from penstock.core.job import Job, Request, Status, new_job_id
from penstock.core.ports import Append, Finish, Lease, Verdict, WorkerInfo
from penstock.testing.oracle import check_log, check_views, tokens_of
from tests.support.redis import RedisServer
from tests.support.redis_store import dump

PATIENCE = 20.0
WORKER = WorkerInfo(id="w")
STOP = Finish(("stop",))
OpenBroker = Callable[..., Awaitable[RedisBroker]]


def job(tenant: str = "acme", **fields: Any) -> Job:
    return Job(id=new_job_id(), tenant=tenant, request=Request(model="m", prompt_ids=(1, 2)), **fields)


def tokens(lease: Lease, position: int, count: int = 1, text: str = "t", **fields: Any) -> Append:
    """Tokens whose ids tell their positions, whoever writes them."""
    return Append(lease.key, position, list(range(position, position + count)), [text] * count, **fields)


async def claim(broker: RedisBroker, limit: int = 1, wait: float = PATIENCE) -> list[Lease]:
    return await broker.claim(WORKER, ["m"], limit, wait)


class Reader:
    """Follows one job in the background."""

    def __init__(self, broker: RedisBroker, job: Job, after: int = 0) -> None:
        self.events: list[Event] = []
        self.failure: PenstockError | None = None
        self._seen = asyncio.Event()
        self.task = asyncio.create_task(self._read(broker, job, after))

    async def _read(self, broker: RedisBroker, job: Job, after: int) -> None:
        events = broker.tail(job.tenant, job.id, after)
        try:
            async for event in events:
                self.events.append(event)
                self._seen.set()
        except PenstockError as error:
            self.failure = error
        finally:
            await events.aclose()  # type: ignore[attr-defined]
            self._seen.set()

    @property
    def last(self) -> int:
        return max((token.position for token in tokens_of(self.events)), default=0)

    async def until(self, position: int) -> None:
        """It has seen the token at *position* (or has ended)."""
        async with asyncio.timeout(PATIENCE):
            while self.last < position and not self.task.done():
                self._seen.clear()
                await self._seen.wait()

    async def end(self) -> list[Event]:
        async with asyncio.timeout(PATIENCE):
            await self.task
        return self.events

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.01)


async def store(server: RedisServer, broker: RedisBroker) -> dict[bytes, Any]:
    with contextlib.closing(server.client()) as client:
        return dump(client, broker._shards[0].base.decode())


class Workload:
    """Jobs that are submitted, generated token by token and read, all at once, until all have ended."""

    def __init__(self, gateway: RedisBroker, workers: list[RedisBroker], jobs: int = 12, length: int = 12) -> None:
        self.gateway = gateway
        self.workers = workers
        self.length = length
        self.jobs = [job(f"t{number % 3}") for number in range(jobs)]
        self.readers: list[Reader] = []
        self.written = 0

    async def _insist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await call()
            except BrokerUnavailable:
                await asyncio.sleep(0.05)

    async def run(self, fault: Callable[[Workload], Coroutine[Any, Any, None]]) -> None:
        async with asyncio.timeout(PATIENCE):
            working = [asyncio.create_task(self._work(worker)) for worker in self.workers]
            sweeping = asyncio.create_task(self._sweep())
            failing = asyncio.create_task(fault(self))
            try:
                for each in self.jobs:
                    await self._insist(lambda each=each: self.gateway.submit(each))
                    self.readers.append(Reader(self.gateway, each))
                await failing
                for reader in self.readers:
                    await reader.task
            finally:
                for task in (*working, sweeping, failing):
                    task.cancel()
                await asyncio.gather(*working, sweeping, failing, return_exceptions=True)

    async def _sweep(self) -> None:
        while True:
            await self._insist(self.gateway.sweep)
            await asyncio.sleep(0.1)

    async def _work(self, broker: RedisBroker) -> None:
        running: dict[str, tuple[Lease, int]] = {}
        while True:
            free = 4 - len(running)
            if free:
                wait = 0.0 if running else 0.2
                for lease in await self._insist(lambda free=free, wait=wait: claim(broker, free, wait)):
                    running[lease.job.id] = (lease, len(lease.ids) + 1)
            batch = [
                tokens(lease, position, finish=STOP if position >= self.length else None)
                for lease, position in running.values()
            ]
            verdicts = await self._insist(lambda batch=batch: broker.append(batch)) if batch else {}
            self.written += len(batch)
            for append in batch:
                name = append.lease.job
                if verdicts[name] is not Verdict.OK or append.finish:
                    del running[name]
                else:
                    running[name] = (running[name][0], append.position + 1)
            await asyncio.sleep(0.01)

    async def check(self) -> None:
        """Everything that was acknowledged is there once, and every reader saw it."""
        for each, reader in zip(self.jobs, self.readers, strict=True):
            assert reader.failure is None, reader.failure
            log = [event async for event in self.gateway.tail(each.tenant, each.id)]
            assert [token.id for token in check_log(log)] == list(range(1, self.length + 1))
            check_log(reader.events)
            check_views([log, reader.events])
            assert (await self.gateway.get(each.tenant, each.id)).status is Status.COMPLETED
        assert (await self.gateway.stats()).jobs[Status.COMPLETED] == len(self.jobs)


class Ledger:
    """A server whose append-only file can be cut back to an earlier moment, as a crash in the tier ``fast`` would."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self._size = 0

    @property
    def _file(self) -> Path:
        [file] = (self.server.folder / "appendonlydir").glob("*.incr.aof")
        return file

    def mark(self) -> None:
        """What is written now survives."""
        self._size = self._file.stat().st_size

    async def lose(self) -> None:
        """kill -9, everything since `mark` is gone, up again."""

        def cut() -> None:
            self.server.kill9()
            with self._file.open("r+b") as file:
                file.truncate(self._size)
            self.server.start()

        await asyncio.to_thread(cut)
