"""The routes of the designs behind Penstock (SPEC section 4)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.ports import ModelInfo, QueuePolicy
from penstock.engines.process import EngineProcess, EngineSpec
from penstock.gateway.app import create_app
from penstock.gateway.service import Gateway, GatewayConfig
from penstock.worker.worker import Worker
from tests.support.api import check_error


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
