"""OpenAI's Responses through the official ``openai`` SDK, unchanged; faults and resumes included."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from penstock.testing.engine.driver import PERSON, assert_obeys
from tests.support.api import check_error, poll, text_of
from tests.support.server import PATIENCE, Server, model, wait_for
from tests.support.sse import open_stream

RIVER = "What is a river?"
LOOK_UP: Any = {"type": "function", "name": "look_up", "description": "Looks up.", "parameters": PERSON}
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``millrace``, and synthetic models: as fast as it can, 50 and 4 tokens/s."""
    server = Server(
        tmp_path_factory.mktemp("box"),
        models=[
            model("millrace", engine="openvino"),
            model("synthetic"),
            model("paced", rate=50),
            model("crawl", rate=4, slots=2),
        ],
        settings={"disconnect_grace": 0.3, "heartbeat": 0.3},
    )
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def sdk(box: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{box.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_sdk(box: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


@pytest.fixture
async def http(box: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=box.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


def finished(sdk: openai.OpenAI, response: str) -> Any:
    """The response once it has ended."""

    def look() -> Any:
        found = sdk.responses.retrieve(response)
        return found if found.status not in ("queued", "in_progress") else None

    return wait_for(look, "the end of the response")


def check_sequence(events: list[Any], first: int = 0) -> str:
    """Numbers without gap, one terminal event at the end; the text."""
    assert [event.sequence_number for event in events] == list(range(first, first + len(events)))
    assert [event.type in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def check_attempts(text: str, count: int) -> None:
    """Every position once and in order, written by more than one attempt."""
    positions, attempts = zip(*(map(int, word.split("@")) for word in text.split()), strict=True)
    assert positions == tuple(range(1, count + 1))
    assert attempts == tuple(sorted(attempts))
    assert len(set(attempts)) > 1


class TestCreate:
    def test_a_response(self, sdk: openai.OpenAI, box: Server) -> None:
        raw = sdk.responses.with_raw_response.create(
            model="millrace", input=RIVER, instructions="Be brief.", temperature=0, metadata={"a": "b"}
        )
        reply = raw.parse()
        assert (reply.object, reply.status, reply.model) == ("response", "completed", "millrace")
        assert reply.output_text.startswith("A river")
        (message,) = reply.output
        assert message.type == "message"
        assert (message.role, message.status) == ("assistant", "completed")
        assert reply.usage is not None
        assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens > 10
        assert (reply.instructions, reply.metadata, reply.temperature) == ("Be brief.", {"a": "b"}, 0)
        assert (reply.error, reply.incomplete_details, reply.background) == (None, None, False)
        assert reply.completed_at is not None
        assert reply.completed_at >= reply.created_at > 1_600_000_000
        job = raw.headers["x-penstock-job"]
        assert reply.id == "resp_" + job.removeprefix("job_")
        assert box.get(f"/v1/jobs/{job}").json()["result"]["text"] == reply.output_text
        assert sdk.responses.retrieve(reply.id).to_dict() == reply.to_dict()

    def test_what_max_output_tokens_cuts_is_incomplete(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(model="synthetic", input="x", max_output_tokens=4)
        assert reply.status == "incomplete"
        assert reply.incomplete_details is not None
        assert reply.incomplete_details.reason == "max_output_tokens"
        assert reply.completed_at is None
        assert reply.output_text == text_of(4)
        assert reply.output[0].status == "incomplete"  # type: ignore[union-attr]
        assert reply.max_output_tokens == 4

    def test_items_of_every_kind(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(
            model="synthetic",
            input=[
                {"role": "developer", "content": "one"},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two three"}]},
                {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "call_1", "output": "four"},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "five", "annotations": []}],
                },
                {"role": "user", "content": "six"},
            ],
            max_output_tokens=1,
        )
        assert reply.usage is not None
        assert reply.usage.input_tokens == 6

    def test_logprobs(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(
            model="millrace",
            input=RIVER,
            max_output_tokens=5,
            top_logprobs=2,
            include=["message.output_text.logprobs"],
            temperature=0,
        )
        (part,) = reply.output[0].content  # type: ignore[union-attr]
        assert part.type == "output_text"
        assert part.logprobs is not None
        assert "".join(entry.token for entry in part.logprobs) == reply.output_text
        assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
        events = list(
            sdk.responses.create(
                model="millrace",
                input=RIVER,
                max_output_tokens=5,
                top_logprobs=2,
                include=["message.output_text.logprobs"],
                temperature=0,
                stream=True,
            )
        )
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert [entry.token for event in deltas for entry in event.logprobs] == [entry.token for entry in part.logprobs]

    def test_a_pydantic_model_is_parsed(self, sdk: openai.OpenAI) -> None:
        class Colour(pydantic.BaseModel):
            name: Literal["red", "green"]
            shades: list[Literal["light", "dark"]] = pydantic.Field(max_length=2)

        reply = sdk.responses.parse(model="millrace", input=RIVER, text_format=Colour, max_output_tokens=200)
        assert isinstance(reply.output_parsed, Colour)
        assert reply.text is not None
        assert reply.text.format is not None
        assert reply.text.format.type == "json_schema"

    def test_a_json_object(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(
            model="millrace", input=RIVER, text={"format": {"type": "json_object"}}, max_output_tokens=40
        )
        assert reply.output_text.startswith("{")

    def test_flex_is_batch_priority(self, sdk: openai.OpenAI, box: Server) -> None:
        raw = sdk.responses.with_raw_response.create(
            model="synthetic",
            input="x",
            max_output_tokens=1,
            service_tier="flex",
            safety_identifier="ann",
            extra_body={"deadline": 60, "seed": None},
        )
        assert raw.parse().service_tier == "flex"
        job = box.get(f"/v1/jobs/{raw.headers['x-penstock-job']}").json()
        assert (job["priority"], job["user_id"]) == ("batch", "ann")
        assert job["deadline_at"] is not None

    @pytest.mark.parametrize(
        ("fields", "param", "code"),
        [
            ({"input": []}, "input", "invalid_request"),
            ({"background": True, "store": False}, "background", "invalid_request"),
            ({"conversation": "conv_1"}, "conversation", "unsupported"),
            ({"tools": [{"type": "web_search"}]}, "tools[0]", "unsupported"),
            ({"input": [{"type": "compaction", "id": "c_1"}]}, "input[0]", "unsupported"),
            ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "invalid_request"),
            ({"previous_response_id": "resp_nope"}, "previous_response_id", "previous_response_not_found"),
            ({"tools": [LOOK_UP], "model": "synthetic"}, "tools", "unsupported"),
        ],
    )
    def test_what_is_refused(self, sdk: openai.OpenAI, fields: dict[str, Any], param: str, code: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.responses.create(**{"model": "millrace", "input": "x", **fields})
        assert (caught.value.param, caught.value.code) == (param, code)

    def test_an_unknown_model(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.responses.create(model="nobody", input="x")
        assert caught.value.code == "model_not_found"

    def test_the_tokens_of_an_input(self, sdk: openai.OpenAI) -> None:
        """As many as the response itself then counts."""
        fields: Any = {"model": "millrace", "input": RIVER, "instructions": "Be brief.", "tools": [LOOK_UP]}
        counted = sdk.responses.input_tokens.count(**fields)
        assert counted.object == "response.input_tokens"
        answered = sdk.responses.create(**fields, max_output_tokens=2)
        assert answered.usage is not None
        assert counted.input_tokens == answered.usage.input_tokens
        more: Any = {"previous_response_id": answered.id, "input": "And a mill?"}
        beyond = sdk.responses.input_tokens.count(model="millrace", **more)
        asked = sdk.responses.create(model="millrace", max_output_tokens=1, **more)
        assert asked.usage is not None
        assert beyond.input_tokens == asked.usage.input_tokens > 8
        assert sdk.responses.input_tokens.count(input=RIVER).input_tokens > 0, "of the first model that has a tokenizer"
        with pytest.raises(openai.NotFoundError):
            sdk.responses.input_tokens.count(model="nobody", input=RIVER)
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.responses.input_tokens.count(model="millrace", input=[{"role": "user"}])  # type: ignore[list-item]
        assert refused.value.param == "input[0]"

    def test_there_is_no_compaction(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            sdk.responses.compact(model="synthetic", input="x")


class TestStreams:
    def test_the_events(self, sdk: openai.OpenAI) -> None:
        events = list(sdk.responses.create(model="millrace", input=RIVER, stream=True, temperature=0))
        text = check_sequence(events)
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        last = events[-1]
        assert last.type == "response.completed"
        assert last.response.output_text == text
        assert sdk.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()

    def test_the_streaming_helper(self, sdk: openai.OpenAI) -> None:
        with sdk.responses.stream(model="millrace", input=RIVER, temperature=0) as stream:
            snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        assert snapshots[-1] == final.output_text
        assert len(snapshots) > 5

    def test_the_streaming_helper_parses(self, sdk: openai.OpenAI) -> None:
        class Answer(pydantic.BaseModel):
            fine: bool

        with sdk.responses.stream(model="millrace", input=RIVER, text_format=Answer) as stream:
            final = stream.get_final_response()
        assert isinstance(final.output_parsed, Answer)

    def test_the_streaming_helper_follows_what_is_there(self, sdk: openai.OpenAI) -> None:
        """It asks for everything and drops what was seen itself."""
        reply = sdk.responses.create(model="millrace", input=RIVER, temperature=0)
        with sdk.responses.stream(response_id=reply.id, starting_after=4) as stream:
            numbers = [event.sequence_number for event in stream]
            final = stream.get_final_response()
        assert numbers[0] == 5
        assert final.output_text == reply.output_text

    def test_a_call_is_streamed(self, sdk: openai.OpenAI) -> None:
        with sdk.responses.stream(
            model="millrace", input=RIVER, tools=[LOOK_UP], tool_choice="required", extra_body={"seed": 3}
        ) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert "response.output_text.delta" not in kinds
        assert kinds.count("response.function_call_arguments.delta") > 1
        (call,) = final.output
        assert call.type == "function_call"
        assert_obeys(call.arguments)

    async def test_async(self, async_sdk: openai.AsyncOpenAI) -> None:
        events = [
            event
            async for event in await async_sdk.responses.create(
                model="paced", input="x", max_output_tokens=6, stream=True
            )
        ]
        assert check_sequence(events) == text_of(6)
        assert events[-1].type == "response.incomplete"
        async with async_sdk.responses.stream(model="millrace", input=RIVER) as stream:
            assert (await stream.get_final_response()).status == "completed"
        reply = await async_sdk.responses.retrieve(events[-1].response.id)
        assert reply.output_text == text_of(6)

    async def test_a_client_that_leaves_cancels_it(self, box: Server, http: httpx.AsyncClient) -> None:
        body = {"model": "crawl", "input": "x", "max_output_tokens": 500, "stream": True}
        async with await open_stream(f"{box.url}/v1/responses", "POST", json_body=body) as stream:
            first, *_ = await stream.take(5)
            job = stream.headers["x-penstock-job"]
        path = f"/v1/responses/{first.data['response']['id']}"

        async def look() -> Any:
            return (await http.get(path)).json()

        left = await poll(look, lambda seen: seen["status"] not in ("queued", "in_progress"))
        assert left["status"] == "cancelled"
        assert left["output"][0]["content"][0]["text"].startswith("1@1 ")
        assert (await http.get(f"/v1/jobs/{job}")).json()["status"] == "cancelled"

    async def test_a_browser_resumes_and_stops(self, box: Server, http: httpx.AsyncClient) -> None:
        """Last-Event-ID is the number of the last event, and 204 tells an EventSource that there is no more."""
        reply = await http.post("/v1/responses", json={"model": "synthetic", "input": "x", "max_output_tokens": 3})
        path = f"/v1/responses/{reply.json()['id']}?stream=true"
        async with await open_stream(box.url + path) as stream:
            events = await stream.rest()
        assert [event.id for event in events] == [str(event.data["sequence_number"]) for event in events]
        async with await open_stream(box.url + path, after=4) as stream:
            assert [event.data for event in await stream.rest()] == [event.data for event in events[5:]]
        end = events[-1].id
        assert (await http.get(path, headers={"last-event-id": str(end)})).status_code == 204
        at_end = await http.get(f"{path}&starting_after={end}")
        assert (at_end.status_code, at_end.content) == (200, b"")


class TestBackground:
    def test_poll(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(model="paced", input="x", max_output_tokens=10, background=True)
        assert reply.status in ("queued", "in_progress")
        assert (reply.background, reply.output) == (True, [])
        done = finished(sdk, reply.id)
        assert (done.status, done.output_text) == ("incomplete", text_of(10))

    def test_streaming_resumed(self, sdk: openai.OpenAI) -> None:
        """The flow of the SDK's own example: break, then go on behind the last number."""
        seen: list[Any] = []
        stream = sdk.responses.create(model="paced", input="x", max_output_tokens=30, background=True, stream=True)
        for event in stream:
            seen.append(event)
            if len(seen) == 10:
                break
        stream.close()
        assert [event.type for event in seen[:3]] == [
            "response.created",
            "response.queued",
            "response.in_progress",
        ]
        response = seen[0].response.id
        rest = sdk.responses.retrieve(response, stream=True, starting_after=seen[-1].sequence_number)
        seen += rest
        assert check_sequence(seen) == text_of(30)
        assert list(sdk.responses.retrieve(response, stream=True)) == seen
        for after in (0, 2, 11, len(seen) - 2, len(seen) - 1):
            again = list(sdk.responses.retrieve(response, stream=True, starting_after=after))
            assert again == seen[after + 1 :]

    async def test_streaming_resumed_async(self, async_sdk: openai.AsyncOpenAI) -> None:
        seen: list[Any] = []
        stream = await async_sdk.responses.create(
            model="paced", input="x", max_output_tokens=20, background=True, stream=True
        )
        async for event in stream:
            seen.append(event)
            if len(seen) == 8:
                break
        await stream.close()
        async for event in await async_sdk.responses.retrieve(seen[0].response.id, stream=True, starting_after=7):
            seen.append(event)
        assert check_sequence(seen) == text_of(20)

    def test_beyond_the_end_is_an_error(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(model="synthetic", input="x", max_output_tokens=2)
        with pytest.raises(openai.APIError, match="events"):
            list(sdk.responses.retrieve(reply.id, stream=True, starting_after=1000))

    def test_cancel(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(model="crawl", input="x", max_output_tokens=500, background=True)
        cancelled = sdk.responses.cancel(reply.id)
        assert (cancelled.status, cancelled.error) == ("cancelled", None)
        assert sdk.responses.cancel(reply.id).to_dict() == cancelled.to_dict()
        *_, last = list(sdk.responses.retrieve(reply.id, stream=True))
        assert last.type == "response.failed"
        assert last.response.status == "cancelled"

    def test_cancel_ends_the_stream(self, sdk: openai.OpenAI) -> None:
        seen: list[Any] = []
        for event in sdk.responses.create(
            model="crawl", input="x", max_output_tokens=500, background=True, stream=True
        ):
            seen.append(event)
            if event.type == "response.output_text.delta":
                sdk.responses.cancel(seen[0].response.id)
        assert check_sequence(seen).startswith("1@1 ")
        assert seen[-1].response.status == "cancelled"

    def test_what_ended_stays_as_it_is(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(model="synthetic", input="x", max_output_tokens=2, background=True)
        done = finished(sdk, reply.id)
        assert sdk.responses.cancel(reply.id).to_dict() == done.to_dict()

    def test_only_what_runs_in_the_background_is_cancelled(self, sdk: openai.OpenAI) -> None:
        reply = sdk.responses.create(model="synthetic", input="x", max_output_tokens=2)
        with pytest.raises(openai.BadRequestError, match="synchronous"):
            sdk.responses.cancel(reply.id)


class TestStored:
    def test_delete(self, sdk: openai.OpenAI, box: Server) -> None:
        reply = sdk.responses.create(model="crawl", input="x", max_output_tokens=500, background=True)
        sdk.responses.delete(reply.id)
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(reply.id)
        with pytest.raises(openai.NotFoundError):
            sdk.responses.delete(reply.id)
        assert box.get("/v1/jobs/job_" + reply.id.removeprefix("resp_")).status_code == 404

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_not_stored_is_forgotten_with_its_delivery(
        self, sdk: openai.OpenAI, box: Server, stream: bool
    ) -> None:
        raw = sdk.responses.with_raw_response.create(
            model="synthetic",
            input="x",
            max_output_tokens=2,
            store=False,
            stream=stream,  # type: ignore[call-overload]
        )
        reply = raw.parse()
        if stream:
            reply = list(reply)[-1].response
        assert (reply.output_text, reply.store) == (text_of(2), False)
        for path in (f"/v1/responses/{reply.id}", f"/v1/jobs/{raw.headers['x-penstock-job']}"):
            wait_for(lambda path=path: box.get(path).status_code == 404, "it to be forgotten")  # type: ignore[misc]
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.responses.create(model="synthetic", input="x", previous_response_id=reply.id)
        assert caught.value.code == "previous_response_not_found"

    def test_what_is_not_stored_is_not_shown_while_it_runs(self, sdk: openai.OpenAI) -> None:
        stream = sdk.responses.create(model="crawl", input="x", max_output_tokens=500, store=False, stream=True)
        first = next(iter(stream))
        assert first.type == "response.created"
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(first.response.id)
        stream.close()

    @pytest.mark.parametrize("id", ["resp_nope", "resp_" + "0" * 32, "job_" + "0" * 32])
    def test_unknown(self, box: Server, id: str) -> None:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            reply = httpx.request(method, f"{box.url}/v1/responses/{id}{path}", timeout=PATIENCE, trust_env=False)
            check_error(reply, 404, "not_found")

    def test_another_routes_job_is_no_response(self, sdk: openai.OpenAI) -> None:
        chat = sdk.chat.completions.create(model="synthetic", messages=[{"role": "user", "content": "x"}], max_tokens=1)
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(chat.id.replace("chatcmpl-", "resp_"))

    def test_input_items(self, sdk: openai.OpenAI) -> None:
        words = [f"word{number}" for number in range(25)]
        reply = sdk.responses.create(
            model="synthetic",
            input=[{"role": "user", "content": word} for word in words],
            instructions="Not an item.",
            max_output_tokens=1,
        )
        newest = sdk.responses.input_items.list(reply.id)
        assert newest.has_more
        assert len(newest.data) == 20
        items = list(sdk.responses.input_items.list(reply.id, order="asc", limit=7))
        assert [item.content[0].text for item in items] == words  # type: ignore[union-attr]
        assert [item.id for item in sdk.responses.input_items.list(reply.id)] == [item.id for item in items][::-1]
        assert len({item.id for item in items}) == 25
        last = sdk.responses.input_items.list(reply.id, order="asc", after=items[-2].id or "")
        assert [item.id for item in last.data] == [items[-1].id]
        assert (last.first_id, last.last_id, last.has_more) == (items[-1].id, items[-1].id, False)  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ("limit=0", "limit"), ("limit=x", "limit"), ("limit=" + "1" * 5000, "limit"), ("order=up", "order"),
            ("after=x", "after"),
        ],
    )  # fmt: skip
    def test_input_items_wrong(self, sdk: openai.OpenAI, box: Server, query: str, param: str) -> None:
        reply = sdk.responses.create(model="synthetic", input="x", max_output_tokens=1)
        check_error(box.get(f"/v1/responses/{reply.id}/input_items?{query}"), 400, "invalid_request", param)

    @pytest.mark.parametrize("query", ["stream=maybe", "stream=true&starting_after=-1", "stream=true&starting_after=x"])
    def test_retrieve_wrong(self, sdk: openai.OpenAI, box: Server, query: str) -> None:
        reply = sdk.responses.create(model="synthetic", input="x", max_output_tokens=1)
        check_error(box.get(f"/v1/responses/{reply.id}?{query}"), 400, "invalid_request")


class TestConversations:
    def test_a_chain(self, sdk: openai.OpenAI) -> None:
        first = sdk.responses.create(
            model="synthetic", input="one two", instructions="these are three", max_output_tokens=2
        )
        second = sdk.responses.create(
            model="synthetic", input="four", previous_response_id=first.id, max_output_tokens=1
        )
        assert second.previous_response_id == first.id
        assert second.instructions is None
        assert second.usage is not None
        # "one two", the reply's two words, "four"; the instructions are not carried over.
        assert second.usage.input_tokens == 5
        sdk.responses.delete(first.id)
        third = sdk.responses.create(
            model="synthetic", input="five", previous_response_id=second.id, max_output_tokens=1
        )
        assert third.usage is not None
        assert third.usage.input_tokens == 7
        texts = [item.content[0].text for item in sdk.responses.input_items.list(third.id, order="asc")]  # type: ignore[union-attr]
        assert texts == ["one two", text_of(2), "four", text_of(1), "five"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_repeat_needs_what_it_goes_on_from_no_more(self, sdk: openai.OpenAI, stream: bool) -> None:
        """The same key finds the same response, though nobody could make it anew."""
        first = sdk.responses.create(model="synthetic", input="one", max_output_tokens=2)

        def ask(key: str) -> Any:
            reply: Any = sdk.responses.create(
                model="synthetic",
                input="two",
                max_output_tokens=2,
                previous_response_id=first.id,
                stream=stream,
                extra_headers={"Idempotency-Key": key},
            )
            return list(reply) if stream else reply.to_dict()

        key = f"repeat-{first.id}"
        second = ask(key)
        sdk.responses.delete(first.id)
        assert ask(key) == second
        with pytest.raises(openai.BadRequestError) as caught:
            ask(key + "-new")
        assert caught.value.code == "previous_response_not_found"

    def test_what_has_no_output_cannot_go_on(self, sdk: openai.OpenAI) -> None:
        running = sdk.responses.create(model="crawl", input="x", max_output_tokens=500, background=True)
        for _ in range(2):
            with pytest.raises(openai.BadRequestError) as caught:
                sdk.responses.create(model="synthetic", input="x", previous_response_id=running.id)
            assert caught.value.param == "previous_response_id"
            sdk.responses.cancel(running.id)

    @pytest.mark.parametrize("chained", [True, False])
    def test_a_loop_of_tools(self, sdk: openai.OpenAI, chained: bool) -> None:
        first = sdk.responses.create(
            model="millrace", input=RIVER, tools=[LOOK_UP], tool_choice="required", extra_body={"seed": 2}
        )
        (call,) = first.output
        assert call.type == "function_call"
        assert (call.name, call.status) == ("look_up", "completed")
        assert_obeys(call.arguments)
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "It is Ann."}
        again: dict[str, Any] = (
            {"previous_response_id": first.id, "input": [output]}
            if chained
            else {"input": [{"role": "user", "content": RIVER}, call, output]}
        )
        last = sdk.responses.create(model="millrace", tools=[LOOK_UP], max_output_tokens=8, **again)
        assert last.usage is not None
        assert first.usage is not None
        assert last.usage.input_tokens > first.usage.input_tokens
        kinds = [item.type for item in sdk.responses.input_items.list(last.id, order="asc")]
        assert kinds == ["message", "function_call", "function_call_output"]

    def test_a_call_needs_its_output(self, sdk: openai.OpenAI) -> None:
        first = sdk.responses.create(
            model="millrace", input=RIVER, tools=[LOOK_UP], tool_choice="required", extra_body={"seed": 2}
        )
        with pytest.raises(openai.BadRequestError, match="No tool output found for function call"):
            sdk.responses.create(model="millrace", input="And?", previous_response_id=first.id)

    def test_what_a_request_refers_to_has_the_bounds_of_a_body(self, sdk: openai.OpenAI) -> None:
        """A few bytes that name large items must not become more than a client could have sent."""
        large = [sdk.responses.create(model="synthetic", input="x" * 400_000, max_output_tokens=1) for _ in range(3)]
        ids = [sdk.responses.input_items.list(each.id).data[0].id or "" for each in large]
        for count in (2, 3):
            with contextlib.ExitStack() as stack:
                if count == 3:
                    caught = stack.enter_context(pytest.raises(openai.APIStatusError))
                references: Any = [{"type": "item_reference", "id": id} for id in ids[:count]]
                both = sdk.responses.create(model="synthetic", input=references, max_output_tokens=1)
        check_error(caught.value.response, 413, "request_too_large", "input")
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.responses.create(model="synthetic", input="x" * 400_000, previous_response_id=both.id)
        check_error(caught.value.response, 413, "request_too_large", "input")

    def test_an_item_is_there_once(self, sdk: openai.OpenAI) -> None:
        first = sdk.responses.create(model="synthetic", input="one", max_output_tokens=1)
        (asked,) = sdk.responses.input_items.list(first.id)
        reference: Any = {"type": "item_reference", "id": asked.id}
        named: Any = {"id": "msg_mine", "role": "user", "content": "one"}
        for input, before in (([reference, reference], None), ([reference], first.id), ([named, named], None)):
            with pytest.raises(openai.BadRequestError, match="two items with the id") as caught:
                sdk.responses.create(model="synthetic", input=input, previous_response_id=before)
            assert caught.value.param == "input"

    def test_references(self, sdk: openai.OpenAI) -> None:
        first = sdk.responses.create(model="synthetic", input="one two", max_output_tokens=3)
        (asked,) = sdk.responses.input_items.list(first.id)
        reply = sdk.responses.create(
            model="synthetic",
            input=[
                {"type": "item_reference", "id": asked.id or ""},
                {"type": "item_reference", "id": first.output[0].id or ""},
                {"role": "user", "content": "x"},
            ],
            max_output_tokens=1,
        )
        assert reply.usage is not None
        assert reply.usage.input_tokens == 6
        with pytest.raises(openai.NotFoundError, match="Item with id"):
            sdk.responses.create(model="synthetic", input=[{"type": "item_reference", "id": "msg_nope"}])


class TestBatches:
    def test_a_batch_of_responses(self, sdk: openai.OpenAI) -> None:
        first = sdk.responses.create(model="synthetic", input="one two", max_output_tokens=1)
        bodies: list[dict[str, Any]] = [
            {"model": "synthetic", "input": "x", "max_output_tokens": 3, "metadata": {"a": "b"}},
            {"model": "synthetic", "input": "x", "max_output_tokens": 1, "previous_response_id": first.id},
            {"model": "synthetic", "input": "x", "previous_response_id": "resp_nope"},
            {"model": "synthetic", "input": "x", "background": True},
        ]
        lines = [
            json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/responses", "body": body})
            for number, body in enumerate(bodies)
        ]
        file = sdk.files.create(file=("lines.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = sdk.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
        wait_for(lambda: sdk.batches.retrieve(batch.id).status == "completed", "the end of the batch")
        batch = sdk.batches.retrieve(batch.id)
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        results = {
            line["custom_id"]: line["response"]
            for id in (batch.output_file_id, batch.error_file_id)
            for line in map(json.loads, sdk.files.content(id).text.splitlines())
        }
        assert results["0"]["body"]["output"][0]["content"][0]["text"] == text_of(3)
        assert results["0"]["body"]["metadata"] == {"a": "b"}
        assert results["1"]["body"]["usage"]["input_tokens"] == 4
        assert results["1"]["body"]["previous_response_id"] == first.id
        assert results["2"]["body"]["error"]["code"] == "previous_response_not_found"
        assert results["3"]["body"]["error"]["param"] == "background"
        assert results["0"]["body"]["store"] is False, "a batch's results are in its files only"


class TestFaults:
    def test_a_killed_engine_leaves_no_gap(self, box: Server, sdk: openai.OpenAI) -> None:
        seen: list[Any] = []
        killed = False
        for event in sdk.responses.create(model="paced", input="x", max_output_tokens=30, background=True, stream=True):
            seen.append(event)
            if len(seen) == 10 and not killed:
                killed = True
                for pid in box.engine_pids():
                    os.kill(pid, signal.SIGKILL)
        check_attempts(check_sequence(seen), 30)

    async def test_a_killed_server_loses_no_event(self, tmp_path: Path) -> None:
        """Background and stream, kill -9 in the middle, the same data again: gapless from where the reader was."""
        server = Server(tmp_path / "server", rate=20).start()
        try:
            seen: list[Any] = []
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as sdk:
                stream = sdk.responses.create(
                    model="synthetic", input="x", max_output_tokens=40, background=True, stream=True
                )
                for event in stream:
                    seen.append(event)
                    if len(seen) == 12:
                        break
                server.kill9()
                with pytest.raises(openai.APIConnectionError):
                    list(stream)
                server.restart()
                response = seen[0].response.id
                seen += sdk.responses.retrieve(response, stream=True, starting_after=seen[-1].sequence_number)
                text = check_sequence(seen)
                check_attempts(text, 40)
                job = server.get("/v1/jobs/job_" + response.removeprefix("resp_")).json()
                assert job["result"]["text"] == text
                assert list(sdk.responses.retrieve(response, stream=True)) == seen
                assert sdk.responses.retrieve(response).to_dict() == seen[-1].response.to_dict()
        finally:
            server.stop()

    async def test_a_repeated_request_is_the_same_response(self, box: Server, http: httpx.AsyncClient) -> None:
        body = {"model": "paced", "input": "x", "max_output_tokens": 10, "stream": True}
        headers = {"idempotency-key": "responses-repeat"}
        async with await open_stream(f"{box.url}/v1/responses", "POST", json_body=body, headers=headers) as stream:
            begun = await stream.take(6)
        async with await open_stream(
            f"{box.url}/v1/responses", "POST", json_body=body, headers=headers, after=5
        ) as stream:
            rest = await stream.rest()
        numbers = [json.loads(event.text)["sequence_number"] for event in begun + rest]
        assert numbers == list(range(len(numbers)))
        assert rest[-1].event == "response.incomplete"
