"""Servers that are set up wrongly, misused or full."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from penstock.brokers.redis import RedisBroker
from penstock.core.errors import (
    BrokerUnavailable,
    InsufficientStorage,
    InvalidRequest,
    NotFound,
)
from penstock.core.job import Job
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
    tokens,
)


class TestTheServerIsAsked:
    @pytest.mark.parametrize(
        ("setting", "bad", "good", "durability", "hint"),
        [
            ("appendfsync", "everysec", "always", "strict", "CONFIG SET appendfsync always"),
            ("appendfsync", "no", "always", "strict", "CONFIG SET appendfsync always"),
            ("no-appendfsync-on-rewrite", "yes", "no", "strict", "CONFIG SET no-appendfsync-on-rewrite no"),
            ("appendonly", "no", "yes", "strict", "CONFIG SET appendonly yes"),
            ("maxmemory-policy", "allkeys-lru", "noeviction", "strict", "CONFIG SET maxmemory-policy noeviction"),
            ("maxmemory-policy", "volatile-ttl", "noeviction", "fast", "CONFIG SET maxmemory-policy noeviction"),
            ("databases", "16", "16", "replicated", "needs 1 replicas, and this Redis has 0"),
        ],
    )
    async def test_a_server_that_keeps_less_than_promised_is_refused(
        self, shared: RedisServer, connect: OpenBroker, setting: str, bad: str, good: str, durability: str, hint: str
    ) -> None:
        with contextlib.closing(shared.client()) as client:
            if bad != good:
                client.config_set(setting, bad)
            try:
                with pytest.raises(InvalidRequest, match=hint):
                    await connect(shared.url, durability=durability)
            finally:
                if bad != good:
                    client.config_set(setting, good)
        if bad != good:
            await connect(shared.url, durability=durability)

    async def test_a_server_that_was_reconfigured_is_noticed_at_the_next_connection(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        server = make_redis()
        broker = await connect(server.url, timeout=0.5)
        with contextlib.closing(server.client()) as client:
            client.config_set("appendfsync", "everysec")
            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
            with pytest.raises(BrokerUnavailable, match="appendfsync always"):
                await broker.submit(job())
            client.config_set("appendfsync", "always")
        await eventually(lambda: broker._shards[0].commands.up.is_set())
        await broker.submit(job())

    async def test_a_user_who_may_not_ask_for_the_configuration(self, shared: RedisServer, connect: OpenBroker) -> None:
        with contextlib.closing(shared.client()) as client:
            client.acl_setuser("limited", enabled=True, passwords=["+pa55word"], keys=["*"], channels=["*"],
                               categories=["+@all"], commands=["-config"])  # fmt: skip
        url = shared.url.replace("redis://", "redis://limited:pa55word@")
        with pytest.raises(InvalidRequest, match="CONFIG GET appendfsync") as caught:
            await connect(url)
        assert "pa55word" not in str(caught.value)
        broker = await connect(url, durability="fast")
        await broker.submit(job())

    @pytest.mark.parametrize("user", ["", "limited2"])
    async def test_a_wrong_password_is_told_and_never_shown(
        self, shared: RedisServer, connect: OpenBroker, user: str
    ) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await connect(shared.url.replace("redis://", f"redis://{user}:s3cret@"), durability="fast")
        assert "s3cret" not in str(caught.value)
        assert "password" in str(caught.value)

    async def test_a_password_is_in_no_message_of_an_outage(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis(requirepass="s3cret")
        broker = await connect(server.url.replace("redis://", "redis://:s3cret@"), timeout=1.0)
        await broker.submit(job())
        await asyncio.to_thread(server.kill9)
        with pytest.raises(BrokerUnavailable) as caught:
            await broker.submit(job())
        assert "s3cret" not in f"{caught.value} {caught.value!r}"

    async def test_nobody_listens(self, connect: OpenBroker) -> None:
        with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1"):
            async with asyncio.timeout(PATIENCE):
                await connect("redis://:s3cret@127.0.0.1:1/0", timeout=0.5)

    async def test_another_number_of_shards(self, shared: RedisServer, connect: OpenBroker) -> None:
        await connect(shared.url)
        with pytest.raises(InvalidRequest, match="1 shards; this one is set to 2"):
            await connect(shared.url, shards=2, timeout=1.0)


async def fill(broker: RedisBroker, jobs: list[Job], *, look: bool) -> InsufficientStorage:
    """Submit until there is no room; with *look*, the broker looks at the memory all the time, as a gateway does."""
    try:
        for each in jobs:
            await broker.submit(each)
            if look:
                await broker.stats()
    except InsufficientStorage as error:
        return error
    raise AssertionError("there is room for everything")


class TestMemory:
    async def test_a_full_redis_takes_no_job_and_finishes_what_it_has(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        server = make_redis(appendfsync="no")
        broker = await connect(server.url, durability="fast", policy={"result_ttl": 0.5, "max_queued_per_tenant": 0})
        with contextlib.closing(server.client()) as client:
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory", used + 5_000_000)
            client.config_set("client-output-buffer-limit", "pubsub 0 0 0")
            running = await broker.submit(job())
            [lease] = await claim(broker)
            big = [job(metadata={str(number): "x" * 2500 for number in range(16)}) for _ in range(200)]
            assert (await fill(broker, big, look=True)).retry_after
            room = client.info("memory")
            assert room["used_memory"] < room["maxmemory"], "refused before it was full"
            # Another process has not looked yet, and fills it to the brim.
            other = await connect(server.url, durability="fast")
            filling = [job(metadata=each.metadata) for each in big]
            await fill(other, filling, look=False)
            # What runs goes on; what waits can be cancelled; nothing of it is refused.
            for position in range(1, 200):
                assert (await broker.append([tokens(lease, position, text="x" * 2000)])) == {running.id: "ok"}
            assert (await broker.append([tokens(lease, 200, finish=STOP)])) == {running.id: "ok"}
            check_log(await Reader(broker, running).end())
            for each in [*big, *filling]:
                with contextlib.suppress(NotFound):
                    await broker.cancel("acme", each.id)
            assert client.info("memory")["used_memory"] > client.info("memory")["maxmemory"]
            # Retention makes room, without anybody's doing.
            async with asyncio.timeout(PATIENCE):
                while True:
                    await broker.sweep()
                    await broker.stats()
                    with contextlib.suppress(InsufficientStorage):
                        await broker.submit(job())
                        break
                    await asyncio.sleep(0.1)

    async def test_a_duplicate_needs_no_room(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        broker = await connect(server.url)
        first = await broker.submit(job(idempotency_key="k", fingerprint=b"f"))
        with contextlib.closing(server.client()) as client:
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] / 0.95))
        await broker.stats()
        assert (await broker.submit(job(idempotency_key="k", fingerprint=b"f"))).id == first.id
        with pytest.raises(InsufficientStorage):
            await broker.submit(job())
