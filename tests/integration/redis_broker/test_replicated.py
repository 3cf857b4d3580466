"""Tier ``replicated``: what is answered is on the replicas."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any

import pytest
import structlog

from penstock.brokers.redis import RedisBroker
from penstock.brokers.redis.server import Server, Tier
from penstock.core.errors import (
    BrokerUnavailable,
)
from penstock.core.job import Job, Status
from penstock.core.ports import Query
from penstock.testing.oracle import check_log
from tests.support.redis import RedisServer
from tests.support.redis_broker import (
    PATIENCE,
    STOP,
    OpenBroker,
    Reader,
    claim,
    eventually,
    job,
    store,
    tokens,
)
from tests.support.redis_store import problems
from tests.support.server import wait_for


class TestReplicated:
    @pytest.mark.parametrize(
        ("version", "commands"), [((7, 0), ["WAIT"]), ((7, 2), ["WAIT", "WAITAOF"]), ((9, 1), ["WAIT", "WAITAOF"])]
    )
    def test_what_a_replica_is_asked(self, version: tuple[int, ...], commands: list[str]) -> None:
        waiting = Server(version, "run").waiting(Tier("replicated", 2))
        assert [command[0] for command in waiting] == commands
        assert all(2 in command for command in waiting)
        assert Server(version, "run").waiting(Tier("strict")) == []

    async def test_what_is_acknowledged_survives_the_master(
        self, make_redis: Any, connect: OpenBroker, proxies: Any
    ) -> None:
        master = make_redis()
        replica = make_redis(replicaof=f"127.0.0.1 {master.port}")
        with contextlib.closing(master.client()) as client:
            wait_for(lambda: client.info("replication")["connected_slaves"] == 1, "the replica")
            wait_for(lambda: client.info("replication")["slave0"]["state"] == "online", "the replica")
        gate = await proxies(master)
        broker = await connect(gate.url, durability="replicated", replicas=1, timeout=3.0)
        assert "replicated" in (await broker.stats()).durability
        kept = await broker.submit(job())
        with contextlib.closing(replica.client()) as client:
            assert client.exists(f"{broker._shards[0].base.decode()}job:{kept.id}")
        reader = Reader(broker, kept)
        [lease] = await claim(broker)
        for position in range(1, 31):
            assert (await broker.append([tokens(lease, position)])) == {kept.id: "ok"}
        await reader.until(30)

        # Without its replica it promises nothing, so it acknowledges nothing; what is tried again counts once.
        replica.signal(signal.SIGSTOP)
        with pytest.raises(BrokerUnavailable, match="replicas"):
            await broker.submit(job(idempotency_key="k", fingerprint=b"f"))
        with pytest.raises(BrokerUnavailable, match="replicas"):
            await broker.append([tokens(lease, 31, 2)])
        assert reader.last == 30, "delivered before it was safe"
        replica.signal(signal.SIGCONT)
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(BrokerUnavailable):
                    again = await broker.submit(job(idempotency_key="k", fingerprint=b"f"))
                    break
        assert {each.id for each in (await broker.list(Query(tenant="acme"))).jobs} == {kept.id, again.id}
        assert (await broker.append([tokens(lease, 31, 2)])) == {kept.id: "ok"}
        await reader.until(32)

        # The master is gone for good: the replica is promoted and gets one of its own.
        master.kill9()
        with contextlib.closing(replica.client()) as client:
            client.execute_command("REPLICAOF NO ONE")
            second = make_redis(replicaof=f"127.0.0.1 {replica.port}")
            wait_for(lambda: client.info("replication").get("slave0", {}).get("state") == "online", "the new replica")
        gate.upstream = replica.port
        gate.drop()
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(BrokerUnavailable):
                    verdicts = await broker.append([tokens(lease, 33, 3, finish=STOP)])
                    break
        assert verdicts == {kept.id: "ok"}
        assert [token.id for token in check_log(await reader.end())] == list(range(1, 36))
        assert (await broker.get("acme", again.id)).status is Status.QUEUED
        assert problems(await store(second, broker)) == []

    async def test_a_write_does_not_wait_for_the_replicas_regular_report(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        """A server with WAITAOF is told of a replica's file once a second, unless it asks when that is written."""
        master = make_redis()
        make_redis(replicaof=f"127.0.0.1 {master.port}")
        _connected(master, 1)
        broker = await connect(master.url, durability="replicated", replicas=1)
        kept = await broker.submit(job())
        [lease] = await claim(broker)
        async with asyncio.timeout(PATIENCE):  # each would take a second
            for position in range(1, 201):
                assert (await broker.append([tokens(lease, position)])) == {kept.id: "ok"}

    async def test_replicas_that_sync_once_a_second_are_waited_for(self, make_redis: Any, connect: OpenBroker) -> None:
        master = make_redis(appendfsync="everysec")
        make_redis(replicaof=f"127.0.0.1 {master.port}", appendfsync="everysec")
        _connected(master, 1)
        broker = await connect(master.url, durability="replicated", replicas=1)
        with structlog.testing.capture_logs() as logs:
            jobs = [await broker.submit(job()) for _ in range(3)]
        assert len({each.id for each in jobs}) == 3
        assert [each for each in logs if each["event"] == "redis_lost"] == []

    async def test_the_start_waits_for_a_replica_that_has_just_joined(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        """It is connected, and confirms nothing before it has its copy."""
        master = make_redis(repl_diskless_sync="yes", repl_diskless_sync_delay="2")
        replica = make_redis(replicaof=f"127.0.0.1 {master.port}")
        _connected(master, 1)
        broker = await connect(master.url, durability="replicated", replicas=1)
        kept = await broker.submit(job())
        assert _has(replica, broker, kept)

    @pytest.mark.parametrize("replicas", [1, 2])
    async def test_a_start_without_confirmation_ends_and_says_what_it_waits_for(
        self, make_redis: Any, connect: OpenBroker, replicas: int
    ) -> None:
        master = make_redis()
        servers = [make_redis(replicaof=f"127.0.0.1 {master.port}") for _ in range(replicas)]
        _connected(master, replicas, state="online")
        servers[-1].signal(signal.SIGSTOP)
        with pytest.raises(BrokerUnavailable, match=f"waiting for replicas, only {replicas - 1} of {replicas} have"):
            await connect(master.url, durability="replicated", replicas=replicas, timeout=4.0)
        servers[-1].signal(signal.SIGCONT)
        await (await connect(master.url, durability="replicated", replicas=replicas)).submit(job())

    async def test_a_replica_that_joins_later_costs_a_pause_which_is_told(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        """Nothing is refused, nothing counts twice: what is asked meanwhile is answered when the newcomer has it."""
        master = make_redis(repl_diskless_sync="yes", repl_diskless_sync_delay="0")
        first = make_redis(replicaof=f"127.0.0.1 {master.port}")
        _connected(master, 1, state="online")
        broker = await connect(master.url, durability="replicated", replicas=1)
        running = await broker.submit(job())
        [lease] = await claim(broker)
        reader = Reader(broker, running)
        await broker.append([tokens(lease, 1)])
        with contextlib.closing(master.client()) as client:
            client.config_set("repl-diskless-sync-delay", "2")
        first.kill9()
        second = make_redis(replicaof=f"127.0.0.1 {master.port}")
        _connected(master, 1)
        with structlog.testing.capture_logs() as logs:
            verdicts, kept = await asyncio.gather(
                broker.append([tokens(lease, 2, 2)]), broker.submit(job(idempotency_key="k", fingerprint=b"f"))
            )
            await eventually(lambda: any(each["event"] == "redis_found" for each in logs))
        [told] = [each["error"] for each in logs if each["event"] == "redis_lost"]
        assert "waiting for replicas, only 0 of 1 have received" in told
        assert verdicts == {running.id: "ok"}
        assert _has(second, broker, kept)
        assert (await broker.submit(job(idempotency_key="k", fingerprint=b"f"))).id == kept.id
        await broker.append([tokens(lease, 4, finish=STOP)])
        assert [token.id for token in check_log(await reader.end())] == [1, 2, 3, 4]
        assert problems(await store(master, broker)) == []


def _connected(master: RedisServer, count: int, state: str = "") -> None:
    """Wait until *count* replicas are connected, each in *state*."""

    def there() -> bool:
        info = client.info("replication")
        return info["connected_slaves"] == count and all(
            state in ("", info[f"slave{number}"]["state"]) for number in range(count)
        )

    with contextlib.closing(master.client()) as client:
        wait_for(there, f"{count} replicas")


def _has(server: RedisServer, broker: RedisBroker, kept: Job) -> bool:
    with contextlib.closing(server.client()) as client:
        return bool(client.exists(f"{broker._shards[0].base.decode()}job:{kept.id}"))
