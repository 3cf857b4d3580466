"""HTTP/1.1 and 1.0 as the RFCs have them, by bytes on a socket: what no well-behaved client library would send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.api import poll, running, submit, text_of, until
from tests.support.http import Answer
from tests.support.server import PATIENCE, Server


class Wire:
    """A connection to *server*: bytes as they are given, answers one after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *requests: bytes) -> None:
        self.writer.write(b"".join(requests))
        await self.writer.drain()

    async def answer(self) -> Answer:
        """The next answer's head (behind interim ones)."""
        answer = Answer(self.reader, self.writer)
        async with asyncio.timeout(PATIENCE):
            while answer.status < 200:
                answer.headers.clear()
                await answer.read_head()
        return answer

    async def closed(self) -> bytes:
        """What still comes until the server closes."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()

    def leave(self) -> None:
        """Close both directions, as a process does that exits."""
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def wire(server: Server) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    connection = Wire(reader, writer)
    try:
        yield connection
    finally:
        connection.leave()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(
    method: str, path: str, body: Any = None, *headers: str, version: str = "1.1", host: str | None = "localhost"
) -> bytes:
    content = json.dumps(body).encode() if body is not None else b""
    lines = [f"{method} {path} HTTP/{version}", *headers]
    if host is not None:
        lines.append(f"Host: {host}")
    if body is not None:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


def chunked(method: str, path: str, body: Any, *headers: str) -> bytes:
    content = json.dumps(body).encode()
    pieces = [content[:7], content[7:]]
    head = request(method, path, None, "Transfer-Encoding: chunked", *headers)
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def generate(model: str = "paced", tokens: int = 100_000, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "x", "max_tokens": tokens, **fields}


async def streams(http: httpx.AsyncClient) -> int:
    """Event streams that the server has open."""
    found = re.search(r"^llm_sse_connections (\d+)", (await http.get("/metrics")).text, re.MULTILINE)
    assert found is not None
    return int(found[1])


async def jobs_of(http: httpx.AsyncClient, user: str) -> list[dict[str, Any]]:
    return (await http.get("/v1/jobs", params={"user_id": user})).json()["data"]  # type: ignore[no-any-return]


async def begun(http: httpx.AsyncClient, user: str) -> str:
    """The id of the *user*'s job once it runs."""
    jobs = await poll(lambda: jobs_of(http, user), lambda jobs: jobs and jobs[0]["tokens"] > 0)
    return str(jobs[0]["id"])


async def left(http: httpx.AsyncClient, job: str) -> None:
    """Nobody listens to *job* any more, and the server knows."""
    await until(http, job, lambda view: view["status"] == "cancelled")


def check_refusal(answer: Answer, body: Any, status: int) -> str:
    """The one error shape, and the connection ends."""
    assert answer.status == status, body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return str(body["error"]["message"])


#: What ``/healthz`` says.
ALIVE = {"status": "ok", "broker": "connected"}

#: Long answers, as a stream and in one piece: path and body.
LONG = [
    pytest.param("/v1/generate", generate(stream=True), id="stream"),
    pytest.param("/v1/generate", generate(), id="json"),
    pytest.param("/v1/chat/completions", {**generate(), "messages": [{"role": "user", "content": "x"}]}, id="chat"),
    pytest.param("/basic_generate", {"model": "paced", "prompts": ["x"], "max_tokens": 100_000}, id="prompts"),
]


class TestHead:
    @pytest.mark.parametrize(
        "path", ["/v1/jobs/{job}/events", "/v1/jobs/{job}/events?after=2", "/v1/events?user_id=u", "/events?user_id=u"]
    )
    async def test_of_a_stream_is_its_head_and_follows_nothing(
        self, server: Server, http: httpx.AsyncClient, path: str
    ) -> None:
        job = await submit(http, model="paced", max_tokens=100_000)
        await running(http, job, tokens=3)
        async with wire(server) as connection:
            await connection.send(request("HEAD", path.format(job=job)), request("GET", "/healthz"))
            head = await connection.answer()
            assert (head.status, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert "transfer-encoding" not in head.headers
            assert "content-length" not in head.headers
            assert await (await connection.answer()).json() == ALIVE
            assert await streams(http) == 0
        await http.post(f"/v1/jobs/{job}/cancel")

    async def test_of_a_responses_events(self, server: Server, http: httpx.AsyncClient) -> None:
        body = {"model": "paced", "input": "x", "max_output_tokens": 1000, "background": True}
        made = (await http.post("/v1/responses", json=body)).json()
        async with wire(server) as connection:
            path = f"/v1/responses/{made['id']}"
            await connection.send(request("HEAD", f"{path}?stream=true"), request("GET", "/healthz"))
            assert (await connection.answer()).headers["content-type"].startswith("text/event-stream")
            assert await (await connection.answer()).json() == ALIVE
            assert await streams(http) == 0
        await http.post(f"{path}/cancel")

    async def test_of_anything_else_has_the_length_of_get(self, server: Server, http: httpx.AsyncClient) -> None:
        async with wire(server) as connection:
            for path, status in (("/v1/models", 200), ("/", 200), ("/nothing", 404), ("/v1/generate", 405)):
                await connection.send(request("HEAD", path), request("GET", path))
                head, get = await connection.answer(), await connection.answer()
                assert (head.status, get.status) == (status, status)
                assert head.headers["content-length"] == get.headers["content-length"] or status >= 400
                await get.body()

    async def test_with_a_request_behind_it_leaks_nothing(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await submit(http, model="paced", max_tokens=100_000)
        for method in ("HEAD", "GET") * 10:
            async with wire(server) as connection:
                await connection.send(request(method, f"/v1/jobs/{job}/events"), request("GET", "/healthz"))
                await connection.answer()
        await poll(lambda: streams(http), lambda count: count == 0)
        await http.post(f"/v1/jobs/{job}/cancel")

    async def test_is_no_reader_that_keeps_a_job(self, server: Server, http: httpx.AsyncClient) -> None:
        async with wire(server) as connection:
            await connection.send(request("POST", "/v1/generate", generate(stream=True)))
            job = (await connection.answer()).headers["x-penstock-job"]
        async with wire(server) as connection:
            await connection.send(request("HEAD", f"/v1/jobs/{job}/events"))
            assert (await connection.answer()).status == 200
        await left(http, job)


class TestPipelining:
    @pytest.mark.parametrize(("path", "body"), LONG)
    @pytest.mark.parametrize(
        "behind",
        [
            request("GET", "/healthz"),
            request("POST", "/v1/jobs", {"prompt": "x" * 10_000}),
            request("GET", "/healthz")[:20],
            request("GET", "/healthz") * 100,
            request("POST", "/v1/jobs", {"prompt": "x" * 300_000}),
            request("POST", "/v1/jobs", {"prompt": "x" * 300_000})[:100_000],
            b"\x00\x01 nonsense\r\n\r\n",
        ],
        ids=["get", "post", "piece", "hundred", "large", "large-piece", "nonsense"],
    )
    async def test_who_leaves_is_noticed_whatever_waits_behind(
        self, server: Server, http: httpx.AsyncClient, path: str, body: dict[str, Any], behind: bytes
    ) -> None:
        user = f"behind-{len(behind)}-{path}-{body.get('stream')}"
        async with wire(server) as connection:
            await connection.send(request("POST", path, {**body, "user_id": user}), behind)
            job = await begun(http, user)
        await left(http, job)
        assert await streams(http) == 0

    async def test_answers_come_in_the_order_of_the_requests(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(
                request("POST", "/v1/generate", generate(tokens=5, stream=True)),
                request("POST", "/v1/generate", generate(tokens=3)),
                request("GET", "/nothing"),
                chunked("POST", "/v1/generate", generate("synthetic", 2)),
                request("GET", "/healthz"),
            )
            assert b'"status":"completed"' in await (await connection.answer()).body()
            assert (await (await connection.answer()).json())["text"] == text_of(3)
            missing = await connection.answer()
            assert (missing.status, (await missing.json())["error"]["code"]) == (404, "not_found")
            assert (await (await connection.answer()).json())["text"] == text_of(2)
            assert await (await connection.answer()).json() == ALIVE
            await connection.send(request("GET", "/healthz"))
            assert (await connection.answer()).status == 200

    @pytest.mark.parametrize("count", [40, 5000])
    async def test_what_waits_is_bounded_and_the_rest_is_told_to_ask_again(self, server: Server, count: int) -> None:
        """By the closed connection: a client that pipelines expects that (RFC 9112, 9.3.2)."""
        async with wire(server) as connection:
            await connection.send(
                request("POST", "/v1/generate", generate(tokens=25)), request("GET", "/healthz") * count
            )
            assert (await (await connection.answer()).json())["text"] == text_of(25)
            for number in range(16):
                answer = await connection.answer()
                assert await answer.json() == ALIVE
                assert ("connection" in answer.headers) == (number == 15)
            assert await connection.closed() == b""

    async def test_a_large_body_behind_a_wait_is_not_taken(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(
                request("POST", "/v1/generate", generate(tokens=25)),
                request("GET", "/healthz"),
                request("POST", "/v1/generate", generate(tokens=1, prompt="x" * 200_000)),
            )
            assert (await (await connection.answer()).json())["text"] == text_of(25)
            assert await (await connection.answer()).json() == ALIVE
            assert await connection.closed() == b""

    async def test_what_is_nonsense_is_refused_in_its_turn(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(request("POST", "/v1/generate", generate(tokens=5)), b"nonsense\r\n\r\n")
            assert (await (await connection.answer()).json())["text"] == text_of(5)
            answer = await connection.answer()
            check_refusal(answer, await answer.json(), 400)
            assert await connection.closed() == b""


UPGRADES = {
    "h2c": ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAA"),
    "websocket": (
        "Connection: keep-alive, Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ),
    "unknown": ("connection: upgrade", "upgrade: TLS/1.3, something"),
}


class TestUpgrade:
    """RFC 9110, 7.8: a server that does not switch handles the request as if it had not been asked to."""

    @pytest.mark.parametrize("headers", UPGRADES.values(), ids=UPGRADES)
    @pytest.mark.parametrize("write", [request, chunked], ids=["length", "chunked"])
    async def test_the_request_is_handled_as_usual(
        self, server: Server, write: Callable[..., bytes], headers: tuple[str, ...]
    ) -> None:
        async with wire(server) as connection:
            for _ in range(2):  # the connection goes on
                await connection.send(write("POST", "/v1/generate", generate("synthetic", 3), *headers))
                answer = await connection.answer()
                assert answer.status == 200
                assert "upgrade" not in answer.headers
                assert (await answer.json())["text"] == text_of(3)
            await connection.send(write("POST", "/v1/generate", generate("synthetic", 3, stream=True), *headers))
            assert b'"status":"completed"' in await (await connection.answer()).body()
            await connection.send(request("GET", "/healthz", None, *headers), request("GET", "/healthz"))
            assert await (await connection.answer()).json() == ALIVE
            assert await (await connection.answer()).json() == ALIVE

    @pytest.mark.parametrize("headers", UPGRADES.values(), ids=UPGRADES)
    async def test_byte_by_byte(self, server: Server, headers: tuple[str, ...]) -> None:
        async with wire(server) as connection:
            for byte in request("POST", "/v1/generate", generate("synthetic", 2), *headers, "X-Request-Id: drops"):
                await connection.send(bytes([byte]))
            answer = await connection.answer()
            assert answer.headers["x-request-id"] == "drops"
            assert (await answer.json())["text"] == text_of(2)

    async def test_a_body_larger_than_a_read(self, server: Server) -> None:
        prompt = "x" * 900_000
        async with wire(server) as connection:
            await connection.send(
                request("POST", "/v1/generate", generate("synthetic", 2, prompt=prompt), *UPGRADES["h2c"])
            )
            answer = await connection.answer()
            assert answer.status == 200, await answer.json()

    async def test_the_log_says_nothing_of_it(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        said = server.errors()
        async with wire(server) as connection:
            for headers in UPGRADES.values():
                await connection.send(request("GET", "/v1/jobs", None, *headers))
                assert (await (await connection.answer()).json())["data"] == []
                await connection.send(request("GET", "/ws", None, *headers))
                answer = await connection.answer()
                assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")
        warned = [line for line in server.log_lines() if line["level"] not in ("info", "debug")]
        assert warned == []
        assert server.errors() == said

    async def test_connect_is_refused(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\nwhatever")
            answer = await connection.answer()
            check_refusal(answer, await answer.json(), 405)
            assert await connection.closed() == b""

    async def test_curl_http2(self, server: Server, tmp_path: Path) -> None:
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        command = ["curl", "-sS", "--http2", "--fail-with-body", "-d", json.dumps(generate("synthetic", 3))]
        url = f"{server.url}/v1/generate"
        curl = await asyncio.create_subprocess_exec(*command, url, "--next", "-sS", f"{server.url}/healthz", stdout=-1)
        out, _ = await curl.communicate()
        assert curl.returncode == 0
        first, second = out.decode().split("}{")
        assert json.loads(first + "}")["text"] == text_of(3)
        assert json.loads("{" + second) == ALIVE


class TestHTTP10:
    """Bodies end with the connection: 1.0 knows no chunks (RFC 9112, 6.1); Host may be missing (3.2)."""

    async def test_a_json_answer(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(request("GET", "/healthz", version="1.0", host=None))
            answer = await connection.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await answer.json() == ALIVE
            assert await connection.closed() == b""

    @pytest.mark.parametrize("path", ["/v1/generate", "/generate_stream", "/v1/completions"])
    async def test_a_stream(self, server: Server, path: str) -> None:
        fields = {} if path == "/generate_stream" else {"stream": True}
        async with wire(server) as connection:
            await connection.send(request("POST", path, generate(tokens=4, **fields), version="1.0", host=None))
            answer = await connection.answer()
            assert answer.status == 200
            assert "transfer-encoding" not in answer.headers
            assert "content-length" not in answer.headers
            body = (await connection.closed()).replace(b": ping\n", b"")
            assert re.match(rb"(retry: 1000\n)?(id: 1\n)?(event: token\n)?data: ", body), body
            assert body.endswith(b"\n\n")

    async def test_other_answers_without_a_length(self, server: Server, http: httpx.AsyncClient) -> None:
        form = {"file": ("a.jsonl", b'{"x":1}\n' * 50_000), "purpose": (None, "batch")}
        file = (await http.post("/v1/files", files=form)).json()["id"]
        async with wire(server) as connection:
            await connection.send(request("GET", f"/v1/files/{file}/content", version="1.0"))
            assert await (await connection.answer()).body() == b'{"x":1}\n' * 50_000
        async with wire(server) as connection:
            await connection.send(request("HEAD", "/v1/events?user_id=u", version="1.0"))
            await connection.answer()
            assert await connection.closed() == b""

    async def test_it_waits_for_no_100(self, server: Server) -> None:
        """Which 1.0 does not know (RFC 9110, 10.1.1)."""
        sent = request("POST", "/v1/generate", generate("synthetic", 2), "Expect: 100-continue", version="1.0")
        async with wire(server) as connection:
            await connection.send(sent)
            assert (await connection.closed()).startswith(b"HTTP/1.1 200 ")

    @pytest.mark.parametrize("version", ["0.9", "2.0", "3.0", "1.2"])
    async def test_other_versions_are_refused(self, server: Server, version: str) -> None:
        async with wire(server) as connection:
            await connection.send(request("GET", "/healthz", version=version))
            answer = await connection.answer()
            check_refusal(answer, await answer.json(), 505 if version in ("0.9", "2.0") else 400)

    @pytest.mark.parametrize("headers", [(), ("Host: localhost", "Host: localhost"), ("Host: a b",), ("Host:",)])
    async def test_of_1_1_one_host_is_required(self, server: Server, headers: tuple[str, ...]) -> None:
        async with wire(server) as connection:
            await connection.send(request("GET", "/healthz", None, *headers, host=None))
            answer = await connection.answer()
            check_refusal(answer, await answer.json(), 400)

    async def test_a_foreign_host_is_refused_of_1_0_too(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(request("GET", "/healthz", version="1.0", host="evil.example"))
            answer = await connection.answer()
            check_refusal(answer, await answer.json(), 400)


class TestHalfClose:
    """A client that has sent all that it has to say may close its side, and gets its answer."""

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    @pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
    async def test_it_gets_its_answer(self, server: Server, version: str, stream: bool) -> None:
        async with wire(server) as connection:
            await connection.send(request("POST", "/v1/generate", generate(tokens=100, stream=stream), version=version))
            connection.writer.write_eof()
            answer = await connection.answer()
            assert answer.status == 200
            body = await answer.body()
            if stream:
                assert b'"status":"completed"' in body
                assert body.count(b"event: token") == 100
            else:
                assert json.loads(body)["text"] == text_of(100)
            assert await connection.closed() == b""

    async def test_all_that_was_asked_is_answered(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(
                request("POST", "/v1/generate", generate(tokens=20)),
                request("GET", "/healthz"),
                request("POST", "/v1/generate", generate(tokens=2)),
                request("GET", "/healthz")[:12],
            )
            connection.writer.write_eof()
            assert (await (await connection.answer()).json())["text"] == text_of(20)
            assert await (await connection.answer()).json() == ALIVE
            assert (await (await connection.answer()).json())["text"] == text_of(2)
            assert await connection.closed() == b""

    async def test_a_request_that_is_not_complete_is_refused(self, server: Server) -> None:
        for sent in (
            request("POST", "/v1/generate", generate())[:-5],
            chunked("POST", "/v1/generate", generate())[:-9],
        ):
            async with wire(server) as connection:
                await connection.send(sent)
                connection.writer.write_eof()
                answer = await connection.answer()
                assert "incomplete" in check_refusal(answer, await answer.json(), 400)

    async def test_an_idle_connection_is_closed(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(request("GET", "/healthz"))
            await (await connection.answer()).body()
            connection.writer.write_eof()
            assert await connection.closed() == b""

    @pytest.mark.parametrize(("path", "body"), LONG[:2])
    async def test_who_closes_it_later_is_noticed(
        self, server: Server, http: httpx.AsyncClient, path: str, body: dict[str, Any]
    ) -> None:
        user = f"half-{path}-{body.get('stream')}"
        async with wire(server) as connection:
            await connection.send(request("POST", path, {**body, "user_id": user}))
            job = await begun(http, user)
            connection.writer.write_eof()
            await running(http, job, tokens=20)
        await left(http, job)

    @pytest.mark.parametrize(("path", "body"), LONG)
    async def test_who_closes_both_sides_is_noticed(
        self, server: Server, http: httpx.AsyncClient, path: str, body: dict[str, Any]
    ) -> None:
        """In order, with a FIN: it looks like a half close until something is sent."""
        user = f"full-{path}-{body.get('stream')}"
        async with wire(server) as connection:
            await connection.send(request("POST", path, {**body, "user_id": user}))
            job = await begun(http, user)
            connection.writer.close()
            await connection.writer.wait_closed()
            await left(http, job)


class TestMalformed:
    @pytest.mark.parametrize(
        "sent",
        [
            b"nonsense\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET /healthz\r\n\r\n",
            b"G\x00T /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
            b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ],
    )  # fmt: skip
    async def test_it_is_a_400_in_the_one_shape(self, server: Server, sent: bytes) -> None:
        async with wire(server) as connection:
            await connection.send(sent)
            answer = await connection.answer()
            assert check_refusal(answer, await answer.json(), answer.status)
            assert answer.status in (400, 405, 505)
            assert answer.headers["connection"] == "close"
            assert await connection.closed() == b""

    async def test_it_is_counted(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        for _ in range(3):
            async with wire(server) as connection:
                await connection.send(b"nonsense\r\n\r\n")
                await connection.closed()
        assert 'llm_gateway_errors_total{code="invalid_request"} 3.0' in server.get("/metrics").text
        assert [line for line in server.log_lines() if line["level"] not in ("info", "debug")] == []

    @pytest.mark.parametrize(
        "piece", [b"X-Many: %s\r\n" % (b"x" * 100), b"x" * 1000, b"\r\nX: y"], ids=["headers", "header", "folds"]
    )
    async def test_a_head_without_end_is_a_431(self, server: Server, piece: bytes) -> None:
        async with wire(server) as connection:
            with contextlib.suppress(ConnectionError):
                await connection.send(
                    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ", piece * (400_000 // len(piece))
                )
            answer = await connection.answer()
            assert "65536 bytes" in check_refusal(answer, await answer.json(), 431)

    async def test_trailers_without_end_are_refused_and_are_no_headers(self, server: Server) -> None:
        sent = chunked("POST", "/v1/generate", generate("synthetic", 2))
        async with wire(server) as connection:
            await connection.send(sent[:-2], b"X-Request-Id: trailed\r\n\r\n")
            answer = await connection.answer()
            assert answer.headers["x-request-id"] != "trailed"
            assert (await answer.json())["text"] == text_of(2)
        async with wire(server) as connection:
            await connection.send(sent[:-2], b"X-Many: x\r\n" * 100_000)
            answer = await connection.answer()
            assert "incomplete" in check_refusal(answer, await answer.json(), 400)

    async def test_the_length_of_a_head_that_is_taken(self, server: Server) -> None:
        async with wire(server) as connection:
            await connection.send(request("GET", "/healthz", None, f"X: {'x' * 60_000}"))
            assert await (await connection.answer()).json() == ALIVE

    async def test_a_target_with_a_scheme(self, server: Server) -> None:
        """RFC 9112, 3.2.2: a server takes the absolute form."""
        async with wire(server) as connection:
            await connection.send(request("GET", f"{server.url}/healthz"), request("HEAD", server.url))
            assert await (await connection.answer()).json() == ALIVE
            assert (await connection.answer()).headers["content-type"].startswith("text/html")
