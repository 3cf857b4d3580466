"""`penstock serve --engine upstream` before real replicas, one of which is killed in the middle of everything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from penstock.testing.oracle import check_log, tokens_of
from tests.support.api import check_error
from tests.support.encoder import SIZE, TEXTS, Reference, encoder
from tests.support.http import PATIENCE
from tests.support.server import Server, model, wait_for
from tests.support.sse import Event, Parser

STREAMS = 12
TOKENS = 200
PROMPTS = [[263 + 7 * i, 300 + i, 411] for i in range(4)]


def before(folder: Path, replicas: list[Server], **options: object) -> Server:
    """A server whose engine is *replicas*."""
    urls = ",".join(each.url for each in replicas)
    return Server(folder, models=[model("millrace", engine="upstream", path=urls, **options)])


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Server]]:
    models = [model("millrace", engine="openvino", precision="f32")]
    both = [Server(tmp_path / name, models=models) for name in ("one", "two")]
    try:
        yield [each.start() for each in both]
    finally:
        for each in both:
            each.stop()


@pytest.fixture
def front(tmp_path: Path, replicas: list[Server]) -> Iterator[Server]:
    server = before(tmp_path / "front", replicas)
    try:
        yield server.start()
    finally:
        server.stop()


class Middle:
    """Counts everybody's tokens."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.reached = asyncio.Event()

    def count(self, tokens: int) -> None:
        self._left -= tokens
        if self._left <= 0:
            self.reached.set()


async def read(client: httpx.AsyncClient, body: dict[str, Any], middle: Middle) -> list[Event]:
    """One stream to its end."""
    events: list[Event] = []
    parser = Parser()
    async with client.stream("POST", "/v1/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        async for data in response.aiter_bytes():
            new = parser.feed(data)
            middle.count(len(new))
            events += new
    return events


@pytest.mark.parametrize("kind", ["ids", "chat"])
async def test_a_replica_dies_in_the_middle_of_all_streams(front: Server, replicas: list[Server], kind: str) -> None:
    asked: list[dict[str, Any]] = [{"prompt": ids} for ids in PROMPTS]
    if kind == "chat":
        asked = [{"messages": [{"role": "user", "content": f"Tell me of a fox, {i}."}]} for i in range(4)]
    bodies = [{**each, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True} for each in asked]
    async with httpx.AsyncClient(base_url=front.url, timeout=PATIENCE, trust_env=False) as client:
        undisturbed = [(await client.post("/v1/generate", json=body)).json()["text"] for body in bodies]
        middle = Middle(STREAMS * TOKENS // 10)  # early: on a busy machine some readers are far ahead of others
        reading = [asyncio.create_task(read(client, bodies[i % len(bodies)], middle)) for i in range(STREAMS)]
        await middle.reached.wait()
        await asyncio.to_thread(replicas[0].kill9)
        assert not any(task.done() for task in reading), "some were over before the kill"
        streams = await asyncio.gather(*reading)
    for i, events in enumerate(streams):
        check_log(events)
        tokens = tokens_of(events)
        assert [token.position for token in tokens] == list(range(1, TOKENS + 1))
        assert {token.attempt for token in tokens} == {1}, "failover happens inside the attempt"
        if kind == "ids":
            assert "".join(token.text for token in tokens) == undisturbed[i % len(bodies)]
    assert_noticed(front)


def assert_noticed(front: Server) -> None:
    """Broken calls alone open its circuit; a refused connection, if one is tried before that, tells that it is down."""
    assert {"replica.resting", "replica.down"} & {line["event"] for line in front.log_lines()}


# ------------------------------------------------------------------------------------------ nobody is there

#: Every way to ask for a reply.
ASKED = [
    ("/v1/generate", {"prompt": "x"}),
    ("/v1/generate", {"prompt": "x", "stream": True}),
    ("/v1/jobs", {"prompt": "x"}),
    ("/v1/completions", {"model": "m", "prompt": "x"}),
    ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}),
    ("/v1/responses", {"model": "m", "input": "x"}),
    ("/v1/messages", {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}),
]


def test_a_model_whose_only_server_is_dead_is_not_ready(tmp_path: Path) -> None:
    behind = Server(tmp_path / "behind", models=[model("m", rate=20)])
    front = Server(tmp_path / "front", models=[model("m", engine="upstream", path=behind.url)])
    with httpx.Client(base_url=front.url, timeout=PATIENCE, trust_env=False) as client:
        try:
            behind.start()
            front.start()
            before = client.post("/v1/jobs", json={"prompt": "x", "max_tokens": 40}).json()["id"]
            wait_for(lambda: client.get(f"/v1/jobs/{before}").json()["tokens"], "its first tokens")
            behind.kill9()
            wait_for(lambda: client.get("/readyz").status_code == 503, "not ready")
            assert client.get("/readyz").json()["checks"]["worker"] is False
            health = client.get("/health").json()
            assert health["status"] == "degraded"
            (told,) = health["models"]
            assert (told["state"], told["ready"], told["info"]["away"]) == (
                "unavailable", False, "no upstream server answers",
            )  # fmt: skip
            assert client.get("/v1/models/m").json()["state"] == "unavailable"
            for path, body in ASKED:
                refused = client.post(path, json=body)
                assert refused.status_code == 503, (path, refused.text)
                assert "no upstream server answers" in refused.json()["error"]["message"]
                assert int(refused.headers["retry-after"]) >= 1
                assert str(behind.port) not in refused.text
            assert client.get("/healthz").status_code == 200
            behind.restart()
            wait_for(lambda: client.get("/readyz").status_code == 200, "ready again")
            assert client.get("/health").json()["status"] == "ok"
            assert client.post("/v1/generate", json={"prompt": "x", "max_tokens": 3}).status_code == 200
            ended = wait_for(
                lambda: (job := client.get(f"/v1/jobs/{before}").json())["status"] == "completed" and job, "its end"
            )
            assert ended["tokens"] == 40, "what was running is not lost"
            assert behind.url in front.output(), "its operator is told"
        finally:
            front.stop()
            behind.stop()


def test_one_of_two_servers_is_enough(tmp_path: Path) -> None:
    both = [Server(tmp_path / name, models=[model("m", rate=200)]) for name in ("one", "two")]
    front = before(tmp_path / "front", both)
    front.settings["models"] = [model("m", engine="upstream", path=",".join(each.url for each in both))]
    with httpx.Client(base_url=front.url, timeout=PATIENCE, trust_env=False) as client:
        try:
            for server in (*both, front):
                server.start()
            both[0].kill9()
            wait_for(lambda: "replica.down" in front.output(), "that it is noticed")
            assert client.get("/readyz").status_code == 200
            assert client.post("/v1/generate", json={"prompt": "x", "max_tokens": 3}).status_code == 200
            both[1].kill9()
            wait_for(lambda: client.get("/readyz").status_code == 503, "not ready")
            both[0].restart()
            wait_for(lambda: client.get("/readyz").status_code == 200, "ready again")
        finally:
            for server in (front, *both):
                server.stop()


# ------------------------------------------------------------------------------------------ embeddings

CLIENTS, CALLS, INPUTS = 8, 8, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[list[Server]]:
    """Two replicas, and the server before them."""
    home = tmp_path_factory.mktemp("encoders")
    replicas = [
        Server(home / name, models=[model("bge", engine="openvino", path=str(folder))]) for name in ("one", "two")
    ]
    urls = ",".join(each.url for each in replicas)
    # What the servers call the model is nobody else's business.
    named = model("encoder", engine="upstream", path=urls, model="bge", batch=20)
    front = Server(home / "front", models=[model(rate=1000), named])
    try:
        for each in replicas:
            each.start()
        yield [front.start(), *replicas]
    finally:
        for each in (front, *replicas):
            each.stop()


def test_it_says_what_the_server_can(encoders: list[Server]) -> None:
    front, behind, _ = encoders
    card = front.get("/v1/models/encoder").json()
    assert (card["engine"], card["tasks"], card["dimensions"]) == ("upstream", ["embed", "tokenize"], SIZE)
    for server, name in ((front, "encoder"), (behind, "bge")):  # whoever refuses it, it is the same refusal
        body = {"model": name, "prompt": "x"}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE, trust_env=False)
        assert "it can embed and tokenize" in check_error(reply, 400, "unsupported", "model")["message"]


async def test_the_sdk_gets_the_vectors_of_the_server_behind(encoders: list[Server], folder: Path) -> None:
    reference = Reference(folder)
    async with openai.AsyncOpenAI(base_url=f"{encoders[0].url}/v1", api_key="none", timeout=PATIENCE) as sdk:
        for asked in ({}, {"encoding_format": "float"}):
            answer = await sdk.embeddings.create(model="encoder", input=TEXTS, **asked)  # type: ignore[arg-type]
            found = np.array([each.embedding for each in answer.data])
            np.testing.assert_allclose(found, reference.vectors(TEXTS), atol=1e-5)
            assert answer.usage.prompt_tokens == sum(len(reference.ids(text)) for text in TEXTS)
            assert answer.model == "encoder"
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.embeddings.create(model="encoder", input=[*TEXTS * 5, "the old mill by the river " * 40])
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "input"


async def test_a_replica_dies_in_the_middle_of_embeddings(encoders: list[Server], folder: Path) -> None:
    front, *replicas = encoders
    wanted = np.tile(Reference(folder).vectors(TEXTS), (INPUTS // len(TEXTS), 1))
    body = {"model": "encoder", "input": TEXTS * (INPUTS // len(TEXTS))}
    answers: list[dict[str, Any]] = []
    middle = asyncio.Event()

    async def embed(client: httpx.AsyncClient) -> None:
        for _ in range(CALLS):
            reply = await client.post("/v1/embeddings", json=body)
            assert reply.status_code == 200, reply.text
            answers.append(reply.json())
            if len(answers) == CLIENTS:
                middle.set()

    async with httpx.AsyncClient(base_url=front.url, timeout=PATIENCE, trust_env=False) as client:
        working = [asyncio.create_task(embed(client)) for _ in range(CLIENTS)]
        await middle.wait()
        await asyncio.to_thread(replicas[0].kill9)
        assert len(answers) < CLIENTS * CALLS, "all were over before the kill"
        await asyncio.gather(*working)
    assert len(answers) == CLIENTS * CALLS
    for answer in answers:
        assert answer["usage"] == answers[0]["usage"]
        assert [each["index"] for each in answer["data"]] == list(range(INPUTS))
        np.testing.assert_allclose([each["embedding"] for each in answer["data"]], wanted, atol=1e-5)
    assert_noticed(front)
    jobs = [line for line in front.log_lines() if line.get("event") == "job_ended"]
    assert len(jobs) >= len(answers)
    assert {line["attempt"] for line in jobs} == {1}, "failover happens inside the attempt"
