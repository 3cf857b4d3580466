"""Tool calls and log-probabilities in the forms that servers have."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from tests.support.upstream import (
    MakeEngine,
    Upstream,
    ask,
    called,
    chat,
    error_of,
    part,
    said,
    sse,
    text_of,
    then,
    write,
)

from penstock.core.calls import Call, read_calls
from penstock.core.events import Logprob, Phase, TopLogprob
from penstock.core.job import Sampling, Tool
from penstock.core.ports import Finish

BROKEN_JSON = '{"a": 1, }}</tool_call> \\ud83d "'


@pytest.mark.parametrize(
    ("events", "calls"),
    [
        (
            [called(part(0, "x", name="sum", arguments="{}")), called(part(0, "y", name="now", arguments='{"b":2}'))],
            [("sum", "{}"), ("now", '{"b":2}')],
        ),
        (
            [called(part(0, "x")), called(part(0, name="sum")), called(part(0, arguments='{"a":1}'))],
            [("sum", '{"a":1}')],
        ),
        ([called(part(0, "x", name="sum", arguments=BROKEN_JSON))], [("sum", BROKEN_JSON)]),
        (
            [called(part(0, "x", name="sum", arguments="[1]")), called(part(1, "y", name="now"))],
            [("sum", "[1]"), ("now", "{}")],
        ),
        ([called(part(0, "x", name="sum", arguments={"a": "\U0001f600"}))], [("sum", '{"a": "\U0001f600"}')]),
        ([called(part(None, name="sum", arguments='{"a":')), called(part(None, arguments="1}"))], [("sum", '{"a":1}')]),
        (
            [called(part(None, name="sum", arguments="{}")), called(part(None, name="sum", arguments='{"a":1}'))],
            [("sum", "{}"), ("sum", '{"a":1}')],
        ),
        ([called(part(None, name="sum", arguments="{}"), part(None, name="now"))], [("sum", "{}"), ("now", "{}")]),
        (
            [
                called(part(0, "x", name="sum", arguments='{"a":')),
                called(part(1, "y", name="now")),
                called(part(0, arguments="1}")),
            ],
            [("sum", '{"a":1}'), ("now", "{}")],
        ),
        (
            [called(part(0, "x", name="sum", arguments='{"a":')), called(part(0, "x", name="sum", arguments="1}"))],
            [("sum", '{"a":1}')],
        ),
        ([called(part(0, "x", name="somebody", arguments='{"a":1}'))], [("somebody", '{"a":1}')]),
        ([called({"index": 0, "name": "sum", "arguments": "{}"})], [("sum", "{}")]),
        ([{"choices": [{"delta": {"function_call": {"name": "sum", "arguments": "{}"}}}]}], [("sum", "{}")]),
        (
            [
                said("I look. "),
                called(part(0, "x", name="sum", arguments='{"a":"\\ud83d')),
                called(part(0, arguments='\\ude00"}')),
            ],
            [("sum", '{"a":"\\ud83d\\ude00"}')],
        ),
    ],
)
@pytest.mark.parametrize("finish", ["tool_calls", "stop"])
async def test_calls_come_in_many_forms_and_are_calls(
    servers: list[Upstream], engine_of: MakeEngine, events: list[Any], calls: list[tuple[str, str]], finish: str
) -> None:
    engine = await engine_of(servers[0])
    request = chat(tools=(Tool("sum"), Tool("now")))
    servers[0].script.append(then(0, sse(*events, said(None, finish))))
    outputs = await engine.run(request)
    assert [(call.name, call.arguments) for call in read_calls(text_of(outputs, Phase.TOOL))] == calls
    assert text_of(outputs, Phase.TEXT) in ("", "I look. ")
    assert outputs[-1].finish == Finish(("tool_calls",))
    assert len(servers[0].bodies) == 1


async def test_a_call_that_was_cut_short_is_given_out_as_far_as_it_came(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(servers[0])
    request = chat(tools=(Tool("sum"), Tool("now")))
    servers[0].script.append(
        then(0, sse(called(part(0, "x", name="sum", arguments='{"a": [1, ')), said(None, "length")))
    )
    outputs = await engine.run(request)
    assert read_calls(text_of(outputs, Phase.TOOL)) == [Call("sum", '{"a": [1, ')]
    assert outputs[-1].finish == Finish(("length",))


async def test_a_call_without_a_name(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    nameless = then(0, sse(called(part(0, "x", arguments='{"a": 1}')), said(None, "tool_calls")))
    servers[0].script += [nameless] * 3
    one = chat(tools=(Tool("sum"), Tool("now")), tool_choice="required", tool_name="now")
    assert read_calls(text_of(await engine.run(one), Phase.TOOL)) == [Call("now", '{"a": 1}')]
    assert "a call that names no tool" in error_of(await engine.run(chat(tools=(Tool("sum"), Tool("now"))))).message


async def test_calls_that_nobody_asked_for_are_no_text(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    events = sse(said("a"), called(part(0, "x", name="sum", arguments="{}")), said(None, "tool_calls"))
    servers[0].script += [then(0, events)] * 2
    for request in (chat(), chat(tools=(Tool("sum"),), tool_choice="none")):
        outputs = await engine.run(request)
        assert (text_of(outputs), outputs[-1].finish) == ("a", Finish(("stop",)))


@pytest.mark.parametrize("dialect", ["vllm", "openai", "penstock"])
async def test_a_call_that_broke_off_is_made_anew(servers: list[Upstream], engine_of: MakeEngine, dialect: str) -> None:
    """Nothing of it is in the log yet, so nothing of it has to be continued."""
    engine = await engine_of(servers[0], dialect=dialect)
    request = chat(tools=(Tool("sum"),))
    begun = write(b"data: " + json.dumps(called(part(0, "x", name="sum", arguments='{"a"'))).encode() + b"\n\n")
    servers[0].script += [
        then(0, begun),
        then(0, sse(called(part(0, "y", name="sum", arguments="{}")), said("", "stop"))),
    ]
    outputs = await engine.run(request)
    assert text_of(outputs, Phase.TEXT) == ""
    assert read_calls(text_of(outputs)) == [Call("sum", "{}")]


# ------------------------------------------------------------------------------------------ log-probabilities


def entry(text: str, logprob: float | None, *top: dict[str, Any], data: bytes | None = None) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode() if data is None else data),
        "top_logprobs": [*top],
    }


async def test_a_logprob_has_its_tokens_own_text_and_bytes(servers: list[Upstream], engine_of: MakeEngine) -> None:
    half, other = entry("\ufffd", -0.1, data=b"\xe2\x82"), entry("\ufffd", -2.0, data=b"\xe2\x83")
    events = [
        said("", logprobs={"content": [half | {"top_logprobs": [other, half]}]}, token_ids=[1]),
        said(
            "\u20acab",
            logprobs={"content": [entry("\ufffd", -0.2, data=b"\xac"), entry("ab", -3.0, entry("x", None))]},
            token_ids=[2, 3],
        ),
        said("", "stop", logprobs=None),
    ]
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(*events)))
    request = msgspec.structs.replace(chat(), sampling=Sampling(max_tokens=10, logprobs=2))
    outputs = await engine.run(request)
    entries = [each for output in outputs for each in output.logprobs or []]
    assert text_of(outputs) == "\u20acab"
    chosen = TopLogprob(1, "\ufffd", -0.1, b"\xe2\x82")
    assert entries == [
        Logprob(-0.1, (TopLogprob(-1, "\ufffd", -2.0, b"\xe2\x83"), chosen), "\ufffd", b"\xe2\x82"),
        Logprob(-0.2, (TopLogprob(2, "\ufffd", -0.2, b"\xac"),), "\ufffd", b"\xac"),
        Logprob(-3.0, (TopLogprob(-1, "x", -9999.0), TopLogprob(3, "ab", -3.0)), "ab"),
    ]


async def test_logprobs_of_a_completion(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """They have texts only, and null where there is nothing to tell."""
    told = {"tokens": ["a", "b"], "token_logprobs": [None, -1.0], "top_logprobs": [None, {"c": -0.5, "\ufffd": -0.7}]}
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse({"choices": [{"text": "ab", "finish_reason": "stop", "logprobs": told}]})))
    outputs = await engine.run(ask(logprobs=2))
    assert [output.texts for output in outputs if output.ids] == [["a", "b"]]
    first, second = (each for output in outputs for each in output.logprobs or [])
    assert first == Logprob(0.0, (TopLogprob(-1, "a", 0.0),), "a")
    assert second is not None
    assert [each.text for each in second.top] == ["c", "\ufffd", "b"]
    assert (second.text, second.data) == ("b", None)


async def test_no_alternatives_where_none_were_asked_for(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, sse(said("a", "stop", logprobs={"content": [entry("a", -1.0)]}))))
    outputs = await engine.run(msgspec.structs.replace(chat(), sampling=Sampling(max_tokens=10, logprobs=0)))
    assert [each for output in outputs for each in output.logprobs or []] == [Logprob(-1.0, (), "a")]
