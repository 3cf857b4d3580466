"""Embeddings over HTTP: the official SDK unchanged, a small encoder, and vectors that numpy computes as well."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from penstock.core.tasks import vector_values
from tests.support.api import check_error
from tests.support.encoder import SIZE, TEXTS, Reference, encoder
from tests.support.server import PATIENCE, Server, model

MODEL = "encoder"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def serving(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The encoder is the first model, one with instructions and with vectors that can be cut the last."""
    instructed = model(
        "instructed",
        engine="openvino",
        path=str(folder),
        query_instruction="find: ",
        passage_instruction="keep: ",
        matryoshka="on",
    )
    models = [model(MODEL, engine="openvino", path=str(folder)), model(rate=1000), instructed]
    server = Server(tmp_path_factory.mktemp("serving"), models=models)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
async def http(serving: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=serving.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


@pytest.fixture
async def sdk(serving: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key="none", timeout=PATIENCE) as client:
        yield client


def check(answer: Any, wanted: Any) -> None:
    """The vectors of an SDK's *answer* are those that are *wanted*."""
    assert [each.index for each in answer.data] == list(range(len(wanted)))
    found = np.array([each.embedding for each in answer.data])
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)


async def test_the_sdk_gets_the_vectors_of_texts(sdk: openai.AsyncOpenAI, reference: Reference) -> None:
    answer = await sdk.embeddings.create(model=MODEL, input=TEXTS)  # as base64, by the SDK's default
    check(answer, reference.vectors(TEXTS))
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(reference.ids(text)) for text in TEXTS)
    check(await sdk.embeddings.create(model=MODEL, input=TEXTS[0]), reference.vectors(TEXTS[:1]))
    check(await sdk.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float"), reference.vectors(TEXTS))


async def test_token_ids_are_taken_as_they_are(sdk: openai.AsyncOpenAI, reference: Reference) -> None:
    ids = [reference.ids(text) for text in TEXTS]
    check(await sdk.embeddings.create(model=MODEL, input=ids), reference.vectors(TEXTS))
    check(await sdk.embeddings.create(model=MODEL, input=ids[1]), reference.vectors(TEXTS[1:2]))
    bare = ids[0][1:-1]
    check(await sdk.embeddings.create(model=MODEL, input=[bare]), reference.vectors([bare]))


async def test_two_thousand_inputs_in_one_call(sdk: openai.AsyncOpenAI, reference: Reference) -> None:
    texts = [f"{TEXTS[i % 5]} {i}" for i in range(2048)]
    answer = await sdk.embeddings.create(model=MODEL, input=texts)
    assert [each.index for each in answer.data] == list(range(2048))
    for i in (0, 1, 777, 2047):
        np.testing.assert_allclose(answer.data[i].embedding, reference.vector(texts[i]), atol=1e-5)


async def test_base64_is_little_endian_float32(http: httpx.AsyncClient, reference: Reference) -> None:
    reply = await http.post("/v1/embeddings", json={"model": MODEL, "input": TEXTS[0], "encoding_format": "base64"})
    answer = reply.json()
    assert set(answer) == {"object", "data", "model", "usage"}
    assert answer["object"] == "list"
    (entry,) = answer["data"]
    assert (entry["object"], entry["index"]) == ("embedding", 0)
    found = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
    np.testing.assert_allclose(found, reference.vector(TEXTS[0]), atol=1e-5)


async def test_queries_and_documents_are_told_apart(sdk: openai.AsyncOpenAI, reference: Reference) -> None:
    for kind, instruction in (("query", "find: "), ("document", "keep: "), ("passage", "keep: "), (None, "keep: ")):
        extra = {} if kind is None else {"input_type": kind}
        answer = await sdk.embeddings.create(model="instructed", input=TEXTS, extra_body=extra)
        check(answer, reference.vectors([instruction + text for text in TEXTS]))


async def test_vectors_are_cut_where_the_model_allows_it(sdk: openai.AsyncOpenAI, reference: Reference) -> None:
    whole = reference.vectors(["keep: " + text for text in TEXTS])
    short = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    check(await sdk.embeddings.create(model="instructed", input=TEXTS, dimensions=16), short)
    check(await sdk.embeddings.create(model=MODEL, input=TEXTS, dimensions=SIZE), reference.vectors(TEXTS))
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.embeddings.create(model=MODEL, input=TEXTS, dimensions=16)
    assert (refused.value.code, refused.value.param) == ("unsupported", "dimensions")


async def test_one_that_is_too_long_is_named(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/embeddings", json={"model": MODEL, "input": ["water", "the mill " * 60]})
    error = check_error(reply, 400, "context_length_exceeded", "input")
    assert error["message"].startswith(
        "This model's maximum context length is 64 tokens. However, input 1 resulted in 122"
    )


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_request", None),
        ({"input": []}, "invalid_request", "input"),
        ({"input": ""}, "invalid_request", "input"),
        ({"input": ["x", ""]}, "invalid_request", "input[1]"),
        ({"input": ["x", 5]}, "invalid_request", "input"),
        ({"input": [[]]}, "invalid_request", "input[0]"),
        ({"input": [[5, -1]]}, "invalid_request", "input[0][1]"),
        ({"input": [[5, 10**8]]}, "invalid_request", "input"),
        ({"input": ["x"] * 2049}, "invalid_request", "input"),
        ({"input": "x", "encoding_format": "hex"}, "invalid_request", "encoding_format"),
        ({"input": "x", "dimensions": 0}, "invalid_request", "dimensions"),
        ({"input": "x", "model": "nobody"}, "model_not_found", "model"),
        ({"input": "x", "model": "instructed", "dimensions": 49}, "invalid_request", "dimensions"),
    ],
)
async def test_what_is_wrong_is_named(
    http: httpx.AsyncClient, body: dict[str, Any], code: str, param: str | None
) -> None:
    reply = await http.post("/v1/embeddings", json={"model": MODEL, **body})
    check_error(reply, 404 if code == "model_not_found" else 400, code, param)


async def test_no_model_is_asked_for_what_it_cannot(http: httpx.AsyncClient) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    error = check_error(await http.post("/v1/chat/completions", json=chat), 400, "unsupported", "model")
    assert "synthetic" in error["message"], "it says who can"
    error = check_error(await http.post("/v1/completions", json={"model": MODEL, "prompt": "x"}), 400, "unsupported")
    reply = await http.post("/v1/generate", json={"prompt": "x", "max_tokens": 2})
    assert reply.json()["model"] == "synthetic", "the first one that generates, not the first one"
    models = {each["id"]: each for each in (await http.get("/v1/models")).json()["data"]}
    assert models[MODEL]["tasks"] == ["embed", "tokenize"]
    assert models[MODEL]["dimensions"] == SIZE
    assert "dimensions" not in models["synthetic"]


async def test_an_answer_is_kept_for_those_who_can_ask_again(http: httpx.AsyncClient, reference: Reference) -> None:
    async def jobs() -> set[str]:
        return {job["id"] for job in (await http.get("/v1/jobs")).json()["data"]}

    before = await jobs()
    body = {"model": MODEL, "input": TEXTS}
    await http.post("/v1/embeddings", json=body)
    assert await jobs() == before
    replies = [await http.post("/v1/embeddings", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert replies[0].content == replies[1].content
    assert replies[0].headers["x-penstock-job"] == replies[1].headers["x-penstock-job"]
    view = (await http.get(f"/v1/jobs/{replies[0].headers['x-penstock-job']}")).json()
    vectors = [vector_values(text) for text in view["result"]["embeddings"]]
    np.testing.assert_allclose(vectors, reference.vectors(TEXTS), atol=1e-5)


async def test_it_counts_as_a_job_and_not_as_tokens(http: httpx.AsyncClient) -> None:
    def value(text: str, name: str) -> float:
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    before = (await http.get("/metrics")).text
    await http.post("/v1/embeddings", json={"model": MODEL, "input": TEXTS})
    after = (await http.get("/metrics")).text
    ended = f'gen_ai_server_request_duration_seconds_count{{gen_ai_request_model="{MODEL}"}}'
    assert value(after, ended) == value(before, ended) + 1
    for name in ("llm_worker_tokens_generated_total", "gen_ai_server_time_to_first_token_seconds_count"):
        assert value(after, name) == value(before, name)
