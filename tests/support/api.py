"""What most tests of the HTTP API do with jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx

from tests.support.server import PATIENCE

T = TypeVar("T")

ENDED = {"completed", "failed", "cancelled", "expired"}


async def submit(http: httpx.AsyncClient, **body: Any) -> str:
    """Submit a job; its id."""
    reply = await http.post("/v1/jobs", json={"prompt": "hello", "max_tokens": 5, **body})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


async def poll(look: Callable[[], Awaitable[T]], good: Callable[[T], Any], timeout: float = PATIENCE) -> T:
    """Look again and again, until what is seen is *good*; what was seen."""
    async with asyncio.timeout(timeout):
        while not good(seen := await look()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return seen


async def until(
    http: httpx.AsyncClient, job: str, condition: Callable[[dict[str, Any]], Any], timeout: float = PATIENCE
) -> dict[str, Any]:
    """Look at the job until *condition* holds."""
    view: dict[str, Any] = {}
    try:
        async with asyncio.timeout(timeout):
            while True:
                reply = await http.get(f"/v1/jobs/{job}")
                assert reply.status_code == 200, reply.text
                view = reply.json()
                if condition(view):
                    return view
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"still not so: {view}") from None


async def ended(http: httpx.AsyncClient, job: str, timeout: float = PATIENCE) -> dict[str, Any]:
    return await until(http, job, lambda view: view["status"] in ENDED, timeout)


async def running(http: httpx.AsyncClient, job: str, tokens: int = 1) -> dict[str, Any]:
    """Wait until the job has produced some tokens."""
    return await until(http, job, lambda view: view["tokens"] >= tokens)


def text_of(count: int, attempt: int = 1) -> str:
    """What the synthetic engine writes."""
    return "".join(f"{position}@{attempt} " for position in range(1, count + 1))


def check_error(reply: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The one error shape, exactly."""
    assert reply.status_code == status, reply.text[:500]
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["code"] == code, body
    assert body["error"]["message"]
    assert body["error"]["type"]
    if param is not None:
        assert body["error"]["param"] == param, body
    if status in (429, 503):
        assert int(reply.headers["retry-after"]) >= 1
        assert int(reply.headers["retry-after-ms"]) >= 1
    return body["error"]  # type: ignore[no-any-return]
