"""The official ``anthropic`` Python SDK, unchanged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

import anthropic
import httpx
import pydantic
import pytest

from penstock.testing.engine.driver import PERSON, assert_obeys
from tests.support.api import ended, running, submit, text_of
from tests.support.server import PATIENCE, Server, model
from tests.support.sse import open_stream

HELLO: Any = [{"role": "user", "content": "say hello"}]
LOOK_UP: Any = {"name": "look_up", "description": "Looks up.", "input_schema": PERSON}
GREEDY = {"temperature": 0}
WAIT: Any = {"name": "wait", "input_schema": {"type": "object", "maxProperties": 0}}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The model in the box, for what the synthetic engine has no part in: tools, schemas, stops, tokens."""
    server = Server(tmp_path_factory.mktemp("box"), models=[model("millrace", engine="openvino")])
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def sdk(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


@pytest.fixture
def boxed(box: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=box.url, api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_sdk(server: Server) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


class TestMessages:
    def test_a_reply(self, sdk: anthropic.Anthropic) -> None:
        reply = sdk.messages.create(model="synthetic", max_tokens=4, system="Be brief.", messages=HELLO)
        assert reply.type == "message"
        assert reply.role == "assistant"
        assert reply.model == "synthetic"
        (block,) = reply.content
        assert block.type == "text"
        assert block.text == text_of(4)
        assert reply.stop_reason == "max_tokens"
        assert reply.stop_sequence is None
        assert (reply.usage.input_tokens, reply.usage.output_tokens) == (4, 4)

    def test_its_job(self, sdk: anthropic.Anthropic, server: Server) -> None:
        raw = sdk.messages.with_raw_response.create(
            model="synthetic", max_tokens=2, messages=HELLO, metadata={"user_id": "u-1"}
        )
        job = server.get(f"/v1/jobs/{raw.headers['x-penstock-job']}").json()
        assert job["user_id"] == "u-1"
        assert job["result"]["text"] == text_of(2)
        message = raw.parse()
        assert message.id == "msg_" + job["id"].removeprefix("job_")
        assert message._request_id == raw.headers["x-request-id"]

    def test_blocks_and_turns(self, sdk: anthropic.Anthropic) -> None:
        reply = sdk.messages.create(
            model="synthetic",
            max_tokens=1,
            system=[
                {"type": "text", "text": "one ", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "two"},
            ],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "three"}]},
                {"role": "assistant", "content": "four"},
                {"role": "user", "content": "five"},
                {"role": "user", "content": "six"},
            ],
            metadata={"user_id": None},
            thinking={"type": "disabled"},
            extra_body={"top_k": 5, "top_p": 0.9, "temperature": 0.5},
        )
        assert reply.usage.input_tokens == 6

    @pytest.mark.parametrize("name", ["synthetic", "paced"])
    def test_a_stream(self, sdk: anthropic.Anthropic, name: str) -> None:
        with sdk.messages.stream(model=name, max_tokens=10, messages=HELLO) as stream:
            text = "".join(stream.text_stream)
            message = stream.get_final_message()
        assert text == text_of(10)
        (block,) = message.content
        assert block.type == "text"
        assert block.text == text
        assert message.stop_reason == "max_tokens"
        assert (message.usage.input_tokens, message.usage.output_tokens) == (2, 10)

    def test_the_events_of_a_stream(self, sdk: anthropic.Anthropic) -> None:
        events = list(sdk.messages.create(model="paced", max_tokens=5, messages=HELLO, stream=True))
        start, begin, *deltas, stop, delta, last = events
        assert start.type == "message_start"
        assert start.message.content == []
        assert start.message.stop_reason is None
        assert (start.message.usage.input_tokens, start.message.usage.output_tokens) == (2, 0)
        assert begin.type == "content_block_start"
        assert begin.content_block.type == "text"
        assert "".join(event.delta.text for event in deltas) == text_of(5)  # type: ignore[union-attr]
        assert stop.type == "content_block_stop"
        assert delta.type == "message_delta"
        assert (delta.delta.stop_reason, delta.usage.output_tokens) == ("max_tokens", 5)
        assert last.type == "message_stop"

    def test_a_heartbeat_disturbs_no_decoder(self, sdk: anthropic.Anthropic) -> None:
        with sdk.messages.stream(model="crawl", max_tokens=3, messages=HELLO) as stream:
            assert stream.get_final_text() == text_of(3)

    def test_models(self, sdk: anthropic.Anthropic) -> None:
        assert [model.id for model in sdk.models.list()] == ["synthetic", "paced", "crawl"]
        assert sdk.models.retrieve("paced").id == "paced"
        with pytest.raises(anthropic.NotFoundError):
            sdk.models.retrieve("nobody")

    def test_the_beta_client(self, sdk: anthropic.Anthropic) -> None:
        reply = sdk.beta.messages.create(model="synthetic", max_tokens=2, messages=HELLO)
        assert reply.content[0].text == text_of(2)  # type: ignore[union-attr]


class TestAsync:
    async def test_a_reply_and_forty_streams_at_once(self, async_sdk: anthropic.AsyncAnthropic) -> None:
        reply = await async_sdk.messages.create(model="synthetic", max_tokens=3, messages=HELLO)
        assert reply.content[0].text == text_of(3)  # type: ignore[union-attr]

        async def one(number: int) -> str:
            async with async_sdk.messages.stream(model="paced", max_tokens=10 + number % 5, messages=HELLO) as stream:
                return await stream.get_final_text()

        texts = await asyncio.gather(*(one(number) for number in range(40)))
        assert texts == [text_of(10 + number % 5) for number in range(40)]

    async def test_a_stream_closed_early_cancels_its_job(
        self, async_sdk: anthropic.AsyncAnthropic, http: httpx.AsyncClient
    ) -> None:
        async with async_sdk.messages.stream(model="paced", max_tokens=100_000, messages=HELLO) as stream:
            job = stream.response.headers["x-penstock-job"]
            async for _ in stream.text_stream:
                break
        assert (await ended(http, job))["status"] == "cancelled"

    async def test_on_disconnect_continue(self, async_sdk: anthropic.AsyncAnthropic, http: httpx.AsyncClient) -> None:
        metadata: Any = {"on_disconnect": "continue"}
        async with async_sdk.messages.stream(model="paced", max_tokens=60, messages=HELLO, metadata=metadata) as stream:
            job = stream.response.headers["x-penstock-job"]
            async for _ in stream.text_stream:
                break
        assert (await ended(http, job))["result"]["text"] == text_of(60)


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "kind", "type", "says"),
        [
            ({"model": "nobody"}, anthropic.NotFoundError, "not_found_error", "Served: synthetic"),
            ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError, "invalid_request_error", "temperature"),
            ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
            ({"messages": []}, anthropic.BadRequestError, "invalid_request_error", "messages"),
            (
                {"extra_body": {"thinking": {"type": "sometimes"}}},
                anthropic.BadRequestError,
                "invalid_request_error",
                "thinking.type",
            ),
            ({"extra_body": {"thread": {"type": "x"}}}, anthropic.BadRequestError, "invalid_request_error", "Threads"),
            ({"extra_body": {"n": 2}}, anthropic.BadRequestError, "invalid_request_error", "n is 1"),
            ({"extra_body": {"stop": ["x"]}}, anthropic.BadRequestError, "invalid_request_error", "stop_sequences"),
            ({"metadata": {"user_id": "a\nb"}}, anthropic.BadRequestError, "invalid_request_error", "user_id"),
            ({"tools": [WAIT]}, anthropic.BadRequestError, "invalid_request_error", "cannot honour 'tools'"),
            ({"system": "x" * (1 << 20)}, anthropic.ContentTooLargeError, "invalid_request_error", "larger than"),
        ],
    )  # fmt: skip
    def test_what_is_refused(
        self,
        sdk: anthropic.Anthropic,
        fields: dict[str, Any],
        kind: type[anthropic.APIStatusError],
        type: str,
        says: str,
    ) -> None:
        with pytest.raises(kind) as caught:
            sdk.messages.create(**{"model": "synthetic", "max_tokens": 1, "messages": HELLO, **fields})
        assert caught.value.type == type
        assert says in (caught.value.api_message or "")
        assert caught.value.request_id

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ([{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}], "text only"),
            ([{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}], "'document'"),
            ([{"type": "thinking", "thinking": "x", "signature": "y"}], "'thinking'"),
            ([{"type": "tool_use", "id": "x", "name": "wait", "input": {}}], "'tool_use'"),
            ([{"type": "tool_result", "content": "x"}], "tool_use_id"),
            ([{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}], "'image'"),
            ([{"type": "text"}], "text"),
            ([], "content"),
        ],
    )
    def test_contents_that_are_refused(self, sdk: anthropic.Anthropic, content: Any, says: str) -> None:
        with pytest.raises(anthropic.BadRequestError) as caught:
            sdk.messages.create(model="synthetic", max_tokens=1, messages=[{"role": "user", "content": content}])
        assert says in (caught.value.api_message or "")
        assert "messages[0]" in (caught.value.api_message or "")

    async def test_the_shape_of_an_error(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/messages", json={"model": "synthetic", "messages": HELLO})
        assert reply.status_code == 400
        assert reply.json() == {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "Object missing required field `max_tokens`",
                "param": "max_tokens",
                "code": "invalid_request",
            },
            "request_id": reply.headers["x-request-id"],
        }

    @pytest.mark.parametrize(
        ("method", "path", "headers", "status", "type"),
        [
            ("GET", "/v1/messages", {}, 405, "invalid_request_error"),
            ("DELETE", "/v1/messages/count_tokens", {}, 405, "invalid_request_error"),
            ("POST", "/v1/messages/batches", {}, 404, "not_found_error"),
            ("GET", "/v1/messages/batches/msgbatch_1/results", {}, 404, "not_found_error"),
            ("GET", "/v1/messages/nothing", {}, 404, "not_found_error"),
            ("POST", "/v1/messages", {"host": "evil.example"}, 400, "invalid_request_error"),
            ("POST", "/v1/messages", {"origin": "https://evil.example"}, 403, "permission_error"),
            ("POST", "/v1/messages", {"content-encoding": "gzip"}, 415, "invalid_request_error"),
        ],
    )
    async def test_what_is_refused_before_it_is_read_has_that_shape_too(
        self, server: Server, method: str, path: str, headers: dict[str, str], status: int, type: str
    ) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            reply = await http.request(method, path, json={}, headers=headers)
            assert reply.status_code == status, reply.text
            body = reply.json()
            assert (body["type"], body["error"]["type"]) == ("error", type)
            assert body["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
            if status == 405:
                assert reply.headers["allow"] == "POST"
            other = await http.get(path.replace("/messages", "/messagesx"))
            assert set(other.json()) == {"error"}, "only below /v1/messages"

    def test_there_are_no_message_batches(self, sdk: anthropic.Anthropic) -> None:
        batches = sdk.messages.batches
        body: Any = {"model": "synthetic", "max_tokens": 1, "messages": HELLO}
        for call in (
            lambda: batches.create(requests=[{"custom_id": "a", "params": body}]),
            batches.list,
            lambda: batches.retrieve("msgbatch_1"),
            lambda: batches.cancel("msgbatch_1"),
        ):
            with pytest.raises(anthropic.NotFoundError, match="Message Batches are not offered: POST /v1/batches runs"):
                call()

    def test_a_failure_mid_stream_is_raised(self, sdk: anthropic.Anthropic, server: Server) -> None:
        with sdk.messages.stream(model="paced", max_tokens=100_000, messages=HELLO) as stream:
            job = stream.response.headers["x-penstock-job"]
            texts = iter(stream.text_stream)
            assert next(texts).startswith("1@1 ")
            httpx.post(f"{server.url}/v1/jobs/{job}/cancel", trust_env=False).raise_for_status()
            with pytest.raises(anthropic.APIStatusError) as caught:
                list(texts)
        assert "cancelled" in (caught.value.api_message or "")
        assert caught.value.body["type"] == "error"  # type: ignore[index]

    async def test_a_full_queue_is_a_rate_limit_with_a_time_to_come_back(
        self, make_server: Callable[..., Server]
    ) -> None:
        server = make_server(rate=50, options={"slots": 1}, settings={"max_queued": 1})
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http,
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none", timeout=PATIENCE, max_retries=0) as sdk,
        ):
            await running(http, await submit(http, max_tokens=100_000))
            await submit(http, max_tokens=1)
            with pytest.raises(anthropic.RateLimitError) as caught:
                await sdk.messages.create(model="synthetic", max_tokens=1, messages=HELLO)
            assert caught.value.type == "rate_limit_error"
            assert int(caught.value.response.headers["retry-after-ms"]) >= 1


class TestResume:
    async def test_the_log_goes_on_behind_the_last_id(self, http: httpx.AsyncClient, server: Server) -> None:
        body = {
            "model": "paced", "max_tokens": 12, "messages": HELLO, "stream": True,
            "metadata": {"on_disconnect": "continue"},
        }  # fmt: skip
        async with await open_stream(f"{server.url}/v1/messages", "POST", json_body=body) as stream:
            job = stream.headers["x-penstock-job"]
            seen = await stream.take(5)
        text = "".join(event.data["delta"]["text"] for event in seen if event.event == "content_block_delta")
        after = stream.parser.last_event_id
        assert after is not None
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events", after=after) as rest:
            *tokens, done = await rest.rest()
        assert text + "".join(event.data["token"] for event in tokens) == text_of(12)
        assert done.event == "done"

    async def test_the_same_key_attaches_to_the_same_message(self, http: httpx.AsyncClient, server: Server) -> None:
        body = {"model": "paced", "max_tokens": 12, "messages": HELLO, "stream": True}
        headers = {"idempotency-key": "anthropic-key"}
        url = f"{server.url}/v1/messages"
        async with await open_stream(url, "POST", headers=headers, json_body=body) as stream:
            first = await stream.take(4)
            async with await open_stream(url, "POST", headers=headers, json_body=body) as again:
                whole = await again.rest()
            first += await stream.rest()
        assert whole[0].data["message"]["id"] == first[0].data["message"]["id"]
        for events in (first, whole):
            told = [event.data["delta"]["text"] for event in events if event.event == "content_block_delta"]
            assert "".join(told) == text_of(12)
        middle = next(event.id for event in whole[3:] if event.id is not None)
        async with await open_stream(url, "POST", headers=headers, after=middle, json_body=body) as rest:
            behind = await rest.rest()
        assert [event.event for event in behind[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
        assert {event.event for event in behind[:-3]} == {"content_block_delta"}
        told = [event.data["delta"]["text"] for event in behind[:-3]]
        assert "".join(told) == "".join(f"{n}@1 " for n in range(int(middle) + 1, 13))
        end = whole[-1].id
        async with await open_stream(url, "POST", headers=headers, after=end, json_body=body) as nothing:
            assert (nothing.status, await nothing.rest()) == (200, [])
        beyond = await http.post(url, json=body, headers={**headers, "last-event-id": "99"})
        assert (beyond.status_code, beyond.json()["type"], beyond.json()["error"]["code"]) == (
            409,
            "error",
            "log_rewound",
        )


class Colour(pydantic.BaseModel):
    name: Literal["red", "green"]
    shade: Literal["light", "dark"]


class TestTheModelInTheBox:
    def test_a_conversation(self, boxed: anthropic.Anthropic) -> None:
        messages: Any = [{"role": "user", "content": "What is a river?"}]
        reply = boxed.messages.create(model="millrace", max_tokens=64, extra_body=GREEDY, messages=messages)
        assert reply.stop_reason == "end_turn"
        assert reply.content[0].text.endswith(".")  # type: ignore[union-attr]
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": "And a mill?"}]
        again = boxed.messages.create(model="millrace", max_tokens=8, messages=messages)
        assert prompt_tokens(again.usage) > prompt_tokens(reply.usage) + reply.usage.output_tokens

    def test_a_begun_reply_goes_on(self, boxed: anthropic.Anthropic) -> None:
        ask: Any = [{"role": "user", "content": "What is a river?"}]
        whole = boxed.messages.create(model="millrace", max_tokens=64, extra_body=GREEDY, messages=ask)
        text: str = whole.content[0].text  # type: ignore[union-attr]
        begun = text[: text.index(" ", 10)]
        rest = boxed.messages.create(
            model="millrace", max_tokens=64, extra_body=GREEDY, messages=[*ask, {"role": "assistant", "content": begun}]
        )
        assert begun + rest.content[0].text == text  # type: ignore[union-attr]

    def test_the_models(self, boxed: anthropic.Anthropic, sdk: anthropic.Anthropic, server: Server) -> None:
        (found,) = boxed.models.list()
        assert (found.id, found.type, found.display_name) == ("millrace", "model", "millrace")
        assert found.created_at.tzinfo is not None
        assert found.max_input_tokens == 1024
        assert boxed.models.retrieve("millrace") == found
        with pytest.raises(anthropic.NotFoundError) as refused:
            boxed.models.retrieve("nobody")
        assert refused.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        names = [each["id"] for each in server.get("/v1/models").json()["data"]]
        assert len(names) == 3, "and who does not say that it is Anthropic's client gets OpenAI's list"
        for limit in (1, 2, 3):
            assert [each.id for each in sdk.models.list(limit=limit)] == names
        assert [each.id for each in sdk.models.list(before_id=names[2], limit=1).data] == [names[1]]
        assert sdk.models.list(after_id=names[2]).data == []
        for wrong in ({"limit": 0}, {"after_id": "nobody"}, {"after_id": names[0], "before_id": names[1]}):
            with pytest.raises(anthropic.BadRequestError):
                sdk.models.list(**wrong)  # type: ignore[arg-type]

    def test_count_tokens(self, boxed: anthropic.Anthropic) -> None:
        fields: Any = {"model": "millrace", "system": "Be brief.", "messages": HELLO}
        count = boxed.messages.count_tokens(**fields)
        assert count.input_tokens == prompt_tokens(boxed.messages.create(**fields, max_tokens=1).usage)
        more = boxed.messages.count_tokens(**fields, tools=[LOOK_UP])
        assert more.input_tokens > count.input_tokens
        with pytest.raises(anthropic.NotFoundError):
            boxed.messages.count_tokens(model="nobody", messages=HELLO)

    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "look_up"}])
    def test_a_call_that_must_be_made_and_its_result(self, boxed: anthropic.Anthropic, choice: Any) -> None:
        tools = [LOOK_UP] if choice["type"] == "any" else [LOOK_UP, WAIT]
        reply = boxed.messages.create(
            model="millrace", max_tokens=200, messages=HELLO, tools=tools, tool_choice=choice, extra_body={"seed": 2}
        )
        assert reply.stop_reason == "tool_use"
        (call,) = reply.content
        assert call.type == "tool_use"
        assert call.name == "look_up"
        assert call.id.startswith("toolu_")
        assert_obeys_person(call.input)
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "It is Ann.", "is_error": True}
        answered: Any = [
            *HELLO,
            reply.to_param(),
            {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
        ]
        last = boxed.messages.create(model="millrace", max_tokens=8, messages=answered, tools=tools)
        assert prompt_tokens(last.usage) > prompt_tokens(reply.usage)
        with pytest.raises(anthropic.BadRequestError, match="tool_result"):
            boxed.messages.create(model="millrace", max_tokens=8, messages=[*HELLO, reply.to_param()])

    def test_the_tool_runner(self, boxed: anthropic.Anthropic) -> None:
        """The SDK's loop: it calls the function, sends what it gave, and stops where no more is to be called."""
        seen = []

        @anthropic.beta_tool
        def weather(city: Literal["Ulm", "Rome"]) -> str:
            """The weather in a city."""
            seen.append(city)
            return f"Rain in {city}."

        for stream in (False, True):
            runner = boxed.beta.messages.tool_runner(
                model="millrace",
                max_tokens=100,
                messages=[{"role": "user", "content": "Weather?"}],
                tools=[weather],
                tool_choice={"type": "tool", "name": "weather"},
                max_iterations=2,
                stream=stream,
            )
            runner.until_done()
        assert len(seen) >= 2
        assert set(seen) <= {"Ulm", "Rome"}

    def test_a_streamed_call(self, boxed: anthropic.Anthropic) -> None:
        with boxed.messages.stream(
            model="millrace", max_tokens=200, messages=HELLO, tools=[LOOK_UP], tool_choice={"type": "any"},
            extra_body={"seed": 3},
        ) as stream:  # fmt: skip
            kinds = [event.type for event in stream]
            message = stream.get_final_message()
        assert kinds.count("input_json") > 1, "its arguments come as they are written"
        assert "text" not in kinds
        assert message.stop_reason == "tool_use"
        (call,) = message.content
        assert call.type == "tool_use"
        assert_obeys_person(call.input)

    def test_a_call_that_is_cut_short_is_not_taken_for_a_whole_one(self, boxed: anthropic.Anthropic) -> None:
        reply = boxed.messages.create(
            model="millrace", max_tokens=20, messages=HELLO, tools=[LOOK_UP], tool_choice={"type": "any"}
        )
        assert reply.stop_reason == "max_tokens"
        (call,) = reply.content
        assert call.type == "tool_use"
        assert call.input == {}

    @pytest.mark.parametrize("choice", [{"type": "none"}, {"type": "auto", "disable_parallel_tool_use": True}])
    def test_calls_that_need_not_be_made(self, boxed: anthropic.Anthropic, choice: Any) -> None:
        reply = boxed.messages.create(
            model="millrace", max_tokens=64, extra_body=GREEDY, messages=HELLO, tools=[LOOK_UP], tool_choice=choice
        )
        assert reply.content[0].type == "text"

    def test_a_format_is_parsed(self, boxed: anthropic.Anthropic) -> None:
        reply = boxed.messages.parse(model="millrace", max_tokens=300, messages=HELLO, output_format=Colour)
        assert isinstance(reply.parsed_output, Colour)
        assert reply.stop_reason == "end_turn"

    def test_stop_sequences_end_the_text(self, boxed: anthropic.Anthropic) -> None:
        ask: Any = [{"role": "user", "content": "What is a river?"}]
        fields: Any = {"model": "millrace", "max_tokens": 64, "extra_body": GREEDY, "messages": ask}
        text: str = boxed.messages.create(**fields).content[0].text  # type: ignore[union-attr]
        word = text.split()[3]
        reply = boxed.messages.create(**fields, stop_sequences=["no such words", word])
        assert reply.content[0].text == text[: text.index(word)]  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "not the client's"),
            ({"tools": [{**WAIT, "defer_loading": True}]}, "defer_loading"),
            ({"tools": [WAIT, WAIT]}, "two tools"),
            ({"tool_choice": {"type": "any"}}, "no tools"),
            ({"tools": [WAIT], "tool_choice": {"type": "tool", "name": "other"}}, "'other'"),
            ({"tools": [WAIT], "tool_choice": {"type": "tool"}}, "name"),
            ({"tools": [WAIT], "messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "begins"),
            ({"tools": [{"name": "a b", "input_schema": {}}]}, "name"),
            ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "not"),
        ],
    )
    def test_what_is_refused(self, boxed: anthropic.Anthropic, fields: dict[str, Any], says: str) -> None:
        with pytest.raises(anthropic.BadRequestError) as caught:
            boxed.messages.create(**{"model": "millrace", "max_tokens": 8, "messages": HELLO, **fields})
        assert says in (caught.value.api_message or "")


def prompt_tokens(usage: anthropic.types.Usage) -> int:
    """All of them: Anthropic counts apart those that were cached."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def assert_obeys_person(value: object) -> None:
    assert_obeys(json.dumps(value))
