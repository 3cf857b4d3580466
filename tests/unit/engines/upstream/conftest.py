"""Servers, and engines before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from tests.support.upstream import Engine, Upstream

from penstock.engines.child import notices
from penstock.engines.child.backend import load_backend
from penstock.engines.frames import Notice


@pytest.fixture
async def servers() -> AsyncIterator[list[Upstream]]:
    both = [Upstream(), Upstream()]
    for server in both:
        await server.start()
    yield both
    for server in both:
        await server.stop()


@pytest.fixture
async def engine_of() -> AsyncIterator[Callable[..., Awaitable[Engine]]]:
    engines: list[Engine] = []

    async def make(*servers: Upstream | str, **options: object) -> Engine:
        urls = ",".join(each if isinstance(each, str) else each.url for each in servers)
        given = {"retries": "2", **{name: str(value) for name, value in options.items()}}
        backend = await asyncio.to_thread(load_backend, "upstream", "m", urls, given, lambda what, fraction: None)
        engines.append(Engine(backend))
        return engines[-1]

    yield make
    for engine in engines:
        await asyncio.to_thread(engine.backend.close)


@pytest.fixture
def noticed() -> Iterator[list[Notice]]:
    """What the engines tell the server's telemetry."""
    found: list[Notice] = []
    notices.listen(found.append)
    yield found
    notices.listen()


@pytest.fixture
async def encoders(servers: list[Upstream]) -> list[Upstream]:
    for server in servers:
        server.embeds = True
    return servers
