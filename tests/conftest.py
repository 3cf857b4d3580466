"""What tests of real server processes share."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.redis import RedisCluster, RedisServer
from tests.support.server import Server

# Engines of several tests share the processors: threads that wait for each other must not spin meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No clock decides about a test. The first text that Hypothesis makes in a fresh clone takes it a second, for instance.
TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
#: The same examples in every run, new ones in CI, and what a night can do (--hypothesis-profile long, soak).
settings.register_profile("short", TIMELESS, max_examples=40, derandomize=True, database=None)
settings.register_profile("long", TIMELESS, max_examples=200)
settings.register_profile("soak", TIMELESS, max_examples=8000)
settings.load_profile("short")

# A shell starts its background jobs deaf to Ctrl-C, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Make a server of the test's own (arguments as `Server`'s, without the folder). It is started unless
    ``start=False``, and ended with the test."""
    servers: list[Server] = []
    numbers = itertools.count()

    def make(*, start: bool = True, **arguments: object) -> Server:
        server = Server(tmp_path_factory.mktemp(f"server{next(numbers)}"), **arguments)  # type: ignore[arg-type]
        servers.append(server)
        return server.start() if start else server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all tests that keep to a prefix of their own, and bring it back if they kill it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    cluster.start()
    yield cluster
    cluster.stop()
