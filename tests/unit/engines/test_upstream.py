"""The upstream engine against a server that misbehaves in every way that servers do."""

from __future__ import annotations

import asyncio
import json
import select
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import web
from tests.support.server import wait_for

from penstock.core.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    PenstockError,
    Unsupported,
)
from penstock.core.events import Logprob, Prefix, Tokens, TopLogprob, fold
from penstock.core.job import Message, Request, ResponseFormat, Sampling, Tool
from penstock.core.ports import Finish, Output
from penstock.core.tasks import Tokenized, vector_text, vector_values
from penstock.core.tools import Call, parse_tool_calls
from penstock.engines.child import notices
from penstock.engines.child.backend import load_backend
from penstock.engines.frames import Notice
from penstock.engines.upstream.backend import UpstreamBackend
from penstock.engines.upstream.dialects import UpstreamError
from penstock.engines.upstream.options import ServerAddress, addresses
from penstock.engines.upstream.replicas import BROKEN, TRIP, Replica
from penstock.engines.upstream.stream import MAX_LINE, Lines, StreamError

WORDS = [f"w{i} " for i in range(1, 11)]
TEXT = "".join(WORDS)
KEY = "sk-not-to-be-seen"

Act = Callable[["Upstream", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class Upstream:
    """A server that says `WORDS`, one a chunk, behind what the request already has of them; ``script`` holds what it
    does with the next requests instead."""

    def __init__(self, owned_by: str = "vllm") -> None:
        self.owned_by = owned_by
        self.script: deque[Act] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.tokens = 90
        """Of any prompt, if it is asked."""
        self.prompt: list[int] = []
        """Those tokens."""
        self.embeds = False
        self.asked_for_vectors: list[dict[str, Any]] = []
        self.cut_off = asyncio.Event()
        self.url = ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/embeddings", self._embed)
        app.router.add_post("/v1/{route:.*}", self._post)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "owned_by": self.owned_by, "max_model_len": 100}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        assert (await request.json())["prompt"]
        return web.json_response({"count": self.tokens, "tokens": self.prompt})

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        """As SGLang does."""
        body = await request.json()
        self.bodies.append(body)
        if self.script:
            return await self.script.popleft()(self, request, body)
        return web.json_response({"text": " ".join(map(str, body["tokens"]))})

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        """As `vectors` does, if it embeds at all."""
        if not self.embeds:
            raise web.HTTPNotFound
        body = await request.json()
        self.asked_for_vectors.append(body)
        if self.script:
            return await self.script.popleft()(self, request, body)
        return await vectors()(self, request, body)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.paths.append(request.path)
        if self.script:
            return await self.script.popleft()(self, request, body)
        return await words()(self, request, body)

    async def opened(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        return response


def chunk(body: dict[str, Any], text: str, finish: str | None = None) -> bytes:
    content = {"delta": {"content": text}} if "messages" in body else {"text": text}
    return b"data: " + json.dumps({"choices": [{"index": 0, **content, "finish_reason": finish}]}).encode() + b"\n\n"


def events(body: dict[str, Any]) -> list[bytes]:
    """The rest of the reply: chunks, the reason, usage."""
    had = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    left = WORDS[had.count("w") :][: body.get("max_tokens") or 10]
    prompt_tokens = 3 + had.count("w")
    usage = {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(left)}}
    return [
        *(chunk(body, word) for word in left),
        chunk(body, "", "length"),
        f"data: {json.dumps(usage)}\r\n\r\n".encode(),
        b": a comment\n\ndata: [DONE]\n\n",
    ]


def words(piece: int = 0) -> Act:
    """A proper reply; *piece*: in writes of so many bytes, wherever they fall."""

    async def act(server: Upstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await server.opened(request)
        pieces = events(body)
        if piece:
            whole = b"".join(pieces)
            pieces = [whole[i : i + piece] for i in range(0, len(whole), piece)]
        for each in pieces:
            await response.write(each)
            await asyncio.sleep(0)
        return response

    return act


def vectors(*, base64: bool = True, size: int = 2) -> Act:
    """Proper vectors: an input's number (the one in its text, or its first id), *size* times."""

    async def act(server: Upstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        numbers = [float(each.strip("x") or 0) if isinstance(each, str) else float(each[0]) for each in body["input"]]
        found: list[Any] = [[number] * size for number in numbers]
        if base64 and body.get("encoding_format") == "base64":
            found = [vector_text(each) for each in found]
        data = [{"object": "embedding", "index": i, "embedding": each} for i, each in enumerate(found)]
        return web.json_response({"data": data[::-1], "usage": {"prompt_tokens": 3 * len(data)}})

    return act


def then(count: int, end: Callable[[Upstream, web.Request, web.StreamResponse], Awaitable[None]]) -> Act:
    """*count* words, and then something else."""

    async def act(server: Upstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await server.opened(request)
        for each in events(body)[:count]:
            await response.write(each)
        await end(server, request, response)
        return response

    return act


async def die(server: Upstream, request: web.Request, response: web.StreamResponse) -> None:
    await asyncio.sleep(0.05)  # else the reset would overtake what was written
    assert request.transport is not None
    request.transport.abort()


async def be_silent(server: Upstream, request: web.Request, response: web.StreamResponse) -> None:
    await asyncio.sleep(30)


async def end_early(server: Upstream, request: web.Request, response: web.StreamResponse) -> None:
    return


def write(data: bytes) -> Callable[[Upstream, web.Request, web.StreamResponse], Awaitable[None]]:
    async def end(server: Upstream, request: web.Request, response: web.StreamResponse) -> None:
        await response.write(data)

    return end


async def go_on(server: Upstream, request: web.Request, response: web.StreamResponse) -> None:
    """Words for ever, until nobody takes them."""
    try:
        while True:
            await response.write(b'data: {"choices":[{"text":"and "}]}\n\n')
            await asyncio.sleep(0.005)
    except ConnectionResetError:
        server.cut_off.set()
        raise


def answer(status: int, body: Any = None, **headers: str) -> Act:
    async def act(server: Upstream, request: web.Request, received: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(
            body or {"error": {"message": f"it is {status}"}}, status=status, headers=headers or None
        )

    return act


# ------------------------------------------------------------------------------------------ driving the engine


@pytest.fixture
async def servers() -> AsyncIterator[list[Upstream]]:
    both = [Upstream(), Upstream()]
    for server in both:
        await server.start()
    yield both
    for server in both:
        await server.stop()


class Engine:
    """The backend and what came out of it. Blocking calls go to a thread: the servers run in the test's loop."""

    def __init__(self, backend: UpstreamBackend) -> None:
        self.backend = backend
        self.keys = 0

    async def run(self, request: Request, prefixes: list[Prefix] | None = None) -> list[Output]:
        return await asyncio.to_thread(self.finish, self.add(request, prefixes))

    def add(self, request: Request, prefixes: list[Prefix] | None = None) -> int:
        self.keys += 1
        self.backend.add(self.keys, request, prefixes or [Prefix() for _ in range(request.n)], 1)
        return self.keys

    def step(self) -> list[Output]:
        ready, _, _ = select.select([self.backend.wakeup], [], [], 20)
        assert ready, "nothing came"
        return self.backend.step()

    def finish(self, key: int) -> list[Output]:
        outputs: list[Output] = []
        while not outputs or outputs[-1].finish is None:
            outputs += [output for output in self.step() if output.key == key]
        return outputs


@pytest.fixture
async def engine_of() -> AsyncIterator[Callable[..., Awaitable[Engine]]]:
    engines: list[Engine] = []

    async def make(*servers: Upstream | str, **options: object) -> Engine:
        urls = ",".join(each if isinstance(each, str) else each.url for each in servers)
        given = {"retries": "2", **{name: str(value) for name, value in options.items()}}
        backend = await asyncio.to_thread(load_backend, "upstream", "m", urls, given, lambda what, fraction: None)
        engines.append(Engine(backend))
        return engines[-1]

    yield make
    for engine in engines:
        await asyncio.to_thread(engine.backend.close)


MakeEngine = Callable[..., Awaitable[Engine]]


@pytest.fixture
def noticed() -> Iterator[list[Notice]]:
    """What the engines tell the server's telemetry."""
    found: list[Notice] = []
    notices.listen(found.append)
    yield found
    notices.listen()


def ask(prompt: str = "say: ", *, max_tokens: int = 10, n: int = 1, **sampling: Any) -> Request:
    return Request(model="m", prompt=prompt, sampling=Sampling(max_tokens=max_tokens, **sampling), n=n)


def chat(*messages: Message, **fields: Any) -> Request:
    return Request(
        model="m", messages=messages or (Message("user", "say"),), sampling=Sampling(max_tokens=10), **fields
    )


def text_of(outputs: list[Output]) -> str:
    return "".join(text for output in outputs for text in output.texts)


def error_of(outputs: list[Output]) -> Any:
    assert outputs[-1].finish is not None
    return outputs[-1].finish.error


def assert_complete(outputs: list[Output]) -> None:
    assert text_of(outputs) == TEXT
    assert sum(len(output.ids) for output in outputs) == 10
    assert outputs[-1].finish == Finish(("length",))
    assert [output.prompt_tokens for output in outputs if output.prompt_tokens is not None] == [3]


# ------------------------------------------------------------------------------------------ replies


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


async def test_tool_calls_are_logged_as_models_write_them(servers: list[Upstream], engine_of: MakeEngine) -> None:
    def delta(index: int, **function: str) -> bytes:
        call = {"index": index, "function": function}
        return b"data: " + json.dumps({"choices": [{"delta": {"tool_calls": [call]}}]}).encode() + b"\n\n"

    end = b'data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
    calls = delta(0, name="sum", arguments="") + delta(0, arguments='{"a":') + delta(0, arguments='"1"}')
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, write(calls + delta(1, name="now") + end)))
    outputs = await engine.run(chat(tools=(Tool("sum"), Tool("now"))))
    assert text_of(outputs) == (
        '<tool_call>\n{"name": "sum", "arguments": {"a":"1"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )
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


# ------------------------------------------------------------------------------------------ failover

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
        (chat(), {"dialect": "openai"}, "does not continue a chat"),
        (ask(), {"continuation": "none"}, "option continuation forbids it"),
        (chat(response_format=ResponseFormat("json_object")), {}, "grammar"),
        (chat(tools=(Tool("t"),)), {"dialect": "penstock"}, "tools"),
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


async def test_an_abort_closes_the_connection(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(then(0, go_on))
    key = engine.add(ask(max_tokens=100_000))
    await asyncio.to_thread(engine.step)
    engine.backend.abort(key)
    await asyncio.wait_for(servers[0].cut_off.wait(), 10)
    assert_complete(await engine.run(ask()))


# ------------------------------------------------------------------------------------------ what servers send instead


def sse(*events: Any) -> Callable[[Upstream, web.Request, web.StreamResponse], Awaitable[None]]:
    return write(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n")


def said(text: Any, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """An event of a chat."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish, **more}]}


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
    content, (found,) = parse_tool_calls(text_of(outputs), request)
    assert (content, found) == ("ab", Call("sum", '{"a": 1}'))
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


# ------------------------------------------------------------------------------------------ calls


def called(*calls: Any, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"tool_calls": list(calls)}, "finish_reason": finish}]}


def part(index: int | None = 0, id: str | None = None, **function: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"function": function}
    return found | ({} if index is None else {"index": index}) | ({} if id is None else {"id": id})


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
    content, found = parse_tool_calls(text_of(outputs), request)
    assert [(call.name, call.arguments) for call in found] == calls
    assert "tool_call>" not in (content or "")
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
    assert parse_tool_calls(text_of(outputs), request) == (None, [Call("sum", '{"a": [1, ')])
    assert outputs[-1].finish == Finish(("length",))


async def test_a_call_without_a_name(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    nameless = then(0, sse(called(part(0, "x", arguments='{"a": 1}')), said(None, "tool_calls")))
    servers[0].script += [nameless] * 3
    one = chat(tools=(Tool("sum"), Tool("now")), tool_choice="required", tool_name="now")
    assert parse_tool_calls(text_of(await engine.run(one)), one) == (None, [Call("now", '{"a": 1}')])
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
    assert parse_tool_calls(text_of(outputs), request) == (None, [Call("sum", "{}")])


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


# ------------------------------------------------------------------------------------------ embeddings and tokens


@pytest.fixture
async def encoders(servers: list[Upstream]) -> list[Upstream]:
    for server in servers:
        server.embeds = True
    return servers


def embed(count: int = 10, **fields: Any) -> Request:
    """Of inputs whose vectors are their numbers, from 0."""
    return Request(model="m", task="embed", inputs=tuple(f"x{i}" for i in range(count)), **fields)


def assert_embedded(outputs: list[Output], count: int = 10, *, tokens: int | None = None) -> None:
    found = {index: text for output in outputs for index, text in zip(output.ids, output.texts, strict=True)}
    assert sum(len(output.ids) for output in outputs) == count, "each of them once"
    assert {index: vector_values(text)[0] for index, text in found.items()} == {i: float(i) for i in range(count)}
    assert outputs[-1].finish == Finish(("stop",))
    told = [output.prompt_tokens for output in outputs if output.prompt_tokens is not None]
    assert told == [3 * count if tokens is None else tokens]


async def test_vectors_come_in_base64_and_in_parts(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(*encoders, batch=3)
    assert (engine.backend.info.tasks, engine.backend.info.dimensions) == (("embed", "tokenize"), 2)
    for server in encoders:
        server.asked_for_vectors.clear()
    outputs = await engine.run(embed(20))
    assert_embedded(outputs, 20)
    asked = [body for server in encoders for body in server.asked_for_vectors]
    assert sorted(len(body["input"]) for body in asked) == [2, 3, 3, 3, 3, 3, 3]
    assert all(body["encoding_format"] == "base64" for body in asked)
    assert all(server.asked_for_vectors for server in encoders), "they share the work"


async def cut_short(server: Upstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await server.opened(request)
    await response.write(b'{"data": [')
    assert request.transport is not None
    request.transport.abort()
    return response


async def say_nothing(server: Upstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(30)
    raise AssertionError


A_VECTOR = {"index": 0, "embedding": "AAAAAAAAAAA="}
NO_VECTORS: dict[str, Act] = {
    "dies": cut_short,
    "silent": say_nothing,
    "500": answer(500),
    "busy": answer(429, **{"Retry-After": "0"}),
    "no JSON": answer(200, "vectors"),
    "too few": answer(200, {"data": [A_VECTOR]}),
    "no base64": answer(200, {"data": [{"index": i, "embedding": "?"} for i in range(5)]}),
    "no float32": answer(200, {"data": [{"index": i, "embedding": "AAA="} for i in range(5)]}),
    "other sizes": answer(200, {"data": [{"index": i, "embedding": [1.0] * (i + 1)} for i in range(5)]}),
    "another size": vectors(size=3),
}


@pytest.mark.parametrize("how", NO_VECTORS)
async def test_another_replica_embeds_what_one_did_not(
    encoders: list[Upstream], engine_of: MakeEngine, how: str
) -> None:
    engine = await engine_of(*encoders, idle_timeout=0.5, batch=5)
    for server in encoders:
        server.script.append(NO_VECTORS[how])
        server.asked_for_vectors.clear()
    assert_embedded(await engine.run(embed()))
    assert sum(len(server.asked_for_vectors) for server in encoders) == 4, "two calls, each a second time"


async def test_inputs_that_are_logged_are_not_embedded_again(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0])
    encoders[0].asked_for_vectors.clear()
    outputs = await engine.run(embed(), [Prefix([3, 0, 7], [vector_text([n, n]) for n in (3, 0, 7)])])
    assert sorted(index for output in outputs for index in output.ids) == [1, 2, 4, 5, 6, 8, 9]
    (body,) = encoders[0].asked_for_vectors
    assert body["input"] == [f"x{i}" for i in (1, 2, 4, 5, 6, 8, 9)]
    assert sum(output.prompt_tokens or 0 for output in outputs) == 30, "the logged ones count as much as the others"
    (output,) = await engine.run(embed(1), [Prefix([0], [vector_text([0, 0])])])
    assert output.finish == Finish(("stop",))
    assert len(encoders[0].asked_for_vectors) == 1


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_server_that_has_numbers_only(encoders: list[Upstream], engine_of: MakeEngine, refuses: bool) -> None:
    server = encoders[0]
    engine = await engine_of(server)
    server.asked_for_vectors.clear()
    refusal = answer(400, {"error": {"message": "encoding_format must be float"}})
    server.script += [refusal] if refuses else [vectors(base64=False)] * 2
    for _ in range(2):
        assert_embedded(await engine.run(embed()))
    formats = [body.get("encoding_format") for body in server.asked_for_vectors]
    assert formats == (["base64", None, None] if refuses else ["base64"] * 2)


async def test_texts_and_ids_go_by_themselves(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0])
    encoders[0].asked_for_vectors.clear()
    request = Request(model="m", task="embed", inputs=("x0", (1, 50), "x2", (3,)), dimensions=2)
    assert_embedded(await engine.run(request), 4)
    asked = [body["input"] for body in encoders[0].asked_for_vectors if body["dimensions"] == 2]
    assert sorted(asked, key=str) == [["x0", "x2"], [[1, 50], [3]]]


async def test_a_call_that_is_too_large_is_cut_in_two(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0])
    encoders[0].asked_for_vectors.clear()
    encoders[0].script += [answer(413), answer(413)]
    assert_embedded(await engine.run(embed()))
    assert [len(body["input"]) for body in encoders[0].asked_for_vectors] == [10, 5, 2, 3, 5]
    encoders[0].script.append(answer(413))
    assert error_of(await engine.run(embed(1))).code == "request_too_large"


@pytest.mark.parametrize(
    ("status", "error", "code", "param"),
    [
        (400, {"message": "Input 3 is empty."}, "invalid_request", "input"),
        (400, {"message": "maximum context length is 512 tokens"}, "context_length_exceeded", "input"),
        (413, {"message": "`inputs` must have less than 512 tokens. Given: 600"}, "context_length_exceeded", "input"),
        (500, {"message": "input (900 tokens) is too large to process."}, "context_length_exceeded", "input"),
    ],
)
async def test_what_is_wrong_with_an_input_is_the_clients(
    encoders: list[Upstream], engine_of: MakeEngine, status: int, error: dict[str, str], code: str, param: str
) -> None:
    engine = await engine_of(*encoders, batch=5)
    for server in encoders:
        server.asked_for_vectors.clear()
    encoders[0].script.append(answer(status, {"error": error}))
    encoders[1].script.append(answer(status, {"error": error}))
    found = error_of(await engine.run(embed()))
    assert (found.code, found.param) == (code, param)
    assert found.message.startswith(error["message"])
    assert "of the inputs 0 to 4" in found.message or "of the inputs 5 to 9" in found.message
    assert sum(len(server.asked_for_vectors) for server in encoders) == 2, "nobody is asked again"


async def test_vectors_that_cannot_be_cut(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0])
    assert_embedded(await engine.run(embed(dimensions=2)))
    error = error_of(await engine.run(embed(dimensions=1)))
    assert (error.code, error.param) == ("unsupported", "dimensions")
    assert "2 dimensions" in error.message


async def test_an_aborted_embedding_makes_no_more_calls(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0], batch=1)
    encoders[0].asked_for_vectors.clear()
    key = engine.add(embed(2000))
    await asyncio.to_thread(engine.step)
    engine.backend.abort(key)
    assert_embedded(await engine.run(embed(3)), 3)
    assert len(encoders[0].asked_for_vectors) < 1000


async def test_when_none_can_embed_now_the_job_goes_back_to_the_queue(
    encoders: list[Upstream], engine_of: MakeEngine
) -> None:
    engine = await engine_of(encoders[0], retries=1)
    encoders[0].script += [answer(500)] * 2
    outputs = await engine.run(embed())
    assert "it is 500" in error_of(outputs).message
    assert outputs[-1].retryable


async def test_one_that_has_no_such_route_is_not_asked_twice(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """Where the operator has said more than it can."""
    engine = await engine_of(*servers, tasks="embed,generate")
    assert engine.backend.info.tasks == ("generate", "embed")
    outputs = await engine.run(embed())
    assert (error_of(outputs).code, error_of(outputs).param) == ("unsupported", "model")
    assert "404" in error_of(outputs).message
    assert not outputs[-1].retryable
    assert_complete(await engine.run(ask()))  # it is none the worse for it
    servers[1].embeds = True
    for _ in range(2 * TRIP):
        assert_embedded(await engine.run(embed()))


async def test_tokens_and_their_text(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """As SGLang has them: without names."""
    servers[0].owned_by = "sglang"
    engine = await engine_of(*servers)
    servers[0].script.append(answer(500))
    servers[1].script.append(answer(500))
    (output,) = await engine.run(Request(model="m", task="tokenize", prompt_ids=(7, 8)))
    assert Tokenized.of(fold([Tokens(1, 1, output.ids, output.texts)], 1)) == Tokenized([7, 8], None, "7 8")
    assert output.finish == Finish(("stop",))
    assert sum(len(server.bodies) for server in servers) == 3


# ------------------------------------------------------------------------------------------ how likely a prompt is

#: What vLLM tells of a prompt of the tokens 5, 6 and 7.
LIKELY = [
    None,
    {"6": {"logprob": -1.5, "rank": 2, "decoded_token": "b"}, "9": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}},
    {"7": {"logprob": -0.25, "rank": 1, "decoded_token": "c"}},
]


def scored(*told: Any, **more: Any) -> Act:
    choice = {"index": 0, "text": "d", "prompt_logprobs": list(told), "prompt_token_ids": [5, 6, 7], **more}
    return answer(200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})


def score(count: int = 1, **prompt: Any) -> Request:
    return Request(model="m", task="score", sampling=Sampling(logprobs=count), **(prompt or {"prompt": "abc"}))


async def test_a_prompt_is_scored_by_vllm(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(scored(*LIKELY))
    (output,) = await engine.run(score())
    assert (output.ids, output.texts, output.prompt_tokens) == ([5, 6, 7], ["a", "b", "c"], 3)
    assert output.logprobs == [
        None,
        Logprob(-1.5, (TopLogprob(9, "x", -0.5), TopLogprob(6, "b", -1.5)), "b"),
        Logprob(-0.25, (TopLogprob(7, "c", -0.25),), "c"),
    ]
    assert output.finish == Finish(("stop",))
    assert (servers[0].bodies[-1]["prompt_logprobs"], servers[0].bodies[-1]["prompt"]) == (1, "abc")


async def test_a_prompt_of_ids_is_scored_behind_what_is_logged(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(*servers)
    for server in servers:
        server.script += [answer(500), scored(*LIKELY), answer(200, {"text": "abc"})]
    (output,) = await engine.run(score(0, prompt_ids=(5, 6, 7)), [Prefix([5], ["a"])])
    assert (output.ids, output.texts) == ([6, 7], ["b", "c"])
    assert output.logprobs == [Logprob(-1.5, (), "b"), Logprob(-0.25, (), "c")]


async def test_ids_that_a_server_does_not_tell_are_asked_for(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """vLLM's older versions."""
    engine = await engine_of(servers[0])
    servers[0].prompt = [5, 6, 7]
    servers[0].script.append(scored(*LIKELY, prompt_token_ids=None))
    (output,) = await engine.run(score())
    assert (output.ids, output.texts) == ([5, 6, 7], ["a", "b", "c"])


@pytest.mark.parametrize(
    "told",
    [
        scored(*LIKELY[:2]),
        scored(None, {"9": {"logprob": -1.0}}, LIKELY[2]),
        scored(*LIKELY, prompt_token_ids=[5, 6]),
        answer(200, {"choices": []}),
        answer(200, {"choices": [{"text": "d"}]}),
        answer(200, {"choices": [{"prompt_logprobs": "many"}]}),
        answer(200, [1]),
    ],
    ids=["too few", "of another", "too few ids", "no choice", "nothing", "a text", "a list"],
)
async def test_scores_that_are_none(servers: list[Upstream], engine_of: MakeEngine, told: Act) -> None:
    engine = await engine_of(servers[0])
    servers[0].script += [told, told]
    outputs = await engine.run(score())
    assert error_of(outputs).code == "engine_error"
    assert not servers[0].script, "it is asked once more"
    assert_complete(await engine.run(ask()))


# ------------------------------------------------------------------------------------------ refusals


async def test_redirects_are_not_followed(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].script.append(answer(307, Location=f"{servers[1].url}/v1/completions"))
    assert error_of(await engine.run(ask())).code == "engine_error"
    assert not servers[1].bodies


@pytest.mark.parametrize(
    "error", [{"message": "maximum context length is 100 tokens"}, {"message": "too many", "param": "max_tokens"}]
)
async def test_what_leaves_no_room_for_max_tokens_gets_the_room_there_is(
    servers: list[Upstream], engine_of: MakeEngine, error: dict[str, str]
) -> None:
    engine = await engine_of(servers[0])
    requests = [
        ask(max_tokens=99),
        Request(model="m", prompt_ids=(1,) * 95, sampling=Sampling(max_tokens=30)),
        chat(),
    ]
    texts = []
    for request in requests:
        servers[0].script.append(answer(400, {"error": error}))
        texts.append(text_of(await engine.run(request)))
    assert texts == [TEXT, "".join(WORDS[:5]), TEXT]
    assert [body.get("max_tokens") for body in servers[0].bodies] == [99, 10, 30, 5, 10, None]


async def test_where_there_is_no_room_at_all_it_is_refused(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0])
    servers[0].tokens = 100
    servers[0].script.append(answer(400, {"error": {"message": "maximum context length is 100 tokens"}}))
    assert error_of(await engine.run(ask())).code == "context_length_exceeded"
    assert len(servers[0].bodies) == 1


async def test_the_limit_is_called_what_the_server_wants(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(servers[0], dialect="openai")
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    servers[0].script.append(answer(400, {"error": {"message": message, "param": "max_tokens"}}))
    assert text_of(await engine.run(chat())) == TEXT
    await engine.run(chat())
    fields = [[name for name in body if name.startswith("max_")] for body in servers[0].bodies]
    assert fields == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]


@pytest.mark.parametrize(
    ("value", "status", "kind"),
    [
        ({"error": {"message": "x", "code": "context_length_exceeded"}}, 400, ContextLengthExceeded),
        ({"error": {"message": "x", "type": "exceed_context_size_error", "code": 400}}, 400, ContextLengthExceeded),
        ({"object": "error", "message": "This model's maximum context length is 5"}, 400, ContextLengthExceeded),
        ({"error": {"message": "x", "code": "unsupported", "param": "seed"}}, 400, Unsupported),
        ({"error": {"message": "x", "code": "model_not_found"}}, 404, ModelNotFound),
        ({"error": {"message": "The model `m` does not exist."}}, 404, ModelNotFound),
        ({"error": {"message": "top_p is odd", "param": "top_p"}}, 400, InvalidRequest),
        ({"detail": [{"loc": ["body"]}]}, 422, InvalidRequest),
        ("<html>no</html>", 400, InvalidRequest),
    ],
)
async def test_refusals_are_the_clients(
    servers: list[Upstream], engine_of: MakeEngine, value: Any, status: int, kind: type[PenstockError]
) -> None:
    engine = await engine_of(servers[0], dialect="penstock")
    servers[0].script.append(answer(status, value))
    outputs = await engine.run(ask())
    error = error_of(outputs)
    assert error.code == kind.code
    assert not outputs[-1].retryable
    assert error.param == UpstreamError.read(value).param or kind is ModelNotFound
    assert len(servers[0].bodies) == 1


def test_lines_are_put_together_and_bounded() -> None:
    lines = Lines()
    assert lines.feed(b'data: {"a"') == []
    assert lines.feed(b": 1}\nid: 7\n\ndata: [DONE]\n") == [b' {"a": 1}', b" [DONE]"]
    with pytest.raises(StreamError):
        lines.feed(b"x" * (MAX_LINE + 1))


# ------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        (None, {}, "--model NAME=http"),
        ("ftp://x", {}, "has the form http"),
        ("http://user:pw@x", {}, "key_env"),
        ("http://x?a=1", {}, "has the form http"),
        ("http://127.0.0.1:9", {"slotz": "1"}, "did you mean 'slots'"),
        ("http://127.0.0.1:9", {"key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
        ("http://127.0.0.1:9", {"tasks": "embed,sing"}, "some of generate, embed, tokenize, score; not 'embed,sing'"),
        ("http://127.0.0.1:9", {"batch": "0"}, "batch is a whole number, at least 1 and at most 2,048, not '0'"),
        ("http://127.0.0.1:9", {"dialect": "klingon"}, "auto, openai, vllm, llama or penstock"),
        ("http://127.0.0.1:9", {}, "No upstream server of 'm' answers"),
    ],
)
def test_what_the_operator_must_correct(path: str | None, options: dict[str, str], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        load_backend("upstream", "m", path, options, lambda what, fraction: None)


def test_addresses_with_and_without_a_version() -> None:
    assert addresses("http://a:1, https://b/v1/,http://c/v1beta/openai,http://d/x") == [
        ServerAddress("http://a:1", "http://a:1/v1"),
        ServerAddress("https://b", "https://b/v1"),
        ServerAddress("http://c/v1beta/openai", "http://c/v1beta/openai"),
        ServerAddress("http://d/x", "http://d/x/v1"),
    ]


async def test_one_replica_may_be_down_at_the_start(servers: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of("http://127.0.0.1:9", servers[0])
    assert_complete(await engine.run(ask()))


async def test_a_model_that_the_server_does_not_have(servers: list[Upstream], engine_of: MakeEngine) -> None:
    with pytest.raises(ModelLoadError, match="It has m"):
        await engine_of(servers[0], model="other")


@pytest.mark.parametrize(
    ("owner", "dialect"), [("vllm", "vllm"), ("llamacpp", "llama"), ("penstock", "penstock"), ("acme", "openai")]
)
async def test_servers_are_recognised(engine_of: MakeEngine, owner: str, dialect: str) -> None:
    server = Upstream(owner)
    await server.start()
    engine = await engine_of(server)
    await engine.run(ask())
    await server.stop()
    told = {"vllm": "return_token_ids", "penstock": "return_token_ids", "llama": "timings_per_token", "openai": ""}
    assert {"return_token_ids", "timings_per_token"} & set(server.bodies[0]) == {told[dialect]} - {""}


@pytest.mark.parametrize(
    ("owner", "script", "tasks"),
    [
        ("vllm", [answer(404)], ("generate", "tokenize", "score")),
        ("vllm", [answer(400)], ("generate", "tokenize", "score")),
        ("vllm", [vectors()], ("embed", "tokenize")),
        ("acme", [answer(403)], ("generate", "tokenize")),
        ("acme", [vectors(base64=False), answer(404), answer(400)], ("embed", "tokenize")),
        ("acme", [vectors(base64=False), answer(404), words()], ("generate", "embed", "tokenize")),
    ],
)
async def test_servers_are_asked_what_they_can(
    servers: list[Upstream], engine_of: MakeEngine, owner: str, script: list[Act], tasks: tuple[str, ...]
) -> None:
    servers[0].owned_by, servers[0].embeds = owner, True
    servers[0].script += script
    assert (await engine_of(servers[0])).backend.info.tasks == tasks
    assert not servers[0].script


async def test_what_a_server_does_not_tell_is_said(
    servers: list[Upstream], engine_of: MakeEngine, noticed: list[Notice]
) -> None:
    servers[0].embeds = True
    servers[0].script.append(answer(503))
    engine = await engine_of(servers[0])
    assert engine.backend.info.tasks == ("generate", "tokenize", "score")
    (notice,) = noticed
    assert (notice.name, notice.facts["replica"]) == ("replica.unclear", servers[0].url)
    assert notice.facts["error"] == "it does not tell whether it has /v1/embeddings (HTTP 503): see the option tasks"


async def test_who_was_away_is_asked_again(servers: list[Upstream], engine_of: MakeEngine) -> None:
    """It may have been started anew, as something else."""
    engine = await engine_of(*servers)
    replica, other = engine.backend._replicas.all
    servers[0].embeds = servers[1].embeds = True
    engine.backend.loop.call_soon_threadsafe(replica.lost, "gone")
    await asyncio.to_thread(wait_for, lambda: replica.tasks == ("embed", "tokenize"), "the new tasks")
    assert other.tasks == ("generate", "tokenize", "score")
    for _ in range(4):
        assert_complete(await engine.run(ask()))  # only the other one is asked


async def test_who_is_told_what_a_server_can_does_not_ask(encoders: list[Upstream], engine_of: MakeEngine) -> None:
    engine = await engine_of(encoders[0], tasks="embed")
    assert engine.backend.info.tasks == ("embed",)
    assert not encoders[0].asked_for_vectors
    assert_embedded(await engine.run(embed()))


# ------------------------------------------------------------------------------------------ the circuit breaker


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def a_replica(clock: Time) -> Replica:
    from penstock.engines.upstream.dialects import DIALECTS

    replica = Replica(ServerAddress("http://x", "http://x/v1"), clock)
    replica.dialect = DIALECTS["openai"]
    return replica


def test_a_replica_that_fails_rests_and_is_tried_by_one_request() -> None:
    clock = Time()
    replica = a_replica(clock)
    for _ in range(TRIP - 1):
        replica.failed("why")
    assert replica.available()
    replica.failed("why")
    assert not replica.available()
    assert 0.25 <= replica.wait() <= 0.5
    clock.now += 0.5
    assert replica.available()
    replica.begin()
    assert not replica.available(), "one at a time"
    replica.failed("why")
    replica.end()
    assert 0.5 <= replica.wait() <= 1.0
    clock.now += 1.0
    replica.begin()
    replica.succeeded()
    assert replica.available()


def test_the_pause_grows_up_to_a_limit() -> None:
    clock = Time()
    replica = a_replica(clock)
    for _ in range(40):
        replica.failed("why")
    assert 15 <= replica.wait() <= 30


def test_who_asks_for_a_pause_gets_it_and_is_not_blamed() -> None:
    clock = Time()
    replica = a_replica(clock)
    replica.busy(7)
    assert not replica.available()
    assert replica.wait() == 7
    clock.now += 7
    assert replica.available()
    assert replica.failures == 0


def test_who_is_down_gets_nothing_until_a_health_check_finds_it() -> None:
    clock = Time()
    replica = a_replica(clock)
    replica.failed("refused")
    replica.lost("refused")
    clock.now += 100
    assert not replica.available()
    replica.found()
    assert replica.available()
    assert replica.failures == 0
