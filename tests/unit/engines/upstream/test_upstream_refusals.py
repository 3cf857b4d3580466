"""What servers refuse, and what the operator has to correct."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.server import wait_for
from tests.support.upstream import (
    TEXT,
    WORDS,
    Act,
    MakeEngine,
    Upstream,
    answer,
    ask,
    assert_complete,
    assert_embedded,
    chat,
    embed,
    error_of,
    text_of,
    vectors,
    words,
)

from penstock.core.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    PenstockError,
    Unsupported,
)
from penstock.core.job import Request, Sampling
from penstock.engines.child.backend import load_backend
from penstock.engines.frames import Notice
from penstock.engines.upstream.dialects import UpstreamError
from penstock.engines.upstream.options import ServerAddress, addresses
from penstock.engines.upstream.stream import MAX_LINE, Lines, StreamError


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
