"""`penstock serve --engine upstream` before real replicas, one of which is killed in the middle of everything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.testing.oracle import check_log, tokens_of
from tests.support.http import PATIENCE
from tests.support.server import Server, model
from tests.support.sse import Event, Parser

STREAMS = 32
TOKENS = 300
PROMPTS = [[263 + 7 * i, 300 + i, 411] for i in range(8)]


def before(folder: Path, replicas: list[Server], **options: object) -> Server:
    """A server whose engine is *replicas*."""
    urls = ",".join(each.url for each in replicas)
    return Server(folder, models=[model("millrace", engine="upstream", path=urls, **options)])


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Server]]:
    models = [model("millrace", engine="openvino", precision="f32")]
    both = [Server(tmp_path / name, models=models) for name in ("one", "two")]
    try:
        yield [each.start() for each in both]
    finally:
        for each in both:
            each.stop()


@pytest.fixture
def front(tmp_path: Path, replicas: list[Server]) -> Iterator[Server]:
    server = before(tmp_path / "front", replicas)
    try:
        yield server.start()
    finally:
        server.stop()


class Middle:
    """Counts everybody's tokens."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.reached = asyncio.Event()

    def count(self, tokens: int) -> None:
        self._left -= tokens
        if self._left <= 0:
            self.reached.set()


async def read(client: httpx.AsyncClient, body: dict[str, Any], middle: Middle) -> list[Event]:
    """One stream to its end."""
    events: list[Event] = []
    parser = Parser()
    async with client.stream("POST", "/v1/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        async for data in response.aiter_bytes():
            new = parser.feed(data)
            middle.count(len(new))
            events += new
    return events


@pytest.mark.parametrize("kind", ["ids", "chat"])
async def test_a_replica_dies_in_the_middle_of_all_streams(front: Server, replicas: list[Server], kind: str) -> None:
    asked: list[dict[str, Any]] = [{"prompt": ids} for ids in PROMPTS]
    if kind == "chat":
        asked = [{"messages": [{"role": "user", "content": f"Tell me of a fox, {i}."}]} for i in range(8)]
    bodies = [{**each, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True} for each in asked]
    async with httpx.AsyncClient(base_url=front.url, timeout=PATIENCE, trust_env=False) as client:
        undisturbed = [(await client.post("/v1/generate", json=body)).json()["text"] for body in bodies]
        middle = Middle(STREAMS * TOKENS // 4)
        reading = [asyncio.create_task(read(client, bodies[i % len(bodies)], middle)) for i in range(STREAMS)]
        await middle.reached.wait()
        await asyncio.to_thread(replicas[0].kill9)
        assert not any(task.done() for task in reading), "some were over before the kill"
        streams = await asyncio.gather(*reading)
    for i, events in enumerate(streams):
        check_log(events)
        tokens = tokens_of(events)
        assert [token.position for token in tokens] == list(range(1, TOKENS + 1))
        assert {token.attempt for token in tokens} == {1}, "failover happens inside the attempt"
        if kind == "ids":
            assert "".join(token.text for token in tokens) == undisturbed[i % len(bodies)]
    # Broken streams alone open its circuit; a refused connection, if one is tried before that, tells that it is down.
    assert "is out of service" in front.errors() or "is down" in front.errors()
