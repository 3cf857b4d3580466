"""The routes of the designs behind Penstock (SPEC section 4)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.ports import ModelInfo, QueuePolicy
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.gateway import Gateway
from penstock.worker.worker import Worker
from tests.support.api import check_error, ended, poll, running, submit, text_of
from tests.support.http import send
from tests.support.server import PATIENCE, Server
from tests.support.sse import open_stream


class CalledVLLM(EngineProcess):
    """The synthetic engine under another name, for a machine without vLLM (a real one: tests/contract)."""

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(msgspec.structs.replace(info, engine="vllm") for info in super().models)


@pytest.fixture
async def vllm(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway with a model on the synthetic engine, its first, and one on an engine that says it is vLLM."""
    broker = EmbeddedBroker(tmp_path, policy=QueuePolicy(max_queued=3, max_attempts=0))
    await broker.open()
    plain = EngineProcess(EngineSpec("synthetic", "plain"))
    served = CalledVLLM(EngineSpec("synthetic", "served", None, {"fail": "unlucky", "slots": "3"}))
    workers = [Worker(broker, engine, claim_wait=0.1) for engine in (plain, served)]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    gateway = Gateway(broker, GatewayConfig(models=("plain",)))
    async with gateway.running():
        async with asyncio.timeout(30):
            while not (gateway.catalogue.ready("plain") and gateway.catalogue.served_by("vllm")):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        transport = httpx.ASGITransport(create_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://penstock", timeout=30) as http:
            yield http
        for worker in workers:
            worker.stop()
        await asyncio.gather(*running)
    await broker.close()


class TestGenerateVLLM:
    async def test_without_a_vllm_worker_it_is_503(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/generate_vllm", json={"prompts": ["a"]})
        check_error(reply, 503, "no_vllm_worker")
        assert int(reply.headers["retry-after"]) >= 1

    async def test_the_prompts_go_to_the_model_that_vllm_serves(self, vllm: httpx.AsyncClient) -> None:
        reply = await vllm.post("/generate_vllm", json={"prompts": ["one", "one two", [7, 7, 7]], "max_tokens": 2})
        assert reply.status_code == 200
        answer = reply.json()
        assert answer["model"] == "served"
        assert [result["usage"]["prompt_tokens"] for result in answer["results"]] == [1, 2, 3], "in the prompts' order"
        for result in answer["results"]:
            assert result["text"] == "1@1 2@1 "
            assert result["finish_reason"] == "length"
            assert (await vllm.get(f"/v1/jobs/{result['job_id']}")).json()["model"] == "served"

    async def test_several_choices(self, vllm: httpx.AsyncClient) -> None:
        reply = await vllm.post("/generate_vllm", json={"prompts": ["a"], "n": 2, "max_tokens": 1})
        (result,) = reply.json()["results"]
        assert result["texts"] == ["1@1 ", "1@1 "]

    async def test_a_prompt_that_fails_leaves_the_others_their_results(self, vllm: httpx.AsyncClient) -> None:
        body = {"prompts": ["fine", "unlucky", "fine"], "max_tokens": 1}
        answer = (await vllm.post("/generate_vllm", json=body)).json()
        assert ["text" in result for result in answer["results"]] == [True, False, True]
        assert answer["results"][1]["error"]["code"] == "engine_error"

    async def test_more_than_the_queue_takes_is_refused_as_a_whole(self, vllm: httpx.AsyncClient) -> None:
        body = {"prompts": ["a"] * 20, "max_tokens": 100_000}
        reply = await vllm.post("/generate_vllm", json=body)
        check_error(reply, 429, "overloaded")
        jobs = (await vllm.get("/v1/jobs")).json()["data"]
        assert jobs
        assert {job["status"] for job in jobs} == {"cancelled"}

    async def test_what_was_refused_can_be_asked_again_under_the_same_key(self, vllm: httpx.AsyncClient) -> None:
        """The prompts that there was room for are not remembered as cancelled."""
        headers = {"idempotency-key": "k"}
        body = {"prompts": ["a"] * 20, "max_tokens": 100_000}
        check_error(await vllm.post("/generate_vllm", json=body, headers=headers), 429, "overloaded")
        assert (await vllm.get("/v1/jobs")).json()["data"] == []
        reply = await vllm.post("/generate_vllm", json={"prompts": ["a", "b"], "max_tokens": 2}, headers=headers)
        assert [result["finish_reason"] for result in reply.json()["results"]] == ["length", "length"]

    async def test_another_engines_model_is_refused(self, vllm: httpx.AsyncClient) -> None:
        reply = await vllm.post("/generate_vllm", json={"prompts": ["a"], "model": "plain"})
        check_error(reply, 400, "invalid_request")
        assert "served" in reply.json()["error"]["message"]

    async def test_the_same_key_gives_the_same_jobs(self, vllm: httpx.AsyncClient) -> None:
        body = {"prompts": ["a", "b"], "max_tokens": 3}
        first, again = [
            (await vllm.post("/generate_vllm", json=body, headers={"idempotency-key": "k"})).json() for _ in range(2)
        ]
        assert first == again
        assert len({result["job_id"] for result in first["results"]}) == 2

    @pytest.mark.parametrize("body", [{}, {"prompts": []}, {"prompts": ["a"] * 257}, {"prompts": ["a"], "x": 1}])
    async def test_bad_bodies(self, vllm: httpx.AsyncClient, body: dict[str, object]) -> None:
        check_error(await vllm.post("/generate_vllm", json=body), 400, "invalid_request")


class TestSubmitJob:
    async def test_every_job_of_a_user_comes_over_one_stream(self, http: httpx.AsyncClient, server: Server) -> None:
        async with await open_stream(f"{server.url}/events?user_id=seed-1") as stream:
            jobs = []
            for prompt in ("one", "two"):
                reply = await http.post("/submit_job?user_id=seed-1", json={"prompt": prompt, "max_tokens": 3})
                assert reply.status_code == 200
                answer = reply.json()
                assert answer == {"received": answer["received"], "msg": prompt}
                jobs.append(answer["received"])
            events = await stream.take(8)
        for job in jobs:
            own = [event for event in events if event.data["job_id"] == job]
            assert [event.event for event in own] == ["token"] * 3 + ["job_complete"]
            assert "".join(event.data["token"] for event in own[:3]) == text_of(3)

    async def test_an_idle_stream_has_a_heartbeat(self, server: Server) -> None:
        async with await open_stream(f"{server.url}/events?user_id=seed-idle") as stream:
            async with asyncio.timeout(PATIENCE):
                while "ping" not in stream.parser.comments:
                    await stream.more()

    async def test_another_users_job_is_not_on_it(self, http: httpx.AsyncClient, server: Server) -> None:
        async with await open_stream(f"{server.url}/events?user_id=seed-2") as stream:
            for user in ("seed-3", "seed-2"):
                await http.post("/submit_job", params={"user_id": user}, json={"prompt": user, "max_tokens": 1})
            first, _ = await stream.take(2)
        job = (await http.get(f"/v1/jobs/{first.data['job_id']}")).json()
        assert job["user_id"] == "seed-2"

    async def test_the_same_key_for_another_user_is_another_request(self, http: httpx.AsyncClient) -> None:
        headers = {"idempotency-key": "seed-key"}
        body = {"prompt": "x", "max_tokens": 1}
        first = await http.post("/submit_job?user_id=a", json=body, headers=headers)
        assert (await http.post("/submit_job?user_id=a", json=body, headers=headers)).json() == first.json()
        again = await http.post("/submit_job?user_id=b", json=body, headers=headers)
        check_error(again, 422, "idempotency_mismatch")

    @pytest.mark.parametrize(
        ("query", "body", "param"),
        [
            ("", {"prompt": "x"}, "user_id"),
            ("?user_id=a", {"prompt": "x", "user_id": "b"}, "user_id"),
            ("?user_id=" + "a" * 257, {"prompt": "x"}, "user_id"),
            ("?user_id=a%00b", {"prompt": "x"}, "user_id"),
            ("?user_id=a", {}, None),
            ("?user_id=a", {"prompt": "x", "stream": True}, "stream"),
        ],
    )
    async def test_what_is_refused(
        self, http: httpx.AsyncClient, query: str, body: dict[str, object], param: str | None
    ) -> None:
        check_error(await http.post(f"/submit_job{query}", json=body), 400, "invalid_request", param)

    async def test_events_need_a_user(self, http: httpx.AsyncClient) -> None:
        check_error(await http.get("/events"), 400, "invalid_request", "user_id")


class TestTasks:
    async def test_submit_and_poll(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/generate", json={"prompt": "one two", "max_tokens": 40, "model": "paced"})
        assert reply.status_code == 202
        task = reply.json()["task_id"]
        assert reply.json() == {"task_id": task}
        assert reply.headers["location"] == f"/result/{task}"
        early = await http.get(f"/result/{task}")
        assert early.status_code == 202
        assert early.json() == {"status": "processing", "task_id": task}
        await running(http, task)
        assert (await http.get(f"/result/{task}")).json() == {"status": "processing", "task_id": task}
        assert (await http.get(f"/status/{task}")).json()["status"] == "running"
        assert (await http.get(f"/v1/jobs/{task}")).json()["status"] == "running", "in its own words"
        late = await poll(lambda: http.get(f"/result/{task}"), lambda reply: reply.status_code != 202)
        assert late.status_code == 200
        answer = late.json()
        assert (answer["status"], answer["task_id"]) == ("completed", task)
        assert answer["result"] == text_of(40)
        metrics = answer["metrics"]
        assert (metrics["prompt_tokens"], metrics["completion_tokens"]) == (2, 40)
        assert metrics["total_time"] >= metrics["processing_time"] > 0
        assert metrics["tokens_per_second"] > 0
        assert metrics["queue_wait_time"] >= 0
        assert (await http.get(f"/status/{task}")).json() == {
            "task_id": task, "status": "completed", "position_in_queue": None,
        }  # fmt: skip

    async def test_several_prompts_are_answered_in_order(self, http: httpx.AsyncClient) -> None:
        body = {"prompts": ["one", "one two", [7, 7, 7]], "max_tokens": 2}
        reply = await http.post("/generate", json=body)
        assert reply.status_code == 200
        answer = reply.json()
        assert answer["model"] == "synthetic"
        assert [result["usage"]["prompt_tokens"] for result in answer["results"]] == [1, 2, 3]
        assert {result["text"] for result in answer["results"]} == {text_of(2)}

    async def test_a_waiting_tasks_place_in_the_queue(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50, options={"slots": 1})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            blocker = await submit(http, max_tokens=100_000)
            await running(http, blocker)
            tasks = [(await http.post("/generate", json={"prompt": "x"})).json()["task_id"] for _ in range(2)]
            places = [(await http.get(f"/status/{task}")).json() for task in tasks]
            assert [place["status"] for place in places] == ["queued", "queued"]
            assert [place["position_in_queue"] for place in places] == [1, 2]
            assert (await http.get(f"/status/{blocker}")).json()["position_in_queue"] is None
            assert (await http.get(f"/result/{tasks[0]}")).json() == {"status": "processing", "task_id": tasks[0]}
            await http.post(f"/v1/jobs/{tasks[0]}/cancel")
            cancelled = await http.get(f"/result/{tasks[0]}")
            assert cancelled.status_code == 200
            assert cancelled.json()["status"] == "cancelled"
            assert "cancelled" in cancelled.json()["error_message"]

    async def test_a_task_that_fails_says_why(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=0, options={"fail": "unlucky"}, settings={"max_attempts": 0})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            task = (await http.post("/generate", json={"prompt": "unlucky"})).json()["task_id"]
            await ended(http, task)
            reply = await http.get(f"/result/{task}")
            assert reply.status_code == 200
            answer = reply.json()
            assert answer == {"status": "failed", "task_id": task, "error_message": answer["error_message"]}
            assert "asked to fail" in answer["error_message"]
            check_error(await http.post("/basic_generate", json={"prompt": "unlucky"}), 500, "engine_error")
            several = (await http.post("/basic_generate", json={"prompts": ["fine", "unlucky"]})).json()["results"]
            assert ["text" in result for result in several] == [True, False]

    async def test_a_task_outlives_the_server(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50)
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            task = (await http.post("/generate", json={"prompt": "x", "max_tokens": 60})).json()["task_id"]
            await running(http, task, tokens=10)
            server.kill9()
            server.restart()
            late = await poll(lambda: http.get(f"/result/{task}"), lambda reply: reply.status_code != 202)
        answer = late.json()
        assert answer["status"] == "completed"
        words = answer["result"].split()
        assert [int(word.split("@")[0]) for word in words] == list(range(1, 61))
        assert {word.split("@")[1] for word in words} == {"1", "2"}

    @pytest.mark.parametrize("route", ["/result", "/status"])
    async def test_an_unknown_task(self, http: httpx.AsyncClient, route: str) -> None:
        check_error(await http.get(f"{route}/job_{'0' * 32}"), 404, "not_found")

    @pytest.mark.parametrize("route", ["/generate", "/basic_generate"])
    @pytest.mark.parametrize(
        "body",
        [{}, {"prompt": "a", "prompts": ["a"]}, {"prompts": []}, {"prompts": ["a"] * 257}, {"prompt": "a", "x": 1}],
    )
    async def test_bad_bodies(self, http: httpx.AsyncClient, route: str, body: dict[str, Any]) -> None:
        check_error(await http.post(route, json=body), 400, "invalid_request")

    async def test_no_prompt_says_what_to_send(self, http: httpx.AsyncClient) -> None:
        error = check_error(await http.post("/generate", json={"max_tokens": 3}), 400, "invalid_request")
        assert "prompts" in error["message"]


class TestBasicGenerate:
    async def test_one_prompt(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/basic_generate", json={"prompt": "one two", "max_tokens": 3, "n": 2})
        assert reply.status_code == 200
        job = reply.headers["x-penstock-job"]
        assert reply.json() == {
            "model": "synthetic",
            "job_id": job,
            "text": text_of(3),
            "texts": [text_of(3)] * 2,
            "finish_reason": "length",
            "usage": {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8},
        }

    async def test_several(self, http: httpx.AsyncClient) -> None:
        answer = (await http.post("/basic_generate", json={"prompts": ["a", "b c"], "max_tokens": 1})).json()
        assert [result["usage"]["prompt_tokens"] for result in answer["results"]] == [1, 2]


@pytest.mark.parametrize("route", ["/generate", "/basic_generate"])
async def test_who_does_not_wait_for_several_cancels_them(http: httpx.AsyncClient, server: Server, route: str) -> None:
    user = f"leaver-{route.strip('/')}"
    body = {"prompts": ["a", "b"], "max_tokens": 100_000, "model": "paced", "user_id": user}
    asking = asyncio.create_task(send(server.url + route, "POST", json_body=body))

    async def jobs() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await http.get("/v1/jobs", params={"user_id": user})).json()["data"]
        return found

    for job in await poll(jobs, lambda seen: len(seen) == 2):
        await running(http, job["id"])
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    for job in await jobs():
        assert (await ended(http, job["id"]))["status"] == "cancelled"


@pytest.mark.parametrize("route", ["/generate_stream", "/api/v1/req"])
class TestOneOpenResponse:
    async def test_its_tokens_and_its_end(self, server: Server, route: str) -> None:
        body = {"prompt": "x", "max_tokens": 5, "model": "paced"}
        async with await open_stream(server.url + route, "POST", json_body=body) as stream:
            events = await stream.rest()
        assert stream.headers["x-penstock-job"] == events[0].data["job_id"]
        assert [event.event for event in events] == ["token"] * 5 + ["done"]
        assert [event.id for event in events] == [str(n) for n in range(1, 7)]
        assert "".join(event.data["token"] for event in events[:-1]) == text_of(5)

    async def test_pings_while_it_waits_in_the_queue(self, make_server: Callable[..., Server], route: str) -> None:
        server = make_server(rate=50, options={"slots": 1}, settings={"heartbeat": 0.2})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            blocker = await submit(http, max_tokens=100_000)
            await running(http, blocker)
            async with await open_stream(
                server.url + route, "POST", json_body={"prompt": "x", "max_tokens": 2}
            ) as stream:
                async with asyncio.timeout(PATIENCE):
                    while len(stream.parser.comments) < 2:
                        await stream.more()
                assert set(stream.parser.comments) == {"ping"}
                assert b"data:" not in stream.raw, "it waits behind the other one"
                await http.post(f"/v1/jobs/{blocker}/cancel")
                assert [event.event for event in await stream.rest()] == ["token", "token", "done"]

    async def test_who_leaves_cancels_it(self, http: httpx.AsyncClient, server: Server, route: str) -> None:
        body = {"prompt": "x", "max_tokens": 100_000, "model": "paced"}
        async with await open_stream(server.url + route, "POST", json_body=body) as stream:
            job = stream.headers["x-penstock-job"]
            await stream.take(1)
        assert (await ended(http, job))["status"] == "cancelled"
