"""Real servers, proxies before them, and open brokers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from penstock.brokers.redis import RedisBroker, RedisOptions
from penstock.core.ports import Clock, QueuePolicy
from tests.support.proxy import Proxy
from tests.support.redis import RedisServer
from tests.support.redis_broker import (
    PATIENCE,
    Ledger,
    OpenBroker,
)

_prefixes = itertools.count()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for every test that leaves it as it was; each has a prefix of its own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """A server of the test's own: ``make_redis(appendfsync="no")``."""
    servers: list[RedisServer] = []

    def make(**config: str) -> RedisServer:
        settings = {name.replace("_", "-"): value for name, value in config.items()}
        server = RedisServer(tmp_path_factory.mktemp("redis"), settings)
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
async def proxies() -> AsyncIterator[Callable[[RedisServer], Awaitable[Proxy]]]:
    started: list[Proxy] = []

    async def make(server: RedisServer) -> Proxy:
        started.append(await Proxy(server.port).start())
        return started[-1]

    yield make
    for proxy in started:
        await proxy.close()


@pytest.fixture
async def connect() -> AsyncIterator[OpenBroker]:
    """An open broker, closed with the test. All of one test share a prefix, and so a queue."""
    prefix = f"i{next(_prefixes)}"
    brokers: list[RedisBroker] = []

    async def make(
        url: str, *, policy: dict[str, Any] | None = None, clock: Clock | None = None, **options: Any
    ) -> RedisBroker:
        options = {"prefix": prefix, "timeout": PATIENCE, **options}
        broker = RedisBroker(url, RedisOptions(**options), policy=QueuePolicy(**policy or {}), clock=clock)
        brokers.append(broker)
        await broker.open()
        return broker

    yield make
    async with asyncio.timeout(PATIENCE):
        for broker in brokers:
            await broker.close()


@pytest.fixture
def ledger(make_redis: Any) -> Ledger:
    return Ledger(make_redis())
