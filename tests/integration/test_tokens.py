"""Tokens of a text and text of tokens, over HTTP, with the model in the box."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

import penstock
from tests.support.api import check_error
from tests.support.server import PATIENCE, Server, model, wait_for

MODEL = "millrace"
FOLDER = Path(penstock.__file__).parent / "bundled" / MODEL
TEXT = "Once upon a time, a little fox ran to the river. Größe, 水車 and 🚰!"
PROMPT = "Once upon a time, a little fox"
ASK = [{"role": "user", "content": "What is a river?"}]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = [model(rate=1000), model(MODEL, engine="openvino")]
    server = Server(tmp_path_factory.mktemp("tokens"), models=models)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
async def http(box: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=box.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def test_a_prompt_becomes_the_tokenizers_ids(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    wanted = tokenizer.encode(TEXT)
    answer = await post(http, "/tokenize", model=MODEL, prompt=TEXT, return_token_strs=True)
    assert answer == {
        "count": len(wanted.ids),
        "max_model_len": 1024,
        "tokens": wanted.ids,
        "token_strs": wanted.tokens,
    }


async def test_the_ids_sent_as_a_prompt_give_the_reply_of_the_text(http: httpx.AsyncClient) -> None:
    tokens = (await post(http, "/tokenize", model=MODEL, prompt=PROMPT))["tokens"]
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 30, "temperature": 0}
    by_text = await post(http, "/v1/completions", prompt=PROMPT, **asked)
    by_ids = await post(http, "/v1/completions", prompt=tokens, **asked)
    assert by_ids["choices"][0]["text"] == by_text["choices"][0]["text"] != ""
    assert by_ids["usage"] == by_text["usage"]
    assert by_ids["usage"]["prompt_tokens"] == len(tokens)


async def test_the_ids_of_messages_are_those_that_a_chat_is_given(http: httpx.AsyncClient) -> None:
    answer = await post(http, "/tokenize", model=MODEL, messages=ASK)
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 30, "temperature": 0}
    chat = await post(http, "/v1/chat/completions", messages=ASK, **asked)
    assert chat["usage"]["prompt_tokens"] == answer["count"] == len(answer["tokens"])
    by_ids = await post(http, "/v1/completions", prompt=answer["tokens"], **asked)
    assert by_ids["choices"][0]["text"] == chat["choices"][0]["message"]["content"] != ""
    begun = [*ASK, {"role": "assistant", "content": "A river"}]
    open_end = await post(http, "/tokenize", model=MODEL, messages=begun, continue_final_message=True)
    assert open_end["tokens"][: answer["count"]] == answer["tokens"]
    assert (await post(http, "/detokenize", model=MODEL, tokens=open_end["tokens"]))["prompt"].endswith("A river")


async def test_detokenize_is_the_way_back(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    for text in (TEXT, "", " two  spaces ", "<|user|>hello<|end|>"):
        tokens = (await post(http, "/tokenize", model=MODEL, prompt=text))["tokens"]
        assert (await post(http, "/detokenize", model=MODEL, tokens=tokens)) == {"prompt": text}
    half = tokenizer.encode("水").ids[:1]
    assert (await post(http, "/detokenize", model=MODEL, tokens=half))["prompt"] == "\N{REPLACEMENT CHARACTER}"


async def test_more_than_the_context_holds_is_counted_all_the_same(http: httpx.AsyncClient) -> None:
    text = "the old mill by the river " * 200
    answer = await post(http, "/tokenize", model=MODEL, prompt=text)
    assert answer["count"] > answer["max_model_len"]
    check_error(
        await http.post("/v1/completions", json={"model": MODEL, "prompt": text}), 400, "context_length_exceeded"
    )
    beyond = await http.post("/tokenize", json={"model": MODEL, "prompt": text * 40})
    check_error(beyond, 400, "context_length_exceeded", "prompt")


async def test_the_default_model_is_the_first_that_can(http: httpx.AsyncClient) -> None:
    """The synthetic engine, which the first model has, cannot."""
    assert (await post(http, "/tokenize", prompt=TEXT))["max_model_len"] == 1024
    error = check_error(await http.post("/tokenize", json={"model": "synthetic", "prompt": "x"}), 400, "unsupported")
    assert MODEL in error["message"]


async def test_nothing_of_it_is_kept(http: httpx.AsyncClient) -> None:
    before = (await http.get("/v1/jobs")).json()["data"]
    await post(http, "/tokenize", model=MODEL, prompt=TEXT)
    assert (await http.get("/v1/jobs")).json()["data"] == before


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/tokenize", {}, "invalid_request", "prompt"),
        ("/tokenize", {"prompt": "x", "messages": ASK}, "invalid_request", "prompt"),
        ("/tokenize", {"prompt": "x", "chat_template": "x"}, "invalid_request", "chat_template"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "invalid_request", "messages"),
        ("/tokenize", {"prompt": "\ud800"}, "invalid_request", None),
        ("/tokenize", {"messages": ASK, "add_generation_prompt": False}, "unsupported", "add_generation_prompt"),
        ("/tokenize", {"messages": ASK, "add_special_tokens": True}, "unsupported", "add_special_tokens"),
        ("/tokenize", {"messages": ASK, "continue_final_message": True}, "invalid_request", "continue_final_message"),
        ("/tokenize", {"prompt": "x", "model": "nobody"}, "model_not_found", "model"),
        ("/detokenize", {}, "invalid_request", None),
        ("/detokenize", {"tokens": [-1]}, "invalid_request", "tokens[0]"),
        ("/detokenize", {"tokens": [10**8], "model": MODEL}, "invalid_request", "tokens"),
    ],
)
async def test_what_is_wrong_is_named(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], code: str, param: str | None
) -> None:
    reply = await http.post(path, content=json.dumps(body))
    check_error(reply, 404 if code == "model_not_found" else 400, code, param)


async def test_an_upstream_passes_it_on(http: httpx.AsyncClient, box: Server, tmp_path: Path) -> None:
    """A Penstock before the box answers what the box answers, refusals included."""
    server = Server(tmp_path, models=[model("fox", engine="upstream", path=box.url, model=MODEL)])
    try:
        server.start()
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as front:

            async def both(path: str, **body: Any) -> dict[str, Any]:
                replies = [
                    await client.post(path, json={"model": name, **body})
                    for client, name in ((front, "fox"), (http, MODEL))
                ]
                assert replies[0].status_code == replies[1].status_code
                answers: list[dict[str, Any]] = [reply.json() for reply in replies]
                assert answers[0] == answers[1]
                return answers[0]

            tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
            begun = [*ASK, {"role": "assistant", "content": "A river"}]
            await both("/tokenize", prompt=TEXT, return_token_strs=True)
            await both("/tokenize", prompt="")
            await both("/tokenize", prompt="<|user|>", add_special_tokens=False)
            await both("/tokenize", prompt="the old mill by the river " * 200)
            await both("/tokenize", messages=begun, continue_final_message=True)
            await both("/tokenize", messages=ASK, tools=[tool])
            tokens = (await both("/tokenize", messages=ASK))["tokens"]
            text = await both("/detokenize", tokens=[*tokens, 300, 301])
            assert text["prompt"].startswith("<|user|>What is a river?")
            assert (await both("/detokenize", tokens=[10**8]))["error"]["param"] == "tokens"
            counted = await front.post("/v1/messages/count_tokens", json={"model": "fox", "messages": ASK})
            assert counted.json() == {"input_tokens": len(tokens)}
            refused = await front.post("/v1/embeddings", json={"model": "fox", "input": "x"})
            check_error(refused, 400, "unsupported", "model")
        wait_for(lambda: server.get("/v1/jobs").json()["data"] == [], "the jobs to be dropped")
    finally:
        server.stop()
