"""Whatever happens to it, the connection to Redis comes back by itself, on both event loops.

A process that has lost its link for good looks alive, and serves nobody: each break must end in a new connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from penstock.brokers.redis import RedisBroker, RedisOptions, connection
from penstock.core.errors import BrokerUnavailable
from tests.support.proxy import Proxy
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE

uvloop = pytest.importorskip("uvloop")

REPLY_TIMEOUT = 0.3


@pytest.mark.parametrize(
    ("fault", "times"), [("drop", 12), ("pause", 3), pytest.param("drop", 60, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_connection_that_breaks_at_any_moment_is_mended(
    run: Callable[[Coroutine[Any, Any, None]], None],
    fault: str,
    times: int,
    tmp_path: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is cut while calls are being written and read and while it connects; or the whole process stands still for
    longer than a reply may take."""
    monkeypatch.setattr(connection, "REPLY_TIMEOUT", REPLY_TIMEOUT)
    monkeypatch.setattr(connection, "MAX_BACKOFF", 0.05)
    server = RedisServer(tmp_path / "redis")
    try:
        server.start()
        run(break_and_mend(server, fault, times, random.Random(seed)))
    finally:
        server.stop()


async def break_and_mend(server: RedisServer, fault: str, times: int, dice: random.Random) -> None:
    async def call_on() -> None:
        nonlocal calls, pause
        while True:
            with contextlib.suppress(BrokerUnavailable):
                await broker.stats()
                calls += 1
            if pause:
                pause = False
                time.sleep(1.2 * REPLY_TIMEOUT)  # noqa: ASYNC251

    calls, pause = 0, False
    async with Proxy(server.port) as proxy:
        broker = RedisBroker(proxy.url if fault == "drop" else server.url, RedisOptions(timeout=PATIENCE))
        await broker.open()
        calling = [asyncio.create_task(call_on()) for _ in range(8)]
        for number in range(times):
            await asyncio.sleep(dice.choice([0, 0.001, 0.01, 0.03]))
            pause = fault == "pause"
            if fault == "drop":
                proxy.drop()
            before = calls
            try:
                async with asyncio.timeout(PATIENCE / 4):
                    while calls < before + 100:  # noqa: ASYNC110
                        await asyncio.sleep(0.001)
            except TimeoutError:
                pytest.fail(f"no connection any more after fault {number}")
        for task in calling:
            task.cancel()
        await asyncio.wait(calling)
        await broker.close()
