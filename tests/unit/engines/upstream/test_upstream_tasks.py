"""Vectors, tokens and scores of upstream servers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from tests.support.upstream import (
    Act,
    MakeEngine,
    Upstream,
    answer,
    ask,
    assert_complete,
    assert_embedded,
    embed,
    error_of,
    vectors,
)

from penstock.core.events import Logprob, Prefix, Tokens, TopLogprob, fold
from penstock.core.job import Request, Sampling
from penstock.core.ports import Finish
from penstock.core.tasks import Tokenized, vector_text
from penstock.engines.upstream.replicas import TRIP


async def test_vectors_come_in_base64_and_in_parts(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(*encoders, batch=3)
    assert (engine.backend.info.tasks, engine.backend.info.dimensions) == (("embed", "tokenize"), 2)
    for server in encoders:
        server.asked_for_vectors.clear()
    outputs = await engine.run(embed(20))
    assert_embedded(outputs, 20)
    asked = [body for server in encoders for body in server.asked_for_vectors]
    assert sorted(len(body["input"]) for body in asked) == [2, 3, 3, 3, 3, 3, 3]
    assert all(body["encoding_format"] == "base64" for body in asked)
    assert all(server.asked_for_vectors for server in encoders), "they share the work"


async def cut_short(server: Upstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await server.opened(request)
    await response.write(b'{"data": [')
    assert request.transport is not None
    request.transport.abort()
    return response


async def say_nothing(server: Upstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(30)
    raise AssertionError


A_VECTOR = {"index": 0, "embedding": "AAAAAAAAAAA="}
NO_VECTORS: dict[str, Act] = {
    "dies": cut_short,
    "silent": say_nothing,
    "500": answer(500),
    "busy": answer(429, **{"Retry-After": "0"}),
    "no JSON": answer(200, "vectors"),
    "too few": answer(200, {"data": [A_VECTOR]}),
    "no base64": answer(200, {"data": [{"index": i, "embedding": "?"} for i in range(5)]}),
    "no float32": answer(200, {"data": [{"index": i, "embedding": "AAA="} for i in range(5)]}),
    "other sizes": answer(200, {"data": [{"index": i, "embedding": [1.0] * (i + 1)} for i in range(5)]}),
    "another size": vectors(size=3),
}


@pytest.mark.parametrize("how", NO_VECTORS)
async def test_another_replica_embeds_what_one_did_not(
    encoders: list[Upstream], engine_of: MakeEngine, how: str
) -> None:
    engine = await engine_of(*encoders, idle_timeout=0.5, batch=5)
    for server in encoders:
        server.script.append(NO_VECTORS[how])
        server.asked_for_vectors.clear()
    assert_embedded(await engine.run(embed()))
    assert sum(len(server.asked_for_vectors) for server in encoders) == 4, "two calls, each a second time"


async def test_inputs_that_are_logged_are_not_embedded_again(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0])
    encoders[0].asked_for_vectors.clear()
    outputs = await engine.run(embed(), [Prefix([3, 0, 7], [vector_text([n, n]) for n in (3, 0, 7)])])
    assert sorted(index for output in outputs for index in output.ids) == [1, 2, 4, 5, 6, 8, 9]
    (body,) = encoders[0].asked_for_vectors
    assert body["input"] == [f"x{i}" for i in (1, 2, 4, 5, 6, 8, 9)]
    assert sum(output.prompt_tokens or 0 for output in outputs) == 30, "the logged ones count as much as the others"
    (output,) = await engine.run(embed(1), [Prefix([0], [vector_text([0, 0])])])
    assert output.finish == Finish(("stop",))
    assert len(encoders[0].asked_for_vectors) == 1


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_server_that_has_numbers_only(encoders: list[Upstream], engine_of: MakeEngine, refuses: bool) -> None:
    server = encoders[0]
    engine = await engine_of(server)
    server.asked_for_vectors.clear()
    refusal = answer(400, {"error": {"message": "encoding_format must be float"}})
    server.script += [refusal] if refuses else [vectors(base64=False)] * 2
    for _ in range(2):
        assert_embedded(await engine.run(embed()))
    formats = [body.get("encoding_format") for body in server.asked_for_vectors]
    assert formats == (["base64", None, None] if refuses else ["base64"] * 2)


async def test_texts_and_ids_go_by_themselves(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0])
    encoders[0].asked_for_vectors.clear()
    request = Request(model="m", task="embed", inputs=("x0", (1, 50), "x2", (3,)), dimensions=2)
    assert_embedded(await engine.run(request), 4)
    asked = [body["input"] for body in encoders[0].asked_for_vectors if body["dimensions"] == 2]
    assert sorted(asked, key=str) == [["x0", "x2"], [[1, 50], [3]]]


async def test_a_call_that_is_too_large_is_cut_in_two(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0])
    encoders[0].asked_for_vectors.clear()
    encoders[0].script += [answer(413), answer(413)]
    assert_embedded(await engine.run(embed()))
    assert [len(body["input"]) for body in encoders[0].asked_for_vectors] == [10, 5, 2, 3, 5]
    encoders[0].script.append(answer(413))
    assert error_of(await engine.run(embed(1))).code == "request_too_large"


@pytest.mark.parametrize(
    ("status", "error", "code", "param"),
    [
        (400, {"message": "Input 3 is empty."}, "invalid_request", "input"),
        (400, {"message": "maximum context length is 512 tokens"}, "context_length_exceeded", "input"),
        (413, {"message": "`inputs` must have less than 512 tokens. Given: 600"}, "context_length_exceeded", "input"),
        (500, {"message": "input (900 tokens) is too large to process."}, "context_length_exceeded", "input"),
    ],
)
async def test_what_is_wrong_with_an_input_is_the_clients(
    encoders: list[Upstream], engine_of: MakeEngine, status: int, error: dict[str, str], code: str, param: str
) -> None:
    engine = await engine_of(*encoders, batch=5)
    for server in encoders:
        server.asked_for_vectors.clear()
    encoders[0].script.append(answer(status, {"error": error}))
    encoders[1].script.append(answer(status, {"error": error}))
    found = error_of(await engine.run(embed()))
    assert (found.code, found.param) == (code, param)
    assert found.message.startswith(error["message"])
    assert "of the inputs 0 to 4" in found.message or "of the inputs 5 to 9" in found.message
    assert sum(len(server.asked_for_vectors) for server in encoders) == 2, "nobody is asked again"


async def test_vectors_that_cannot_be_cut(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0])
    assert_embedded(await engine.run(embed(dimensions=2)))
    error = error_of(await engine.run(embed(dimensions=1)))
    assert (error.code, error.param) == ("unsupported", "dimensions")
    assert "2 dimensions" in error.message


async def test_an_aborted_embedding_makes_no_more_calls(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0], batch=1)
    encoders[0].asked_for_vectors.clear()
    key = engine.add(embed(2000))
    await asyncio.to_thread(engine.step)
    engine.backend.abort(key)
    assert_embedded(await engine.run(embed(3)), 3)
    assert len(encoders[0].asked_for_vectors) < 1000


async def test_when_none_can_embed_now_the_job_goes_back_to_the_queue(
    encoders: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(encoders[0], retries=1)
    encoders[0].script += [answer(500)] * 2
    outputs = await engine.run(embed())
    assert "it is 500" in error_of(outputs).message
    assert outputs[-1].retryable


async def test_one_that_has_no_such_route_is_not_asked_twice(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """Where the operator has said more than it can."""
    engine = await engine_of(*servers, tasks="embed,generate")
    assert engine.backend.info.tasks == ("generate", "embed")
    outputs = await engine.run(embed())
    assert (error_of(outputs).code, error_of(outputs).param) == ("unsupported", "model")
    assert "404" in error_of(outputs).message
    assert not outputs[-1].retryable
    assert_complete(await engine.run(ask()))  # it is none the worse for it
    servers[1].embeds = True
    for _ in range(2 * TRIP):
        assert_embedded(await engine.run(embed()))


async def test_tokens_and_their_text(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """As SGLang has them: without names."""
    servers[0].owned_by = "sglang"
    engine = await engine_of(*servers)
    servers[0].script.append(answer(500))
    servers[1].script.append(answer(500))
    (output,) = await engine.run(Request(model="m", task="tokenize", prompt_ids=(7, 8)))
    assert Tokenized.of(fold([Tokens(1, 1, output.ids, output.texts)], 1)) == Tokenized([7, 8], None, "7 8")
    assert output.finish == Finish(("stop",))
    assert sum(len(server.bodies) for server in servers) == 3


# ------------------------------------------------------------------------------------------ how likely a prompt is


#: What vLLM tells of a prompt of the tokens 5, 6 and 7.
LIKELY = [
    None,
    {"6": {"logprob": -1.5, "rank": 2, "decoded_token": "b"}, "9": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}},
    {"7": {"logprob": -0.25, "rank": 1, "decoded_token": "c"}},
]


def scored(*told: Any, **more: Any) -> Act:
    choice = {"index": 0, "text": "d", "prompt_logprobs": list(told), "prompt_token_ids": [5, 6, 7], **more}
    return answer(200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})


def score(count: int = 1, **prompt: Any) -> Request:
    return Request(model="m", task="score", sampling=Sampling(logprobs=count), **(prompt or {"prompt": "abc"}))


async def test_a_prompt_is_scored_by_vllm(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(scored(*LIKELY))
    (output,) = await engine.run(score())
    assert (output.ids, output.texts, output.prompt_tokens) == ([5, 6, 7], ["a", "b", "c"], 3)
    assert output.logprobs == [
        None,
        Logprob(-1.5, (TopLogprob(9, "x", -0.5), TopLogprob(6, "b", -1.5)), "b"),
        Logprob(-0.25, (TopLogprob(7, "c", -0.25),), "c"),
    ]
    assert output.finish == Finish(("stop",))
    assert (servers[0].bodies[-1]["prompt_logprobs"], servers[0].bodies[-1]["prompt"]) == (1, "abc")


async def test_a_prompt_of_ids_is_scored_behind_what_is_logged(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(*servers)
    for server in servers:
        server.script += [answer(500), scored(*LIKELY), answer(200, {"text": "abc"})]
    (output,) = await engine.run(score(0, prompt_ids=(5, 6, 7)), [Prefix([5], ["a"])])
    assert (output.ids, output.texts) == ([6, 7], ["b", "c"])
    assert output.logprobs == [Logprob(-1.5, (), "b"), Logprob(-0.25, (), "c")]


async def test_ids_that_a_server_does_not_tell_are_asked_for(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """vLLM's older versions."""
    engine = await engine_of(servers[0])
    servers[0].prompt = [5, 6, 7]
    servers[0].script.append(scored(*LIKELY, prompt_token_ids=None))
    (output,) = await engine.run(score())
    assert (output.ids, output.texts) == ([5, 6, 7], ["a", "b", "c"])


@pytest.mark.parametrize(
    "told",
    [
        scored(*LIKELY[:2]),
        scored(None, {"9": {"logprob": -1.0}}, LIKELY[2]),
        scored(*LIKELY, prompt_token_ids=[5, 6]),
        answer(200, {"choices": []}),
        answer(200, {"choices": [{"text": "d"}]}),
        answer(200, {"choices": [{"prompt_logprobs": "many"}]}),
        answer(200, [1]),
    ],
    ids=["too few", "of another", "too few ids", "no choice", "nothing", "a text", "a list"],
)
async def test_scores_that_are_none(servers: list[Upstream], engine_of: MakeEngine, told: Act) -> None:
    engine = await engine_of(servers[0])
    servers[0].script += [told, told]
    outputs = await engine.run(score())
    assert error_of(outputs).code == "engine_error"
    assert not servers[0].script, "it is asked once more"
    assert_complete(await engine.run(ask()))
