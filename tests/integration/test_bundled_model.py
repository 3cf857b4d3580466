"""The model in the box, as `penstock serve` without any flag serves it: real inference over HTTP."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest

from penstock.testing.oracle import Token, check_log, flatten
from tests.support.api import check_error, submit
from tests.support.server import PATIENCE, Server
from tests.support.sse import Event, Parser, open_stream

MODEL = "millrace"
ASK: Any = [{"role": "user", "content": "Tell me a story about a dog."}]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("bundled"), bundled=True)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
async def http(bundled: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=bundled.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


@pytest.fixture
async def sdk(bundled: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{bundled.url}/v1", api_key="none", timeout=PATIENCE) as client:
        yield client


async def complete(sdk: openai.AsyncOpenAI, prompt: Any = PROMPT, **fields: Any) -> str:
    fields = {"max_tokens": 40, "temperature": 0, **fields}
    return (await sdk.completions.create(model=MODEL, prompt=prompt, **fields)).choices[0].text


async def test_a_chat_streams_text_and_stops_by_itself(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    parts, reason, usage = [], None, None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
    text = "".join(parts)
    assert reason == "stop"
    assert sum(bool(part) for part in parts) > 5, "it came in pieces"
    assert len(text.split()) > 10
    assert "<|" not in text
    assert usage is not None
    assert usage.completion_tokens > 10
    assert usage.prompt_tokens > 5


async def test_streamed_and_waited_for_are_the_same(sdk: openai.AsyncOpenAI) -> None:
    reply = await sdk.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=60)
    stream = await sdk.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=60, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert reply.choices[0].message.content == text


async def test_greedy_is_the_same_alone_and_in_a_crowd(sdk: openai.AsyncOpenAI) -> None:
    alone = await complete(sdk)
    crowd = await asyncio.gather(
        *(complete(sdk) for _ in range(8)), *(complete(sdk, f"Number {n} was", temperature=1) for n in range(16))
    )
    assert set(crowd[:8]) == {alone}


async def test_a_seed_repeats_a_sample(sdk: openai.AsyncOpenAI) -> None:
    samples = [await complete(sdk, temperature=1, seed=seed) for seed in (1, 2, 3)]
    assert len(set(samples)) == 3
    noise = asyncio.gather(*(complete(sdk, temperature=1) for _ in range(4)))
    assert [await complete(sdk, temperature=1, seed=seed) for seed in (1, 2, 3)] == samples
    await noise


async def test_stop_strings_end_it_before_they_appear(sdk: openai.AsyncOpenAI) -> None:
    full = await complete(sdk)
    for length in (1, 4, 9):
        stop = full[15 : 15 + length]
        expected = full[: full.index(stop)]
        reply = await sdk.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "\x01"]
        )
        assert reply.choices[0].text == expected
        assert reply.choices[0].finish_reason == "stop"
        stream = await sdk.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=stop, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in stream]) == expected


async def test_max_tokens_is_length(sdk: openai.AsyncOpenAI) -> None:
    reply = await sdk.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5
    assert (await complete(sdk)).startswith(reply.choices[0].text)


async def test_logit_bias_forces_and_forbids(bundled: Server, http: httpx.AsyncClient) -> None:
    async def ids(**fields: Any) -> list[int]:
        job = await submit(http, prompt=PROMPT, temperature=0, max_tokens=8, **fields)
        async with await open_stream(f"{bundled.url}/v1/jobs/{job}/events") as stream:
            return [token.id for token in flatten(await stream.rest()) if isinstance(token, Token)]

    plain = await ids()
    assert plain[0] not in await ids(logit_bias={str(plain[0]): -100})
    other = plain[3]
    assert await ids(logit_bias={str(other): 100}, ignore_eos=True) == [other] * 8


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}], ids=str)
async def test_a_filter_that_leaves_the_likeliest_is_greedy(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    async def text(**fields: Any) -> str:
        reply = await http.post("/v1/generate", json={"prompt": PROMPT, "max_tokens": 30, **fields})
        return str(reply.json()["text"])

    greedy = await text(temperature=0)
    assert await text(temperature=2, seed=1) != greedy
    assert await text(temperature=2, seed=1, **fields) == greedy


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
async def test_a_penalty_makes_repetitions_rarer(http: httpx.AsyncClient, field: str) -> None:
    async def kinds(**fields: Any) -> int:
        body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True, **fields}
        return len(set((await http.post("/v1/generate", json=body)).json()["text"].split()))

    assert await kinds(**{field: 2}) > await kinds()


async def test_logprobs_are_those_of_the_tokens(sdk: openai.AsyncOpenAI) -> None:
    reply = await sdk.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "refusal" in logprobs.model_fields_set
    assert logprobs.refusal is None
    assert "".join(entry.token for entry in logprobs.content) == reply.choices[0].message.content
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        best = max(entry.top_logprobs, key=lambda top: top.logprob)
        assert entry.logprob == pytest.approx(best.logprob), "greedy takes the likeliest"


async def test_a_resumed_completion_goes_on_in_its_text(http: httpx.AsyncClient) -> None:
    """With bytes that are no characters, and a stop string that does not come."""
    body = {
        "model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 1.5, "seed": 9, "ignore_eos": True,
        "logprobs": 2, "stop": ["no such words"], "stream": True, "logit_bias": {"140": 6, "141": 6},
    }  # fmt: skip
    whole: list[int] = []
    for after in (0, 1, 3, 9):
        answer = await http.post(
            "/v1/completions", json=body, headers={"idempotency-key": "offsets", "last-event-id": str(after)}
        )
        events = [event.data for event in Parser().feed(answer.content) if event.data != "[DONE]"]
        found = [place for event in events for place in (event["choices"][0]["logprobs"] or {}).get("text_offset", ())]
        whole = whole or found
        assert found == whole[after:]
    assert whole == sorted(whole)
    assert len(whole) == 24


async def test_several_samples_differ_and_count(sdk: openai.AsyncOpenAI) -> None:
    reply = await sdk.completions.create(model=MODEL, prompt=PROMPT, n=4, max_tokens=12, temperature=1, seed=5)
    assert len({choice.text for choice in reply.choices}) > 1
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 48


@pytest.mark.parametrize(
    "text", ["Zoë aß 🍰 in Łódź — “schön”", "\u2028\u0000\x1b[31m", "<|im_end|><|endoftext|>", " ", "日本語" * 30]
)
async def test_any_prompt_gives_whole_characters(bundled: Server, http: httpx.AsyncClient, text: str) -> None:
    job = await submit(http, prompt=None, messages=[{"role": "user", "content": text}], max_tokens=30, temperature=1.5)
    async with await open_stream(f"{bundled.url}/v1/jobs/{job}/events") as stream:
        check_log(await stream.rest(), job=job)
    assert stream.raw.isascii()
    assert "job_" in stream.raw.decode()


async def test_token_ids_are_a_prompt_and_bad_ones_are_refused(sdk: openai.AsyncOpenAI) -> None:
    reply = await sdk.completions.create(model=MODEL, prompt=[300, 301, 302], max_tokens=3)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens in (3, 4), "as they are, but for a begin token"
    with pytest.raises(openai.BadRequestError):
        await complete(sdk, [2**31 - 1])


async def test_a_prompt_beyond_the_context_is_refused(http: httpx.AsyncClient) -> None:
    context = (await http.get(f"/v1/models/{MODEL}")).json()["context_length"]
    text = "word " * (context + 10)
    body = {"model": MODEL, "prompt": text, "max_tokens": 5}
    words = f"This model's maximum context length is {context} tokens. However, "
    for route, fields in (("/v1/completions", {}), ("/v1/generate", {"stream": True})):
        error = check_error(await http.post(route, json={**body, **fields}), 400, "context_length_exceeded", "prompt")
        assert error["message"].startswith(words + "you requested ")
    messages = [{"role": "user", "content": text}]
    chat = {"model": MODEL, "messages": messages, "max_tokens": 5}
    reply = await http.post("/v1/chat/completions", json=chat)
    error = check_error(reply, 400, "context_length_exceeded", "messages")
    assert error["message"].startswith(words + "your messages resulted in ")
    reply = await http.post("/v1/responses", json={"model": MODEL, "input": text})
    assert check_error(reply, 400, "context_length_exceeded", "input")["message"].startswith(words)
    for long in (text, text * 40):  # the second is refused before anybody counts
        reply = await http.post("/v1/messages", json={**chat, "messages": [{"role": "user", "content": long}]})
        told = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", reply.json()["error"]["message"])
        assert told is not None, reply.text
        assert int(told[1]) > int(told[2]) == context - 1


async def test_killing_the_engine_changes_not_a_single_token(bundled: Server, http: httpx.AsyncClient) -> None:
    """Greedy at f32: the stream that lived through the death of its engine equals the one that did not."""
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 400, "ignore_eos": True, "stop": ["\x01"]}

    async def stream_of(kill: bool) -> list[Event]:
        job = await submit(http, **body)
        async with await open_stream(f"{bundled.url}/v1/jobs/{job}/events") as stream:
            events = await stream.take(20)
            if kill:
                os.kill(bundled.engine_pid(), signal.SIGKILL)
            events += await stream.rest()
        check_log(events, job=job)
        return events

    calm = [token for token in flatten(await stream_of(kill=False)) if isinstance(token, Token)]
    shaken = [token for token in flatten(await stream_of(kill=True)) if isinstance(token, Token)]
    assert [(token.id, token.text) for token in shaken] == [(token.id, token.text) for token in calm]
    assert shaken[-1].attempt is not None
    assert shaken[-1].attempt > 1, "it was over before the kill: nothing was proven"


async def chat_reply(http: httpx.AsyncClient, messages: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 40, **fields}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


async def test_a_begun_reply_goes_on_where_it_ends(http: httpx.AsyncClient) -> None:
    whole = (await chat_reply(http, ASK))["message"]["content"]
    cut = whole.index(" ", 20)
    begun = [*ASK, {"role": "assistant", "content": whole[:cut]}]
    for fields in ({}, {"add_generation_prompt": False}):
        rest = (await chat_reply(http, begun, continue_final_message=True, **fields))["message"]["content"]
        assert (whole[:cut] + rest).startswith(whole)
    anew = (await chat_reply(http, begun))["message"]["content"]
    assert not (whole[:cut] + anew).startswith(whole)


@pytest.mark.parametrize(
    ("messages", "fields", "code", "param"),
    [
        (ASK, {"continue_final_message": True}, "invalid_request", "continue_final_message"),
        (ASK, {"add_generation_prompt": False}, "unsupported", "add_generation_prompt"),
        (
            [*ASK, {"role": "assistant", "content": "Once"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "invalid_request",
            "add_generation_prompt",
        ),
    ],
)
async def test_what_contradicts_a_begun_reply(
    http: httpx.AsyncClient, messages: Any, fields: dict[str, Any], code: str, param: str
) -> None:
    body = {"model": MODEL, "messages": messages, **fields}
    answer = await http.post("/v1/chat/completions", json=body)
    check_error(answer, 400, code, param)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_token_ids_are_told_to_who_asks(http: httpx.AsyncClient, bundled: Server, route: str) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT} if route == "completions" else {"messages": ASK}
    body = {"model": MODEL, "temperature": 0, "max_tokens": 20, "ignore_eos": True, "return_token_ids": True, **asked}
    whole = (await http.post(f"/v1/{route}", json=body)).json()["choices"][0]["token_ids"]
    assert len(whole) == 20
    streamed: list[int] = []
    url = f"{bundled.url}/v1/{route}"
    async with await open_stream(url, "POST", json_body={**body, "stream": True}) as stream:
        for event in await stream.rest():
            if event.text != "[DONE]":
                streamed += [token for choice in event.data["choices"] for token in choice.get("token_ids", [])]
    assert streamed == whole
    plain = (await http.post(f"/v1/{route}", json={**body, "return_token_ids": False})).json()
    assert "token_ids" not in plain["choices"][0]
