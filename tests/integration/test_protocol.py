"""``python -m penstock.testing``: our server keeps the rules of docs/protocol.md, and a broken one is found out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

from penstock import Client
from penstock.testing.protocol import RULES, Outcome, check
from tests.support.fleet import GatewayProcess, WorkerProcess
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Server, free_port, wait_for

#: What the synthetic engine does not show.
SKIPPED = {"3.6": "the model gives no log-probabilities"}


@pytest.mark.parametrize("rule", [rule.id for rule in RULES])
async def test_our_server_keeps_every_rule(server: Server, rule: str) -> None:
    (outcome,) = [outcome async for outcome in check(server.url, model="paced", only=[rule], patience=PATIENCE)]
    assert (outcome.outcome, outcome.why) == (("skipped", SKIPPED[rule]) if rule in SKIPPED else ("passed", ""))


async def test_nothing_is_left_of_a_check(server: Server) -> None:
    def jobs() -> set[str]:
        with Client(server.url) as client:
            return {job.id for job in client.jobs()}

    before = jobs()
    outcomes = [outcome async for outcome in check(server.url, model="synthetic", only=["2", "3.1", "5.1", "6"])]
    assert {outcome.outcome for outcome in outcomes} == {"passed"}
    assert jobs() <= before


async def test_a_gateway_over_redis_keeps_them_too(tmp_path: Path) -> None:
    settings = {"heartbeat": 0.3, "disconnect_grace": 0.3}
    redis = RedisServer(tmp_path / "redis")
    gateway = GatewayProcess(tmp_path / "gateway", redis.url, settings=settings)
    worker = WorkerProcess(tmp_path / "worker", redis.url, rate=200, settings=settings)
    try:
        for process in (redis, gateway, worker):
            process.start()
        wait_for(gateway.is_served, "the worker's model to be known")
        found = [outcome async for outcome in check(gateway.url, patience=PATIENCE)]
    finally:
        for process in (worker, gateway, redis):
            process.stop()
    assert [outcome for outcome in found if outcome.outcome != "passed" and outcome.rule not in SKIPPED] == []
    assert len(found) == len(RULES)


# ---------------------------------------------------------------------------------------------- broken servers

OnBlock = Callable[[int, bytes], bytes]
OnRequest = Callable[[httpx.Request], None]
OnResponse = Callable[[httpx.Response], httpx.Response]


class Blocks(httpx.AsyncByteStream):
    """A stream whose blocks go through *on_block*, with their number from 1."""

    def __init__(self, inner: httpx.AsyncByteStream, on_block: OnBlock) -> None:
        self._inner = inner
        self._on_block = on_block

    async def __aiter__(self) -> AsyncIterator[bytes]:
        rest, number = b"", 0
        async for piece in self._inner:
            *blocks, rest = (rest + piece).split(b"\n\n")
            for block in blocks:
                number += 1
                yield self._on_block(number, block + b"\n\n")
            if rest == b": ping\n":
                yield rest
                rest = b""
        yield rest

    async def aclose(self) -> None:
        await self._inner.aclose()


class Broken(httpx.AsyncBaseTransport):
    """The real server behind a proxy with one fault."""

    def __init__(
        self,
        *,
        block: OnBlock | None = None,
        request: OnRequest | None = None,
        response: OnResponse | None = None,
    ) -> None:
        self._server = httpx.AsyncHTTPTransport()
        self._block = block
        self._request = request
        self._response = response

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._request is not None:
            self._request(request)
        response = await self._server.handle_async_request(request)
        if self._block is not None and response.headers.get("content-type", "").startswith("text/event-stream"):
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = Blocks(response.stream, self._block)
        if self._response is not None:
            response = self._response(response)
        return response

    async def aclose(self) -> None:
        await self._server.aclose()


class Repeating(Broken):
    """A server that begins a resumed stream with the first event twice."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        resumed = "last-event-id" in request.headers
        self._block = (lambda n, block: 2 * block if n == 1 else block) if resumed else None
        return await super().handle_async_request(request)


def at(number: int, change: Callable[[bytes], bytes]) -> Broken:
    """*change* one block of every stream."""
    return Broken(block=lambda n, block: change(block) if n == number else block)


def without(header: str) -> Broken:
    """A server that does not look at a header."""
    return Broken(request=lambda request: request.headers.pop(header, None) and None)


def html(response: httpx.Response) -> httpx.Response:
    return response if response.is_success else httpx.Response(response.status_code, html="<h1>Oops</h1>")


def always_a_body(response: httpx.Response) -> httpx.Response:
    return httpx.Response(200, stream=httpx.ByteStream(b"")) if response.status_code == 204 else response


def nameless(response: httpx.Response) -> httpx.Response:
    response.headers.pop("x-penstock-job", None)
    return response


def in_one_shape_of_its_own(response: httpx.Response) -> httpx.Response:
    return response if response.is_success else httpx.Response(response.status_code, json={"detail": "Oops"})


FAULTS = {
    "duplicates an event": (lambda: at(2, lambda block: 2 * block), ["1.1", "1.2", "3.1"]),
    "drops an event": (lambda: at(2, lambda block: b""), ["1.1", "1.2", "5.5"]),
    "drops the terminal event": (
        lambda: Broken(block=lambda n, block: b"" if b"event: done" in block else block),
        ["1.1", "3.terminal"],
    ),
    "goes on after the end": (
        lambda: Broken(block=lambda n, block: 2 * block if b"event: done" in block else block),
        ["1.1"],
    ),
    "mixes jobs up": (lambda: at(2, lambda block: block.replace(b':"job_', b':"job_f00d')), ["1.1", "3.1"]),
    "lets an attempt fall": (
        lambda: at(1, lambda block: block.replace(b'"attempt":1', b'"attempt":2')),
        ["1.1", "1.4"],
    ),
    "changes a text": (lambda: at(2, lambda block: block.replace(b'"token":"', b'"token":"!')), ["1.5", "6.5"]),
    "writes raw UTF-8": (lambda: at(1, lambda block: block.replace(b'"token":"', '"token":"é'.encode())), ["3.2"]),
    "repeats the retry": (lambda: at(2, lambda block: b"retry: 1000\n" + block), ["3.3"]),
    "sends a retry of its own": (lambda: at(1, lambda block: b"retry: 1000\n\n" + block[12:]), ["3.3"]),
    "ends lines like Windows": (
        lambda: Broken(block=lambda n, block: block.replace(b"\n", b"\r\n")),
        ["3.1", "3.4"],
    ),
    "puts a blank line behind a heartbeat": (lambda: at(2, lambda block: b": ping\n\n" + block), ["3.1"]),
    "breaks a block with a heartbeat": (
        lambda: at(2, lambda block: block.replace(b"\ndata", b"\n: ping\ndata")),
        ["3.1"],
    ),
    "answers failures in HTML": (lambda: Broken(response=html), ["4.4", "api.errors", "2.idempotency.3", "6.4"]),
    "answers failures in a shape of its own": (lambda: Broken(response=in_one_shape_of_its_own), ["4.4", "api.errors"]),
    "leaves a field out": (
        lambda: Broken(block=lambda n, block: block.replace(b',"token_id"', b',"id_of_token"')),
        ["api.types"],
    ),
    "knows no 204": (lambda: Broken(response=always_a_body), ["4.2", "6.responses.3"]),
    "does not name the job": (lambda: Broken(response=nameless), ["3.headers", "4.6", "6.5"]),
    "ignores keys": (lambda: without("idempotency-key"), ["2.idempotency.1", "2.idempotency.2"]),
    "ignores Last-Event-ID": (lambda: without("last-event-id"), ["4.1", "4.2", "4.3", "6.responses.2"]),
    "repeats an event on resuming": (Repeating, ["4.1", "4.6", "5.3", "6.responses.2"]),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_server_is_found_out_that(server: Server, fault: str) -> None:
    make, broken = FAULTS[fault]
    found = [
        outcome
        async for outcome in check(server.url, model="synthetic", only=broken, patience=PATIENCE, transport=make())
    ]
    assert {outcome.rule: outcome.outcome for outcome in found} == dict.fromkeys(broken, "failed")
    assert all(outcome.why for outcome in found)


# ---------------------------------------------------------------------------------------------- the command


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock.testing", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_the_command_reports_a_line_a_rule(server: Server) -> None:
    done = run(server.url, "--only", "1", "--only", "4.2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rules = [*(rule.id for rule in RULES if rule.id.startswith("1.")), "4.2"]
    assert [line.split()[:2] for line in lines[:-1]] == [[rule, "passed"] for rule in rules]
    assert lines[-1] == f"{len(rules)} passed, 0 failed, 0 skipped"


def test_the_command_fails_for_what_is_no_penstock_server() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<h1>It works!</h1>")

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Page) as page:
        thread = Thread(target=page.serve_forever)
        thread.start()
        try:
            done = run(f"http://127.0.0.1:{page.server_port}", "--only", "1.1", "--json")
        finally:
            page.shutdown()
            thread.join()
    assert done.returncode == 1, done.stdout + done.stderr
    outcome = Outcome(**json.loads(done.stdout))
    assert (outcome.rule, outcome.outcome) == ("1.1", "failed")
    assert "text/html" in outcome.why


def test_the_command_says_in_one_line_that_nobody_listens() -> None:
    done = run(f"http://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Cannot reach http://127.0.0.1:")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("args", "word"), [(["--only", "99"], "99"), (["--header", "nonsense"], "nonsense")])
def test_the_command_refuses_what_it_does_not_know(args: list[str], word: str) -> None:
    done = run("http://127.0.0.1:9", *args)
    assert done.returncode == 2
    assert word in done.stderr
