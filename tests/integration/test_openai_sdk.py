"""The official ``openai`` Python SDK, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import openai
import pytest

from tests.support.api import ended, poll, running, submit, text_of
from tests.support.server import PATIENCE, Server, free_port


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_sdk(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0
    ) as client:
        yield client


HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say hello"}]


class TestChat:
    def test_a_reply(self, sdk: openai.OpenAI) -> None:
        reply = sdk.chat.completions.create(model="synthetic", messages=HELLO, max_completion_tokens=4)  # type: ignore[arg-type]
        assert reply.object == "chat.completion"
        assert reply.id.startswith("chatcmpl-")
        assert reply.model == "synthetic"
        assert reply.created > 1_600_000_000
        (choice,) = reply.choices
        assert choice.index == 0
        assert choice.message.role == "assistant"
        assert choice.message.content == text_of(4)
        assert choice.finish_reason == "length"
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 4
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + 4

    @pytest.mark.parametrize("model", ["synthetic", "paced"])
    def test_a_stream_with_usage(self, sdk: openai.OpenAI, model: str) -> None:
        stream = sdk.chat.completions.create(
            model=model,
            messages=HELLO,
            max_tokens=10,
            stream=True,
            stream_options={"include_usage": True},  # type: ignore[arg-type]
        )
        chunks = list(stream)
        assert len({chunk.id for chunk in chunks}) == 1
        assert len({chunk.created for chunk in chunks}) == 1
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        *body, last = chunks
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == 10
        assert all(chunk.usage is None for chunk in body)
        assert body[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == text_of(10)
        assert [chunk.choices[0].finish_reason for chunk in body if chunk.choices[0].finish_reason] == ["length"]
        assert body[-1].choices[0].finish_reason == "length"

    def test_a_stream_without_usage(self, sdk: openai.OpenAI) -> None:
        chunks = list(sdk.chat.completions.create(model="synthetic", messages=HELLO, max_tokens=3, stream=True))  # type: ignore[arg-type]
        assert all(chunk.choices for chunk in chunks)
        assert all(chunk.usage is None for chunk in chunks)

    def test_the_streaming_helper(self, sdk: openai.OpenAI) -> None:
        with sdk.chat.completions.stream(model="paced", messages=HELLO, max_tokens=8) as stream:  # type: ignore[arg-type]
            kinds = [event.type for event in stream]
            # (Its get_final_completion refuses whatever was cut by max_tokens.)
            completion = stream.current_completion_snapshot
        assert "content.delta" in kinds
        assert completion.choices[0].message.content == text_of(8)

    def test_several_choices(self, sdk: openai.OpenAI) -> None:
        reply = sdk.chat.completions.create(model="synthetic", messages=HELLO, max_tokens=3, n=3)  # type: ignore[arg-type]
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert [choice.message.content for choice in reply.choices] == [text_of(3)] * 3
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 9
        texts = ["", "", ""]
        reasons: dict[int, str] = {}
        for chunk in sdk.chat.completions.create(model="paced", messages=HELLO, max_tokens=3, n=3, stream=True):  # type: ignore[arg-type]
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert texts == [text_of(3)] * 3
        assert reasons == {0: "length", 1: "length", 2: "length"}

    def test_content_parts(self, sdk: openai.OpenAI) -> None:
        messages = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]
        reply = sdk.chat.completions.create(model="synthetic", messages=messages, max_tokens=1)  # type: ignore[arg-type]
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == 2

    def test_extra_fields_pass(self, sdk: openai.OpenAI) -> None:
        reply = sdk.chat.completions.create(
            model="synthetic", messages=HELLO, max_tokens=2, extra_body={"top_k": 5, "min_p": 0.1, "priority": "batch"},  # type: ignore[arg-type]
        )  # fmt: skip
        assert reply.choices[0].message.content == text_of(2)

    def test_raw_responses_tell_the_job(self, sdk: openai.OpenAI, server: Server) -> None:
        raw = sdk.chat.completions.with_raw_response.create(
            model="synthetic",
            messages=HELLO,
            max_tokens=2,
            extra_headers={"x-request-id": "from-the-sdk"},  # type: ignore[arg-type]
        )
        assert raw.headers["x-request-id"] == "from-the-sdk"
        assert raw.parse()._request_id == "from-the-sdk"
        job = raw.headers["x-penstock-job"]
        assert server.get(f"/v1/jobs/{job}").json()["result"]["text"] == text_of(2)


class TestCompletions:
    def test_two_choices(self, sdk: openai.OpenAI) -> None:
        reply = sdk.completions.create(model="synthetic", prompt="a b", n=2, max_tokens=3)
        assert reply.object == "text_completion"
        assert [(choice.index, choice.text) for choice in reply.choices] == [(0, text_of(3)), (1, text_of(3))]
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 6)

    def test_a_stream_of_two_choices_with_usage(self, sdk: openai.OpenAI) -> None:
        texts = ["", ""]
        usage = None
        for chunk in sdk.completions.create(
            model="paced", prompt="a", n=2, max_tokens=6, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [text_of(6)] * 2
        assert usage is not None
        assert usage.completion_tokens == 12

    def test_the_default_length(self, sdk: openai.OpenAI) -> None:
        assert sdk.completions.create(model="synthetic", prompt="a").choices[0].text == text_of(16)

    def test_token_ids_and_a_list_of_one(self, sdk: openai.OpenAI) -> None:
        reply = sdk.completions.create(model="synthetic", prompt=[5, 6, 7, 8], max_tokens=1)
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == 4
        assert sdk.completions.create(model="synthetic", prompt=["a b c"], max_tokens=1).usage.prompt_tokens == 3  # type: ignore[union-attr]


class TestModels:
    def test_list_and_retrieve(self, sdk: openai.OpenAI) -> None:
        models = list(sdk.models.list())
        assert [model.id for model in models] == ["synthetic", "paced", "crawl"]
        assert sdk.models.retrieve("paced").id == "paced"
        with pytest.raises(openai.NotFoundError):
            sdk.models.retrieve("nobody")


class TestErrors:
    def test_an_unknown_model(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.chat.completions.create(model="nobody", messages=HELLO)  # type: ignore[arg-type]
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
        assert caught.value.request_id

    def test_a_bad_request(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(model="synthetic", messages=HELLO, temperature=9)  # type: ignore[arg-type]
        assert caught.value.param == "temperature"
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(model="synthetic", messages=HELLO, seed=1)  # type: ignore[arg-type]
        assert caught.value.code == "unsupported"
        with pytest.raises(openai.BadRequestError):
            sdk.chat.completions.create(model="synthetic", messages=[])

    def test_another_body_under_the_same_key(self, sdk: openai.OpenAI) -> None:
        headers = {"Idempotency-Key": "sdk-key"}
        sdk.completions.create(model="synthetic", prompt="a", extra_headers=headers)
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            sdk.completions.create(model="synthetic", prompt="b", extra_headers=headers)
        assert caught.value.code == "idempotency_mismatch"

    def test_a_body_that_is_too_large(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.completions.create(model="synthetic", prompt="x" * (1 << 20))
        assert caught.value.status_code == 413

    def test_no_server(self) -> None:
        sdk = openai.OpenAI(base_url=f"http://127.0.0.1:{free_port()}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIConnectionError):
            sdk.models.list()
        sdk.close()

    def test_a_route_that_is_not_served(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            sdk.moderations.create(input="x")

    def test_a_failure_mid_stream_is_raised(self, sdk: openai.OpenAI, server: Server) -> None:
        stream = sdk.completions.create(model="paced", prompt="a", max_tokens=100_000, stream=True)
        job = stream.response.headers["x-penstock-job"]
        chunks = [next(stream) for _ in range(3)]
        httpx.post(f"{server.url}/v1/jobs/{job}/cancel", trust_env=False).raise_for_status()
        with pytest.raises(openai.APIError, match="cancelled"):
            chunks.extend(stream)
        assert chunks[0].choices[0].text.startswith("1@1 ")

    async def test_a_full_queue_is_a_rate_limit_and_the_sdk_comes_back_by_itself(
        self, make_server: Callable[..., Server]
    ) -> None:
        server = make_server(rate=50, options={"slots": 1}, settings={"max_queued": 1})
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as sdk,
        ):
            blocker = await submit(http, max_tokens=100_000)
            await running(http, blocker)
            waiting = await submit(http, max_tokens=1)
            with pytest.raises(openai.RateLimitError) as caught:
                await sdk.completions.create(model="synthetic", prompt="a", max_tokens=1)
            assert caught.value.code == "overloaded"
            assert int(caught.value.response.headers["retry-after-ms"]) <= 60_000
            patient = asyncio.create_task(
                sdk.with_options(max_retries=5).completions.create(model="synthetic", prompt="a", max_tokens=1)
            )
            errors = 'llm_gateway_errors_total{code="overloaded"} 2.0'
            await poll(lambda: http.get("/metrics"), lambda reply: errors in reply.text)
            await http.post(f"/v1/jobs/{blocker}/cancel")
            await ended(http, waiting)
            assert (await patient).choices[0].text == text_of(1)


class TestAsync:
    async def test_forty_streams_at_once(self, async_sdk: openai.AsyncOpenAI) -> None:
        async def one(number: int) -> str:
            text = ""
            stream = await async_sdk.chat.completions.create(
                model="paced",
                messages=HELLO,
                max_tokens=10 + number % 5,
                stream=True,  # type: ignore[arg-type]
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            return text

        texts = await asyncio.gather(*(one(number) for number in range(40)))
        assert texts == [text_of(10 + number % 5) for number in range(40)]

    async def test_a_stream_closed_early_cancels_its_job(
        self, async_sdk: openai.AsyncOpenAI, http: httpx.AsyncClient
    ) -> None:
        stream = await async_sdk.chat.completions.create(model="paced", messages=HELLO, max_tokens=100_000, stream=True)  # type: ignore[arg-type]
        job = stream.response.headers["x-penstock-job"]
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        assert (await ended(http, job))["status"] == "cancelled"

    async def test_what_is_timed_out_and_sent_again_under_its_key_is_one_job(
        self, async_sdk: openai.AsyncOpenAI, http: httpx.AsyncClient
    ) -> None:
        reply = await async_sdk.with_options(timeout=0.3, max_retries=20).chat.completions.create(
            model="crawl",
            messages=HELLO,  # type: ignore[arg-type]
            max_tokens=2,
            user="impatient",
            metadata={"on_disconnect": "continue"},
            extra_headers={"Idempotency-Key": "impatient"},
        )
        assert reply.choices[0].message.content == text_of(2)
        assert len((await http.get("/v1/jobs?user_id=impatient")).json()["data"]) == 1

    async def test_a_heartbeat_disturbs_no_decoder(self, async_sdk: openai.AsyncOpenAI) -> None:
        """Half a second between tokens, a ping in between: after an id, a wrong one would be a JSONDecodeError."""
        stream = await async_sdk.completions.create(model="crawl", prompt="x", max_tokens=4, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
        assert text == text_of(4)
