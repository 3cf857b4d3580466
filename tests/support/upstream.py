"""A server that misbehaves in every way that servers do, and the upstream engine before it."""

from __future__ import annotations

import asyncio
import json
import select
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from penstock.core.events import Phase, Prefix
from penstock.core.job import Message, Request, Sampling
from penstock.core.ports import Finish, Output
from penstock.core.tasks import vector_text, vector_values
from penstock.engines.upstream.backend import UpstreamBackend

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


MakeEngine = Callable[..., Awaitable[Engine]]


def ask(prompt: str = "say: ", *, max_tokens: int = 10, n: int = 1, **sampling: Any) -> Request:
    return Request(model="m", prompt=prompt, sampling=Sampling(max_tokens=max_tokens, **sampling), n=n)


def chat(*messages: Message, **fields: Any) -> Request:
    return Request(
        model="m", messages=messages or (Message("user", "say"),), sampling=Sampling(max_tokens=10), **fields
    )


def text_of(outputs: list[Output], phase: Phase | None = None) -> str:
    """All of it, or what is of one *phase*."""
    if phase is None:
        return "".join(text for output in outputs for text in output.texts)
    return "".join(Prefix(each.ids, each.texts, each.phases).text_of(phase) for each in outputs)


def error_of(outputs: list[Output]) -> Any:
    assert outputs[-1].finish is not None
    return outputs[-1].finish.error


def assert_complete(outputs: list[Output]) -> None:
    assert text_of(outputs) == TEXT
    assert sum(len(output.ids) for output in outputs) == 10
    assert outputs[-1].finish == Finish(("length",))
    assert [output.prompt_tokens for output in outputs if output.prompt_tokens is not None] == [3]


def sse(*events: Any) -> Callable[[Upstream, web.Request, web.StreamResponse], Awaitable[None]]:
    return write(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n")


def said(text: Any, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """An event of a chat."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish, **more}]}


def thought(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """An event of a chat whose model thinks."""
    return {"choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": finish, **more}]}


def called(*calls: Any, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"tool_calls": list(calls)}, "finish_reason": finish}]}


def part(index: int | None = 0, id: str | None = None, **function: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"function": function}
    return found | ({} if index is None else {"index": index}) | ({} if id is None else {"id": id})


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
