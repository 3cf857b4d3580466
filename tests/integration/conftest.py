"""Real server processes for tests that talk to them over HTTP.

``server`` is one shared server with synthetic models, ``make_server`` starts one of the test's own, ``http`` is an
`httpx.AsyncClient` of the shared one, which checks that every answer is as ``/openapi.json`` says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.support.conformance import conforms
from tests.support.server import PATIENCE, Server, model


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three models: ``synthetic`` (as fast as it can), ``paced`` (50 tokens/s), ``crawl`` (2 tokens/s, two slots).

    Heartbeats come after 0.3 s of silence, and abandoned jobs are cancelled after 0.3 s.
    """
    shared = Server(
        tmp_path_factory.mktemp("server"),
        models=[model(), model("paced", rate=50), model("crawl", rate=2, slots=2)],
        settings={"heartbeat": 0.3, "disconnect_grace": 0.3},
    )
    try:
        yield shared.start()
    finally:
        shared.stop()


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=server.url, timeout=PATIENCE, trust_env=False, event_hooks={"response": [conforms]}
    ) as client:
        yield client
