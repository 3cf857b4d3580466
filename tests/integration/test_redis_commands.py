"""``penstock gateway``, ``penstock worker`` and ``penstock serve`` over a real Redis, each a real process."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest

from penstock.testing.oracle import check_log, check_views
from tests.support.api import check_error, ended, poll, running, submit, text_of
from tests.support.fleet import GatewayProcess, WorkerProcess
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Process, Server, wait_for
from tests.support.sse import Event, Stream, open_stream

AnyProcess = TypeVar("AnyProcess", bound=Process)
Make = Callable[..., Any]

_numbers = itertools.count()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Make a Redis of the test's own, with *config*; it is not started."""
    servers: list[RedisServer] = []

    def make(config: dict[str, str] | None = None) -> RedisServer:
        servers.append(RedisServer(tmp_path / f"redis{len(servers)}", config))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Start a process of that class; it ends with the test."""
    processes: list[Process] = []

    def make(kind: type[AnyProcess], *arguments: Any, ready: bool = True, **settings: Any) -> AnyProcess:
        process = kind(tmp_path_factory.mktemp(kind.command), *arguments, **settings)
        processes.append(process)
        if ready:
            process.start()
        else:
            process.spawn()
        return process

    yield make
    for process in processes:
        process.stop()


class Fleet:
    """Two gateways and two workers over one Redis, under a prefix of their own."""

    def __init__(self, folder: Path, redis: RedisServer, **settings: object) -> None:
        shared = {"broker_prefix": f"fleet{next(_numbers)}", **settings}
        self.gateways = [GatewayProcess(folder / f"gateway{i}", redis.url, settings=shared) for i in range(2)]
        self.workers = [
            WorkerProcess(
                folder / f"worker{i}", redis.url, rate=50, settings={**shared, "log_dir": f"{folder}/logs{i}"}
            )
            for i in range(2)
        ]
        self.folder = folder

    @property
    def processes(self) -> list[Process]:
        return [*self.gateways, *self.workers]

    def start(self) -> Fleet:
        for process in self.processes:
            process.spawn()
        for process in self.processes:
            process.wait_ready()
        for gateway in self.gateways:
            wait_for(gateway.is_served, "a worker behind the gateway")
        return self

    def stop(self) -> None:
        for process in self.processes:
            process.stop()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"), redis)
    try:
        yield made.start()
    finally:
        made.stop()


def client(process: Process) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=process.url, timeout=PATIENCE, trust_env=False)


def events_of(gateway: GatewayProcess, job: str, after: int | None = None) -> Any:
    return open_stream(f"{gateway.url}/v1/jobs/{job}/events", after=after)


async def stop(process: Process) -> None:
    """SIGTERM; it must end with 0."""
    assert await asyncio.to_thread(process.terminate) == 0, process.tail()


def samples(process: Process) -> dict[str, float]:
    """What /metrics says, by name with labels."""
    text = process.get("/metrics").text
    return {match[1]: float(match[2]) for match in re.finditer(r"^([a-z_0-9]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


# ---------------------------------------------------------------------------------------------- many of each


class TestFleet:
    async def test_what_one_gateway_takes_every_gateway_streams(self, fleet: Fleet) -> None:
        one, other = fleet.gateways
        async with client(one) as http:
            job = await submit(http, max_tokens=20)
            async with await events_of(one, job) as here, await events_of(other, job) as there:
                views = [await here.rest(), await there.rest()]
            for view in views:
                assert len(check_log(view, job=job)) == 20
            check_views(views)
        async with client(other) as http:
            view = await ended(http, job)
            assert (view["status"], view["result"]["text"]) == ("completed", text_of(20))

    async def test_a_resume_goes_to_any_gateway(self, fleet: Fleet) -> None:
        one, other = fleet.gateways
        async with client(one) as http:
            job = await submit(http, max_tokens=20)
        async with await events_of(one, job) as stream:
            head = await stream.take(7)
        async with await events_of(other, job, after=7) as stream:
            check_log([*head, *await stream.rest()], job=job)

    async def test_a_users_events_tell_of_jobs_of_every_gateway(self, fleet: Fleet) -> None:
        one, other = fleet.gateways
        async with client(one) as http, await open_stream(f"{other.url}/v1/events?user_id=fleet") as stream:
            jobs = {await submit(http, user_id="fleet", max_tokens=3) for _ in range(3)}
            told = await stream.take(5)
        # The cursor of one gateway is one of every gateway.
        async with await open_stream(f"{one.url}/v1/events?user_id=fleet", after=told[-1].id) as stream:
            told += await stream.take(4 * len(jobs) - len(told))
        assert {event.data["job_id"] for event in told} == jobs
        assert sum(event.event == "job_complete" for event in told) == len(jobs)
        assert len({(event.data["job_id"], event.data.get("position")) for event in told}) == len(told), "none twice"

    async def test_the_openai_sdk_on_both(self, fleet: Fleet) -> None:
        for gateway in fleet.gateways:
            async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as sdk:
                [served] = [model.id async for model in sdk.models.list()]
                reply = await sdk.chat.completions.create(
                    model=served, messages=[{"role": "user", "content": "x"}], max_tokens=4
                )
                assert reply.choices[0].message.content == text_of(4)
                chunks = await sdk.completions.create(model=served, prompt="x", max_tokens=4, stream=True)
                assert "".join([chunk.choices[0].text async for chunk in chunks]) == text_of(4)

    async def test_a_job_is_cancelled_from_anywhere(self, fleet: Fleet) -> None:
        one, other = fleet.gateways
        async with client(one) as here, client(other) as there:
            job = await submit(here, max_tokens=100_000)
            await running(there, job)
            assert (await there.post(f"/v1/jobs/{job}/cancel")).json()["status"] == "cancelled"
            assert (await ended(here, job))["status"] == "cancelled"

    async def test_health_tells_the_tier_and_every_worker(self, fleet: Fleet) -> None:
        for gateway in fleet.gateways:
            async with client(gateway) as http:
                view = (
                    await poll(lambda http=http: http.get("/health"), lambda r: len(r.json()["workers"]) == 2)
                ).json()
            assert view["status"] == "ok"
            assert view["broker"] == {
                "kind": "redis",
                "connected": True,
                "durability": "strict (Redis, appendfsync always)",
            }
            assert {worker["state"] for worker in view["workers"]} == {"ready"}
            assert len({worker["id"] for worker in view["workers"]}) == 2

    async def test_each_process_exports_and_logs_what_it_did(self, fleet: Fleet) -> None:
        gateway = fleet.gateways[0]
        before = [samples(process) for process in fleet.processes]
        async with client(gateway) as http:
            reply = await http.post("/v1/generate", json={"prompt": "x", "max_tokens": 9})
            assert reply.status_code == 200, reply.text
            job = reply.headers["x-penstock-job"]
        after = [samples(process) for process in fleet.processes]
        grown = [
            {name: value - old.get(name, 0.0) for name, value in new.items()}
            for old, new in zip(before, after, strict=True)
        ]
        assert [each.get("llm_gateway_tokens_generated_total") for each in grown] == [9, 0, None, None]
        assert sorted(each["llm_worker_tokens_generated_total"] for each in grown[2:]) == [0, 9]
        model = '{gen_ai_request_model="synthetic"}'
        counted = [each.get(f"gen_ai_server_time_to_first_token_seconds_count{model}", 0) for each in grown]
        assert sorted(counted) == [0, 0, 0, 1]
        for process, seen in zip(fleet.processes, after, strict=True):
            foreign = "llm_worker_" if process in fleet.gateways else "llm_gateway_"
            assert not [name for name in seen if name.startswith(foreign)]
            assert seen["llm_process_memory_bytes"] > 1e6
        told = [
            line["job_id"]
            for process in fleet.processes
            for line in process.log_lines()
            if line["event"] == "job_ended"
        ]
        assert told.count(job) == 1
        logs = [(fleet.folder / f"logs{i}" / "llm_requests.log").read_text() for i in range(2)]
        assert "".join(logs).count(f"task_id={job} status=success prompt_tokens=1 completion_tokens=9") == 1

    def test_a_worker_answers_for_itself_and_nothing_else(self, fleet: Fleet) -> None:
        worker = fleet.workers[0]
        assert worker.get("/healthz").json() == {"status": "ok"}
        assert worker.get("/readyz").json() == {"status": "ready"}
        assert worker.get("/metrics").headers["content-type"].startswith("text/plain")
        assert worker.get("/v1/jobs").status_code == 404


# ---------------------------------------------------------------------------------------------- one of them leaves


class TestLeaving:
    async def test_a_worker_that_leaves_hands_its_jobs_over(self, redis: RedisServer, start: Make) -> None:
        """Its leases are given back, not left to run out: they would be counted as lost, and the readers would wait."""
        settings = {"broker_prefix": "handover", "drain_timeout": 0.3}
        gateway = start(GatewayProcess, redis.url, settings=settings)
        first = start(WorkerProcess, redis.url, rate=25, settings=settings)
        wait_for(gateway.is_served, "the first worker")
        async with client(gateway) as http, AsyncExitStack() as stack:
            jobs = [await submit(http, max_tokens=600) for _ in range(4)]
            streams = [await stack.enter_async_context(await events_of(gateway, job)) for job in jobs]
            heads = [await stream.take(5) for stream in streams]
            start(WorkerProcess, redis.url, rate=1000, settings=settings)  # the first has half a minute to do
            await stop(first)
            for job, stream, head in zip(jobs, streams, heads, strict=True):
                tokens = check_log([*head, *await rest(stream)], job=job)
                assert [token.position for token in tokens] == [*range(1, 601)]
                assert {token.attempt for token in tokens} == {1, 2}
                assert (await ended(http, job))["status"] == "completed"
            health = (await http.get("/health")).json()
        assert health["queue"]["leases_lost"] == 0
        assert health["queue"]["jobs"]["completed"] == len(jobs)

    async def test_a_worker_that_leaves_lets_short_jobs_finish(self, redis: RedisServer, start: Make) -> None:
        settings = {"broker_prefix": "finish", "drain_timeout": 30}
        gateway = start(GatewayProcess, redis.url, settings=settings)
        worker = start(WorkerProcess, redis.url, rate=25, settings=settings)
        wait_for(gateway.is_served, "the worker")
        async with client(gateway) as http:
            job = await submit(http, max_tokens=25)
            await running(http, job)
            await stop(worker)
            view = await ended(http, job)
        assert (view["status"], view["attempt"], view["result"]["text"]) == ("completed", 1, text_of(25))

    async def test_a_killed_worker_costs_no_token(self, redis: RedisServer, start: Make) -> None:
        settings = {"broker_prefix": "killed", "lease_ttl": 1.0}
        gateway = start(GatewayProcess, redis.url, settings=settings)
        first = start(WorkerProcess, redis.url, rate=25, settings=settings)
        wait_for(gateway.is_served, "the first worker")
        async with client(gateway) as http:
            job = await submit(http, max_tokens=600)
            async with await events_of(gateway, job) as stream:
                head = await stream.take(5)
                start(WorkerProcess, redis.url, rate=1000, settings=settings)
                await asyncio.to_thread(first.kill9)
                tokens = check_log([*head, *await rest(stream)], job=job)
        assert {token.attempt for token in tokens} == {1, 2}

    async def test_a_gateway_that_leaves_sends_its_readers_to_the_other(self, redis: RedisServer, start: Make) -> None:
        settings = {"broker_prefix": "leaving"}
        start(WorkerProcess, redis.url, rate=25, settings=settings)
        one, other = (start(GatewayProcess, redis.url, settings=settings) for _ in range(2))
        wait_for(one.is_served, "the worker")
        async with client(one) as http:
            job = await submit(http, max_tokens=60)
        async with await events_of(one, job) as stream:
            events = await stream.take(5)
            await stop(one)
            events += await rest(stream)
            assert not stream.torn
            assert stream.parser.retry is not None
        assert events[-1].event == "token"
        async with await events_of(other, job, after=len(events)) as stream:
            tokens = check_log([*events, *await rest(stream)], job=job)
        assert {token.attempt for token in tokens} == {1}


async def rest(stream: Stream) -> list[Event]:
    return await stream.rest(2 * PATIENCE)


# ---------------------------------------------------------------------------------------------- in any order


class TestStart:
    async def test_a_gateway_comes_up_before_any_worker(self, redis: RedisServer, start: Make) -> None:
        settings = {"broker_prefix": "early"}
        gateway = start(GatewayProcess, redis.url, settings=settings)
        async with client(gateway) as http:
            ready = await http.get("/readyz")
            assert (ready.status_code, ready.json()["checks"]) == (
                503,
                {"broker": True, "worker": False, "accepting": True},
            )
            assert (await http.get("/v1/models")).json()["data"] == []
            for named in ({}, {"model": "synthetic"}):  # which may exist: nobody can say yet
                refused = await http.post("/v1/jobs", json={"prompt": "x", **named})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
            start(WorkerProcess, redis.url, settings=settings)
            await poll(lambda: http.get("/readyz"), lambda reply: reply.status_code == 200)
            assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["synthetic"]

    async def test_a_gateway_takes_jobs_for_a_model_that_it_is_told_of(self, redis: RedisServer, start: Make) -> None:
        settings = {"broker_prefix": "told"}
        gateway = start(GatewayProcess, redis.url, settings=settings, args=["--model", "synthetic"])
        async with client(gateway) as http:
            job = await submit(http, max_tokens=3)
            start(WorkerProcess, redis.url, settings=settings)
            assert (await ended(http, job))["result"]["text"] == text_of(3)

    async def test_everything_in_one_process_over_redis(self, redis: RedisServer, start: Make) -> None:
        settings = {"broker_prefix": "one", "broker": redis.url}
        server = start(Server, rate=0, settings=settings)
        gateway = start(GatewayProcess, redis.url, settings={"broker_prefix": "one"})
        assert f"broker {redis.url} (strict)" in server.errors()
        async with client(server) as http:
            job = await submit(http, max_tokens=5)
            assert (await ended(http, job))["status"] == "completed"
        async with await events_of(gateway, job) as stream:
            check_log(await stream.rest(), job=job)
        await stop(server)
        assert not server.data_dir.exists()

    @pytest.mark.parametrize("kind", [GatewayProcess, WorkerProcess])
    async def test_redis_may_come_later(
        self, kind: type[Process], make_redis: Callable[..., RedisServer], start: Make
    ) -> None:
        redis = make_redis()
        process = start(kind, redis.url, ready=False)
        wait_for(lambda: process.errors().count("Trying again in") >= 2, "two attempts")
        with pytest.raises(httpx.ConnectError):  # a proxy goes elsewhere
            process.get("/healthz")
        await asyncio.to_thread(redis.start)
        await asyncio.to_thread(process.wait_ready)
        await stop(process)

    @pytest.mark.parametrize("kind", [GatewayProcess, WorkerProcess])
    async def test_who_waits_for_redis_can_be_ended(
        self, kind: type[Process], make_redis: Callable[..., RedisServer], start: Make
    ) -> None:
        process = start(kind, make_redis().url, ready=False)
        wait_for(lambda: "Trying again in" in process.errors(), "an attempt")
        await stop(process)
        assert "Traceback" not in process.errors() + process.output()

    async def test_a_gateway_says_that_its_broker_is_away(
        self, make_redis: Callable[..., RedisServer], start: Make
    ) -> None:
        """Alive, not ready, and refusing; all by itself well again."""
        redis = make_redis()
        redis.start()
        gateway = start(GatewayProcess, redis.url, settings={"broker_timeout": 0.5}, args=["--model", "synthetic"])
        async with client(gateway) as http:

            async def reachable() -> bool:
                return bool((await http.get("/readyz")).json()["checks"]["broker"])

            await poll(reachable, bool)
            redis.kill9()
            await poll(reachable, lambda seen: not seen)
            assert (await http.get("/readyz")).status_code == 503
            alive = await http.get("/healthz")
            assert (alive.status_code, alive.json()) == (200, {"status": "ok", "broker": "unavailable"})
            view = (await http.get("/health")).json()
            assert (view["status"], view["broker"]["connected"]) == ("degraded", False)
            check_error(await http.post("/v1/jobs", json={"prompt": "x"}), 503, "broker_unavailable")
            redis.start()
            await poll(reachable, bool)
            assert (await http.get("/healthz")).json()["broker"] == "connected"
            assert (await http.post("/v1/jobs", json={"prompt": "x"})).status_code == 202

    async def test_a_worker_is_ended_while_redis_is_away(
        self, make_redis: Callable[..., RedisServer], start: Make
    ) -> None:
        redis = make_redis()
        redis.start()
        settings = {"drain_timeout": 0.2, "broker_timeout": 0.5}
        gateway = start(GatewayProcess, redis.url, settings=settings)
        worker = start(WorkerProcess, redis.url, rate=10, settings=settings)
        wait_for(gateway.is_served, "the worker")
        async with client(gateway) as http:
            job = await submit(http, max_tokens=100)
            await running(http, job)
            redis.kill9()
            await stop(worker)
            redis.start()
            start(WorkerProcess, redis.url, rate=0, settings=settings)
            async with await events_of(gateway, job) as stream:
                check_log(await rest(stream), job=job)


# ---------------------------------------------------------------------------------------------- what cannot work


def refused(command: str, *arguments: str) -> str:
    """Run a command that must end at once with exit code 2; what it says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    done = subprocess.run(
        [sys.executable, "-m", "penstock", command, *arguments],
        env=clean,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    return said


PORTS = {"gateway": "--port", "worker": "--metrics-port"}
COMMANDS = pytest.mark.parametrize("command", ["gateway", "worker"])


class TestRefused:
    @COMMANDS
    def test_the_embedded_broker_cannot_be_shared(self, command: str) -> None:
        said = refused(command)
        assert "--broker redis://" in said
        assert "penstock serve" in said

    @COMMANDS
    @pytest.mark.parametrize(
        ("config", "hint"),
        [
            ({"appendfsync": "everysec"}, "CONFIG SET appendfsync always"),
            ({"appendonly": "no"}, "CONFIG SET appendonly yes"),
            ({"maxmemory-policy": "allkeys-lru"}, "CONFIG SET maxmemory-policy noeviction"),
        ],
    )
    def test_a_redis_that_does_not_keep_what_is_promised(
        self, command: str, config: dict[str, str], hint: str, make_redis: Callable[..., RedisServer]
    ) -> None:
        redis = make_redis(config)
        redis.start()
        assert hint in refused(command, "--broker", redis.url, PORTS[command], "0")

    def test_what_fast_allows(self, make_redis: Callable[..., RedisServer], start: Make) -> None:
        redis = make_redis({"appendfsync": "everysec"})
        redis.start()
        gateway = start(GatewayProcess, redis.url, settings={"durability": "fast"})
        assert gateway.get("/health").json()["broker"]["durability"].startswith("fast ")

    @COMMANDS
    def test_a_wrong_password_is_told_and_never_shown(
        self, command: str, make_redis: Callable[..., RedisServer], start: Make
    ) -> None:
        locked = make_redis({"requirepass": "open-sesame"})
        locked.start()
        address = f"127.0.0.1:{locked.port}/0"
        said = refused(command, "--broker", f"redis://:wr0ng-pw@{address}", PORTS[command], "0")
        assert "password" in said
        assert "wr0ng-pw" not in said
        kind = GatewayProcess if command == "gateway" else WorkerProcess
        process = start(kind, f"redis://:open-sesame@{address}")
        said = process.output() + process.errors()
        assert f"broker redis://:***@{address}" in said
        assert "open-sesame" not in said

    @COMMANDS
    def test_a_taken_port(self, command: str, redis: RedisServer, start: Make) -> None:
        gateway = start(GatewayProcess, redis.url, settings={"broker_prefix": "port"})
        said = refused(command, "--broker", redis.url, PORTS[command], str(gateway.port))
        assert f"Cannot listen on 127.0.0.1:{gateway.port}" in said
        assert PORTS[command] in said

    @COMMANDS
    @pytest.mark.parametrize(
        ("broker", "hint"),
        [
            ("http://localhost", "begins with redis://"),
            ("localhost:6379", "begins with redis://"),
            ("redis://:se/cret@localhost", "special characters"),
            ("redis://:secret@localhost:port", "redis://[user:password@]host[:port]"),
        ],
    )
    def test_what_is_no_broker(self, command: str, broker: str, hint: str) -> None:
        said = refused(command, "--broker", broker)
        assert hint in said
        assert "secret" not in said
        assert "se/cret" not in said

    async def test_a_second_signal_ends_a_drain(self, redis: RedisServer, start: Make) -> None:
        settings = {"broker_prefix": "twice", "drain_timeout": 60}
        gateway = start(GatewayProcess, redis.url, settings=settings)
        worker = start(WorkerProcess, redis.url, rate=1, settings=settings)
        wait_for(gateway.is_served, "the worker")
        async with client(gateway) as http:
            job = await submit(http, max_tokens=100)
            await running(http, job)
            worker.signal(signal.SIGTERM)
            await poll(lambda: http.get("/health"), lambda r: r.json()["workers"][0]["state"] == "draining")
            assert worker.get("/readyz").status_code == 503
            worker.signal(signal.SIGTERM)
            assert worker.process is not None
            assert await asyncio.to_thread(worker.process.wait, PATIENCE) == 1
