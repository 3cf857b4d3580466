"""A replica that fails in the middle of a reply."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.upstream import (
    TEXT,
    WORDS,
    MakeEngine,
    Upstream,
    answer,
    ask,
    assert_complete,
    be_silent,
    chat,
    die,
    end_early,
    error_of,
    go_on,
    text_of,
    then,
    write,
)

from penstock.core.errors import (
    ModelLoadError,
)
from penstock.core.events import Prefix
from penstock.core.job import Request, ResponseFormat, Sampling, Tool
from penstock.core.ports import Finish
from penstock.engines.frames import Notice

FAILURES = {
    "dies": die,
    "silent": be_silent,
    "ends early": end_early,
    "gives up": write(b'data: {"choices":[{"text":"","finish_reason":"abort"}]}\n\n'),
    "an error as a reason": write(b'data: {"choices":[{"text":"","finish_reason":"error"}]}\n\ndata: [DONE]\n\n'),
    "says so": write(b'data: {"error": {"message": "CUDA error", "type": "server_error", "code": 500}}\n\n'),
}


@pytest.mark.parametrize("how", FAILURES)
async def test_another_replica_goes_on_in_the_middle(servers: list[Upstream], engine_of: MakeEngine, how: str) -> None:
    engine = await engine_of(*servers, idle_timeout=0.5)
    for server in servers:
        server.script.append(then(3, FAILURES[how]))  # whoever is asked first, and the other one as well
    assert_complete(await engine.run(ask()))
    prompts = [body["prompt"] for server in servers for body in server.bodies]
    assert sorted(prompts, key=len) == ["say: ", "say: w1 w2 w3 ", "say: w1 w2 w3 w4 w5 w6 "]
    limits = {body["prompt"].count("w"): body["max_tokens"] for server in servers for body in server.bodies}
    assert limits == {0: 10, 3: 7, 6: 4}


async def test_a_chat_goes_on_with_its_last_message(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(*servers)
    for server in servers:
        server.script.append(then(4, die))
    outputs = await engine.run(chat())
    assert text_of(outputs) == TEXT
    last = max((body for server in servers for body in server.bodies), key=lambda body: len(str(body)))
    assert last["messages"] == [
        {"role": "user", "content": "say"},
        {"role": "assistant", "content": "".join(WORDS[:8])},
    ]
    assert (last["continue_final_message"], last["add_generation_prompt"]) == (True, False)


async def test_ids_go_on_as_ids(servers: list[Upstream], engine_of: MakeEngine) -> None:
    begun = b'data: {"choices":[{"text":"a","token_ids":[7]}]}\n\n'
    ended = b'data: {"choices":[{"text":"b","token_ids":[8],"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    engine = await engine_of(servers[0])
    servers[0].script += [then(0, write(begun)), then(0, write(ended))]
    outputs = await engine.run(Request(model="m", prompt_ids=(1, 2), sampling=Sampling()))
    assert [token for output in outputs for token in output.ids] == [7, 8]
    assert [body["prompt"] for body in servers[0].bodies] == [[1, 2], [1, 2, 7]]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
async def test_a_failure_before_the_first_token_is_somebody_elses_turn(
    servers: list[Upstream], engine_of: MakeEngine, status: int
) -> None:
    engine = await engine_of(*servers)
    for server in servers:
        server.script.append(answer(status, **{"Retry-After": "0"}))
    assert_complete(await engine.run(ask()))
    assert sum(len(server.bodies) for server in servers) == 3


async def test_when_no_replica_can_serve_the_job_goes_back_to_the_queue(
    servers: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(servers[0], retries=1)
    servers[0].script += [answer(500)] * 9
    outputs = await engine.run(ask())
    assert error_of(outputs).code == "engine_error"
    assert "it is 500" in error_of(outputs).message
    assert outputs[-1].retryable


async def test_a_client_is_not_told_where_the_servers_are(
    servers: list[Upstream], engine_of: MakeEngine, noticed: list[Notice]
) -> None:
    engine = await engine_of(servers[0], retries=0)
    port = servers[0].url.rpartition(":")[2]
    servers[0].script.append(answer(500, {"error": {"message": f"behind {servers[0].url} is nothing"}}))
    assert (
        error_of(await engine.run(ask())).message
        == "No upstream server can serve this: HTTP 500: behind http://*** is nothing."
    )
    await servers[0].stop()
    outputs = await engine.run(ask())
    error = error_of(outputs)
    assert (error.code, outputs[-1].retryable) == ("no_worker", True)
    assert error.message == "No upstream server can serve this: cannot connect (Connection refused)."
    assert engine.backend.info.away == "no upstream server answers"
    with pytest.raises(ModelLoadError) as caught:
        await engine_of(servers[0])
    assert port not in caught.value.message
    assert sum(notice.facts["replica"] == servers[0].url for notice in noticed) >= 2, "its operator is"


async def test_an_attempt_goes_on_behind_what_is_logged(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    outputs = await engine.run(ask(), [Prefix([-1, -1], ["w1 ", "w2 "])])
    assert text_of(outputs) == "".join(WORDS[2:])
    assert servers[0].bodies[0]["max_tokens"] == 8


async def test_a_complete_reply_only_ends(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    (output,) = await engine.run(ask(max_tokens=2), [Prefix([-1, -1], ["w1 ", "w2 "])])
    assert output.finish == Finish(("length",))
    assert not output.ids
    assert not servers[0].bodies


@pytest.mark.parametrize(
    ("request_", "options", "words"),
    [
        (ask(), {"continuation": "none"}, "option continuation forbids it"),
        (ask(), {"continuation": "ids"}, "option continuation forbids it"),
    ],
)
async def test_what_cannot_go_on_is_begun_again_before_its_first_token_only(
    servers: list[Upstream], engine_of: MakeEngine, request_: Request, options: dict[str, str], words: str
) -> None:
    engine = await engine_of(servers[0], **options)
    servers[0].script += [answer(500), then(2, end_early)]
    outputs = await engine.run(request_)
    assert text_of(outputs) == "w1 w2 "
    assert words in error_of(outputs).message
    assert not outputs[-1].retryable
    assert len(servers[0].bodies) == 2


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (chat(), {"dialect": "openai"}),
        (chat(response_format=ResponseFormat("json_object")), {}),
        (chat(tools=(Tool("t"),)), {"dialect": "penstock"}),
    ],
)
async def test_what_cannot_be_continued_is_asked_for_again(
    servers: list[Upstream], engine_of: MakeEngine, request_: Request, options: dict[str, str]
) -> None:
    """It goes on where the log ends, if the server says the same; else it fails, and nothing false is said."""
    engine = await engine_of(servers[0], **options)
    servers[0].script.append(then(2, end_early))
    assert_complete(await engine.run(request_))
    first, second = servers[0].bodies
    assert first == second
    other = then(0, write(b'data: {"choices":[{"delta":{"content":"w1 but"}}]}\n\n'))
    servers[0].script += [then(2, end_early), other]
    outputs = await engine.run(request_)
    assert text_of(outputs) == "w1 w2 "
    assert "asked again, it says something else" in error_of(outputs).message
    assert not outputs[-1].retryable


async def test_an_abort_closes_the_connection(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, go_on))
    key = engine.add(ask(max_tokens=100_000))
    await asyncio.to_thread(engine.step)
    engine.backend.abort(key)
    await asyncio.wait_for(servers[0].cut_off.wait(), 10)
    assert_complete(await engine.run(ask()))
