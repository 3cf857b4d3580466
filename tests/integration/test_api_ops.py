"""Liveness, readiness, metrics, logs, the API's own description, and the server's life (SPEC 3, 4, 6, 9, 10)."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from penstock.api.stats import Stats
from penstock.core.trace import TraceContext
from penstock.testing.oracle import check_log
from tests.support.api import check_error, ended, poll, running, submit, until
from tests.support.clock import SteppedClock
from tests.support.server import PATIENCE, Server, wait_for
from tests.support.sse import open_stream


def client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False)


class TestHealth:
    async def test_live_and_ready(self, http: httpx.AsyncClient) -> None:
        alive = await http.get("/healthz")
        assert (alive.status_code, alive.json()) == (200, {"status": "ok", "broker": "connected"})
        reply = await http.get("/readyz")
        assert reply.status_code == 200
        assert reply.json()["checks"] == {"broker": True, "worker": True, "accepting": True}

    async def test_health_tells_the_whole_picture(self, http: httpx.AsyncClient) -> None:
        view = (await http.get("/health")).json()
        assert view["status"] == "ok"
        assert view["broker"]["connected"] is True
        assert "synchronous=FULL" in view["broker"]["durability"]
        assert {model["id"] for model in view["models"]} == {"synthetic", "paced", "crawl"}
        assert all(model["ready"] for model in view["models"])
        assert len(view["workers"]) == 3
        for worker in view["workers"]:
            assert worker["state"] == "ready"
            assert worker["slots"] >= 1
        assert set(view["queue"]["jobs"]) == {"queued", "running", "completed", "failed", "cancelled", "expired"}

    async def test_not_ready_while_the_engine_is_down(self, make_server: Callable[..., Server]) -> None:
        """Live all the time; ready again by itself."""
        server = make_server(rate=50)
        first = psutil.Process(server.engine_pid())
        first.kill()
        engine = psutil.Process(
            wait_for(lambda: [pid for pid in server.engine_pids() if pid != first.pid], "a new engine")[0]
        )
        engine.suspend()  # the restart takes as long as we like
        async with client(server) as http:
            reply = await poll(lambda: http.get("/readyz"), lambda reply: reply.status_code != 200)
            assert reply.status_code == 503
            assert reply.json()["checks"]["worker"] is False
            assert int(reply.headers["retry-after"]) >= 1
            assert (await http.get("/healthz")).status_code == 200
            job = await submit(http, max_tokens=2)  # taken all the same: it waits for the engine
            engine.resume()
            await poll(lambda: http.get("/readyz"), lambda reply: reply.status_code == 200)
            assert (await ended(http, job))["status"] == "completed"


class TestModels:
    async def test_the_list(self, http: httpx.AsyncClient) -> None:
        view = (await http.get("/v1/models")).json()
        assert view["object"] == "list"
        assert [model["id"] for model in view["data"]] == ["synthetic", "paced", "crawl"]
        for model in view["data"]:
            assert model["object"] == "model"
            assert isinstance(model["created"], int)
            assert model["owned_by"]
            assert (await http.get(f"/v1/models/{model['id']}")).json() == model

    async def test_an_unknown_one(self, http: httpx.AsyncClient) -> None:
        for name in ("nobody", "a/b", "..%2fetc"):
            check_error(await http.get(f"/v1/models/{name}"), 404, "model_not_found")


METRICS = {
    "llm_gateway_request_count_total": ["status"],
    "llm_gateway_inflight_requests": [],
    "llm_gateway_batch_size": [],
    "llm_gateway_request_latency_seconds_bucket": ["route", "le"],
    "llm_gateway_request_latency_p50_seconds": [],
    "llm_gateway_request_latency_p95_seconds": [],
    "llm_gateway_request_latency_p99_seconds": [],
    "llm_gateway_tokens_generated_total": [],
    "llm_gateway_errors_total": ["code"],
    "llm_worker_batch_size": [],
    "llm_worker_tokens_generated_total": [],
    "llm_worker_errors_total": [],
    "llm_model_state": ["model", "state"],
    "llm_model_memory_bytes": ["model"],
    "llm_model_standby": ["model"],
    "gen_ai_server_request_duration_seconds_bucket": ["le"],
    "gen_ai_server_time_to_first_token_seconds_bucket": ["le"],
    "gen_ai_server_time_per_output_token_seconds_bucket": ["le"],
    "llm_queue_depth": ["model", "priority"],
    "llm_queue_wait_seconds_bucket": ["le"],
    "llm_jobs": ["status"],
    "llm_sse_connections": [],
    "llm_leases_lost_total": [],
    "llm_process_cpu_percent": [],
    "llm_process_memory_bytes": [],
}


def samples(text: str) -> dict[str, dict[str, float]]:
    """Metric name → labels as written → value."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z_0-9]+)(\{.*\})? ([0-9.eE+\-]+|NaN|\+Inf)( \d+)?", line)
            assert match, line
            found.setdefault(match[1], {})[match[2] or ""] = float(match[3])
    return found


class TestMetrics:
    async def test_an_engine_that_dies_and_loads_again_is_counted(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        psutil.Process(server.engine_pid()).kill()
        async with client(server) as http:
            await ended(http, await submit(http))  # by the next engine
            found = samples((await http.get("/metrics")).text)
        assert found["penstock_engine_deaths_total"]['{model="synthetic"}'] == 1
        assert found["penstock_engine_load_seconds_count"]['{model="synthetic"}'] == 2

    async def test_the_figures_of_the_page(self, server: Server, http: httpx.AsyncClient) -> None:
        before = msgspec.json.decode((await http.get("/v1/stats")).content, type=Stats)
        await ended(http, await submit(http, max_tokens=7))
        after = msgspec.json.decode((await http.get("/v1/stats")).content, type=Stats)
        assert after.tokens >= before.tokens + 7
        assert before.time_to_first_token is not None
        assert after.time_to_first_token is not None
        assert sum(after.time_to_first_token.counts) > sum(before.time_to_first_token.counts)
        assert sum(after.request_duration.counts) > sum(before.request_duration.counts)
        assert after.uptime > before.uptime

    async def test_every_name_is_there_and_counts(self, server: Server, http: httpx.AsyncClient) -> None:
        before = samples((await http.get("/metrics")).text)
        await ended(http, await submit(http, max_tokens=7))
        await http.post("/v1/generate", json={"prompt": "x", "max_tokens": 1})
        await http.get("/v1/jobs/none")
        blockers = [await submit(http, model="crawl", max_tokens=100_000) for _ in range(3)]
        for blocker in blockers[:2]:
            await running(http, blocker)
        async with await open_stream(f"{server.url}/v1/jobs/{blockers[0]}/events") as stream:
            await stream.take(1)
            async with asyncio.timeout(PATIENCE):  # the queue is looked at once a second
                while True:
                    reply = await http.get("/metrics")
                    after = samples(reply.text)
                    if after.get("llm_queue_depth") and after["llm_jobs"]['{status="running"}'] >= 2:
                        break
                    await asyncio.sleep(0.1)
        for blocker in blockers:
            await http.post(f"/v1/jobs/{blocker}/cancel")
        assert reply.headers["content-type"].startswith("text/plain")
        for name, labels in METRICS.items():
            assert name in after, name
            for label in labels:
                assert all(f'{label}="' in written for written in after[name]), name
        assert after["llm_queue_depth"]['{model="crawl",priority="normal"}'] == 1
        assert after["llm_sse_connections"][""] >= 1
        grown = after["llm_gateway_tokens_generated_total"][""] - before["llm_gateway_tokens_generated_total"][""]
        assert grown >= 7
        code = '{code="not_found"}'
        errors = after["llm_gateway_errors_total"]
        assert errors[code] >= before.get("llm_gateway_errors_total", {}).get(code, 0) + 1
        assert after["llm_process_memory_bytes"][""] > 1e6
        counts = "llm_gateway_request_count_total"
        assert after[counts]['{status="202"}'] >= before[counts].get('{status="202"}', 0) + 4

    async def test_the_latency_is_that_of_generation(self, make_server: Callable[..., Server]) -> None:
        """Not of the probes, scrapes and lists around it, however many there are."""
        server = make_server(rate=10)
        name = "llm_gateway_request_latency_seconds_count"
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            chat = {"model": "synthetic", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
            for path, body in (
                ("/v1/generate", {"prompt": "x", "max_tokens": 3}),
                ("/v1/chat/completions", {**chat, "stream": True}),
                ("/v1/messages", chat),
                ("/generate", {"prompts": ["x", "y"], "max_tokens": 3}),
            ):
                assert (await http.post(path, json=body)).status_code == 200
            job = (await http.post("/generate", json={"prompt": "x", "max_tokens": 3})).json()["task_id"]
            for _ in range(50):
                for path in ("/healthz", "/readyz", "/metrics", "/v1/jobs", f"/v1/jobs/{job}", "/nothing", "/"):
                    await http.get(path)
                await http.post("/v1/jobs", json={"prompt": "x", "max_tokens": 1})
            found = samples((await http.get("/metrics")).text)
        assert found[name] == {
            f'{{route="{route}"}}': 1.0
            for route in ("/v1/generate", "/v1/chat/completions", "/v1/messages", "/generate")
        }
        assert all(found[f"llm_gateway_request_latency_p{percent}_seconds"][""] > 0.1 for percent in (50, 95, 99))

    async def test_every_refusal_counts(self, http: httpx.AsyncClient) -> None:
        """Also those that no route of ours answers."""
        upload = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", b"0123456789")}}
        file = (await http.post("/v1/files", **upload)).json()["id"]
        for method, path, headers, status, code in (
            ("GET", "/nothing/here", {}, 404, "not_found"),
            ("PUT", "/v1/jobs", {}, 405, "invalid_request"),
            ("POST", "/v1/jobs", {"Origin": "https://elsewhere.example"}, 403, "forbidden"),
            ("GET", "/v1/models", {"Host": "elsewhere.example"}, 400, "invalid_request"),
            ("GET", f"/v1/files/{file}/content", {"Range": "bytes=10-"}, 416, "invalid_request"),
        ):
            label = f'{{code="{code}"}}'
            before = samples((await http.get("/metrics")).text).get("llm_gateway_errors_total", {})
            reply = await http.request(method, path, headers=headers)
            check_error(reply, status, code)
            after = samples((await http.get("/metrics")).text)["llm_gateway_errors_total"]
            assert after[label] == before.get(label, 0) + 1, path


class TestClock:
    @pytest.mark.parametrize("step", [-3600, 3600])
    async def test_that_is_set_while_jobs_run_changes_no_duration(
        self, make_server: Callable[..., Server], tmp_path: Path, step: int
    ) -> None:
        clock = SteppedClock(tmp_path, "server")
        server = make_server(rate=20, options={"slots": 1}, settings={"log_dir": str(tmp_path / "log")}, start=False)
        server.extra_env = clock.environment
        server.start()
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            began = time.monotonic()
            runs = await submit(http, max_tokens=20, deadline=60)
            await running(http, runs)
            waits = await submit(http, max_tokens=5)
            clock.step(step)
            views = [await ended(http, job) for job in (runs, waits)]
            views.append(await ended(http, await submit(http, max_tokens=1)))
            lasted = time.monotonic() - began
            for view in views:
                assert (view["status"], view["attempt"]) == ("completed", 1), "no lease ran out, nor a deadline"
                for name in ("queue_wait_time", "processing_time", "total_time", "time_to_first_token"):
                    # Its clock goes back to the one on the wall at a twentieth of its pace.
                    assert 0 <= view["timings"][name] <= 1.1 * lasted, (name, view["timings"])
            assert views[0]["timings"]["processing_time"] >= 0.9 * 19 / 20
            assert views[1]["timings"]["queue_wait_time"] > 0
            found = samples((await http.get("/metrics")).text)
            for name in ("gen_ai_server_request_duration_seconds_sum", "llm_queue_wait_seconds_sum"):
                assert 0 <= sum(found[name].values()) <= 3.3 * lasted
            log = (tmp_path / "log" / "llm_requests.log").read_text()
            times = [float(text) for text in re.findall(r"(?:processing_time|total_time|queue_wait)=(\S+)s", log)]
            assert len(times) == 9
            assert all(0 <= seconds <= 1.1 * lasted for seconds in times)

    async def test_that_is_set_back_between_two_lives_makes_none_negative(
        self, make_server: Callable[..., Server], tmp_path: Path
    ) -> None:
        clock = SteppedClock(tmp_path, "server")
        server = make_server(rate=20, start=False)
        server.extra_env = clock.environment
        server.start()
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            job = await submit(http, max_tokens=60)
            await running(http, job)
            server.kill9()
            clock.step(-3600)
            server.restart()
            view = await ended(http, job)
            assert view["result"]["text"].startswith("1@1 ")
            assert all(value >= 0 for value in view["timings"].values() if value is not None), view["timings"]
            found = samples((await http.get("/metrics")).text)
            assert all(value >= 0 for name in found for value in found[name].values() if name.endswith("_sum"))


class TestDescription:
    async def test_openapi_describes_exactly_the_served_routes(self, http: httpx.AsyncClient) -> None:
        from penstock.gateway.app import OPERATIONS

        document = (await http.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.")
        described = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
        about_itself = {("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/metrics")}
        about_itself |= {("GET", "/"), ("GET", "/static/{path}")}
        served = {(each.method, each.path.replace(":path", "")) for each in OPERATIONS if each.method != "*"}
        assert described - about_itself == served - about_itself

    async def test_openapi_is_valid(self, http: httpx.AsyncClient) -> None:
        """What a generator needs: every reference resolves, every operation has responses, parameters match paths."""
        document = (await http.get("/openapi.json")).json()
        text = json.dumps(document)
        for reference in re.findall(r'"\$ref": "([^"]+)"', text):
            node = document
            assert reference.startswith("#/")
            for part in reference[2:].split("/"):
                node = node[part]
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert operation["responses"]
                named = {entry["name"] for entry in operation.get("parameters", []) if entry["in"] == "path"}
                assert named == set(re.findall(r"\{(\w+)\}", path))
        assert set(document["info"]) >= {"title", "version"}

    async def test_the_page_needs_no_network(self, http: httpx.AsyncClient) -> None:
        reply = await http.get("/docs")
        assert reply.headers["content-type"].startswith("text/html")
        assert "/v1/chat/completions" in reply.text
        assert "<script" not in reply.text
        assert "http://" not in reply.text.replace("http://127.0.0.1", "")
        assert "https://" not in reply.text


class TestSigterm:
    async def test_streams_end_with_a_time_to_come_back_and_jobs_go_on_after_the_restart(
        self, make_server: Callable[..., Server]
    ) -> None:
        server = make_server(rate=50, settings={"drain_timeout": 0.2})
        async with client(server) as http:
            job = await submit(http, user_id="u", max_tokens=300)
            body = {
                "model": "synthetic",
                "messages": [{"role": "user", "content": "x"}],
                "stream": True,
                "max_tokens": 300,
            }
            async with (
                await open_stream(f"{server.url}/v1/jobs/{job}/events") as one,
                await open_stream(f"{server.url}/v1/chat/completions", "POST", json_body=body) as two,
                await open_stream(f"{server.url}/v1/events?user_id=u") as three,
            ):
                for stream in (one, two, three):
                    await stream.take(3)
                chat = two.headers["x-penstock-job"]
                before = await one.take(2)
                server.signal(signal.SIGTERM)
                events = {stream: await stream.rest() for stream in (one, two, three)}
                for stream in (one, two, three):
                    assert not stream.torn, "the response must be ended, not cut"
                    *_, last = stream.raw.split(b"\n\n")
                    assert re.fullmatch(rb"(: ping\n)*retry: \d+\n", last), last
                    assert 100 <= int(last.split()[-1]) <= 10_000
                assert server.process is not None
                assert await asyncio.to_thread(server.process.wait, PATIENCE) == 0
        await asyncio.to_thread(server.restart)
        async with client(server) as http:
            last_id = [*before, *events[one]][-1].id
            async with await open_stream(f"{server.url}/v1/jobs/{job}/events", after=last_id) as stream:
                tokens = check_log(await stream.rest(), after=int(last_id or 0), job=job)
            assert tokens[-1].position == 300
            assert tokens[-1].attempt == 2
            # A chat whose server went is no chat that nobody wants: it goes on too, and can be read as a job.
            assert (await ended(http, chat))["status"] == "completed"

    async def test_nothing_is_accepted_any_more(self, make_server: Callable[..., Server]) -> None:
        """While what runs is still being finished."""
        server = make_server(rate=50, settings={"drain_timeout": 30})
        async with client(server) as http:
            await running(http, await submit(http, max_tokens=100_000))
            await http.get("/healthz")  # a connection that is kept
            server.signal(signal.SIGTERM)

            async def refused() -> bool:
                try:
                    reply = await http.post("/v1/jobs", json={"prompt": "x"})
                except httpx.TransportError:
                    return True
                if reply.status_code == 503:
                    check_error(reply, 503, "broker_unavailable")
                    return True
                assert reply.status_code == 202, reply.text
                return False

            await poll(refused, bool)
            assert [await refused() for _ in range(5)] == [True] * 5
            assert server.process is not None
            assert server.process.poll() is None, "it has not gone yet: it refuses"

    async def test_short_jobs_are_finished_first(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50, settings={"drain_timeout": 30})
        async with client(server) as http:
            job = await submit(http, max_tokens=40)
            await running(http, job)
            reply = asyncio.create_task(http.post("/v1/generate", json={"prompt": "x", "max_tokens": 40}))
            await until(http, job, lambda view: view["tokens"] >= 5)
            code = await asyncio.to_thread(server.terminate)
            assert code == 0
            # Who waits for a reply gets it, or is told to come back: never a torn connection.
            answer = await reply
            assert answer.status_code in (200, 503), answer.text
        await asyncio.to_thread(server.restart)
        async with client(server) as http:
            view = await ended(http, job)
            assert view["status"] == "completed"
            assert view["attempt"] == 1, "it was finished before the exit"

    async def test_a_reply_that_would_take_too_long_is_a_503(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50, settings={"drain_timeout": 0.2})
        async with client(server) as http:
            reply = asyncio.create_task(http.post("/v1/generate", json={"prompt": "x", "max_tokens": 100_000}))
            await poll(lambda: http.get("/health"), lambda reply: reply.json()["queue"]["jobs"]["running"])
            assert await asyncio.to_thread(server.terminate) == 0
            answer = await reply
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1

    async def test_idle_streams_do_not_hold_it_up(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50)
        streams = [await open_stream(f"{server.url}/v1/events?user_id=u{number}") for number in range(20)]
        assert await asyncio.to_thread(server.terminate) == 0
        for stream in streams:
            await stream.rest()
            assert not stream.torn
            await stream.__aexit__(None, None, None)

    async def test_sigint_is_the_same(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50)
        server.signal(signal.SIGINT)
        assert server.process is not None
        assert await asyncio.to_thread(server.process.wait, PATIENCE) == 0

    async def test_while_a_model_is_loading(self, make_server: Callable[..., Server]) -> None:
        """A model can take minutes to load or to be fetched: the server can be ended meanwhile."""
        server = make_server(start=False)
        server.spawn()
        engine = psutil.Process(server.engine_pid())
        engine.suspend()  # it will not say that it is ready
        wait_for(lambda: _answers(server), "/healthz")
        server.signal(signal.SIGTERM)
        assert server.process is not None
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "the engine's end")

    async def test_while_the_engine_hangs(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50, settings={"drain_timeout": 0.5})
        async with client(server) as http:
            await running(http, await submit(http, max_tokens=100_000))
        engine = psutil.Process(server.engine_pid())
        engine.suspend()
        server.signal(signal.SIGTERM)
        assert server.process is not None
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "the engine's end")


def _answers(server: Server) -> bool:
    try:
        return server.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


class TestStart:
    def _fails(self, server: Server) -> str:
        """Start a server that cannot; what it says."""
        server.spawn()
        assert server.process is not None
        assert server.process.wait(PATIENCE) not in (0, None)
        said = server.output() + server.errors()
        assert "Traceback" not in said, said
        return said

    def test_a_second_server_on_the_same_data_is_refused(
        self, server: Server, make_server: Callable[..., Server]
    ) -> None:
        said = self._fails(make_server(start=False, data_dir=server.data_dir))
        assert "Another Penstock" in said
        assert str(server.pid) in said
        assert "--data-dir" in said
        assert server.get("/readyz").status_code == 200

    def test_a_taken_port_is_told_at_once(self, server: Server, make_server: Callable[..., Server]) -> None:
        other = make_server(start=False)
        other.port = server.port
        said = self._fails(other)
        assert str(server.port) in said
        assert "--port" in said

    def test_a_data_dir_that_cannot_be_written_is_told(
        self, tmp_path: Path, make_server: Callable[..., Server]
    ) -> None:
        blocker = tmp_path / "file"
        blocker.write_text("x")
        assert str(blocker) in self._fails(make_server(start=False, data_dir=blocker / "data"))

    def test_a_public_address_without_authentication_is_refused(self, make_server: Callable[..., Server]) -> None:
        assert "--insecure-public" in self._fails(make_server(start=False, settings={"host": "0.0.0.0"}))

    def test_an_unknown_setting_names_the_nearest(self, make_server: Callable[..., Server]) -> None:
        said = self._fails(make_server(start=False, settings={"hang_timeuot": 3}))
        assert "PENSTOCK_HANG_TIMEOUT" in said

    def test_an_unknown_engine_and_a_bad_option_are_told(self, make_server: Callable[..., Server]) -> None:
        assert "rats" in self._fails(make_server(start=False, options={"rats": 5}))

    def test_a_server_that_was_killed_leaves_its_data_usable(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        server.kill9()
        server.restart()
        assert server.terminate() == 0


class TestLogs:
    async def test_json_lines_with_fields_and_without_texts(
        self, make_server: Callable[..., Server], tmp_path: Path
    ) -> None:
        secret, files = "ZEBRAPHRASE", tmp_path / "logs"
        server = make_server(rate=0, options={"fail": "OUTCRY"}, settings={"log_dir": str(files), "max_attempts": 0})
        async with client(server) as http:
            headers = {"x-request-id": "req-77", "authorization": "Bearer sk-TOPSECRET"}
            body = {"prompt": f"{secret} one", "max_tokens": 30, "metadata": {"k": secret}, "user_id": "u7"}
            done = (await http.post("/v1/jobs", json=body, headers=headers)).json()["id"]
            await ended(http, done)
            failed = await submit(http, prompt=f"{secret} OUTCRY")
            await ended(http, failed)
            chat = {"model": "synthetic", "messages": [{"role": "user", "content": secret}], "max_tokens": 5}
            await http.post("/v1/chat/completions", json=chat)
            await http.post("/v1/jobs", json={"prompt": secret, "max_tokens": -1})
            await http.post("/v1/jobs", content=secret.encode())
            cancelled = await submit(http, prompt=secret, max_tokens=900_000)
            await http.post(f"/v1/jobs/{cancelled}/cancel")
            psutil.Process(server.engine_pid()).kill()
            await asyncio.to_thread(server.wait_ready)
        assert server.terminate() == 0
        lines = server.log_lines()
        (line,) = [entry for entry in lines if entry.get("job_id") == done and entry["event"] == "job_ended"]
        assert line["tenant"] == "default"
        assert line["request_id"] == "req-77"
        assert line["attempt"] == 1
        assert line["position"] == 30
        assert line["status"] == "completed"
        assert line["level"] == "info"
        assert line["timestamp"]
        (line,) = [entry for entry in lines if entry.get("job_id") == failed and entry["event"] == "job_ended"]
        assert line["error"] == "engine_error"
        assert [entry for entry in lines if entry["event"] == "engine_died"]
        texts = [server.output(), server.errors(), *(path.read_text() for path in files.iterdir())]
        for text in texts:
            assert secret not in text
            assert "TOPSECRET" not in text
            assert "3@1" not in text
        for raw in server.output().splitlines():
            assert not raw.startswith("{") or isinstance(json.loads(raw), dict)

        requests = (files / "llm_requests.log").read_text().splitlines()
        pattern = (
            r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] task_id=(job_\w+) status=(\w+) prompt_tokens=\d+ "
            r"completion_tokens=\d+ tokens_per_sec=\d+\.\d\d "
            r"queue_wait=\d+\.\d\ds processing_time=\d+\.\d\ds total_time=\d+\.\d\ds"
        )
        matches = [re.fullmatch(pattern, entry) for entry in requests]
        assert all(matches), requests
        found = {match[1]: match[2] for match in matches if match}
        assert found[done] == "success"
        assert found[failed] == "engine_error"
        assert found[cancelled] == "cancelled"
        for entry in (files / "app.log").read_text().splitlines():
            json.loads(entry)
        assert "engine_died" in (files / "errors.log").read_text()

    async def test_what_is_told_of_a_job_has_the_trace_of_its_request(self, make_server: Callable[..., Server]) -> None:
        trace = TraceContext.new()
        server = make_server(rate=0, settings={"log_level": "debug"})
        async with client(server) as http:
            body = {"prompt": "x", "max_tokens": 3}
            reply = await http.post("/v1/jobs", json=body, headers={"traceparent": str(trace)})
            await ended(http, reply.json()["id"])
        assert server.terminate() == 0
        (attempt,) = [line for line in server.log_lines() if line["event"] == "job.attempt"]
        told = TraceContext.parse(attempt["trace"])
        assert told is not None
        assert told.trace_id == trace.trace_id
        assert (attempt["outcome"], attempt["attempt"]) == ("completed", 1)

    def test_the_help_is_quick_to_come(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "penstock", "--help"], capture_output=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0
        assert b"serve" in done.stdout


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "TRACE"])
async def test_odd_methods_are_answered(http: httpx.AsyncClient, method: str) -> None:
    for path in ("/v1/jobs", "/healthz", "/v1/chat/completions", "/nothing"):
        reply = await http.request(method, path)
        assert reply.status_code in (200, 404, 405), (method, path, reply.status_code)
