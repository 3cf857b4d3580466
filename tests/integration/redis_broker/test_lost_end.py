"""Tier ``fast``: what becomes of readers and writers when Redis has lost its last seconds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.core.errors import (
    LogRewound,
    NotFound,
)
from penstock.core.job import Status
from penstock.core.ports import Append, Lease, Release
from penstock.testing.oracle import check_log
from tests.support.redis_broker import (
    PATIENCE,
    STOP,
    Ledger,
    OpenBroker,
    Reader,
    claim,
    eventually,
    job,
    tokens,
)


class TestALostEnd:
    """Tier ``fast``: Redis may lose its last seconds. No reader is ever given a mixture, and no zombie writes."""

    async def test_a_reader_that_had_seen_more_is_told(self, ledger: Ledger, connect: OpenBroker) -> None:
        broker = await connect(ledger.server.url, durability="fast")
        queued = await broker.submit(job())
        reader = Reader(broker, queued)
        [lease] = await claim(broker)
        await broker.append([tokens(lease, 1, 5)])
        await reader.until(5)
        ledger.mark()
        await broker.append([tokens(lease, 6, 5)])
        await reader.until(10)
        await ledger.lose()
        check_log(await reader.end(), complete=False)
        assert isinstance(reader.failure, LogRewound)
        with pytest.raises(LogRewound):
            await anext(aiter(broker.tail("acme", queued.id, 10)))

    async def test_even_if_the_log_has_grown_past_it_meanwhile(
        self, ledger: Ledger, connect: OpenBroker, proxies: Any
    ) -> None:
        """The gateway is away until the job was claimed anew and its log is longer than what the gateway has."""
        gate = await proxies(ledger.server)
        policy = {"lease_ttl": 0.5}
        gateway = await connect(gate.url, durability="fast", policy=policy)
        worker = await connect(ledger.server.url, durability="fast", policy=policy)
        queued = await gateway.submit(job())
        seen_more, seen_less = Reader(gateway, queued), Reader(gateway, await gateway.submit(job()))
        first, second = await claim(worker, 2)
        await worker.append([tokens(first, 1, 5), tokens(second, 1, 5)])
        await seen_more.until(5)
        await seen_less.until(5)
        ledger.mark()
        await worker.append([tokens(first, 6, 5)])
        await seen_more.until(10)
        await gate.refuse()
        gate.drop()
        await ledger.lose()
        async with asyncio.timeout(PATIENCE):
            leases: list[Lease] = []
            while len(leases) < 2:
                await worker.sweep()
                leases += await claim(worker, 2, 0.1)
        again = {lease.job.id: lease for lease in leases}
        assert all(lease.attempt > 1000 and lease.ids == [1, 2, 3, 4, 5] for lease in leases)
        for lease in leases:
            await worker.append([Append(lease.key, 6, [99] * 20, ["other"] * 20)])
        await gate.accept()
        await seen_more.end()
        assert isinstance(seen_more.failure, LogRewound)
        assert [token.id for token in check_log(seen_more.events, complete=False)] == list(range(1, 11))
        # Who had seen nothing of what was lost simply goes on.
        await worker.append([tokens(again[second.job.id], 26, finish=STOP)])
        assert [token.id for token in check_log(await seen_less.end())] == [1, 2, 3, 4, 5, *[99] * 20, 26]

    async def test_attempts_never_repeat(self, ledger: Ledger, connect: OpenBroker) -> None:
        broker = await connect(ledger.server.url, durability="fast", policy={"lease_ttl": 0.5})
        await broker.submit(job())
        [first] = await claim(broker)
        ledger.mark()
        await broker.release([Release(first.key)])
        [forgotten] = await claim(broker)
        assert forgotten.attempt == 2
        await ledger.lose()
        async with asyncio.timeout(PATIENCE):
            while not (leases := await claim(broker, 1, 0.1)):
                await broker.sweep()
        [lease] = leases
        assert lease.attempt > forgotten.attempt
        for zombie in (first, forgotten):
            assert (await broker.append([tokens(zombie, 1)])) == {zombie.job.id: "lost"}
        assert (await broker.append([tokens(lease, 1, finish=STOP)])) == {lease.job.id: "ok"}

    async def test_a_lost_submit_is_unknown(self, ledger: Ledger, connect: OpenBroker) -> None:
        broker = await connect(ledger.server.url, durability="fast")
        kept = await broker.submit(job())
        ledger.mark()
        lost = await broker.submit(job())
        reader = Reader(broker, lost)
        await asyncio.sleep(0.1)
        await ledger.lose()
        await reader.end()
        assert isinstance(reader.failure, NotFound)
        with pytest.raises(NotFound):
            await broker.get("acme", lost.id)
        assert (await broker.get("acme", kept.id)).status is Status.QUEUED

    @pytest.mark.parametrize("when", ["queued", "running", "requeued"])
    async def test_where_nothing_was_lost_nobody_is_told_so(
        self, ledger: Ledger, connect: OpenBroker, when: str
    ) -> None:
        broker = await connect(ledger.server.url, durability="fast")
        queued = await broker.submit(job())
        readers = [Reader(broker, queued), Reader(broker, queued)]
        if when != "queued":
            [lease] = await claim(broker)
            await broker.append([tokens(lease, 1, 3)])
            await readers[0].until(3)
        await asyncio.to_thread(ledger.server.restart)
        await eventually(lambda: broker._shards[0].commands.up.is_set() and broker._shards[0].subscriber.up.is_set())
        position = 1 if when == "queued" else 4
        if when == "requeued":
            await broker.release([Release(lease.key)])
        if when != "running":
            [lease] = await claim(broker)
        await asyncio.sleep(1.2)  # the look that follows a restart is over; the next one comes within a second
        for number in range(12):
            await broker.append([tokens(lease, position + number)])
            await asyncio.sleep(0.1)
        await broker.append([tokens(lease, position + 12, finish=STOP)])
        for reader in readers:
            check_log(await reader.end())
            assert reader.failure is None
