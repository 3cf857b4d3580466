from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator

import pytest

from tests.support.server import Server


@pytest.fixture
def seed() -> int:
    """Printed when a test fails; ``PENSTOCK_TEST_SEED`` repeats it."""
    value = int(os.environ.get("PENSTOCK_TEST_SEED", "") or random.SystemRandom().randrange(10**6))
    print(f"seed: PENSTOCK_TEST_SEED={value}")
    return value


@pytest.fixture
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Make a server of the test's own (arguments as `Server`'s, without the folder); ended with the test."""
    servers: list[Server] = []
    numbers = itertools.count()

    def make(*, start: bool = True, **arguments: object) -> Server:
        server = Server(tmp_path_factory.mktemp(f"server{next(numbers)}"), **arguments)  # type: ignore[arg-type]
        servers.append(server)
        return server.start() if start else server

    yield make
    for server in servers:
        server.stop()
