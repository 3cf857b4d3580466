from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from hypothesis import settings
from tests.support.redis import RedisCluster, RedisServer

pytest.register_assert_rewrite("penstock.testing.broker")

if TYPE_CHECKING:
    from penstock.brokers.embedded import EmbeddedBroker
    from penstock.brokers.redis import RedisBroker
    from penstock.core.ports import QueuePolicy
    from penstock.testing.broker import BrokerHarness


def embedded_harness(folder: Path) -> BrokerHarness:
    from penstock.brokers.embedded import EmbeddedBroker
    from penstock.core.ports import QueuePolicy
    from penstock.testing.broker import BrokerHarness
    from penstock.testing.clock import ManualClock

    class EmbeddedHarness(BrokerHarness):
        """A crash copies the files as they lie while the broker is still open: what a kill -9 leaves behind."""

        def __init__(self) -> None:
            self.clock = ManualClock()
            self._generations = itertools.count(1)
            self._store = folder / "0"
            self._store.mkdir()
            self._open: list[EmbeddedBroker] = []

        async def broker(self, policy: QueuePolicy | None = None) -> EmbeddedBroker:
            broker = EmbeddedBroker(self._store / "store", clock=self.clock, policy=policy or QueuePolicy())
            self._open.append(broker)
            await broker.open()
            return broker

        async def crash(self) -> None:
            left = folder / str(next(self._generations))
            shutil.copytree(self._store, left)
            await self.close()
            shutil.rmtree(self._store)
            self._store = left

        async def close(self) -> None:
            while self._open:
                await self._open.pop().close()

        async def stored_bytes(self) -> int | None:
            """Bytes in used pages: SQLite keeps freed pages for what comes next."""
            for path in self._store.rglob("*"):
                if path.is_file() and path.read_bytes()[:15] == b"SQLite format 3":
                    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                        sizes = [
                            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")
                        ]
                        return int((sizes[0] - sizes[1]) * db.execute("PRAGMA page_size").fetchone()[0])
            return None

    return EmbeddedHarness()


@pytest.fixture
def make_embedded_harness(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], BrokerHarness]:
    return lambda: embedded_harness(tmp_path_factory.mktemp("embedded"))


#: Steps of the lease clock that a harness takes at most: beyond what any lease or delay of the suite asks for.
LEASE_STEPS = 1000


def redis_harness(url: str, restart: Callable[[], None], **options: Any) -> BrokerHarness:
    from penstock.brokers.redis import RedisBroker, RedisOptions
    from penstock.testing.broker import BrokerHarness
    from penstock.testing.clock import ManualClock

    class RedisHarness(BrokerHarness):
        """A prefix of its own in a real server; *restart* kills that with -9 and starts it again."""

        total_order = options.get("shards", 1) == 1

        def __init__(self) -> None:
            self.clock = ManualClock()
            self._prefix = f"t{next(PREFIXES)}"
            self._open: list[RedisBroker] = []

        async def broker(self, policy: QueuePolicy | None = None) -> RedisBroker:
            broker = RedisBroker(url, RedisOptions(prefix=self._prefix, **options), policy=policy, clock=self.clock)
            self._open.append(broker)
            await broker.open()
            return broker

        async def advance(self, seconds: float) -> None:
            """In small steps, each seen by the broker, as time passes for one that is alive (see `tick` in lib.lua)."""
            steps = min(int(seconds / 0.25), LEASE_STEPS)
            for _ in range(steps):
                self.clock.advance(0.25)
                for broker in self._open[-1:]:
                    await broker.tick()
            self.clock.advance(seconds - steps * 0.25)
            for broker in self._open[-1:]:
                await broker.tick()

        async def crash(self) -> None:
            await self.close()
            await asyncio.to_thread(restart)

        async def close(self) -> None:
            while self._open:
                await self._open.pop().close()

        async def stored_bytes(self) -> int | None:
            total = 0
            for node in url.split(","):
                with contextlib.closing(redis.Redis.from_url(node)) as client:
                    keys = client.scan_iter(f"{{{self._prefix}:*", count=1000)
                    total += sum(client.memory_usage(key) or 0 for key in keys)
            return total

    return RedisHarness()


PREFIXES = itertools.count()


@pytest.fixture
def make_redis_harness(redis_server: RedisServer) -> Callable[[], BrokerHarness]:
    return lambda: redis_harness(redis_server.url, redis_server.restart)


@pytest.fixture
def make_cluster_harness(redis_cluster: RedisCluster) -> Callable[..., BrokerHarness]:
    """A cluster takes two seconds to be one again: except in a soak, a crash is one of the brokers alone."""
    soak = settings().max_examples == settings.get_profile("soak").max_examples
    restart = redis_cluster.restart if soak else lambda: None
    return lambda **options: redis_harness(redis_cluster.url, restart, **options)
