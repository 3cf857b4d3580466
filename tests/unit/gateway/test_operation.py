"""One record is all that a route is: what is read from it, shown on a dialect that only this test has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.ports import Append, Finish, WorkerInfo
from penstock.gateway import openapi
from penstock.gateway.app import OPERATIONS, create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.gateway import Gateway
from penstock.gateway.identity import Identity
from tests.unit.gateway.shouting import routes as shouting

ALL = [*OPERATIONS, *shouting.OPERATIONS]


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(tmp_path)
    await broker.open()
    yield broker
    await broker.close()


def client(broker: EmbeddedBroker, identity: Identity | None = None, **config: Any) -> httpx.AsyncClient:
    """A client of all routes, whom an authenticating layer took for *identity*."""
    app = create_app(Gateway(broker, GatewayConfig(models=("m",), **config)), operations=ALL)

    async def marked(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await app(scope | ({"penstock.identity": identity} if identity is not None else {}), receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(marked), base_url="http://localhost")


async def work(broker: EmbeddedBroker) -> None:
    (lease,) = await broker.claim(WorkerInfo(id="w", slots=1), ["m"], 1, 10)
    await broker.append([Append(lease.key, 1, [1], [f"{lease.job.request.prompt}!"], finish=Finish(("stop",)))])


class TestADialect:
    async def test_its_route_is_served(self, broker: EmbeddedBroker) -> None:
        async with client(broker) as http:
            asking = asyncio.create_task(http.post("/shout", json={"say": "ahoy"}))
            await work(broker)
            assert (await asking).json() == {"shout": "AHOY!"}

    async def test_it_is_described(self) -> None:
        document = openapi.document(ALL)
        described = document["paths"]["/shout"]["post"]
        assert described["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Shout")
        assert described["responses"]["default"] == {"$ref": "#/components/responses/Failure"}
        assert document["components"]["schemas"]["Shout"]["additionalProperties"] is False
        assert "/shout" in openapi.page(document)

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            ({"method": "POST", "json": {}}, 400),
            ({"method": "GET"}, 405),
            ({"method": "POST", "url": "/shout/louder"}, 404),
            ({"method": "POST", "json": {"say": "x"}, "headers": {"host": "evil.example"}}, 400),
            ({"method": "POST", "json": {"say": "x"}, "headers": {"sec-fetch-site": "cross-site"}}, 403),
        ],
        ids=["body", "method", "path", "host", "origin"],
    )
    async def test_it_fails_in_its_own_words_wherever(
        self, broker: EmbeddedBroker, request_: dict[str, Any], status: int
    ) -> None:
        async with client(broker, allowed_hosts=("localhost",)) as http:
            reply = await http.request(**{"url": "/shout", **request_})
        assert reply.status_code == status
        assert list(reply.json()) == ["alas"]
        assert reply.json()["alas"].isupper()

    async def test_a_bug_is_told_in_its_words_too(
        self, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with client(broker) as http:

            async def broken(*_: Any) -> None:
                raise ZeroDivisionError

            monkeypatch.setattr(broker, "submit", broken)
            reply = await http.post("/shout", json={"say": "x"})
        assert (reply.status_code, list(reply.json())) == (500, ["alas"])


class TestRights:
    @pytest.mark.parametrize(
        "operation",
        [each for each in ALL if each.scope != "public" and each.method != "*"],
        ids=lambda each: f"{each.method} {each.path}",
    )
    async def test_without_its_right_no_route_is_reached(self, broker: EmbeddedBroker, operation: Any) -> None:
        path = operation.path.replace("{id}", "x").replace("{model:path}", "m")
        headers = {operation.header: "x"} if operation.header else {}
        async with client(broker, Identity("t", frozenset())) as http:
            reply = await http.request(operation.method, path, headers=headers)
        assert reply.status_code == 403
        msgspec.json.decode(reply.content, type=operation.dialect.failure)  # … and it is told in its dialect's words
        assert set(reply.json()) == set(operation.dialect.failure.__struct_fields__)

    async def test_what_is_public_needs_nobody(self, broker: EmbeddedBroker) -> None:
        async with client(broker, Identity("t", frozenset())) as http:
            assert (await http.get("/healthz")).status_code == 200

    async def test_a_tenants_key_operates_nothing(self, broker: EmbeddedBroker) -> None:
        async with client(broker, Identity("t")) as http:
            assert (await http.get("/v1/jobs")).status_code == 200
            assert (await http.get("/health")).status_code == 403
            assert (await http.post("/v1/models/m/load")).status_code == 403

    @pytest.mark.parametrize("manageable", [True, False])
    async def test_who_reaches_a_closed_server_operates_it(self, broker: EmbeddedBroker, manageable: bool) -> None:
        async with client(broker, manageable=manageable) as http:
            assert (await http.get("/health")).status_code == 200
            assert (await http.post("/v1/models/m/load")).status_code == (501 if manageable else 403)


class TestHeaders:
    async def test_who_sends_it_means_the_other_operation(self, broker: EmbeddedBroker) -> None:
        async with client(broker) as http:
            ours = (await http.get("/v1/models/m")).json()
            theirs = (await http.get("/v1/models/m", headers={"anthropic-version": "2023-06-01"})).json()
            missing = (await http.get("/v1/models/no", headers={"anthropic-version": "2023-06-01"})).json()
        assert (ours["object"], theirs["type"], missing["type"]) == ("model", "model", "error")


class TestTrace:
    TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    @pytest.mark.parametrize("route", ["/v1/jobs", "/submit_job?user_id=u"])
    async def test_a_job_is_part_of_its_requests_trace(self, broker: EmbeddedBroker, route: str) -> None:
        headers = {"traceparent": f"00-{self.TRACE}-{self.SPAN}-01"}
        async with client(broker) as http:
            await http.post(route, json={"prompt": "x"}, headers=headers)
        (lease,) = await broker.claim(WorkerInfo(id="w", slots=1), ["m"], 1, 10)
        assert lease.job.trace == headers["traceparent"]

    @pytest.mark.parametrize("header", ["", "00-0-0-0", f"ff-{TRACE}-{SPAN}-01"])
    async def test_what_is_no_trace_is_ignored(self, broker: EmbeddedBroker, header: str) -> None:
        async with client(broker) as http:
            reply = await http.post("/v1/jobs", json={"prompt": "x"}, headers={"traceparent": header})
        assert reply.status_code == 202
        (lease,) = await broker.claim(WorkerInfo(id="w", slots=1), ["m"], 1, 10)
        assert lease.job.trace is None
