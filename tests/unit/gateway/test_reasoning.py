"""Thoughts and calls in OpenAI's chat: the stream says what the reply says, from any position on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from hypothesis import given

from penstock.core.errors import InvalidRequest
from penstock.core.events import Ended, Event, Phase, Tokens, fold
from penstock.core.job import Status, Usage
from penstock.gateway.dialects.openai.bodies import ChatCompletion, TextCompletion
from penstock.gateway.dialects.openai.stream import ChatWriter
from tests.support.phases import logs, thinking_job
from tests.support.sse import Event as Seen
from tests.support.sse import Parser


async def _replay(events: list[Event], after: int = 0) -> AsyncGenerator[Event]:
    for event in events:
        if isinstance(event, Ended):
            yield event
        elif event.last > after:
            yield event.after(after)


def streamed(writer: ChatWriter, events: list[Event], after: int = 0) -> list[Seen]:
    async def all_of_it() -> bytes:
        return b"".join([block async for block in writer.render(_replay(events, after))])

    return Parser().feed(asyncio.run(all_of_it()))


def joined(seen: list[Seen], n: int) -> list[dict[str, Any]]:
    """The messages that the chunks make, put together as clients do it."""
    messages: list[dict[str, Any]] = [{"content": None, "reasoning": "", "tool_calls": []} for _ in range(n)]
    for event in seen:
        if event.data == "[DONE]":
            continue
        for choice in event.data["choices"]:
            message, delta = messages[choice["index"]], choice["delta"]
            if delta.get("content"):
                message["content"] = (message["content"] or "") + delta["content"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            message["reasoning"] += delta.get("reasoning", "")
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return messages


def told(events: list[Event], writer: ChatWriter, n: int) -> list[dict[str, Any]]:
    reply = msgspec.to_builtins(writer.reply(fold(events, n)))
    return [
        {
            "content": choice["message"]["content"] or None,
            "reasoning": choice["message"].get("reasoning", ""),
            "tool_calls": [{"id": call["id"], **call["function"]} for call in choice["message"].get("tool_calls", ())],
        }
        for choice in reply["choices"]
    ]


@given(logs(2))
def test_the_stream_says_what_the_reply_says(events: list[Event]) -> None:
    job = thinking_job(2)
    seen = streamed(ChatWriter(job, include_usage=True), events)
    assert joined(seen, 2) == told(events, ChatWriter(job, include_usage=False), 2)
    assert seen[-2].data["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert seen[-2].data["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


@given(logs())
def test_a_reader_who_comes_back_gets_the_rest_from_any_position(events: list[Event]) -> None:
    job = thinking_job()
    whole = streamed(ChatWriter(job, include_usage=False), events)
    for number, event in enumerate(whole):
        if event.id is None or event.data == "[DONE]":
            continue
        writer = ChatWriter(job, include_usage=False)
        writer.after, writer.replay = int(event.id), lambda: _replay(events)
        again = streamed(writer, events, int(event.id))
        assert joined([*whole[: number + 1], *again], 1) == joined(whole, 1)


def test_a_token_that_ends_a_thought_and_begins_the_text_is_one_chunk() -> None:
    events: list[Event] = [
        Tokens(1, 1, [1, 2], ["Hm", ".Yes"], phases=[Phase.REASONING, [(Phase.REASONING, 1), (Phase.TEXT, 3)]]),
        Ended(3, 1, Status.COMPLETED, ("stop",)),
    ]
    seen = streamed(ChatWriter(thinking_job(), include_usage=False), events)
    assert [(event.id, event.data["choices"][0]["delta"]) for event in seen[1:3]] == [
        ("1", {"reasoning": "Hm", "reasoning_content": "Hm"}),
        ("2", {"content": "Yes", "reasoning": ".", "reasoning_content": "."}),
    ]


def test_a_reply_that_ends_inside_a_thought_has_the_thought_and_no_text() -> None:
    events: list[Event] = [
        Tokens(1, 1, [1], ["Hm"], phases=[Phase.REASONING]),
        Ended(2, 1, Status.COMPLETED, ("length",), Usage(1, 1, 1)),
    ]
    (choice,) = msgspec.to_builtins(ChatWriter(thinking_job(), include_usage=False).reply(fold(events)))["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"] == "Hm"


@given(logs())
def test_thoughts_are_not_shown_to_those_who_do_not_want_them(events: list[Event]) -> None:
    job = thinking_job()
    writer = ChatWriter(job, include_usage=False, shows_reasoning=False)
    assert "reasoning" not in str(msgspec.to_builtins(writer.reply(fold(events)).choices))
    assert {message["reasoning"] for message in joined(streamed(writer, events), 1)} == {""}


def body(**fields: Any) -> ChatCompletion:
    return msgspec.convert({"model": "m", "messages": [{"role": "user", "content": "?"}], **fields}, ChatCompletion)


@pytest.mark.parametrize(
    ("fields", "effort", "values"),
    [
        ({}, None, {}),
        ({"reasoning_effort": "low"}, "low", {}),
        ({"enable_thinking": False}, None, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True, "x": [1]}}, None, {"enable_thinking": True, "x": [1]}),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            None,
            {"enable_thinking": True},
        ),
        ({"thinking": {"type": "disabled"}}, None, {"enable_thinking": False}),
        ({"thinking": {"type": "enabled", "budget_tokens": 99}}, None, {"enable_thinking": True}),
        ({"thinking": {"type": "adaptive"}}, None, {}),
        ({"reasoning": {"effort": "high", "max_tokens": 9}}, "high", {}),
        ({"reasoning": {"enabled": False}}, None, {"enable_thinking": False}),
        ({"documents": [{"text": "d"}]}, None, {"documents": [{"text": "d"}]}),
    ],
    ids=str,
)
def test_how_much_to_think_reaches_the_request(fields: Any, effort: str | None, values: dict[str, Any]) -> None:
    request = body(**fields).request(64)
    assert (request.reasoning_effort, request.chat_template_kwargs) == (effort, values)


def test_what_the_request_says_itself_is_no_variable() -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        body(chat_template_kwargs={"messages": []}).request(64)


def test_a_prompt_has_no_template_to_be_told() -> None:
    completion = msgspec.convert({"model": "m", "prompt": "p", "enable_thinking": True}, TextCompletion)
    with pytest.raises(InvalidRequest, match="needs messages"):
        completion.request("p")


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_past_thoughts_and_names_reach_the_template(field: str) -> None:
    messages = [{"role": "assistant", "content": "a", field: "Hm", "name": "ann"}, {"role": "user", "content": "?"}]
    first, second = body(messages=messages).request(64).messages or ()
    assert (first.reasoning, first.name, second.reasoning, second.name) == ("Hm", "ann", "", None)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [({}, True), ({"include_reasoning": False}, False), ({"reasoning": {"exclude": True}}, False)],
    ids=str,
)
def test_who_wants_thoughts(fields: Any, shown: bool) -> None:
    assert body(**fields).shows_reasoning is shown
