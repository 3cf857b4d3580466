"""What processes tell each other: tokens, ends, wake-ups, arrivals. And what is left when they close."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
from typing import Any

import pytest

from penstock.core.errors import (
    BrokerUnavailable,
    LogRewound,
)
from penstock.core.events import Tokens
from penstock.core.job import Status
from penstock.core.ports import Release, WorkerInfo
from penstock.testing.oracle import check_log
from tests.support.redis import RedisServer
from tests.support.redis_broker import (
    PATIENCE,
    STOP,
    WORKER,
    Ledger,
    OpenBroker,
    Reader,
    claim,
    eventually,
    job,
    store,
    tokens,
)
from tests.support.redis_store import problems


class TestNews:
    async def test_one_message_a_step_and_process(self, shared: RedisServer, connect: OpenBroker) -> None:
        worker, *gateways = [await connect(shared.url) for _ in range(3)]
        jobs = [await worker.submit(job()) for _ in range(4)]
        leases = await claim(worker, 4)
        readers = [Reader(gateway, each) for gateway in gateways for each in jobs for _ in range(3)]
        await worker.append([tokens(lease, 1) for lease in leases])
        for reader in readers:
            await reader.until(1)
        with contextlib.closing(shared.client()) as client:
            client.config_resetstat()
            for position in range(2, 12):
                await worker.append([tokens(lease, position) for lease in leases])
            for reader in readers:
                await reader.until(11)
            assert client.info("commandstats")["cmdstat_spublish"]["calls"] == 10 * len(gateways)
            # Who has left is not written to any more.
            for reader in readers:
                await reader.leave()
            names = [f"{worker._shards[0].base.decode()}job:{each.id}" for each in jobs]
            await eventually(lambda: not any(client.hget(name, "rs") for name in names))
            client.config_resetstat()
            await worker.append([tokens(lease, 12) for lease in leases])
            assert "cmdstat_spublish" not in client.info("commandstats")

    async def test_a_process_that_died_is_forgotten(self, shared: RedisServer, connect: OpenBroker) -> None:
        worker, gateway = await connect(shared.url), await connect(shared.url)
        queued = await worker.submit(job())
        reader = Reader(gateway, queued)
        [lease] = await claim(worker)
        await worker.append([tokens(lease, 1)])
        await reader.until(1)
        await gateway.close()
        with contextlib.closing(shared.client()) as client:
            for position in itertools.count(2):  # Redis sees a closed connection when it comes to it
                await worker.append([tokens(lease, position)])
                if not client.hget(f"{worker._shards[0].base.decode()}job:{queued.id}", "rs"):
                    break
                assert position < 1000
                await asyncio.sleep(0.01)
        await reader.leave()

    async def test_messages_that_were_lost_are_repaired(self, shared: RedisServer, connect: OpenBroker) -> None:
        """The registration is gone, as after a message of an older self that came late: the next look puts it right."""
        worker, gateway = await connect(shared.url), await connect(shared.url)
        queued = await worker.submit(job())
        reader = Reader(gateway, queued)
        [lease] = await claim(worker)
        await worker.append([tokens(lease, 1)])
        await reader.until(1)
        with contextlib.closing(shared.client()) as client:
            for position in range(2, 5):
                client.hdel(f"{worker._shards[0].base.decode()}job:{queued.id}", "rs")
                await worker.append([tokens(lease, position)])
                await reader.until(position)
            client.hdel(f"{worker._shards[0].base.decode()}job:{queued.id}", "rs")
        await worker.append([tokens(lease, 5, finish=STOP)])
        check_log(await reader.end())

    async def test_a_subscriber_that_redis_kicks_out_loses_nothing(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis(client_output_buffer_limit="pubsub 1024 0 0")
        worker, gateway = await connect(server.url), await connect(server.url)
        queued = await worker.submit(job())
        reader = Reader(gateway, queued)
        [lease] = await claim(worker)
        for position in range(1, 5):
            await worker.append([tokens(lease, position, text="x" * 100_000)])
            await reader.until(position)
        await worker.append([tokens(lease, 5, finish=STOP)])
        check_log(await reader.end())

    async def test_a_waiting_claim_is_woken(self, shared: RedisServer, connect: OpenBroker, monkeypatch: Any) -> None:
        """Not by its poll: that one comes too late here."""
        monkeypatch.setattr("penstock.brokers.redis.claims.CLAIM_POLL", 2 * PATIENCE)
        worker, gateway = await connect(shared.url), await connect(shared.url)
        async with asyncio.timeout(PATIENCE):
            for _ in range(3):
                waiting = asyncio.create_task(claim(worker, 1, 2 * PATIENCE))
                await asyncio.sleep(0.1)
                queued = await gateway.submit(job())
                [lease] = await waiting
                assert lease.job.id == queued.id
            # A wake-up for a claimant that has gone is passed on to the next.
            gone, waiting = [
                asyncio.create_task(worker.claim(WorkerInfo(id=name), ["m"], 1, 2 * PATIENCE)) for name in ("a", "b")
            ]
            await asyncio.sleep(0.1)
            gone.cancel()
            await asyncio.wait([gone])
            queued = await gateway.submit(job())
            assert [lease.job.id for lease in await waiting] == [queued.id]

    async def test_a_second_reader_beside_one_that_was_told_of_a_lost_end(
        self, ledger: Ledger, connect: OpenBroker
    ) -> None:
        """The first one does not take it in (a slow client): the second must not hear of what it was never given."""
        broker = await connect(ledger.server.url, durability="fast")
        queued = await broker.submit(job())
        [lease] = await claim(broker)
        ledger.mark()
        await broker.append([tokens(lease, 1, 5)])
        slow = broker.tail("acme", queued.id)
        assert isinstance(await anext(slow), Tokens)
        await ledger.lose()
        await eventually(lambda: broker._shards[0].commands.up.is_set())
        await asyncio.sleep(1.2)
        fresh = Reader(broker, queued)
        await asyncio.sleep(0.1)
        assert fresh.failure is None
        await fresh.leave()
        with pytest.raises(LogRewound):
            await anext(slow)


class TestClosing:
    async def test_no_task_and_no_connection_is_left(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        with contextlib.closing(server.client()) as client:
            before, connections = asyncio.all_tasks(), len(client.client_list())
            broker = await connect(server.url)
            queued = await broker.submit(job(user="u"))
            arrivals = broker.arrivals("acme", "u")
            reader = Reader(broker, queued)
            waiting = asyncio.create_task(broker.claim(WORKER, ["other"], 1, PATIENCE))
            await asyncio.sleep(0.1)
            waiting.cancel()
            await reader.leave()
            await asyncio.wait([waiting])
            await arrivals.aclose()  # type: ignore[attr-defined]
            await broker.close()
            await eventually(lambda: asyncio.all_tasks() == before)
            await eventually(lambda: len(client.client_list()) == connections)

    async def test_at_the_moment_when_the_connection_breaks(self, shared: RedisServer, connect: OpenBroker) -> None:
        """A cancellation may meet a failure in a task group, or a write in asyncio.wait_for, and be lost there."""
        pick = random.Random(3)
        with contextlib.closing(shared.client()) as client:
            for number in range(40):
                broker = await connect(shared.url)
                client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
                if number % 2:
                    client.execute_command("CLIENT KILL TYPE pubsub")
                await asyncio.sleep(pick.uniform(0, 0.06) if number % 3 else 0)
                async with asyncio.timeout(5):
                    await broker.close()

    async def test_whoever_waits_is_answered_at_once(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        broker = await connect(server.url)
        server.signal(signal.SIGSTOP)
        calls = [asyncio.create_task(broker.submit(job())) for _ in range(20)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(PATIENCE / 2):
            await broker.close()
            done = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(each, BrokerUnavailable) for each in done)

    async def test_a_claim_that_was_cancelled_leaves_no_lease(self, shared: RedisServer, connect: OpenBroker) -> None:
        """As a worker does that is told to stop: the claim is cancelled, the broker closed, at any moment."""
        gateway, pick = await connect(shared.url), random.Random(1)
        for _ in range(25):
            worker = await connect(shared.url)
            waiting = asyncio.create_task(claim(worker))
            await asyncio.sleep(0.01)
            submitting = asyncio.create_task(gateway.submit(job()))
            await asyncio.sleep(pick.uniform(0, 0.002))
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gateway.release([Release(lease.key) for lease in await waiting])
            await worker.close()
            queued = await submitting
            assert (await gateway.get("acme", queued.id)).status is Status.QUEUED
            await gateway.cancel("acme", queued.id)
        assert (await gateway.stats()).leases_lost == 0

    async def test_a_claim_that_was_cancelled_while_redis_is_away(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        broker = await connect(server.url, timeout=0.3)
        await broker.submit(job())
        server.signal(signal.SIGSTOP)
        waiting = asyncio.create_task(claim(broker))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.sleep(0.4)
        server.signal(signal.SIGCONT)
        assert problems(await store(server, broker)) == []

    async def test_a_submit_that_was_cancelled_is_all_or_nothing(
        self, shared: RedisServer, connect: OpenBroker
    ) -> None:
        broker = await connect(shared.url)
        for number in range(20):
            submitting = asyncio.create_task(broker.submit(job()))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            submitting.cancel()
            await asyncio.wait([submitting])
        await broker.stats()
        assert problems(await store(shared, broker)) == []
