"""Penstock's own stream and its own answers, of logs with thoughts and calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.api import TokenEvent
from penstock.core.calls import Call, call_id, call_text
from penstock.core.events import Ended, Event, Phase, TokenPhase, Tokens, fold, segments
from penstock.core.job import Job, Status, Usage
from penstock.gateway.dialects.fields import ChatMessage
from penstock.gateway.dialects.native.answers import generated, job_view
from penstock.gateway.dialects.native.stream import feed_frames, render
from penstock.gateway.dialects.tokens.routes import Tokenize
from penstock.testing.oracle import check_log, check_views, tokens_of
from tests.support.phases import logs, thinking_job
from tests.support.sse import Event as Seen
from tests.support.sse import Parser


def streamed(job: Job, events: list[Event], after: int = 0) -> list[Seen]:
    rest = [event.after(after) if isinstance(event, Tokens) else event for event in events]

    async def replay() -> AsyncIterator[Event]:
        for event in rest:
            if isinstance(event, Ended) or event.ids:
                yield event

    async def blocks() -> bytes:
        return b"".join([block async for block in render(job, replay())])

    return Parser().feed(asyncio.run(blocks()))


def log_of(*tokens: tuple[str, TokenPhase], reason: str = "stop", thoughts: int = 0) -> list[Event]:
    texts, phases = [list(each) for each in zip(*tokens, strict=True)]
    usage = Usage(5, len(tokens), reasoning_tokens=thoughts)
    ended = Ended(len(tokens) + 1, 1, Status.COMPLETED, (reason,), usage)
    return [Tokens(1, 1, [7] * len(tokens), texts, phases=phases), ended]


CALL = call_text(Call("look", '{"where": "here"}'))
#: A thought, a token that ends it, text, a call.
LOG = log_of(
    ("Hm", Phase.REASONING),
    (" é.Hi", [(Phase.REASONING, 3), (Phase.TEXT, 2)]),
    ("!", Phase.TEXT),
    (CALL, Phase.TOOL),
    reason="tool_calls",
    thoughts=2,
)


@settings(max_examples=40)
@given(st.integers(1, 2).flatmap(lambda n: st.tuples(st.just(n), logs(n))))
def test_a_resume_anywhere_tells_what_the_log_has(drawn: tuple[int, list[Event]]) -> None:
    n, events = drawn
    job = thinking_job(n)
    whole = streamed(job, events)
    for after in range(len(whole)):
        part = streamed(job, events, after)
        assert [event.id for event in part] == [event.id for event in whole[after:]]
        check_views([events, part])
    for event in whole[:-1]:  # what is written by hand is what the type says
        assert json.loads(msgspec.json.encode(msgspec.convert(event.data, TokenEvent))) == event.data


@settings(max_examples=40)
@given(st.integers(1, 2).flatmap(lambda n: st.tuples(st.just(n), logs(n))))
def test_the_stream_says_what_the_answer_says(drawn: tuple[int, list[Event]]) -> None:
    n, events = drawn
    job = thinking_job(n)
    parts = {(choice, phase): "" for choice in range(n) for phase in Phase}
    for token in tokens_of(streamed(job, events)):
        assert token.phase is not None
        for phase, text in segments(token.text, token.phase):
            parts[token.choice or 0, phase] += text
    answer = generated(job, fold(events, n))
    assert answer.text == parts[0, Phase.TEXT]
    assert answer.texts == (None if n == 1 else [parts[choice, Phase.TEXT] for choice in range(n)])
    assert (answer.reasoning or "") == parts[0, Phase.REASONING]
    written = "".join(call_text(Call(call.function.name, call.function.arguments)) for call in answer.tool_calls or ())
    assert written == parts[0, Phase.TOOL]


def test_a_token_says_its_phase_unless_it_is_text() -> None:
    events = streamed(thinking_job(), LOG)
    check_log(events)
    phases = [event.data.get("phase") for event in events]
    assert phases == ["reasoning", [["reasoning", 3], ["text", 2]], None, "tool", None]
    assert "phase" not in events[2].data


def test_a_users_stream_says_it_too() -> None:
    run = LOG[0]
    assert isinstance(run, Tokens)
    events = Parser().feed(feed_frames("job_1", run, lambda position: f"c{position}"))
    assert [event.data.get("phase") for event in events] == ["reasoning", [["reasoning", 3], ["text", 2]], None, "tool"]


def test_a_result_has_thoughts_and_calls_apart_from_its_text() -> None:
    job = thinking_job()
    ended = msgspec.structs.replace(job, status=Status.COMPLETED, tokens=4, ended_at=2.0)
    result = job_view(ended, fold(LOG)).result
    assert result is not None
    calls = [
        {
            "id": call_id(job.id, 0, 0),
            "type": "function",
            "function": {"name": "look", "arguments": '{"where": "here"}'},
        }
    ]
    assert msgspec.to_builtins(result) == {"text": "Hi!", "reasoning": "Hm é.", "tool_calls": calls}


def test_a_length_limit_inside_a_thought_leaves_the_thought() -> None:
    log = log_of(("Hm", Phase.REASONING), ("m", Phase.REASONING), reason="length", thoughts=2)
    answer = generated(thinking_job(), fold(log))
    assert (answer.text, answer.reasoning, answer.tool_calls) == ("", "Hmm", [])
    assert answer.finish_reason == "length"
    assert answer.usage.reasoning_tokens == 2


def test_a_log_without_phases_is_as_it_was() -> None:
    log: list[Event] = [Tokens(1, 1, [3, 4], ["a", "b"]), Ended(3, 1, Status.COMPLETED, ("stop",), Usage(1, 2))]
    first, second, _ = streamed(thinking_job(), log)
    assert set(first.data) == set(second.data) == {"job_id", "token", "token_id", "attempt"}
    assert "reasoning" not in json.loads(msgspec.json.encode(generated(thinking_job(), fold(log))))


@pytest.mark.parametrize("phase", ["thought", 1, [["reasoning"]], [["reasoning", "2"]]])
def test_a_phase_that_is_none_is_refused(phase: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"job_id": "j", "token": "", "token_id": 1, "attempt": 1, "phase": phase}, TokenEvent)


def test_tokens_are_counted_as_the_template_is_told() -> None:
    body = Tokenize(messages=[ChatMessage("user", "Hi")], chat_template_kwargs={"enable_thinking": False})
    assert body.request("m").chat_template_kwargs == {"enable_thinking": False}
