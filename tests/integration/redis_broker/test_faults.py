"""Connections that break, replies that are lost, servers that go away: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from typing import Any

import pytest

from penstock.brokers.redis import connection
from penstock.core.errors import (
    BrokerUnavailable,
)
from penstock.core.job import Status
from penstock.core.ports import Release
from penstock.testing.oracle import check_log
from tests.support.proxy import Words
from tests.support.redis import RedisServer
from tests.support.redis_broker import (
    PATIENCE,
    STOP,
    OpenBroker,
    Reader,
    Workload,
    claim,
    eventually,
    job,
    store,
    tokens,
)
from tests.support.redis_store import problems


class TestLostReplies:
    async def test_what_was_done_once_is_not_done_twice(
        self, shared: RedisServer, proxies: Any, connect: OpenBroker
    ) -> None:
        """Replies are lost all the time, leases never: so each job runs exactly once, under its first attempt."""
        pick, lost = random.Random(5), 0
        gates = [await proxies(shared) for _ in range(3)]
        policy = {"lease_ttl": 60.0}
        gateway, *workers = [await connect(gate.url, policy=policy) for gate in gates]

        async def lose(workload: Workload) -> None:
            nonlocal lost
            while not (workload.readers and all(reader.task.done() for reader in workload.readers)):
                gate = pick.choice(gates)
                losing = gate.lose_reply(lambda words: words[0] == b"EVALSHA")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await losing
                        lost += 1

        workload = Workload(gateway, workers, jobs=15, length=40)
        await workload.run(lose)
        await workload.check()
        assert lost > 5
        for each in workload.jobs:
            assert (await gateway.get(each.tenant, each.id)).attempt == 1
        assert (await gateway.stats()).leases_lost == 0
        assert problems(await store(shared, gateway)) == []

    @pytest.mark.parametrize("verb", ["submit", "claim", "append", "release", "cancel"])
    async def test_the_answer_is_that_of_the_first_time(
        self, shared: RedisServer, proxies: Any, connect: OpenBroker, verb: str
    ) -> None:
        gate = await proxies(shared)
        broker = await connect(gate.url)

        def is_script(words: Words) -> bool:
            return words[0] == b"EVALSHA" and words[1].decode() == script_sha(verb)

        first = job(deadline_at=None, idempotency_key="k", fingerprint=b"f")
        async with asyncio.timeout(PATIENCE):
            losing = gate.lose_reply(is_script) if verb == "submit" else None
            submitted = await broker.submit(first)
            assert (submitted.id, submitted.status, submitted.queue_position) == (first.id, Status.QUEUED, 1)
            losing = gate.lose_reply(is_script) if verb == "claim" else losing
            [lease] = await claim(broker)
            assert lease.attempt == 1
            losing = gate.lose_reply(is_script) if verb == "append" else losing
            assert await broker.append([tokens(lease, 1, 3)]) == {first.id: "ok"}
            losing = gate.lose_reply(is_script) if verb == "release" else losing
            await broker.release([Release(lease.key)])
            losing = gate.lose_reply(is_script) if verb == "cancel" else losing
            assert (await broker.cancel("acme", first.id)).status is Status.CANCELLED
            assert losing is not None
            await losing
        assert (await broker.get("acme", first.id)).tokens == 3
        assert problems(await store(shared, broker)) == []


def script_sha(script: str) -> str:
    from penstock.brokers.redis.scripts import SHA

    return SHA[script]


class TestFaults:
    """Nothing is lost, nothing comes twice, and every reader that was there goes on by itself."""

    @pytest.mark.parametrize(
        "fault", ["kill -9", "stop", "script flush", "kill normal", "kill pubsub", "kill replica and normal"]
    )
    async def test_under_load(
        self, make_redis: Any, connect: OpenBroker, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "REPLY_TIMEOUT", 0.6)
        server = make_redis()
        gateway, *workers = [await connect(server.url, policy={"lease_ttl": 1.0}) for _ in range(3)]

        async def break_it(workload: Workload) -> None:
            for number in range(1, 4):
                await eventually(lambda number=number: workload.written > 20 * number)
                with contextlib.closing(server.client()) as client:
                    match fault:
                        case "kill -9":
                            await asyncio.to_thread(server.restart)
                        case "stop":
                            server.signal(signal.SIGSTOP)
                            await asyncio.sleep(1.0)
                            server.signal(signal.SIGCONT)
                        case "script flush":
                            client.execute_command("SCRIPT FLUSH")
                        case "kill normal":
                            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
                        case "kill pubsub":
                            client.execute_command("CLIENT KILL TYPE pubsub")
                        case _:
                            client.execute_command("CLIENT KILL TYPE pubsub")
                            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")

        workload = Workload(gateway, workers)
        await workload.run(break_it)
        await workload.check()
        assert problems(await store(server, gateway)) == []

    async def test_a_redis_that_is_away_is_told_in_time_and_found_again(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        server = make_redis()
        broker = await connect(server.url, timeout=1.0)
        queued = await broker.submit(job())
        reader = Reader(broker, queued)
        await asyncio.to_thread(server.kill9)
        for call in (broker.submit(job()), broker.get("acme", queued.id), broker.stats(), broker.sweep()):
            with pytest.raises(BrokerUnavailable) as caught:
                async with asyncio.timeout(PATIENCE):
                    await call
            assert caught.value.retry_after
        for _ in range(5):
            calls = [broker.submit(job()) for _ in range(50)]
            assert all(
                isinstance(each, BrokerUnavailable) for each in await asyncio.gather(*calls, return_exceptions=True)
            )
        # What nobody waits for any more takes no memory, however long it lasts.
        assert len(broker._shards[0].commands._queue) < 50
        await asyncio.to_thread(server.start)
        await eventually(lambda: broker._shards[0].commands.up.is_set() and broker._shards[0].subscriber.up.is_set())
        [lease] = await claim(broker)
        assert lease.job.id == queued.id
        await broker.append([tokens(lease, 1, finish=STOP)])
        check_log(await reader.end())

    async def test_a_tail_that_begins_while_redis_is_away(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        broker = await connect(server.url, timeout=0.2)
        queued = await broker.submit(job())
        await asyncio.to_thread(server.kill9)
        reader = Reader(broker, queued)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.start)
        await eventually(lambda: broker._shards[0].commands.up.is_set())
        [lease] = await claim(broker)
        await broker.append([tokens(lease, 1, finish=STOP)])
        check_log(await reader.end())
