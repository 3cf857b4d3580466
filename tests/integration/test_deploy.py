"""The services of docker-compose.yml, run as it says but without Docker: other addresses, and nothing else changed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from penstock.settings import PREFIX
from penstock.testing.oracle import check_log
from tests.support import compose
from tests.support.nginx import Nginx
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Process
from tests.support.sse import open_stream

PASSWORD = "secret"


class ComposeRedis(RedisServer):
    """The service ``redis``."""

    def __init__(self, folder: Path, services: Any) -> None:
        settings = compose.redis_settings(services)
        del settings["dir"]
        super().__init__(folder, settings)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=PASSWORD, socket_timeout=10)


class Service(Process):
    """A service of ours: its command and environment, on loopback and with the port and Redis of the test."""

    def __init__(self, folder: Path, service: Any, redis_port: int) -> None:
        self.command, *self._words = service["command"]
        environment = {name.removeprefix(PREFIX).lower(): value for name, value in service["environment"].items()}
        environment["broker"] = environment["broker"].replace("@redis:6379/", f"@127.0.0.1:{redis_port}/")
        super().__init__(folder, settings=environment)

    def arguments(self) -> list[str]:
        ours = {"0.0.0.0": "127.0.0.1", "8000": str(self.port), "9100": str(self.port)}
        return [ours.get(word, word) for word in self._words]

    def is_ready(self) -> bool:
        return self.get("/healthz" if self.command == "gateway" else "/readyz").status_code == 200

    def healthcheck(self) -> int:
        """What the image's health check says of it."""
        port = "PENSTOCK_PORT" if self.command == "gateway" else "PENSTOCK_METRICS_PORT"
        other = "PENSTOCK_METRICS_PORT" if self.command == "gateway" else "PENSTOCK_PORT"
        return subprocess.run(
            [sys.executable, "-I", str(compose.DEPLOY / "healthcheck.py")],
            env={**os.environ, port: str(self.port), other: "1"},
            timeout=PATIENCE,
        ).returncode


@pytest.fixture
def services(tmp_path: Path) -> Iterator[tuple[Nginx, list[Service]]]:
    file = compose.load({"REDIS_PASSWORD": PASSWORD})
    with contextlib.ExitStack() as stack:
        store = ComposeRedis(tmp_path / "redis", file)
        stack.callback(store.stop)
        store.start()
        ours = []
        for name in ("worker", "gateway"):
            for number in range(file["services"][name]["deploy"]["replicas"]):
                process = Service(tmp_path / f"{name}{number}", file["services"][name], store.port)
                stack.callback(process.stop)
                process.start()
                ours.append(process)
        nginx = Nginx([process.port for process in ours if process.command == "gateway"])
        stack.callback(nginx.stop)
        yield nginx.start(), ours


async def test_it_serves_the_bundled_model_and_stops_in_time(services: tuple[Nginx, list[Service]]) -> None:
    nginx, ours = services
    assert sorted(process.command for process in ours) == ["gateway", "gateway", "worker", "worker"]
    assert [process.healthcheck() for process in ours] == [0] * len(ours)

    async with httpx.AsyncClient(base_url=nginx.url, timeout=PATIENCE, trust_env=False) as http:
        async with asyncio.timeout(PATIENCE):
            while (await http.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        body = {"model": "millrace", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 20}
        reply = await http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"]
        job = (await http.post("/v1/jobs", json={"prompt": "Once upon a time", "max_tokens": 30})).json()["id"]
        async with await open_stream(f"{nginx.url}/v1/jobs/{job}/events") as stream:
            check_log(await stream.rest(), job=job)

    for process in ours:
        assert process.terminate() == 0
    assert [process.healthcheck() for process in ours] == [1] * len(ours)


def test_redis_refuses_whoever_has_no_password(tmp_path: Path) -> None:
    store = ComposeRedis(tmp_path, compose.load({"REDIS_PASSWORD": PASSWORD}))
    try:
        store.start()
        with contextlib.closing(redis.Redis(port=store.port)) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    finally:
        store.stop()
