"""The shipped nginx configuration in a real nginx: what the gateways promise still holds behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from penstock.testing.oracle import check_log
from tests.support.api import check_error, ended, poll, running, submit, until
from tests.support.fleet import GatewayProcess, WorkerProcess
from tests.support.http import send
from tests.support.nginx import HOSTILE, Nginx
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Server, free_port, wait_for
from tests.support.sse import Stream, open_stream

MAX_BODY = 1 << 20

#: Tokens whose stream is larger than what the sockets between nginx and a reader that takes nothing hold.
BEYOND_THE_SOCKETS = 80_000


@pytest.fixture(scope="module")
def nginx(server: Server) -> Iterator[Nginx]:
    """In front of the shared server, within an http block that gzips, caches and buffers."""
    proxy = Nginx([server.port], http=HOSTILE)
    try:
        yield proxy.start()
    finally:
        proxy.stop()


@pytest.fixture
def make_nginx() -> Iterator[Callable[..., Nginx]]:
    proxies: list[Nginx] = []

    def make(*ports: int, http: str = "") -> Nginx:
        proxies.append(Nginx(ports, http=http))
        return proxies[-1].start()

    yield make
    for proxy in proxies:
        proxy.stop()


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False)


@pytest.fixture
async def proxied(nginx: Nginx) -> AsyncIterator[httpx.AsyncClient]:
    async with client(nginx.url) as http:
        yield http


def check_headers(stream: Stream) -> None:
    assert stream.status == 200
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["cache-control"] == "no-cache, no-store, no-transform"
    assert "content-encoding" not in stream.headers
    assert "content-length" not in stream.headers
    assert stream.headers["x-request-id"]


class TestStreams:
    async def test_tokens_come_one_by_one(
        self, make_server: Callable[..., Server], make_nginx: Callable[..., Nginx]
    ) -> None:
        """A token every 2.5 s, and whole logs that are smaller than any buffer on the way: who has read the first token
        of a job that runs on got it at once, and not with the rest."""
        server = make_server(rate=0.4)
        nginx = make_nginx(server.port, http=HOSTILE)
        fields = {"prompt": "x", "max_tokens": 6}
        chat = {"model": "synthetic", "messages": [{"role": "user", "content": "x"}], "max_tokens": 6, "stream": True}

        async def first_token(http: httpx.AsyncClient, stream: Stream, job: str) -> None:
            async with stream:
                check_headers(stream)
                async for event in stream:
                    if "1@1 " in event.text:
                        break
                assert (await http.get(f"/v1/jobs/{job}")).json()["status"] == "running"
                await http.post(f"/v1/jobs/{job}/cancel")
                last = (await stream.take(1))[0]
                while last.event == "token":
                    last = (await stream.take(1))[0]
                assert "cancelled" in last.text

        async with client(nginx.url) as http:
            job, other = await submit(http, **fields), await submit(http, **fields, user_id="somebody")
            headers = {"accept-encoding": "gzip"}
            streams = [
                await open_stream(f"{nginx.url}/v1/jobs/{job}/events", headers=headers),
                await open_stream(f"{nginx.url}/v1/events?user_id=somebody", headers=headers),
                await open_stream(f"{nginx.url}/v1/generate", "POST", json_body={**fields, "stream": True}),
                await open_stream(f"{nginx.url}/v1/chat/completions", "POST", json_body=chat, headers=headers),
            ]
            jobs = [job, other, *(stream.headers["x-penstock-job"] for stream in streams[2:])]
            async with asyncio.TaskGroup() as tasks:
                for stream, job in zip(streams, jobs, strict=True):
                    tasks.create_task(first_token(http, stream, job))

    async def test_the_bytes_are_the_servers(self, server: Server, nginx: Nginx, proxied: httpx.AsyncClient) -> None:
        """Not compressed though the client takes it and the http block wants it, not cached, not changed."""
        job = await submit(proxied, max_tokens=500)
        await ended(proxied, job)
        views = []
        for url in (server.url, nginx.url, nginx.url):
            headers = {"accept-encoding": "gzip, deflate, br"}
            async with await open_stream(f"{url}/v1/jobs/{job}/events", headers=headers) as stream:
                check_log(await stream.rest(), job=job)
                check_headers(stream)
                assert not stream.torn
                assert stream.headers["x-penstock-job"] == job
                views.append(stream.raw)
        assert views[0] == views[1] == views[2]

    async def test_pings_pass_through_a_silent_stream(self, nginx: Nginx, proxied: httpx.AsyncClient) -> None:
        """Both slots are taken: the third job's stream has nothing but pings for as long as it waits."""
        blockers = [await submit(proxied, model="crawl", max_tokens=100_000) for _ in range(2)]
        job = None
        try:
            for blocker in blockers:
                await running(proxied, blocker)
            job = await submit(proxied, model="crawl", max_tokens=2)
            async with await open_stream(f"{nginx.url}/v1/jobs/{job}/events") as stream:
                async with asyncio.timeout(PATIENCE):
                    while len(stream.parser.comments) < 3:
                        assert await stream.more()
                assert stream.raw == b": ping\n" * len(stream.parser.comments)
        finally:
            for each in [*blockers, *([job] if job else [])]:
                await proxied.post(f"/v1/jobs/{each}/cancel")

    async def test_a_client_that_leaves_is_told_to_the_gateway(self, nginx: Nginx, proxied: httpx.AsyncClient) -> None:
        body = {"model": "paced", "prompt": "x", "stream": True, "max_tokens": 1_000_000}
        async with await open_stream(f"{nginx.url}/v1/generate", "POST", json_body=body) as stream:
            await stream.take(1)
            job = stream.headers["x-penstock-job"]
        await until(proxied, job, lambda view: view["status"] == "cancelled")

    async def test_what_a_slow_reader_leaves_is_not_swallowed(
        self, make_server: Callable[..., Server], make_nginx: Callable[..., Nginx]
    ) -> None:
        """nginx would take all of it from the gateway, onto its disk: now the gateway feels its readers. It may drop
        this one, which comes back for the rest."""
        server = make_server(rate=0, settings={"send_deadline": 1})
        nginx = make_nginx(server.port, http=HOSTILE)
        async with client(nginx.url) as http:
            job = await submit(http, max_tokens=BEYOND_THE_SOCKETS)
            await ended(http, job)
            url = f"{nginx.url}/v1/jobs/{job}/events"
            async with await open_stream(url, limit=1 << 16) as stream:
                idle = "llm_sse_connections 0.0"
                await asyncio.to_thread(wait_for, lambda: idle in server.get("/metrics").text, "the gateway's part")
                assert "temporary file" not in nginx.errors()
                events = await stream.rest()
            while events[-1].event == "token":
                async with await open_stream(url, after=events[-1].id) as stream:
                    events += await stream.rest()
            check_log(events, job=job)

    async def test_204_after_the_end(self, nginx: Nginx, proxied: httpx.AsyncClient) -> None:
        job = await submit(proxied, max_tokens=3)
        await ended(proxied, job)
        async with await open_stream(f"{nginx.url}/v1/jobs/{job}/events", after=4) as stream:
            assert stream.status == 204
            assert stream.raw == b""

    async def test_a_reload_cuts_no_stream(self, server: Server, make_nginx: Callable[..., Nginx]) -> None:
        nginx = make_nginx(server.port)
        async with client(nginx.url) as http:
            job = await submit(http, model="paced", max_tokens=150)
            async with await open_stream(f"{nginx.url}/v1/jobs/{job}/events") as stream:
                events = await stream.take(3)
                nginx.reload()
                events += await stream.rest()
            assert not stream.torn
            check_log(events, job=job)


class TestResume:
    async def test_after_kill_9_of_the_server(
        self, make_server: Callable[..., Server], make_nginx: Callable[..., Nginx]
    ) -> None:
        server = make_server(rate=50)
        nginx = make_nginx(server.port)
        async with client(nginx.url) as http:
            job = await submit(http, max_tokens=60)
            url = f"{nginx.url}/v1/jobs/{job}/events"
            async with await open_stream(url) as stream:
                events = await stream.take(10)
                server.kill9()
                events += await stream.rest()
                assert stream.torn, "a stream that was cut must not look complete"
            check_gateway_gone(await http.get(f"/v1/jobs/{job}/events"))

            server.restart()
            async with await open_stream(url, after=events[-1].id) as stream:
                check_headers(stream)
                events += await stream.rest()
            assert not stream.torn
            check_log(events, job=job)
            assert len(events) == 61
            assert events[-1].event == "done"
            async with await open_stream(url, after=events[-1].id) as stream:
                assert stream.status == 204

    async def test_long_cursors_pass(self, proxied: httpx.AsyncClient) -> None:
        """The cursor of a user with many jobs has some kilobytes: it is the gateway that judges it."""
        reply = await proxied.get("/v1/events?user_id=x", headers={"last-event-id": "!" * 12_000})
        check_error(reply, 400, "invalid_request")


class TestFailover:
    async def test_a_post_that_was_sent_is_never_repeated(
        self, server: Server, make_nginx: Callable[..., Nginx]
    ) -> None:
        """One of two gateways dies whenever it has read a request. Each POST is one job or one 502, never both."""
        async with fake_gateway() as (port, taken):
            nginx = make_nginx(port, server.port)
            async with client(nginx.url) as http:
                user, keys = "never-twice", [f"never-twice-{number}" for number in range(12)]
                body = {"prompt": "x", "max_tokens": 1, "user_id": user}
                replies = [await http.post("/v1/jobs", json=body, headers={"idempotency-key": key}) for key in keys]
                failed = [reply for reply in replies if reply.status_code != 202]
                assert len(failed) == len(taken) > 0
                for reply in failed:
                    check_gateway_gone(reply)
                jobs = (await http.get("/v1/jobs", params={"user": user})).json()["data"]
                assert len(jobs) == len(keys) - len(failed)

                # What the clients are told to do, and what comes of it: one job per key.
                for key in keys:
                    await poll(
                        lambda key=key: http.post("/v1/jobs", json=body, headers={"idempotency-key": key}),
                        lambda reply: reply.status_code == 202,
                    )
                jobs = (await http.get("/v1/jobs", params={"user": user})).json()["data"]
                assert len(jobs) == len(keys)

    async def test_a_get_is_given_to_another_gateway(self, server: Server, make_nginx: Callable[..., Nginx]) -> None:
        async with fake_gateway() as (port, taken):
            nginx = make_nginx(port, server.port)
            async with client(nginx.url) as http:
                for _ in range(6):
                    assert (await http.get("/v1/models")).status_code == 200
                assert taken

    async def test_a_gateway_that_is_down_costs_nobody_anything(
        self, server: Server, make_nginx: Callable[..., Nginx]
    ) -> None:
        nginx = make_nginx(free_port(), server.port)
        async with client(nginx.url) as http:
            for _ in range(12):
                await submit(http, max_tokens=1)
        tried = [request["gateway"].count(",") for request in nginx.requests() if request["method"] == "POST"]
        assert max(tried) == 1, "no request met the gateway that is down"

    async def test_connections_to_the_gateways_are_kept(self, make_nginx: Callable[..., Nginx]) -> None:
        async with fake_gateway(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok") as (port, taken):
            nginx = make_nginx(port)
            async with client(nginx.url) as http:
                for _ in range(10):
                    assert (await http.get("/v1/models")).text == "ok"
        assert [len(requests) for requests in taken] == [10]


class TestTwoGateways:
    """Two gateways and a worker over Redis: a client of nginx need not know which gateway it has."""

    async def test_a_stream_goes_on_when_its_gateway_is_killed(self, fleet: Fleet) -> None:
        async with client(fleet.nginx.url) as http:
            job = await submit(http, max_tokens=100)
            url = f"{fleet.nginx.url}/v1/jobs/{job}/events"
            async with await open_stream(url) as stream:
                events = await stream.take(10)
                fleet.carrier().kill9()
                events += await stream.rest()
                assert stream.torn, (len(events), len(stream.raw), stream.raw[-80:])
            async with await open_stream(url, after=events[-1].id) as stream:
                events += await stream.rest()
            check_log(events, job=job)
            assert len(events) == 101
            async with await open_stream(url, after=events[-1].id) as stream:
                assert stream.status == 204
            # One gateway is down: nobody notices, whatever they do.
            for _ in range(8):
                await submit(http, max_tokens=1)

    async def test_a_stream_goes_on_when_its_gateway_is_stopped(self, fleet: Fleet) -> None:
        async with client(fleet.nginx.url) as http:
            job = await submit(http, max_tokens=100)
            url = f"{fleet.nginx.url}/v1/jobs/{job}/events"
            async with await open_stream(url) as stream:
                events = await stream.take(10)
                fleet.carrier().signal(signal.SIGTERM)
                events += await stream.rest()
                assert not stream.torn, "a gateway that is stopped ends its streams properly"
                assert stream.parser.retry is not None
            while events[-1].event == "token":  # the one that is stopping may end this stream, too
                async with await open_stream(url, after=events[-1].id) as stream:
                    events += await stream.rest()
            check_log(events, job=job)


@dataclass
class Fleet:
    nginx: Nginx
    gateways: list[GatewayProcess]

    def carrier(self) -> GatewayProcess:
        """The gateway of the only open stream."""
        (carrier,) = [each for each in self.gateways if "llm_sse_connections 1.0" in each.get("/metrics").text]
        return carrier


@pytest.fixture
def fleet(tmp_path: Path, make_nginx: Callable[..., Nginx]) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        redis = RedisServer(tmp_path / "redis")
        stack.callback(redis.stop)
        redis.start()
        gateways = [GatewayProcess(tmp_path / f"gateway{number}", redis.url) for number in range(2)]
        for process in (*gateways, WorkerProcess(tmp_path / "worker", redis.url)):
            stack.callback(process.stop)
            process.start()
        for gateway in gateways:
            wait_for(gateway.is_served, "a worker")
        yield Fleet(make_nginx(*(gateway.port for gateway in gateways)), gateways)


class TestRequests:
    @pytest.mark.parametrize("size", [MAX_BODY + 1, 2 * MAX_BODY], ids=["gateway", "nginx"])
    async def test_a_body_that_is_too_large(self, proxied: httpx.AsyncClient, size: int) -> None:
        """Whoever refuses it, the client sees the same error."""
        reply = await proxied.post("/v1/jobs", content=b"x" * size)
        check_error(reply, 413, "request_too_large")

    async def test_a_body_that_is_too_large_and_does_not_say_so(self, nginx: Nginx) -> None:
        answer = await send(f"{nginx.url}/v1/jobs", "POST", chunks=[b"x" * 65536] * 40)
        async with answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "request_too_large"

    async def test_a_body_just_below_the_limit(self, proxied: httpx.AsyncClient) -> None:
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        reply = await proxied.post("/v1/jobs", content=body + b" " * (MAX_BODY - len(body)))
        assert reply.status_code == 202, reply.text

    async def test_the_request_id(self, nginx: Nginx, proxied: httpx.AsyncClient) -> None:
        """The client's own, or a new one; on every answer once, and in nginx's log."""
        for path in ("/v1/models", "/nothing"):
            given = await proxied.get(path, headers={"x-request-id": f"mine:{path[1:3]}"})
            assert given.headers.get_list("x-request-id") == [f"mine:{path[1:3]}"]
            bad = await proxied.get(path, headers={"x-request-id": 'no"good'})
            fresh = await proxied.get(path)
            for reply in (bad, fresh):
                (made,) = reply.headers.get_list("x-request-id")
                assert made.startswith("req_")
                assert any(request["request_id"] == made for request in nginx.requests())

    @pytest.mark.parametrize(
        "path",
        ["/v1/stats", "/metrics", "/health", "/docs", "/openapi.json", "//metrics", "/v1/../metrics",
         "/v1/%2e%2e/metrics",
         "/v1/x%2f..%2f..%2fmetrics", "/static/../metrics", "/static/%2e%2e/metrics", "/metrics/"],
    )  # fmt: skip
    async def test_what_is_not_public(self, nginx: Nginx, path: str) -> None:
        async with await send(nginx.url + path) as answer:  # by hand: clients tidy such paths up
            assert answer.status == 404
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-request-id"]
            assert (await answer.json())["error"]["code"] == "not_found"

    async def test_models_are_loaded_and_unloaded_from_inside_only(self, proxied: httpx.AsyncClient) -> None:
        for action in ("load", "unload"):
            check_error(await proxied.post(f"/v1/models/a/b/{action}"), 404, "not_found")

    async def test_what_is(self, proxied: httpx.AsyncClient) -> None:
        for path in ("/healthz", "/readyz", "/v1/models", "/v1/jobs", "/", "/static/style.css"):
            assert (await proxied.get(path)).status_code == 200, path

    async def test_the_gateways_errors_are_their_own(self, proxied: httpx.AsyncClient) -> None:
        check_error(await proxied.get("/v1/jobs/job_nothing"), 404, "not_found")
        check_error(await proxied.post("/v1/jobs", json={"prompt": "x", "model": "none"}), 404, "model_not_found")

    async def test_the_gateways_see_the_host_that_the_client_named(self, proxied: httpx.AsyncClient) -> None:
        """A server on loopback refuses names it was not told: so do those behind nginx."""
        reply = await proxied.get("/v1/models", headers={"host": "evil.example"})
        check_error(reply, 400, "invalid_request")

    async def test_queries_are_not_logged(self, nginx: Nginx, proxied: httpx.AsyncClient) -> None:
        await proxied.get("/v1/jobs?user=somebody-in-particular")
        assert "somebody-in-particular" not in json.dumps(nginx.requests())


def check_gateway_gone(reply: httpx.Response) -> None:
    error = check_error(reply, 502, "bad_gateway")
    assert "Idempotency-Key" in error["message"]
    assert reply.headers["retry-after"] == "1"
    assert reply.headers["retry-after-ms"] == "1000"


@contextlib.asynccontextmanager
async def fake_gateway(answer: bytes = b"") -> AsyncIterator[tuple[int, list[list[bytes]]]]:
    """A port that gives every request this answer, or without one dies of it; and the requests by connection."""
    taken: list[list[bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append([])
        try:
            while b"connection: close" not in (head := (await reader.readuntil(b"\r\n\r\n")).lower()):
                lengths = [line for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
                taken[-1].append(head + body)
                if not answer:
                    break
                writer.write(answer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    serving: list[asyncio.Task[None]] = []
    listener = await asyncio.start_server(
        lambda reader, writer: serving.append(asyncio.create_task(serve(reader, writer))), "127.0.0.1", 0
    )
    async with listener:
        yield listener.sockets[0].getsockname()[1], taken
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)
