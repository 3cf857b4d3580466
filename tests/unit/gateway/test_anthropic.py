"""Anthropic's stream without a server: the golden event sequences, and that cuts and resumes make no difference.

The files in ``golden`` are what a client gets, byte for byte. After a change that is meant:
``PENSTOCK_GOLDEN=write python -m pytest tests/unit/gateway/test_anthropic.py``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.calls import Call, call_text
from penstock.core.errors import ErrorInfo, InvalidRequest, LogRewound, Unsupported
from penstock.core.events import Ended, Event, Phase, TokenPhase, Tokens, fold
from penstock.core.job import Job, Message, Request, Sampling, Status, Tool, Usage
from penstock.gateway.dialects.anthropic.bodies import CreateMessage
from penstock.gateway.dialects.anthropic.stream import MessageWriter, reply
from penstock.gateway.http import decode, json_reply
from tests.support.phases import logs, thinking_job
from tests.support.sse import Event as Seen
from tests.support.sse import Parser

GOLDEN = Path(__file__).parent / "golden"
TOOLS = (Tool("weather", "", {"type": "object"}), Tool("wait", "", {"type": "object"}))


def job(**fields: Any) -> Job:
    request = Request(model="millrace", messages=(Message("user", "Hi"),), sampling=Sampling(max_tokens=9), **fields)
    return Job(id="job_" + "1".zfill(32), tenant="t", request=request, created_at=1.0, prompt_tokens=7)


#: Marks of the tests: what stands before a token that is a thought, or a part of a call.
PHASES = {"~": Phase.REASONING, "!": Phase.TOOL}


def runs(*texts: list[str]) -> list[Event]:
    """Each list of tokens' texts as a run of its own."""
    events: list[Event] = []
    position = 1
    for run in texts:
        phases: list[TokenPhase] = [PHASES.get(text[:1], Phase.TEXT) for text in run]
        plain = [text[1:] if text[:1] in PHASES else text for text in run]
        events.append(Tokens(position, 1, list(range(len(run))), plain, phases=phases if plain != run else None))
        position += len(run)
    return events


def log(*texts: list[str], reason: str = "stop", error: ErrorInfo | None = None) -> list[Event]:
    count = sum(map(len, texts))
    status = Status.COMPLETED if error is None else Status.FAILED
    reasons = (reason,) if error is None else ()
    return [*runs(*texts), Ended(count + 1, 1, status, reasons, Usage(7, count), error)]


async def follow(events: list[Event], after: int = 0) -> AsyncIterator[Event]:
    for event in events:
        if isinstance(event, Ended):
            if event.position > after:
                yield event
        elif event.last > after:
            yield event.after(after)


def written(job: Job, events: list[Event], after: int = 0) -> bytes:
    async def look() -> Job:
        return job

    async def render() -> bytes:
        writer = MessageWriter(job, "req_1", after=after, look=look, replay=lambda: follow(events))
        return b"".join([block async for block in writer.render(follow(events, after))])

    return asyncio.run(render())


def parse(raw: bytes) -> list[Seen]:
    parser = Parser()
    events = parser.feed(raw)
    assert raw.isascii()
    assert parser.empty_blocks == 0
    assert [event.retry is not None for event in events] == ([True] + [False] * len(events))[: len(events)]
    for event in events:
        assert event.data["type"] == event.event
    return events


def message(events: list[Seen]) -> dict[str, Any]:
    """A stream put together as clients do it: what a reply in one piece would have been."""
    result: dict[str, Any] = {}
    open_block: int | None = None
    for event in events:
        data = event.data
        match event.event:
            case "message_start":
                assert not result
                result = data["message"]
            case "content_block_start":
                assert open_block is None
                assert data["index"] == len(result["content"])
                open_block = data["index"]
                result["content"].append(data["content_block"])
            case "content_block_delta":
                assert data["index"] == open_block
                block, delta = result["content"][data["index"]], data["delta"]
                if (kind := delta["type"].removesuffix("_delta")) in ("text", "thinking", "signature"):
                    block[kind] += delta[kind]
                else:
                    block["json"] = block.get("json", "") + delta["partial_json"]
            case "content_block_stop":
                assert data["index"] == open_block
                open_block = None
                block = result["content"][data["index"]]
                if "json" in block:
                    block["input"] = json.loads(block.pop("json"))
            case "message_delta":
                assert open_block is None
                result |= data["delta"]
                result["usage"] |= data["usage"]
    assert events[-1].event == "message_stop"
    return result


CALL = "!" + call_text(Call("weather", '{"city": "Ulm"}'))
FORCED = ['!{"name": "weather",', '! "arguments": {"ci', '!ty": "Ul', '!m"}', "!}", ""]
CASES: dict[str, tuple[Job, list[Event]]] = {
    "text": (job(), log(["A", " river"], [" is"], ["", "."])),
    "length": (job(), log(["A river"], reason="length")),
    "nothing": (job(), log([""])),
    "filtered": (job(), log(["A river"], reason="content_filter")),
    "calls": (
        job(tools=TOOLS),
        log(["Let me", " see."], [CALL[:12], "!" + CALL[12:]], [CALL.replace("weather", "wait")], reason="tool_calls"),
    ),
    "thoughts": (
        job(tools=TOOLS),
        log(["~", "~Hm", "~, a"], ["~ river"], ["A", " river."], [CALL], reason="tool_calls"),
    ),
    "thought_cut": (job(), log(["~Hm", "~, a"], reason="length")),
    "forced": (job(tools=TOOLS, tool_choice="required"), log(FORCED[:2], FORCED[2:4], FORCED[4:], reason="tool_calls")),
    "error": (job(), log(["A"], error=ErrorInfo("The engine failed.", "server_error", None, "engine_error"))),
}


@pytest.mark.parametrize("name", CASES)
def test_the_stream_is_the_golden_one(name: str) -> None:
    raw = written(*CASES[name])
    file = GOLDEN / f"anthropic_{name}.sse"
    if os.environ.get("PENSTOCK_GOLDEN") == "write":
        file.write_bytes(raw)
    assert raw.decode() == file.read_bytes().decode()


def test_every_golden_file_is_of_a_case() -> None:
    assert {file.name for file in GOLDEN.glob("anthropic_*")} == {f"anthropic_{name}.sse" for name in CASES}


@pytest.mark.parametrize("name", [name for name in CASES if name != "error"])
def test_a_reply_in_one_piece_is_the_fold_of_its_stream(name: str) -> None:
    of, events = CASES[name]
    assert message(parse(written(of, events))) == msgspec.to_builtins(reply(of, fold(events)))


@pytest.mark.parametrize("name", CASES)
def test_a_resume_behind_any_id_goes_on_with_what_was_not_seen(name: str) -> None:
    of, events = CASES[name]
    whole = parse(written(of, events))
    for i, event in enumerate(whole):
        if event.id is not None:
            rest = written(of, events, after=int(event.id))
            assert [later.data for later in parse(rest)] == [later.data for later in whole[i + 1 :]]
    assert written(of, events, after=int(whole[-1].id or 0)) == b""


PIECES = st.sampled_from(
    ["A", " river\n", "", "é\u2028", "~Hm", "~", CALL, CALL.replace("Ulm", "}"), "{", " ", "wait", "{}\n"]
)


@given(st.lists(st.lists(PIECES, min_size=1, max_size=4), min_size=1, max_size=5), st.booleans())
def test_however_the_runs_fall_the_message_is_the_same(texts: list[list[str]], tools: bool) -> None:
    of = job(tools=TOOLS) if tools else job()
    text = "".join(part for run in texts for part in run if part[:1] not in PHASES)
    events = log(*texts, reason="stop")
    expected = msgspec.to_builtins(reply(of, fold(events)))
    assert message(parse(written(of, events))) == expected
    assert "".join(block["text"] for block in expected["content"] if block["type"] == "text") == text


@settings(max_examples=30)
@given(logs())
def test_a_connection_that_is_cut_anywhere_and_resumed_makes_no_difference(events: list[Event]) -> None:
    """Tokens of more than one phase too, and also where a token ends in the middle of a call."""
    of = thinking_job()
    expected = msgspec.to_builtins(reply(of, fold(events)))
    whole = parse(written(of, events))
    assert message(whole) == expected
    for position in range(1, events[-1].position):
        first = [event.up_to(position) for event in events if isinstance(event, Tokens) and event.position <= position]
        rest = parse(written(of, events, after=position))
        assert message([*parse(written(of, [*first])), *rest]) == expected
    told = {"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens_details": {"thinking_tokens": 3}}
    assert told.items() <= expected["usage"].items()
    assert told.items() <= whole[-2].data["usage"].items()


def test_the_start_tells_what_was_cached() -> None:
    of = msgspec.structs.replace(job(), cached_tokens=4)
    usage = parse(written(of, CASES["text"][1]))[0].data["message"]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (3, 4)


def test_a_token_that_ends_a_thought_and_begins_the_text_is_in_both_blocks() -> None:
    mixed: list[TokenPhase] = [Phase.REASONING, [(Phase.REASONING, 1), (Phase.TEXT, 3)]]
    events: list[Event] = [Tokens(1, 1, [1, 2], ["Hm", ".Yes"], phases=mixed), log(["", ""])[-1]]
    thought, text = message(parse(written(job(), events)))["content"]
    assert (thought["thinking"], text["text"]) == ("Hm.", "Yes")


@pytest.mark.parametrize("name", ["text", "calls", "length", "filtered"])
def test_a_text_block_has_no_null_that_clients_refuse(name: str) -> None:
    """``"citations": null`` made the AI SDK refuse every reply in one piece."""
    blocks = message(parse(written(*CASES[name])))["content"]
    texts = [block for block in blocks if block["type"] == "text"]
    assert texts
    assert all(block["citations"] == [] for block in texts)  # llm-comply wants it, and the AI SDK no null


def test_a_filtered_reply_is_a_refusal() -> None:
    assert message(parse(written(*CASES["filtered"])))["stop_reason"] == "refusal"


THINKING = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
REDACTED = {"type": "redacted_thinking", "data": "ZGF0YQ=="}
SAID = {"type": "text", "text": "Yes.", "cache_control": {"type": "ephemeral"}, "citations": None}
CALLED = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
ANSWERED = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain."}


def asked(*turns: tuple[str, Any], **fields: Any) -> Request:
    """What these turns ask for."""
    given = [{"role": role, "content": content} for role, content in turns]
    body = {"model": "m", "max_tokens": 5, "messages": given, **fields}
    return decode(json.dumps(body).encode(), CreateMessage).request()


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "adaptive"}}, {"thinking": None}, {"output_config": {"effort": None}},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"context_management": None},
    ],
    ids=lambda fields: "".join(fields),
)  # fmt: skip
def test_what_leaves_it_to_the_model_makes_no_difference(fields: dict[str, Any]) -> None:
    """Claude Code sends it all with every request."""
    assert asked(("user", "Hi"), **fields) == asked(("user", "Hi"))


class TestThoughts:
    """Of an earlier reply, which clients send back as they came; and how much of them a request asks for."""

    @pytest.mark.parametrize(
        ("blocks", "same", "thoughts"),
        [
            ([THINKING, SAID], [SAID], "Hm."), ([REDACTED, SAID], [SAID], ""),
            ([THINKING, REDACTED, SAID, SAID], [SAID, SAID], "Hm."), ([THINKING, CALLED], [CALLED], "Hm."),
            ([THINKING, SAID, REDACTED, CALLED], [SAID, CALLED], "Hm."),
        ],
        ids=["thinking", "redacted", "both", "call", "between"],
    )  # fmt: skip
    def test_are_beside_what_was_said(self, blocks: list[Any], same: list[Any], thoughts: str) -> None:
        behind = ("user", [ANSWERED] if CALLED in blocks else "Why?")
        before = ("user", "Is it so?")
        found, plain = (asked(before, ("assistant", each), behind).messages or () for each in (blocks, same))
        assert found[1].reasoning == thoughts
        assert [msgspec.structs.replace(message, reasoning="") for message in found] == list(plain)

    def test_of_turns_that_are_one_are_one(self) -> None:
        found = asked(("user", "?"), ("assistant", [THINKING, SAID]), ("assistant", [THINKING, SAID]), ("user", "!"))
        assert [message.reasoning for message in found.messages or ()] == ["", "Hm.\n\nHm.", ""]

    @pytest.mark.parametrize(
        ("fields", "effort", "values"),
        [
            ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, None, {"enable_thinking": True}),
            ({"thinking": {"type": "disabled"}}, None, {"enable_thinking": False}),
            ({"output_config": {"effort": "high"}}, "high", {}),
        ],
        ids=str,
    )
    def test_are_asked_for(self, fields: Any, effort: str | None, values: dict[str, Any]) -> None:
        found = asked(("user", "Hi"), **fields)
        assert (found.reasoning_effort, found.chat_template_kwargs) == (effort, values)

    def test_are_omitted_for_those_who_want_it_so(self) -> None:
        of, events = CASES["thoughts"]
        found = msgspec.to_builtins(reply(of, fold(events), shows_thinking=False))["content"]
        assert [(block["type"], block.get("thinking")) for block in found] == [
            ("thinking", ""),
            ("text", None),
            ("tool_use", None),
        ]
        assert found[0]["signature"]

    def test_a_turn_of_nothing_else_is_none(self) -> None:
        found = asked(("user", "Hi"), ("assistant", [THINKING]), ("user", "And?"))
        assert found.messages == asked(("user", "Hi"), ("user", "And?")).messages
        assert not asked(("user", "Hi"), ("assistant", [REDACTED])).continue_final, "there is no beginning of a reply"

    def test_nothing_but_thoughts_cannot_be_answered(self) -> None:
        with pytest.raises(InvalidRequest) as refused:
            asked(("assistant", [THINKING, REDACTED]))
        assert refused.value.param == "messages"

    def test_only_an_assistants(self) -> None:
        for kind in (THINKING, REDACTED):
            with pytest.raises(Unsupported):
                asked(("user", [kind]))


@pytest.mark.parametrize("kind", ["image", "document", "search_result", "server_tool_use", "web_search_tool_result"])
def test_a_block_that_is_no_text_is_named(kind: str) -> None:
    block = {"type": kind, "source": {"type": "text", "data": "x"}, "title": "x"}
    for turn in (("user", [block]), ("user", [{**ANSWERED, "content": [block]}])):
        with pytest.raises(Unsupported, match=f"content of type '{kind}' is not supported") as refused:
            asked(turn)
        assert refused.value.param is not None
        assert refused.value.param.startswith("messages[0]")


def test_a_mark_for_a_cache_makes_no_difference() -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": "5m"}}
    tool = {"name": "weather", "input_schema": {"type": "object"}}
    plain = asked(("user", [{"type": "text", "text": "Hi"}]), system=[{"type": "text", "text": "S"}], tools=[tool])
    marked = asked(
        ("user", [{"type": "text", "text": "Hi", **mark}]),
        system=[{"type": "text", "text": "S", **mark}],
        tools=[{**tool, **mark}],
        **mark,
    )
    assert marked == plain


def test_a_call_that_was_cut_has_no_arguments() -> None:
    of = job(tools=TOOLS, tool_choice="required")
    answer = msgspec.to_builtins(reply(of, fold(log(FORCED[:2], reason="length"))))
    assert [(block["name"], block["input"]) for block in answer["content"]] == [("weather", {})]
    assert answer["stop_reason"] == "max_tokens"


def test_half_a_surrogate_pair_in_a_call_is_no_obstacle() -> None:
    text = '!{"name": "weather", "arguments": {"city": "\\ud83d Ulm \\ud83d\\ude00"}}'
    answer = json_reply(reply(job(tools=TOOLS, tool_choice="required"), fold(log([text]))))
    assert json.loads(bytes(answer.body))["content"][0]["input"] == {"city": "? Ulm 😀"}


def test_a_log_that_rewinds_is_an_error() -> None:
    async def rewinding() -> AsyncIterator[Event]:
        yield Tokens(1, 1, [1], ["A"])
        raise LogRewound("The store lost it.")

    async def look() -> Job:
        return job()

    async def render() -> bytes:
        writer = MessageWriter(job(), "req_1", after=0, look=look, replay=rewinding)
        return b"".join([block async for block in writer.render(rewinding())])

    last = parse(asyncio.run(render()))[-1]
    assert last.event == "error"
    assert last.data["error"]["code"] == "log_rewound"
    assert last.id is None
