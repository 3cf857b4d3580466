"""What servers send instead of what they should."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web
from tests.support.upstream import (
    MakeEngine,
    Upstream,
    answer,
    ask,
    assert_complete,
    chat,
    chunk,
    die,
    end_early,
    error_of,
    said,
    sse,
    text_of,
    then,
    write,
)

from penstock.core.calls import Call, read_calls
from penstock.core.events import Phase
from penstock.core.job import Sampling, Tool
from penstock.core.ports import Finish
from penstock.engines.upstream.replicas import BROKEN, TRIP
from penstock.engines.upstream.stream import MAX_LINE

GARBLED: dict[str, Callable[[Upstream, web.Request, web.StreamResponse], Awaitable[None]]] = {
    "no JSON": write(b"data: {oops}\n\n"),
    "no UTF-8": write(b'data: {"choices":[{"text":"\xff"}]}\n\n'),
    "nested": write(b'data: {"choices":' + b"[" * 20_000 + b"\n\n"),
    "a huge line": write(b"data: " + b"x" * (MAX_LINE + 100)),
    "a number": write(b"data: 7\n\n"),
    "a text that is none": sse({"choices": [{"text": {"a": 1}}]}),
    "no end": sse({"choices": [{"text": "a"}]}),
    "other JSON": write(b'{"object": "list"}'),
    "HTML": write(b'{"<html>'),
}


@pytest.mark.parametrize("how", GARBLED)
async def test_what_is_no_reply_is_asked_for_once_more(
    servers: list[Upstream], engine_of: MakeEngine, how: str
) -> None:
    """By whoever it comes: it is the request's failure then, and no replica is put to rest for it."""
    engine = await engine_of(*servers)
    for _ in range(2 * TRIP):
        asked = sum(len(server.bodies) for server in servers)
        for server in servers:
            server.script = deque([then(0, GARBLED[how])] * 2)
        outputs = await engine.run(ask())
        assert error_of(outputs).code == "engine_error"
        assert "cannot be read" in error_of(outputs).message
        assert not outputs[-1].retryable
        assert sum(len(server.bodies) for server in servers) == asked + 2
        for server in servers:
            server.script.clear()
    for replica in engine.backend._replicas.all:
        assert replica.available()
    assert_complete(await engine.run(ask()))


async def test_one_garbled_answer_costs_a_call(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(3, GARBLED["no UTF-8"]))
    assert_complete(await engine.run(ask()))
    assert len(servers[0].bodies) == 2


async def test_choices_share_what_a_request_may_cost(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(*servers)
    for server in servers:
        server.script += [then(1, GARBLED["no JSON"])] * 20
    outputs = await engine.run(ask(n=4))
    assert error_of(outputs).code == "engine_error"
    assert sum(len(server.bodies) for server in servers) <= 4 + 1


async def test_calls_that_break_off_are_bounded_however_far_each_comes(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(servers[0], retries=1)
    servers[0].script += [then(1, end_early)] * 50
    outputs = await engine.run(ask(max_tokens=1000))
    assert "the stream broke off" in error_of(outputs).message
    assert outputs[-1].retryable
    assert len(servers[0].bodies) == 2 * BROKEN


async def test_many_choices_survive_what_one_does(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0], retries=1)
    servers[0].script += [then(1, end_early)] * 8
    outputs = await engine.run(ask(n=8))
    assert outputs[-1].finish == Finish(("length",) * 8)


@pytest.mark.parametrize(
    "events",
    [
        [said("a"), said("b", "stop"), {"choices": [], "usage": {"prompt_tokens": None, "completion_tokens": None}}],
        [said("a"), said("b", "stop"), {"choices": [], "usage": {"prompt_tokens": 3.0, "completion_tokens": 2.0}}],
        [said("a"), said("b", "stop"), {"choices": None, "usage": "none"}],
        [said("a"), said("b", "stop"), 7],
        [said("a", ""), {"choices": [{"delta": None}]}, said("b", "stop", token_ids=None, logprobs="none")],
        [said([{"type": "text", "text": "a"}, {"type": "image"}]), said(["b"], "stop")],
        [{"error": None, **said("a")}, said("b", "stop", index="0", extra={"x": [1]}), {"error": {"message": "late"}}],
        [{"timings": {"predicted_n": None}, **said("a")}, said(None), said("b", "stop")],
        [{"usage": {}, "choices": [{"text": "a"}]}, {"choices": [{"text": "b", "finish_reason": {"type": "stop"}}]}],
    ],
)
async def test_what_is_not_needed_may_be_anything(
    servers: list[Upstream], engine_of: MakeEngine, events: list[Any]
) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(*events)))
    outputs = await engine.run(chat())
    assert text_of(outputs) == "ab"
    assert outputs[-1].finish == Finish(("stop",))
    assert len(servers[0].bodies) == 1


async def test_a_connection_that_breaks_behind_a_complete_reply_costs_nothing(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    async def end(server: Upstream, request: web.Request, response: web.StreamResponse) -> None:
        await response.write(chunk({"messages": []}, "ab", "stop"))
        await die(server, request, response)

    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, end))
    outputs = await engine.run(chat())
    assert (text_of(outputs), outputs[-1].finish) == ("ab", Finish(("stop",)))
    assert len(servers[0].bodies) == 1


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["a\ud83d", "\ude00b"], "a\U0001f600b"),
        (["\ud83d", "", "\ude00", "\ud83d\ude00"], "\U0001f600\U0001f600"),
        (["a\ud83d", "b"], "a\ufffdb"),
        (["a\ude00", "b\ud83d"], "a\ufffdb\ufffd"),
    ],
)
@pytest.mark.parametrize("ids", [True, False])
async def test_half_characters_are_joined_over_chunks(
    servers: list[Upstream], engine_of: MakeEngine, pieces: list[str], text: str, ids: bool
) -> None:
    engine = await engine_of(servers[0])
    events = [said(piece, token_ids=[7]) if ids else said(piece) for piece in pieces]
    servers[0].script.append(then(0, sse(*events, said("", "stop"))))
    outputs = await engine.run(chat())
    assert text_of(outputs) == text
    assert len(servers[0].bodies) == 1


async def test_a_reply_in_one_json_is_a_reply(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """To what asked for a stream."""
    call = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    entry = {"token": "ab", "logprob": -0.5, "bytes": [97, 98], "top_logprobs": [{"token": "ab", "logprob": -0.5}]}
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    message = {"role": "assistant", "content": "ab", "tool_calls": [call]}
    choice = {"message": message, "finish_reason": "tool_calls", "logprobs": {"content": [entry]}}
    engine = await engine_of(servers[0])
    servers[0].script.append(answer(200, {"object": "chat.completion", "choices": [choice], "usage": usage}))
    request = chat(tools=(Tool("sum"),))
    request = msgspec.structs.replace(request, sampling=Sampling(max_tokens=10, logprobs=1))
    outputs = await engine.run(request)
    assert text_of(outputs, Phase.TEXT) == "ab"
    assert read_calls(text_of(outputs, Phase.TOOL)) == [Call("sum", '{"a": 1}')]
    assert outputs[-1].finish == Finish(("tool_calls",))
    assert [output.prompt_tokens for output in outputs if output.prompt_tokens] == [5]
    assert sum(len(output.ids) for output in outputs) == 3
    assert [entry.text for output in outputs for entry in output.logprobs or [] if entry] == ["ab"]
    servers[0].script.append(answer(200, {"choices": [{"text": "abc", "finish_reason": "length"}]}))
    outputs = await engine.run(ask())
    assert (text_of(outputs), outputs[-1].finish) == ("abc", Finish(("length",)))
    servers[0].script.append(answer(200, {"error": {"message": "no such thing", "type": "invalid_request_error"}}))
    assert error_of(await engine.run(ask())).message == "no such thing"
    assert len(servers[0].bodies) == 3


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("stop", "stop"),
        ("eos_token", "stop"),
        ("STOP", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "stop"),
        ("function_call", "stop"),
    ],
)
async def test_why_a_reply_ended(servers: list[Upstream], engine_of: MakeEngine, reason: str, finish: str) -> None:
    """Never by calls where there are none."""
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(said("a"), said("", reason))))
    outputs = await engine.run(chat(tools=(Tool("t"),)))
    assert (text_of(outputs), outputs[-1].finish) == ("a", Finish((finish,)))
