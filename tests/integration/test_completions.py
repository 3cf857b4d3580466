"""Completions of several prompts, and of prompts that are echoed, with the model in the box."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.support.api import check_error
from tests.support.server import PATIENCE, Server, model, wait_for

MODEL = "millrace"
FOX, RAIN = "Once upon a time, a little fox", "Rain fell on the house by the sea"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = [model(MODEL, engine="openvino"), model(rate=200)]
    server = Server(tmp_path_factory.mktemp("completions"), models=models)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
async def http(box: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=box.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


async def complete(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await http.post("/v1/completions", json={**GREEDY, **body})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def chunks(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    found = []
    async with http.stream("POST", "/v1/completions", json={**GREEDY, **body, "stream": True}) as reply:
        assert reply.status_code == 200, await reply.aread()
        lines = [line async for line in reply.aiter_lines() if line.startswith(("data: ", "id: "))]
    assert not [line for line in lines if line.startswith("id: ")]  # several logs have no position together
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        found.append(json.loads(line.removeprefix("data: ")))
    return found


def joined(found: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, as a reply in one piece would have them."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in found:
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": {}})
            assert whole["finish_reason"] is None, "more of a choice that has ended"
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                whole["logprobs"].setdefault(name, []).extend(values)
    return choices


async def ids_of(http: httpx.AsyncClient, text: str) -> list[int]:
    tokens: list[int] = (await http.post("/tokenize", json={"model": MODEL, "prompt": text})).json()["tokens"]
    return tokens


class TestSeveralPrompts:
    async def test_each_has_the_choices_that_it_has_alone(self, http: httpx.AsyncClient) -> None:
        alone = [await complete(http, prompt=prompt, max_tokens=12, n=2) for prompt in (FOX, RAIN)]
        both = await complete(http, prompt=[FOX, RAIN], max_tokens=12, n=2)
        assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
        texts = [choice["text"] for reply in alone for choice in reply["choices"]]
        assert [choice["text"] for choice in both["choices"]] == texts
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert both["usage"][name] == sum(reply["usage"][name] for reply in alone)

    async def test_token_ids_of_one_and_of_several(self, http: httpx.AsyncClient) -> None:
        fox, rain = await ids_of(http, FOX), await ids_of(http, RAIN)
        by_text = await complete(http, prompt=[FOX, RAIN], max_tokens=8)
        by_ids = await complete(http, prompt=[fox, rain], max_tokens=8)
        nested = await complete(http, prompt=[fox], max_tokens=8)
        assert by_ids["choices"] == by_text["choices"]
        assert by_ids["usage"] == by_text["usage"]
        assert nested["choices"] == by_text["choices"][:1]

    @pytest.mark.parametrize("n", [1, 2])
    async def test_a_stream_has_the_same_choices(self, http: httpx.AsyncClient, n: int) -> None:
        asked = {"prompt": [FOX, RAIN, FOX], "max_tokens": 10, "n": n, "logprobs": 2}
        whole = await complete(http, **asked)
        found = await chunks(http, **asked, stream_options={"include_usage": True})
        assert len({chunk["id"] for chunk in found}) == 1
        assert found[-1]["choices"] == []
        assert found[-1]["usage"] == whole["usage"]
        choices = joined(found)
        assert sorted(choices) == list(range(3 * n))
        for choice in whole["choices"]:
            told = choices[choice["index"]]
            assert (told["text"], told["finish_reason"]) == (choice["text"], choice["finish_reason"])
            assert told["logprobs"]["tokens"] == choice["logprobs"]["tokens"]

    async def test_every_prompt_is_a_job_of_its_own(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/completions", json={**GREEDY, "prompt": [FOX, RAIN], "max_tokens": 4})
        jobs = reply.headers["x-penstock-job"].split(", ")
        for job, choice in zip(jobs, reply.json()["choices"], strict=True):
            assert (await http.get(f"/v1/jobs/{job}")).json()["result"]["text"] == choice["text"]

    async def test_the_same_key_gives_the_same_jobs(self, http: httpx.AsyncClient) -> None:
        asked: dict[str, Any] = {"json": {**GREEDY, "prompt": [FOX, RAIN], "max_tokens": 4}}
        replies = [await http.post("/v1/completions", headers={"Idempotency-Key": "two"}, **asked) for _ in range(2)]
        assert replies[0].headers["x-penstock-job"] == replies[1].headers["x-penstock-job"]
        assert replies[0].json() == replies[1].json()

    async def test_one_that_is_refused_is_everybodys_refusal(self, http: httpx.AsyncClient) -> None:
        for stream in (False, True):
            body = {**GREEDY, "prompt": [FOX, "word " * 3000], "stream": stream}
            check_error(await http.post("/v1/completions", json=body), 400, "context_length_exceeded")

    @pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [[1], 2], ["a"] * 129, [[1.5]], [None]])
    async def test_what_is_no_prompt(self, http: httpx.AsyncClient, prompt: Any) -> None:
        answer = await http.post("/v1/completions", json={**GREEDY, "prompt": prompt})
        assert check_error(answer, 400, "invalid_request")["param"].startswith("prompt")

    async def test_who_leaves_ends_all_of_them(self, http: httpx.AsyncClient, box: Server) -> None:
        body = {"model": "synthetic", "prompt": ["a"] * 5, "max_tokens": 100_000, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            jobs = reply.headers["x-penstock-job"].split(", ")
            async for line in reply.aiter_lines():
                if '"index":4' in line:
                    break
        for job in jobs:
            wait_for(lambda job=job: box.get(f"/v1/jobs/{job}").json()["status"] == "cancelled", "the end of a job")


class TestEcho:
    async def test_the_prompt_begins_the_choice(self, http: httpx.AsyncClient) -> None:
        plain = await complete(http, prompt=FOX, max_tokens=8)
        echo = await complete(http, prompt=FOX, max_tokens=8, echo=True)
        by_ids = await complete(http, prompt=[await ids_of(http, FOX)], max_tokens=8, echo=True)
        assert echo["choices"][0]["text"] == FOX + plain["choices"][0]["text"]
        assert by_ids["choices"][0]["text"].endswith(FOX + plain["choices"][0]["text"])
        assert echo["usage"] == by_ids["usage"] == plain["usage"]

    async def test_logprobs_of_the_prompt_are_those_of_the_reply_it_was(self, http: httpx.AsyncClient) -> None:
        asked = {"max_tokens": 10, "logprobs": 2, "return_token_ids": True}
        reply = (await complete(http, prompt=FOX, **asked))["choices"][0]
        ids = await ids_of(http, FOX)
        echoed = await complete(http, prompt=[[*ids, *reply["token_ids"]]], echo=True, **{**asked, "max_tokens": 0})
        (choice,) = echoed["choices"]
        logprobs = choice["logprobs"]
        assert choice["finish_reason"] == "length"
        assert choice["token_ids"] == [*ids, *reply["token_ids"]]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][len(ids) :] == pytest.approx(reply["logprobs"]["token_logprobs"], abs=1e-3)
        assert logprobs["tokens"][len(ids) :] == reply["logprobs"]["tokens"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
        assert echoed["usage"] == {
            "prompt_tokens": len(ids) + 10,
            "completion_tokens": 0,
            "total_tokens": len(ids) + 10,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    async def test_what_lm_evaluation_harness_asks(self, http: httpx.AsyncClient) -> None:
        """A context and a continuation as ids, one token more; which tokens of the continuation are the likeliest."""
        context = await ids_of(http, FOX)
        greedy = (await complete(http, prompt=FOX, max_tokens=6, return_token_ids=True))["choices"][0]["token_ids"]
        other = await ids_of(http, RAIN)
        body = {
            "prompt": [context + greedy, context + other],
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        likely = []
        for choice in sorted((await complete(http, **body))["choices"], key=lambda choice: choice["index"]):
            tokens = choice["logprobs"]["token_logprobs"][len(context) : -1]
            tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
            likely.append(all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True)))
            assert sum(tokens) < 0
        assert likely == [True, False]

    async def test_offsets_are_those_of_the_whole_text(self, http: httpx.AsyncClient) -> None:
        choice = (await complete(http, prompt=FOX, max_tokens=8, echo=True, logprobs=0))["choices"][0]
        logprobs = choice["logprobs"]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            if token in choice["text"]:  # not a special token
                assert choice["text"][offset : offset + len(token)] == token

    async def test_a_stream_has_the_same_text(self, http: httpx.AsyncClient) -> None:
        asked = {"prompt": [FOX, RAIN], "max_tokens": 8, "echo": True, "logprobs": 1, "n": 2}
        whole = await complete(http, **asked)
        choices = joined(await chunks(http, **asked))
        for choice in whole["choices"]:
            told = choices[choice["index"]]
            assert told["text"] == choice["text"]
            for name in ("tokens", "token_logprobs", "text_offset"):
                assert told["logprobs"][name] == choice["logprobs"][name]

    async def test_nothing_but_the_prompt(self, http: httpx.AsyncClient) -> None:
        for stream in (False, True):
            asked: dict[str, Any] = {"prompt": [FOX, RAIN], "max_tokens": 0, "echo": True}
            found = (
                joined(await chunks(http, **asked))
                if stream
                else dict(enumerate((await complete(http, **asked))["choices"]))
            )
            assert [found[i]["text"] for i in range(2)] == [FOX, RAIN]
            assert [found[i]["finish_reason"] for i in range(2)] == ["length", "length"]

    async def test_without_an_echo_nothing_is_no_request(self, http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/completions", json={**GREEDY, "prompt": FOX, "max_tokens": 0})
        assert check_error(answer, 400, "invalid_request")["param"] == "max_tokens"

    async def test_an_engine_that_cannot_tell_says_so(self, http: httpx.AsyncClient) -> None:
        body = {"model": "synthetic", "prompt": "a b", "echo": True, "logprobs": 1}
        assert check_error(await http.post("/v1/completions", json=body), 400, "unsupported")["param"] == "echo"

    async def test_the_sdk_reads_it(self, box: Server) -> None:
        async with openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key="none", timeout=PATIENCE) as sdk:
            reply = await sdk.completions.create(model=MODEL, prompt=[FOX, RAIN], echo=True, max_tokens=1, logprobs=1)
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.choices[1].text.startswith(RAIN)
        assert reply.choices[1].logprobs is not None
