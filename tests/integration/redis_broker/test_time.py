"""Clocks that jump, and the time that leases are measured by."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from penstock.core.job import Status
from penstock.testing.clock import ManualClock
from tests.support.redis import RedisServer
from tests.support.redis_broker import (
    PATIENCE,
    STOP,
    OpenBroker,
    claim,
    job,
    store,
    tokens,
)
from tests.support.redis_store import problems


class TestTime:
    @pytest.mark.parametrize("how", ["stop", "kill"])
    async def test_an_outage_expires_no_live_lease(self, make_redis: Any, connect: OpenBroker, how: str) -> None:
        server = make_redis()
        policy = {"lease_ttl": 0.6}
        worker, sweeper = await connect(server.url, policy=policy), await connect(server.url, policy=policy)
        await worker.submit(job())
        [lease] = await claim(worker)
        if how == "stop":
            server.signal(signal.SIGSTOP)
            await asyncio.sleep(1.8)
            server.signal(signal.SIGCONT)
        else:
            await asyncio.to_thread(server.restart, 1.8)
        for _ in range(2):
            await sweeper.sweep()
        assert (await worker.append([tokens(lease, 1)])) == {lease.job.id: "ok"}
        assert (await worker.stats()).leases_lost == 0

    async def test_a_dead_worker_is_noticed_where_redis_was_never_away(
        self, shared: RedisServer, connect: OpenBroker
    ) -> None:
        broker = await connect(shared.url, policy={"lease_ttl": 0.6})
        await broker.submit(job())
        [lease] = await claim(broker)
        async with asyncio.timeout(PATIENCE):
            while (await broker.stats()).leases_lost == 0:
                await broker.sweep()
                await asyncio.sleep(0.1)
        assert [again.attempt for again in await claim(broker)] == [lease.attempt + 1]

    @pytest.mark.parametrize("step", [3600.0, -3600.0])
    async def test_a_clock_that_is_set_expires_nothing_but_deadlines(
        self, shared: RedisServer, connect: OpenBroker, step: float
    ) -> None:
        clock = ManualClock()
        broker = await connect(shared.url, clock=clock, policy={"result_ttl": 7200.0})
        ended = await broker.submit(job())
        [lease] = await claim(broker)
        await broker.append([tokens(lease, 1, finish=STOP)])
        held, due = await broker.submit(job()), await broker.submit(job(deadline_at=clock.now() + 60))
        [lease, _] = await claim(broker, 2)
        later = [await broker.submit(job()) for _ in range(2)]
        clock.advance(step)
        later += [await broker.submit(job()) for _ in range(2)]
        await broker.sweep()
        assert (await broker.get("acme", ended.id)).status is Status.COMPLETED
        assert (await broker.get("acme", due.id)).status is (Status.EXPIRED if step > 0 else Status.RUNNING)
        assert (await broker.append([tokens(lease, 1)]))[held.id] == "ok"
        # First in, first out, whatever the clock says.
        assert [lease.job.id for lease in await claim(broker, 4)] == [each.id for each in later]
        assert problems(await store(shared, broker)) == []
