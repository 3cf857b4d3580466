"""Slots that move and nodes that go away."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

import pytest

from penstock.brokers.redis import RedisBroker
from penstock.core.errors import (
    BrokerUnavailable,
)
from penstock.core.job import Job
from penstock.core.ports import Lease
from penstock.testing.oracle import check_log
from tests.support.redis import RedisCluster, RedisServer
from tests.support.redis_broker import (
    PATIENCE,
    STOP,
    OpenBroker,
    Reader,
    claim,
    eventually,
    job,
    tokens,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"), {"cluster-require-full-coverage": "no"})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class TestCluster:
    async def test_a_slot_that_moves_takes_its_readers_along(
        self, cluster: RedisCluster, connect: OpenBroker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("penstock.brokers.redis.claims.CLAIM_POLL", 2 * PATIENCE)
        broker = await connect(cluster.url)
        queued = await broker.submit(job())
        reader = Reader(broker, queued)
        [lease] = await claim(broker)
        await broker.append([tokens(lease, 1)])
        await reader.until(1)
        await asyncio.to_thread(move_slot, cluster, broker._shards[0]._address._slot)
        await broker.append([tokens(lease, 2)])
        await reader.until(2)
        # Whoever listens does so where the keys are now: woken, not by polling.
        await eventually(lambda: broker._shards[0].subscriber.up.is_set())
        waiting = asyncio.create_task(claim(broker, 1, 2 * PATIENCE))
        await asyncio.sleep(0.5)
        other = await connect(cluster.url)
        second = await other.submit(job())
        async with asyncio.timeout(5):
            assert [lease.job.id for lease in await waiting] == [second.id]
        await broker.append([tokens(lease, 3, finish=STOP)])
        check_log(await reader.end())

    async def test_a_shard_that_is_away_takes_no_lease_with_it(
        self, cluster: RedisCluster, connect: OpenBroker
    ) -> None:
        """What the other shards gave is given to the worker; nothing is leased to nobody."""
        broker = await connect(cluster.url, shards=3, timeout=1.0)
        watcher = await connect(cluster.url, shards=3)
        jobs = [await broker.submit(job()) for _ in range(24)]
        away = cluster.nodes[owner_of(cluster, broker._shards[0]._address._slot)]
        there = [each for each in jobs if owner_node(cluster, broker, each) is not away]
        away.signal(signal.SIGSTOP)
        leases: list[Lease] = []
        try:
            async with asyncio.timeout(PATIENCE):
                while len(leases) < len(there):
                    with contextlib.suppress(BrokerUnavailable):
                        leases += await claim(broker, 24, 0.0)
                    running = [each for each in there if (await watcher.get("acme", each.id)).status == "running"]
                    assert len(running) == len(leases), "leased to nobody"
        finally:
            away.signal(signal.SIGCONT)
        assert {lease.job.id for lease in leases} >= {each.id for each in there}


def owner_of(cluster: RedisCluster, slot: int) -> int:
    with contextlib.closing(cluster.nodes[0].client()) as client:
        for first, last, primary, *_ in client.execute_command("CLUSTER SLOTS"):
            if first <= slot <= last:
                return next(number for number, node in enumerate(cluster.nodes) if node.port == primary[1])
    raise AssertionError(slot)


def owner_node(cluster: RedisCluster, broker: RedisBroker, job: Job) -> RedisServer:
    return cluster.nodes[owner_of(cluster, broker._shard(job.id)._address._slot)]


def move_slot(cluster: RedisCluster, slot: int) -> None:
    """From the node that has it to another, keys and all."""
    number = owner_of(cluster, slot)
    source, target = cluster.nodes[number], cluster.nodes[(number + 1) % 3]
    with contextlib.closing(source.client()) as old, contextlib.closing(target.client()) as new:
        ids = [client.execute_command("CLUSTER MYID") for client in (old, new)]
        new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
        old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
        keys = old.execute_command("CLUSTER GETKEYSINSLOT", slot, 10_000)
        old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in cluster.nodes:
            with contextlib.closing(node.client()) as client:
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])
