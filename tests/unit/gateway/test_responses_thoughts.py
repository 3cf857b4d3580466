"""Thoughts and calls in OpenAI's Responses: the stream says what the response says, from any event on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import Ended, Event, Logprob, Phase, Tokens, fold
from penstock.core.job import Message, Status, ToolCall, Usage
from penstock.gateway.dialects.responses.bodies import CreateResponse
from penstock.gateway.dialects.responses.items import Item, View, messages, output_items
from penstock.gateway.dialects.responses.stream import render, whole
from tests.support.phases import logs, thinking_job
from tests.support.sse import Event as Seen
from tests.support.sse import Parser

JOB = msgspec.structs.replace(thinking_job(), status=Status.COMPLETED)
VIEW = View()


async def _log(events: list[Event]) -> AsyncGenerator[Event]:
    for event in events:
        yield event


async def _ended_at() -> float:
    return 2.0


def streamed(events: list[Event], after: int = -1) -> list[Seen]:
    async def all_of_it() -> bytes:
        return b"".join([block async for block in render(JOB, VIEW, _log(events), _ended_at, after)])

    return Parser().feed(asyncio.run(all_of_it()))


def response(events: list[Event]) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(whole(JOB, VIEW, fold(events), 2.0))
    return found


def joined(seen: list[Seen]) -> list[dict[str, Any]]:
    """The output that the deltas make, put together as clients do it."""
    output: list[dict[str, Any]] = []
    for event in seen:
        if event.event == "response.output_item.added":
            output.append({"type": event.data["item"]["type"], "id": event.data["item"]["id"], "text": ""})
        elif event.event.endswith(".delta"):
            assert event.data["item_id"] == output[-1]["id"]
            output[-1]["text"] += event.data["delta"]
    return output


def likely(events: list[Event], known: list[bool]) -> list[Event]:
    """The log with log-probabilities of those tokens that *known* says, in turn."""
    count, result = 0, []
    for event in events:
        if isinstance(event, Tokens):
            places = range(count, count := count + len(event.ids))
            logprobs = [Logprob(-1.0 - place) if known[place % len(known)] else None for place in places]
            event = msgspec.structs.replace(event, logprobs=logprobs)
        result.append(event)
    return result


@given(logs())
def test_the_deltas_make_the_response(events: list[Event]) -> None:
    seen = streamed(events)
    assert [event.data["sequence_number"] for event in seen] == list(range(len(seen)))
    last = seen[-1].data["response"]
    assert last == response(events)
    texts = [
        {"type": item["type"], "id": item["id"], "text": item.get("arguments") or item["content"][0]["text"]}
        for item in last["output"]
    ]
    assert joined(seen) == texts
    assert last["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    assert last["usage"]["input_tokens_details"]["cached_tokens"] == 4


@given(logs(), st.lists(st.booleans(), min_size=1, max_size=3))
def test_log_probabilities_stand_where_the_stream_has_them(events: list[Event], known: list[bool]) -> None:
    """Also where only some tokens have one, as upstream servers may report it: nothing of the text is lost."""
    seen, plain = streamed(likely(events, known)), response(events)
    whole = response(likely(events, known))
    assert seen[-1].data["response"] == whole
    said = [item["content"][0]["text"] for item in whole["output"] if item["type"] == "message"]
    assert said == [item["content"][0]["text"] for item in plain["output"] if item["type"] == "message"]


@given(logs(), st.data())
def test_a_reader_goes_on_behind_any_event(events: list[Event], data: st.DataObject) -> None:
    seen = streamed(events)
    after = data.draw(st.integers(-1, len(seen) - 1))
    assert [event.data for event in streamed(events, after)] == [event.data for event in seen[after + 1 :]]


def test_a_thought_that_is_cut_off_is_incomplete() -> None:
    log: list[Event] = [
        Tokens(1, 1, [7, 8], ["so ", "far"], phases=[Phase.REASONING, Phase.REASONING]),
        Ended(3, 1, Status.COMPLETED, ("length",), Usage(3, 2, 2)),
    ]
    found = response(log)
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (item,) = found["output"]
    assert (item["type"], item["status"], item["summary"]) == ("reasoning", "incomplete", [])
    assert item["content"] == [{"type": "reasoning_text", "text": "so far"}]


def test_only_text_has_logprobs() -> None:
    log: list[Event] = [
        Tokens(
            1,
            1,
            [7, 8, 9, 2],
            ["hm", "a", "b", ""],
            logprobs=[Logprob(-1.0), Logprob(-2.0), Logprob(-3.0), Logprob(-4.0)],
            phases=[Phase.REASONING, [(Phase.REASONING, 0), (Phase.TEXT, 1)], Phase.TEXT, Phase.TEXT],
        ),
        Ended(5, 1, Status.COMPLETED, ("stop",), Usage(3, 4, 2)),
    ]
    assert streamed(log)[-1].data["response"] == response(log)
    thought, message = response(log)["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert [each["logprob"] for each in message["content"][0]["logprobs"]] == [-2.0, -3.0, -4.0]


def test_a_token_that_speaks_around_a_thought_has_one_log_probability() -> None:
    phase: list[tuple[Phase, int]] = [(Phase.TEXT, 1), (Phase.REASONING, 1), (Phase.TEXT, 1)]
    log: list[Event] = [
        Tokens(1, 1, [7], ["abc"], logprobs=[Logprob(-1.0)], phases=[phase]),
        Ended(2, 1, Status.COMPLETED, ("stop",), Usage(3, 1)),
    ]
    first, _, second = response(log)["output"]
    assert [len(item["content"][0]["logprobs"]) for item in (first, second)] == [1, 0]


def test_a_reply_is_whole_where_only_some_tokens_have_logprobs() -> None:
    log: list[Event] = [
        Tokens(1, 1, [7, 8, 9], ["a", "b", "c"], logprobs=[Logprob(-1.0), None, Logprob(-3.0)]),
        Ended(4, 1, Status.COMPLETED, ("stop",), Usage(3, 3)),
    ]
    (message,) = response(log)["output"]
    assert message["content"][0]["text"] == "abc"
    assert [each["logprob"] for each in message["content"][0]["logprobs"]] == [-1.0, -3.0]


def test_thoughts_of_earlier_responses_are_part_of_the_turn_behind_them() -> None:
    call = '{"name": "look", "arguments": {"x": 1}}\n'
    log: list[Event] = [
        Tokens(1, 1, [1, 2], ["why", call], phases=[Phase.REASONING, Phase.TOOL]),
        Ended(3, 1, Status.COMPLETED, ("tool_calls",), Usage(3, 2, 1)),
    ]
    before = output_items(whole(JOB, VIEW, fold(log), None).output)
    id = before[1].call_id
    given = msgspec.convert(
        {
            "model": "m",
            "input": [
                {"type": "function_call_output", "call_id": id, "output": "7"},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "encrypted_content": "x"},
                {"role": "assistant", "content": "Seven."},
                {"role": "user", "content": "Sure?"},
            ],
        },
        CreateResponse,
    )
    assert not isinstance(given.input, str)
    items = [*before, *(item.plain(place) for place, item in enumerate(given.input or ()))]
    assert messages(None, items) == (
        Message("assistant", "", (ToolCall(id, "look", '{"x": 1}'),), reasoning="why"),
        Message("tool", "7", tool_call_id=id),
        Message("assistant", "Seven.", reasoning="so"),
        Message("user", "Sure?"),
    )


@pytest.mark.parametrize("field", [{"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}])
def test_the_effort_reaches_the_template(field: dict[str, Any]) -> None:
    body = msgspec.convert({"model": "m", "input": "?", **field}, CreateResponse)
    assert body.request((Item("message", role="user", content=("?",)),), 64).reasoning_effort == "low"


def test_thoughts_around_a_reply_and_its_calls_are_those_of_one_turn() -> None:
    thought, user = Item("reasoning", content=("Hm.",)), Item("message", role="user", content=("?",))
    said = Item("message", role="assistant", content=("Yes.",))
    call = Item("function_call", call_id="c", name="look", arguments="{}")
    answer = Item("function_call_output", call_id="c", output="7")
    found = messages(None, [user, thought, said, thought, call, answer, thought, user])
    assert [(turn.role, turn.reasoning, turn.content, len(turn.tool_calls)) for turn in found] == [
        ("user", "", "?", 0),
        ("assistant", "Hm.\n\nHm.", "Yes.", 1),
        ("tool", "", "7", 0),
        ("user", "", "?", 0),
    ]
