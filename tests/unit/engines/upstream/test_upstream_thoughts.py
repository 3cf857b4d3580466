"""Thoughts of upstream servers: what is logged of them, and how a reply goes on that broke off in one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.support.upstream import (
    MakeEngine,
    Upstream,
    called,
    chat,
    die,
    error_of,
    part,
    said,
    sse,
    text_of,
    then,
    thought,
    write,
)

from penstock.core.calls import Call, read_calls
from penstock.core.events import Phase, Prefix, phase_of
from penstock.core.job import Message, Request, ResponseFormat, Sampling, Tool
from penstock.core.ports import Finish, Output
from penstock.engines.upstream.reply import BREAK

CALL = called(part(0, "x", name="sum", arguments='{"a":1}'))
TOOLS = (Tool("sum"),)
#: A reply with all phases, one token a chunk.
REPLY = [thought("It "), thought("adds. "), said("I "), said("look."), CALL, said(None, "tool_calls")]


def logged(outputs: list[Output]) -> Prefix:
    log = Output(0, [], [])
    for output in outputs:
        log.extend(output)
    return Prefix(log.ids, log.texts, log.phases)


def phases(outputs: list[Output]) -> list[Phase]:
    log = logged(outputs)
    return [phase_of(phase) for phase in log.phases or [Phase.TEXT] * len(log.ids)]


async def test_thoughts_text_and_calls_are_told_apart(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(*REPLY)))
    outputs = await engine.run(chat(tools=TOOLS))
    assert text_of(outputs, Phase.REASONING) == "It adds. "
    assert text_of(outputs, Phase.TEXT) == "I look."
    assert read_calls(text_of(outputs, Phase.TOOL)) == [Call("sum", '{"a":1}')]
    assert phases(outputs) == [1, 1, 0, 0, 2, 2]
    assert outputs[-1].finish == Finish(("tool_calls",))


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning": "Hm."},
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm.", "reasoning_content": "Hm."},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]},
        {"reasoning": "Hm.", "content": None, "tool_calls": {}},
    ],
)
async def test_thoughts_come_under_many_names(
    servers: list[Upstream], engine_of: MakeEngine, delta: dict[str, Any]
) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse({"choices": [{"delta": delta}]}, said("Yes", "stop"))))
    outputs = await engine.run(chat())
    assert (text_of(outputs, Phase.REASONING), text_of(outputs, Phase.TEXT)) == ("Hm.", "Yes")


async def test_one_token_may_end_a_thought_and_begin_the_text(servers: list[Upstream], engine_of: MakeEngine) -> None:
    both = {"choices": [{"delta": {"reasoning": "\ud83d\ude00.", "content": "Yes"}, "token_ids": [7]}]}
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(both, said("", "stop", token_ids=[8]))))
    log = logged(await engine.run(chat()))
    assert log == Prefix([7, 8], ["\U0001f600.Yes", ""], [[(Phase.REASONING, 2), (Phase.TEXT, 3)], Phase.TEXT])


async def test_thoughts_that_are_only_counted_are_counted_as_thoughts(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 6,
        "completion_tokens_details": {"reasoning_tokens": 4},
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(said("a"), said("b", "stop"), {"choices": [], "usage": usage})))
    outputs = await engine.run(chat())
    assert phases(outputs) == [0, 0, 1, 1, 1, 1]
    assert [(each.prompt_tokens, each.cached_tokens) for each in outputs if each.prompt_tokens is not None] == [(9, 5)]


async def test_a_limit_within_a_thought(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(thought("So many "), thought("words", "length"))))
    outputs = await engine.run(chat())
    assert (text_of(outputs, Phase.REASONING), text_of(outputs, Phase.TEXT)) == ("So many words", "")
    assert outputs[-1].finish == Finish(("length",))


@pytest.mark.parametrize("dialect", ["openai", "vllm", "llama", "penstock"])
@pytest.mark.parametrize("cut", [1, 2, 4, 5])
async def test_a_reply_goes_on_from_wherever_it_broke_off(
    servers: list[Upstream], engine_of: MakeEngine, dialect: str, cut: int
) -> None:
    """Within the thought, behind it, and within the call, of which nothing was logged: in one attempt and in two."""
    engine = await engine_of(servers[0], dialect=dialect)
    request = chat(tools=TOOLS)
    servers[0].script.append(then(0, sse(*REPLY)))
    whole = await engine.run(request)
    begun = sse(*REPLY[:cut])  # without an end
    servers[0].script += [then(0, begun), then(0, sse(*REPLY))]
    outputs = await engine.run(request)
    assert logged(outputs) == logged(whole)
    assert outputs[-1].finish == Finish(("tool_calls",))

    log = logged(whole)
    assert log.phases is not None
    servers[0].script.append(then(0, sse(*REPLY)))
    prefix = Prefix(log.ids[:cut], log.texts[:cut], log.phases[:cut])
    rest = await engine.run(request, [prefix])
    assert prefix.texts + logged(rest).texts == log.texts
    assert rest[-1].finish == Finish(("tool_calls",))


async def test_a_thought_that_comes_out_otherwise_begins_anew_behind_what_is_logged(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    """The answer is what the server makes of the request as it was; so is one that must be JSON."""
    other = [thought("It "), thought("is 2."), said("{}", "stop")]
    engine = await engine_of(servers[0])
    servers[0].script += [then(2, die), then(0, sse(*other))]
    servers[0].script[0] = then(0, write(b"".join(_event(each) for each in REPLY[:2])))
    outputs = await engine.run(chat(response_format=ResponseFormat("json_object")))
    assert text_of(outputs, Phase.REASONING) == f"It adds. {BREAK}It is 2."
    assert text_of(outputs, Phase.TEXT) == "{}"
    assert outputs[-1].finish == Finish(("stop",))
    assert servers[0].bodies[0] == servers[0].bodies[1]


async def test_the_words_of_a_thought_said_as_text_are_no_repetition(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(said("It "), said("turns.", "stop"))))
    outputs = await engine.run(chat(), [Prefix([-1], ["It "], [Phase.REASONING])])
    assert (text_of(outputs, Phase.REASONING), text_of(outputs, Phase.TEXT)) == ("", "It turns.")


async def test_a_thought_that_begins_anew_has_the_room_that_is_left(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(servers[0])
    request = msgspec.structs.replace(chat(), sampling=Sampling(max_tokens=4))
    servers[0].script.append(then(0, sse(thought("b "), thought("c "), thought("d "), said("e", "stop"))))
    outputs = await engine.run(request, [Prefix([-1, -1], ["a ", "a "], [Phase.REASONING] * 2)])
    assert logged(outputs).texts == [f"{BREAK}b ", "c "]
    assert outputs[-1].finish == Finish(("length",))


async def test_behind_a_thought_the_text_goes_on_by_ids_where_they_are_known(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    """All that the model saw is in them, also a thought that its template would leave out."""
    begun = [
        {"prompt_token_ids": [1, 2], **thought("Hm.", token_ids=[5])},
        said("A ", token_ids=[6]),
    ]
    rest = {"choices": [{"text": "mill.", "token_ids": [7], "finish_reason": "stop"}]}
    engine = await engine_of(servers[0])
    servers[0].script += [then(0, write(b"".join(map(_event, begun)))), then(0, sse(rest))]
    outputs = await engine.run(chat())
    assert logged(outputs) == Prefix([5, 6, 7], ["Hm.", "A ", "mill."], [Phase.REASONING, Phase.TEXT, Phase.TEXT])
    assert servers[0].bodies[1]["prompt"] == [1, 2, 5, 6]
    assert [path.rpartition("/v1")[2] for path in servers[0].paths] == ["/chat/completions", "/completions"]


async def test_what_differs_behind_a_thought_is_not_written(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0], dialect="openai")
    servers[0].script += [
        then(0, write(b"".join(map(_event, REPLY[:3])))),
        then(0, sse(thought("It adds. "), said("You", "stop"))),
    ]
    outputs = await engine.run(chat())
    assert text_of(outputs) == "It adds. I "
    assert "asked again, it says something else" in error_of(outputs).message


@pytest.mark.parametrize(
    ("owner", "sent"),
    [
        ("vllm", {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "high", "documents": []}}),
        ("llamacpp", {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "high", "documents": []}}),
        ("penstock", {"reasoning_effort": "high", "chat_template_kwargs": {"documents": []}}),
        ("somebody", {"reasoning_effort": "high", "chat_template_kwargs": {"documents": []}}),
    ],
)
async def test_how_much_to_think_is_passed_on(engine_of: MakeEngine, owner: str, sent: dict[str, Any]) -> None:
    server = Upstream(owner)
    await server.start()
    engine = await engine_of(server)
    past = Message("assistant", "Yes", reasoning="Hm.")
    await engine.run(_effort(past, "high", chat_template_kwargs={"documents": []}))
    await engine.run(_effort(past, "none"))
    first, second = server.bodies
    await server.stop()
    assert {name: first.get(name) for name in ("chat_template_kwargs", "reasoning_effort") if name in first} == sent
    if owner in ("vllm", "llamacpp"):
        assert (second["chat_template_kwargs"], "reasoning_effort" in second) == ({"enable_thinking": False}, False)
    else:
        assert second["reasoning_effort"] == "none"
    thoughts = {} if owner == "somebody" else {"reasoning": "Hm.", "reasoning_content": "Hm."}
    assert first["messages"][1] == {"role": "assistant", "content": "Yes", **thoughts}


def _effort(past: Message, effort: str, **fields: Any) -> Request:
    return chat(Message("user", "?"), past, Message("user", "say"), reasoning_effort=effort, **fields)


def _event(event: Any) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"
