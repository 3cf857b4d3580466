"""Several models under one roof, as clients and operators see them: real servers, synthetic engines, one real model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock import Client
from penstock.core.errors import Forbidden, ModelLoadError, ModelNotFound, Unsupported
from penstock.core.ports import LoadProgress
from penstock.testing.oracle import check_log
from tests.support import tiny_models as tiny
from tests.support.api import check_error, ended, poll, running, submit, text_of
from tests.support.fleet import GatewayProcess, WorkerProcess
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Process, Server, model, wait_for
from tests.support.sse import open_stream

Make = Callable[..., Server]


def client(server: Process) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False)


def demand(name: str, standby: int = 0, **options: object) -> Any:
    return {**model(name, **options), "load": "demand", "standby": standby}


def unbuildable(folder: Path) -> Any:
    """A model on demand whose architecture nobody knows: that is found when it is loaded."""
    tiny.llama(folder, architectures=["OddForCausalLM"])
    return {"name": "bad", "engine": "openvino", "path": str(folder), "load": "demand"}


async def states(http: httpx.AsyncClient) -> dict[str, str]:
    return {each["id"]: each["state"] for each in (await http.get("/v1/models")).json()["data"]}


def penstock(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return subprocess.run(
        [sys.executable, "-m", "penstock", *arguments],
        capture_output=True, text=True, timeout=PATIENCE, env=environment,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- a budget for one of two


class TestBudget:
    async def test_jobs_of_two_models_where_one_fits_all_complete(self, make_server: Make) -> None:
        server = make_server(
            models=[demand(name, rate=200, memory_mb=100, load_seconds=1) for name in ("a", "b")],
            settings={"memory_budget": "200MB", "swap_after": 0.5},
        )
        async with client(server) as http:
            assert (await http.get("/readyz")).status_code == 200  # nothing is loaded, but would be
            assert await states(http) == {"a": "unloaded", "b": "unloaded"}
            seen: set[tuple[str, str]] = set()

            async def watch() -> None:
                while True:
                    now = await states(http)
                    seen.update(now.items())
                    assert list(now.values()).count("ready") <= 1

            async with asyncio.TaskGroup() as group:
                watching = group.create_task(watch())  # before the first job: it is answered while its model loads
                jobs = [await submit(http, model=name, max_tokens=20) for _ in range(20) for name in "ab"]
                for job in jobs:
                    assert (await ended(http, job))["status"] == "completed"
                watching.cancel()
            assert {(name, state) for name in "ab" for state in ("unloaded", "loading", "ready")} <= seen
            for job in jobs:
                async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
                    assert len(check_log(await stream.rest(), job=job)) == 20
            assert len(server.engine_pids()) == 1

    async def test_health_tells_what_a_model_waits_for(self, make_server: Make) -> None:
        server = make_server(
            models=[demand("a", rate=20, memory_mb=100), demand("b", memory_mb=100)],
            settings={"memory_budget": "200MB", "swap_after": 60},
        )
        async with client(server) as http:
            first = await submit(http, model="a", max_tokens=1000)
            await running(http, first)
            second = await submit(http, model="b", max_tokens=2)

            async def worker(name: str) -> dict[str, Any]:
                workers = (await http.get("/health")).json()["workers"]
                [found] = [worker for worker in workers if worker["models"] == [name]]
                return found  # type: ignore[no-any-return]

            seen = await poll(lambda: worker("b"), lambda seen: seen["detail"])
            assert (seen["state"], seen["on_demand"]) == ("unloaded", True)
            assert "waits for memory" in seen["detail"]
            assert "a hold the budget of 200 MB" in seen["detail"]
            seen = await poll(lambda: worker("a"), lambda seen: seen["memory_bytes"])
            assert seen["memory_bytes"] > 100_000_000
            entry = {each["id"]: each for each in (await http.get("/health")).json()["models"]}["b"]
            assert (entry["state"], entry["ready"], entry["queued"]) == ("unloaded", True, 1)
            await http.post(f"/v1/jobs/{first}/cancel")
            assert (await ended(http, second))["status"] == "completed"

    async def test_the_real_model_comes_back(self, make_server: Make) -> None:
        """The model in the box makes room and returns; greedy, its reply is the same."""
        server = make_server(
            models=[{"name": "millrace", "load": "demand"}, demand("b", memory_mb=200)],
            settings={"memory_budget": "280MB"},
        )
        body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        async with client(server) as http:
            first = (await http.post("/v1/generate", json={**body, "model": "millrace"})).json()
            assert (await http.get("/v1/models/millrace")).json()["precision"] == "f32"
            assert (await http.post("/v1/generate", json={**body, "model": "b"})).status_code == 200
            # At the latest when it is measured what the other one took.
            await poll(lambda: states(http), lambda seen: seen["millrace"] == "unloaded")
            assert (await http.get("/v1/models/millrace")).json()["context_length"] > 0  # still known
            again = (await http.post("/v1/generate", json={**body, "model": "millrace"})).json()
            assert again["text"] == first["text"]


# ---------------------------------------------------------------------------------------------- what is wrong


class TestErrors:
    async def test_unknown_is_404_at_once_and_what_cannot_be_loaded_fails_the_job(
        self, make_server: Make, tmp_path: Path
    ) -> None:
        server = make_server(models=[model(rate=50), unbuildable(tmp_path)])
        async with client(server) as http:
            check_error(await http.post("/v1/jobs", json={"prompt": "x", "model": "x"}), 404, "model_not_found")
            job = await ended(http, await submit(http, model="bad"))
            assert (job["status"], job["error"]["code"]) == ("failed", "model_load_error")
            assert "OddForCausalLM" in job["error"]["message"]
            assert (await states(http))["bad"] == "failed"
            [worker] = [one for one in (await http.get("/health")).json()["workers"] if one["models"] == ["bad"]]
            assert "OddForCausalLM" in worker["error"]["message"]
            check_error(await http.post("/v1/generate", json={"prompt": "x", "model": "bad"}), 500, "model_load_error")
            assert (await http.post("/v1/generate", json={"prompt": "x", "model": "synthetic"})).status_code == 200

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            ({"engine": "openvino", "path": "/no/such/folder"}, "There is no model '/no/such/folder'"),
            ({"engine": "openvino", "path": "."}, "has neither openvino_model.xml nor"),
            ({"engine": "openvino", "precisoin": "f32"}, "did you mean 'precision'"),
            ({"engine": "llama", "path": "none.gguf"}, "There is no file none.gguf"),
            ({"engine": "llama", "path": "server.err"}, "is not a GGUF file"),
            ({"engine": "transformers", "path": "."}, "needs config.json and"),
            ({"engine": "vllm", "max_num_seqs": "many"}, "max_num_seqs is a whole number, at least 0"),
            ({"engine": "upstream", "path": "ftp://x"}, "has the form http"),
            ({"engine": "upstream", "path": "http://127.0.0.1:9", "key_env": "NO_SUCH_ONE"}, "NO_SUCH_ONE"),
            ({"engine": "synthetic", "rats": 1}, "has no option 'rats'"),
            ({"engine": "openvin"}, "engine 'openvin'"),
        ],
    )
    def test_what_can_be_told_before_loading_is_told_before_listening(
        self, make_server: Make, bad: dict[str, Any], words: str
    ) -> None:
        """With another model that is well, and would be ready first."""
        server = make_server(models=[model("good"), model("bad", **bad)], start=False)
        server.spawn()
        assert server.process is not None
        assert server.process.wait(PATIENCE) == 1
        assert words in server.errors()
        assert "listens" not in server.errors()
        assert "Traceback" not in server.errors()

    async def test_a_process_that_dies_answers_who_is_connected(self, make_server: Make) -> None:
        """As at SIGTERM: streams end with a time to come back, replies are JSON, and jobs are given back."""
        asked, answer = asyncio.Event(), asyncio.Event()

        async def behind(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.set()
            await answer.wait()
            writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(behind, "127.0.0.1", 0) as upstream:
            url = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}"
            server = make_server(
                models=[model("good", rate=50), model("bad", engine="upstream", path=url)],
                settings={"drain_timeout": 0.3},
                start=False,
            )
            await asyncio.to_thread(server.spawn)
            await asyncio.wait_for(asked.wait(), PATIENCE)
            async with client(server) as http:
                await poll(lambda: http.get("/readyz"), lambda reply: reply.status_code == 200)
                waiting = asyncio.create_task(http.post("/v1/generate", json={"prompt": "x", "max_tokens": 5000}))
                job = await submit(http, max_tokens=400)
                async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
                    before = await stream.take(3)
                    answer.set()
                    before += await stream.rest()
                    assert not stream.torn
                    *_, last = stream.raw.split(b"\n\n")
                    assert re.fullmatch(rb"(: ping\n)*retry: \d+\n", last), last
                check_error(await waiting, 503, "broker_unavailable")
            assert server.process is not None
            assert await asyncio.to_thread(server.process.wait, PATIENCE) == 1
            assert "No upstream server of 'bad' answers" in server.errors()
        server.settings["models"] = [model("good", rate=500)]
        await asyncio.to_thread(server.restart)
        async with client(server) as http, await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            tokens = check_log(await stream.rest(), job=job)
            assert (tokens[-1].position, tokens[-1].attempt) == (400, 2)
            assert (await ended(http, job))["status"] == "completed"

    def test_one_of_the_start_that_cannot_be_loaded_ends_the_server(self, make_server: Make) -> None:
        server = make_server(models=[model("bad", rats=1)], start=False)
        server.spawn()
        assert server.process is not None
        assert server.process.wait(PATIENCE) == 1
        assert "has no option 'rats'" in server.errors()


# ---------------------------------------------------------------------------------------------- by hand


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``a`` is loaded at the start, ``b`` on demand, slowly."""
    server = Server(
        tmp_path_factory.mktemp("managed"), models=[model("a", rate=50), demand("b", load_seconds=0.5, rate=50)]
    )
    try:
        yield server.start()
    finally:
        server.stop()


class TestByHand:
    async def test_load_and_unload_in_one_answer(self, managed: Server) -> None:
        async with client(managed) as http:
            for _ in range(2):
                reply = await http.post("/v1/models/b/load")
                assert (reply.status_code, reply.json()["state"]) == (200, "ready")
            assert reply.json() == (await http.get("/v1/models/b")).json()
            assert (await http.post("/v1/models/b/unload", json={})).json()["state"] == "unloaded"
            assert len(managed.engine_pids()) == 1

    async def test_load_and_unload_as_a_stream(self, managed: Server) -> None:
        for verb, end in (("load", "ready"), ("unload", "unloaded")):
            url = f"{managed.url}/v1/models/b/{verb}"
            async with await open_stream(url, method="POST", json_body={"stream": True}) as stream:
                events = await stream.rest()
            assert {event.event for event in events[:-1]} == {"progress"}
            assert all(set(event.data) == {"state", "what", "fraction"} for event in events[:-1])
            assert (events[-1].event, events[-1].data["state"]) == ("done", end)
            if verb == "load":
                fractions = [event.data["fraction"] for event in events[:-1] if event.data["fraction"] is not None]
                assert len(fractions) > 3
                assert fractions == sorted(fractions)

    async def test_an_unload_under_a_running_job_costs_it_nothing(self, managed: Server) -> None:
        async with client(managed) as http:
            job = await submit(http, model="b", max_tokens=400)
            await running(http, job)
            async with await open_stream(f"{managed.url}/v1/jobs/{job}/events") as stream:
                assert (await http.post("/v1/models/b/unload")).status_code == 200
                tokens = check_log(await stream.rest(), job=job)
            assert len(tokens) == 400
            view = await ended(http, job)
            assert (view["status"], view["attempt"]) == ("completed", 2)

    async def test_what_is_refused(self, managed: Server) -> None:
        async with client(managed) as http:
            for verb in ("load", "unload"):
                check_error(await http.post(f"/v1/models/x/{verb}"), 404, "model_not_found")
                check_error(await http.get(f"/v1/models/a/{verb}"), 405, "invalid_request")
                check_error(await http.post(f"/v1/models/a/{verb}", json={"now": 1}), 400, "invalid_request", "now")
                foreign = {"origin": "http://somewhere.example"}
                check_error(await http.post(f"/v1/models/a/{verb}", headers=foreign), 403, "forbidden")
            assert (await states(http))["a"] == "ready"

    def test_the_python_client(self, managed: Server) -> None:
        steps: list[LoadProgress] = []
        with Client(managed.url) as http:
            assert http.unload_model("b").state == "unloaded"
            view = http.load_model("b", steps.append)
            assert (view.state, view.engine) == ("ready", "synthetic")
            assert "seed" in (view.unsupported or ())
            assert any(step.what == "sleeping" for step in steps)
            with pytest.raises(ModelNotFound, match="It has: a, b"):
                http.load_model("x")

    def test_the_command(self, managed: Server) -> None:
        url = ("--url", managed.url)
        result = penstock("models", "unload", "b", *url)
        assert (result.returncode, result.stdout) == (0, "b unloaded\n"), result
        result = penstock("models", "load", "b", *url)
        assert (result.returncode, result.stdout) == (0, "b ready\n"), result
        assert "b: sleeping\n" in result.stderr
        assert "\x1b" not in result.stderr
        for arguments in ([], ["list"]):
            result = penstock("models", *arguments, *url)
            lines = [line.split() for line in result.stdout.splitlines()]
            assert [line[:3] for line in lines[1:]] == [["a", "ready", "synthetic"], ["b", "ready", "synthetic"]]
        assert [each["id"] for each in json.loads(penstock("models", "--json", *url).stdout)] == ["a", "b"]
        result = penstock("models", "load", "x", *url)
        assert (result.returncode, result.stdout) == (1, "")
        assert "This process has no model 'x'" in result.stderr
        assert penstock("models", *url, "load", "b").returncode == 2

    async def test_a_load_that_fails_says_why(self, make_server: Make, tmp_path: Path) -> None:
        server = make_server(models=[model(rate=50), unbuildable(tmp_path)])
        with Client(server.url) as http, pytest.raises(ModelLoadError, match="OddForCausalLM"):
            await asyncio.to_thread(http.load_model, "bad")


# ---------------------------------------------------------------------------------------------- spares


class TestStandby:
    async def test_the_engine_is_killed_and_every_stream_goes_on(self, make_server: Make) -> None:
        """With loads that take for ever, it is the spare that goes on, or nobody."""
        server = make_server(models=[{**model(rate=50, load_seconds=3), "standby": 1}])
        wait_for(lambda: len(server.engine_pids()) == 2, "the spare")
        async with client(server) as http:

            async def spares() -> int:
                return int((await http.get("/health")).json()["workers"][0]["standby"])

            await poll(spares, lambda count: count == 1)
            jobs = [await submit(http, max_tokens=100) for _ in range(8)]
            streams = [await open_stream(f"{server.url}/v1/jobs/{job}/events") for job in jobs]
            await running(http, jobs[0], 20)
            first, spare = server.engine_pids()
            os.kill(first, signal.SIGKILL)
            for job, stream in zip(jobs, streams, strict=True):
                async with stream:
                    assert len(check_log(await stream.rest(), job=job)) == 100
            assert spare in server.engine_pids()
            events = [line["event"] for line in server.log_lines()]
            assert "engine.spare_taken" in events
            assert "engine_restart_failed" not in events
            await poll(spares, lambda count: count == 1)  # and there is another one

    async def test_a_cold_model_with_a_spare_is_there_at_once(self, make_server: Make) -> None:
        server = make_server(models=[demand("a", standby=1, load_seconds=2)])
        wait_for(server.engine_pids, "the spare")
        async with client(server) as http:
            [worker] = await poll(
                lambda: _workers(http), lambda workers: workers[0]["standby"] == 1 and workers[0]["state"] == "unloaded"
            )
            [spare] = server.engine_pids()
            job = await ended(http, await submit(http, model="a"))
            assert job["result"]["text"] == text_of(5)
            assert spare in server.engine_pids()
            assert worker["on_demand"]


async def _workers(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    return (await http.get("/health")).json()["workers"]  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------- over Redis


class TestFleet:
    @pytest.fixture
    def fleet(self, redis_server: RedisServer, tmp_path: Path) -> Iterator[tuple[GatewayProcess, WorkerProcess]]:
        """A gateway that was told of no model, and a worker with one on demand."""
        shared = {"broker_prefix": f"models-{tmp_path.name}"}
        gateway = GatewayProcess(tmp_path / "gateway", redis_server.url, settings=shared)
        worker = WorkerProcess(
            tmp_path / "worker", redis_server.url, models=[demand("b", rate=100, load_seconds=0.5)], settings=shared
        )
        try:
            yield gateway.start(), worker
        finally:
            worker.stop()
            gateway.stop()

    async def test_queued_then_served(self, fleet: tuple[GatewayProcess, WorkerProcess]) -> None:
        gateway, worker = fleet
        async with client(gateway) as http:
            assert (await http.get("/readyz")).status_code == 503
            check_error(await http.post("/v1/jobs", json={"prompt": "x", "model": "b"}), 503, "no_worker")
            worker.start()  # ready without having loaded anything
            assert worker.engine_pids() == []
            await poll(lambda: states(http), lambda seen: seen == {"b": "unloaded"})
            assert (await http.get("/readyz")).status_code == 200
            reply = await http.post("/v1/jobs", json={"prompt": "x", "max_tokens": 5})  # it is the default, too
            assert reply.json()["status"] == "queued"
            view = await ended(http, reply.json()["id"])
            assert view["result"]["text"] == text_of(5)
            await poll(lambda: states(http), lambda seen: seen == {"b": "ready"})

    async def test_the_worker_is_asked_to_load_and_not_the_gateway(
        self, fleet: tuple[GatewayProcess, WorkerProcess]
    ) -> None:
        gateway, worker = fleet
        worker.start()
        async with client(gateway) as http:
            await poll(lambda: states(http), lambda seen: "b" in seen)
            error = check_error(await http.post("/v1/models/b/load"), 501, "unsupported")
            assert "metrics port" in error["message"]
            with Client(gateway.url) as there, pytest.raises(Unsupported):
                await asyncio.to_thread(there.load_model, "b")
            with Client(worker.url) as there:
                assert (await asyncio.to_thread(there.load_model, "b")).state == "ready"
                assert [view.state for view in await asyncio.to_thread(there.models)] == ["ready"]
                await poll(lambda: states(http), lambda seen: seen == {"b": "ready"})
                assert (await asyncio.to_thread(there.unload_model, "b")).state == "unloaded"
            assert 'llm_model_state{model="b",state="unloaded"} 1.0' in worker.get("/metrics").text

    async def test_not_on_an_address_that_others_reach(self, fleet: tuple[GatewayProcess, WorkerProcess]) -> None:
        """Metrics may be public; who may load and unload is another matter."""
        _, worker = fleet
        worker.settings["metrics_host"] = "0.0.0.0"
        worker.start()
        assert worker.get("/metrics").status_code == 200
        with Client(worker.url) as there, pytest.raises(Forbidden, match="INSECURE_PUBLIC"):
            await asyncio.to_thread(there.load_model, "b")
