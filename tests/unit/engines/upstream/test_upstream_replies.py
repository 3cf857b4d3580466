"""Replies of upstream servers, and their continuation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support.upstream import (
    KEY,
    TEXT,
    WORDS,
    MakeEngine,
    Upstream,
    answer,
    ask,
    assert_complete,
    chat,
    error_of,
    text_of,
    then,
    words,
    write,
)

from penstock.core.events import Phase, Prefix, fold
from penstock.core.job import Message, ResponseFormat, Tool
from penstock.core.ports import Finish


async def test_a_reply(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    assert engine.backend.info.context_length == 100
    assert_complete(await engine.run(ask()))


@pytest.mark.parametrize("piece", [1, 7, 100])
async def test_events_may_be_cut_anywhere(servers: list[Upstream], engine_of: MakeEngine, piece: int) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(words(piece))
    assert_complete(await engine.run(ask()))


async def test_a_reply_that_begins_anew_has_nothing_in_its_prompt(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    """Tokens that came together have one text: of the first ones nobody has seen any."""
    engine = await engine_of(servers[0])
    outputs = await engine.run(ask(), [Prefix([-1] * 4, [""] * 4)])
    assert [output.prompt_tokens for output in outputs if output.prompt_tokens is not None] == [3]
    assert text_of(outputs).startswith(WORDS[0])


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", b""], ids=["no usage", "broken off behind the reason"])
async def test_a_prompt_that_nobody_counts_is_guessed(
    servers: list[Upstream], engine_of: MakeEngine, end: bytes
) -> None:
    body = b'data: {"choices":[{"text":"a b","finish_reason":"stop"}]}\n\n' + end
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, write(body)))
    outputs = await engine.run(ask("a prompt of some length"))
    told = [output.prompt_tokens for output in outputs if output.prompt_tokens is not None]
    assert told == [ask("a prompt of some length").estimated_prompt_tokens]
    assert outputs[-1].finish == Finish(("stop",))


async def test_tokens_that_only_usage_counts_are_in_the_log(servers: list[Upstream], engine_of: MakeEngine) -> None:
    told = b'{"choices":[{"text":"a b","finish_reason":"stop"}],"usage":{"completion_tokens":4}}'
    body = b"data: " + told + b"\n\ndata: [DONE]\n\n"
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, write(body)))
    outputs = await engine.run(ask())
    assert [token for output in outputs for token in output.ids] == [-1] * 4
    assert text_of(outputs) == "a b"


async def test_ids_come_with_the_text_that_the_last_one_completes(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    body = (
        b'data: {"prompt_token_ids":[1,2],"choices":[{"text":"a b","token_ids":[7,8]}]}\n\n'
        b'data: {"choices":[{"text":"","token_ids":[9],"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    )
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, write(body)))
    (output,) = await engine.run(ask())
    assert (output.ids, output.texts, output.prompt_tokens) == ([7, 8, 9], ["", "a b", ""], 2)
    assert servers[0].bodies[-1]["return_token_ids"] is True


async def test_choices_are_requests_of_their_own_with_other_seeds(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(*servers)
    outputs = await engine.run(ask(n=3, seed=5))
    log = fold([], 3)
    for output in outputs:
        for choice, text in zip(output.choices or [], output.texts, strict=True):
            log.texts[choice] += text
    assert log.texts == [TEXT] * 3
    assert outputs[-1].finish == Finish(("length",) * 3)
    seeds = [body["seed"] for server in servers for body in server.bodies]
    assert len(set(seeds)) == 3
    assert 5 in seeds
    assert {len(server.bodies) for server in servers} == {1, 2}, "the least loaded replica gets the next one"


async def test_tool_calls_are_logged_in_one_form(servers: list[Upstream], engine_of: MakeEngine) -> None:
    def delta(index: int, **function: str) -> bytes:
        call = {"index": index, "function": function}
        return b"data: " + json.dumps({"choices": [{"delta": {"tool_calls": [call]}}]}).encode() + b"\n\n"

    end = b'data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
    calls = delta(0, name="sum", arguments="") + delta(0, arguments='{"a":') + delta(0, arguments='"1"}')
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, write(calls + delta(1, name="now") + end)))
    outputs = await engine.run(chat(tools=(Tool("sum"), Tool("now"))))
    assert text_of(outputs, Phase.TOOL) == (
        '{"name": "sum", "arguments": {"a":"1"}}\n{"name": "now", "arguments": {}}\n'
    )
    assert text_of(outputs) == text_of(outputs, Phase.TOOL)
    assert outputs[-1].finish == Finish(("tool_calls",))
    assert [tool["function"]["name"] for tool in servers[0].bodies[0]["tools"]] == ["sum", "now"]


async def test_what_is_neutral_is_not_sent(engine_of: MakeEngine) -> None:
    server = Upstream("somebody")
    await server.start()
    engine = await engine_of(server)
    assert set(engine.backend.info.unsupported) == {
        "bad_words",
        "ignore_eos",
        "input_type",
        "min_p",
        "min_tokens",
        "repetition_penalty",
        "stop_token_ids",
        "top_k",
    }
    await engine.run(ask(temperature=1.0, stop=("END",), logit_bias={5: 1.5}))
    (body,) = server.bodies
    await server.stop()
    assert set(body) == {"model", "prompt", "max_tokens", "stream", "stream_options", "stop", "logit_bias"}
    assert body["logit_bias"] == {"5": 1.5}


@pytest.mark.parametrize(
    ("owner", "form", "sent"),
    [
        ("vllm", ResponseFormat("regex", pattern="a+"), {"structured_outputs": {"regex": "a+"}}),
        ("penstock", ResponseFormat("choice", choices=("a", "b")), {"structured_outputs": {"choice": ["a", "b"]}}),
        ("vllm", ResponseFormat("grammar", grammar='start: "a"'), {"structured_outputs": {"grammar": 'start: "a"'}}),
        ("llamacpp", ResponseFormat("choice", choices=('"', "é\n")), {"grammar": 'root ::= "\\"" | "é\\n"'}),
        ("llamacpp", ResponseFormat("grammar", grammar='root ::= "a"'), {"grammar": 'root ::= "a"'}),
        ("llamacpp", ResponseFormat("grammar", grammar='start: "a"'), None),
        ("llamacpp", ResponseFormat("regex", pattern="a+"), None),
        ("somebody", ResponseFormat("choice", choices=("a",)), None),
        ("vllm", ResponseFormat("choice"), None),
        ("penstock", ResponseFormat("regex"), None),
    ],
)
async def test_a_form_is_sent_in_the_servers_words_or_refused(
    engine_of: MakeEngine, owner: str, form: ResponseFormat, sent: dict[str, Any] | None
) -> None:
    server = Upstream(owner)
    await server.start()
    engine = await engine_of(server)
    outputs = await engine.run(chat(response_format=form))
    await server.stop()
    if sent is None:
        assert error_of(outputs).code == (
            "unsupported" if form.pattern or form.choices or form.grammar else "invalid_request"
        )
        assert error_of(outputs).param == "response_format"
        assert not server.bodies
    else:
        assert {name: server.bodies[0][name] for name in sent} == sent


@pytest.mark.parametrize(
    ("owner", "role"), [("vllm", "system"), ("llamacpp", "system"), ("penstock", "developer"), ("openai", "developer")]
)
async def test_what_a_developer_says_is_not_lost_in_a_template(engine_of: MakeEngine, owner: str, role: str) -> None:
    server = Upstream(owner)
    await server.start()
    engine = await engine_of(server)
    await engine.run(chat(Message("developer", "Be brief."), Message("user", "?")))
    await server.stop()
    assert [message["role"] for message in server.bodies[0]["messages"]] == [role, "user"]


async def test_where_a_reply_may_end_is_sent_as_far_as_it_is_open(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(servers[0])
    request = ask(min_tokens=6, stop_token_ids=(7, 9), bad_words=("oh",))
    await engine.run(request, [Prefix([1, 2], WORDS[:2])])
    body = servers[0].bodies[0]
    assert (body["min_tokens"], body["stop_token_ids"], body["bad_words"]) == (4, [7, 9], ["oh"])
    await engine.run(ask())
    assert not {"min_tokens", "stop_token_ids", "bad_words"} & set(servers[0].bodies[1])


async def test_the_key_is_sent_and_never_shown(
    servers: list[Upstream], engine_of: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", KEY)
    engine = await engine_of(servers[0], key_env="UPSTREAM_KEY")
    servers[0].script.append(answer(401, {"error": {"message": f"bad key {KEY}"}}))
    outputs = await engine.run(ask())
    assert servers[0].headers[0]["Authorization"] == f"Bearer {KEY}"
    error = error_of(outputs)
    assert error.code == "engine_error"
    assert not outputs[-1].retryable
    assert KEY not in error.message
    servers[0].script.append(answer(400, {"error": {"message": f"no such thing as {KEY}"}}))
    assert error_of(await engine.run(ask())).message == "no such thing as ***"
