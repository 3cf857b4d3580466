"""A storm in which nothing dies, but one client in ten sends what has broken others' work before.

The others are judged as in any storm, and more strictly: every stream has the attempt it began with, every engine
process is the one that it was, and afterwards no reader is left. What the hostile clients are answered is not judged
where there is no right answer, only that they are answered.

`INPUTS` has what they send; ``python -m tests.chaos --hostile`` runs storms of it (``--kinds`` names some) and tells
what it costs the others between two tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from penstock.core.errors import first_of
from tests.chaos.harness import Outcome, Plan, Reader, Storm
from tests.chaos.report import quantiles
from tests.chaos.target import Embedded
from tests.chaos.upstream import DEFECTS
from tests.support.gguf import bundled_gguf
from tests.support.http import PATIENCE
from tests.support.server import Server, free_port, model, wait_for

#: Slots of the model `few`, which jobs of several choices fill.
FEW = 8
#: Who asks for jobs of eight choices.
EIGHT = "eight"
#: Prompts with the same defect in their replies that are sent at once.
BURST = 6
#: How often each hostile client sends everything.
ROUNDS = 2
#: Half an emoji, as JSON in JSON has it.
HALF = '{"text": "\\ud83d"}'

#: What waits behind a request on its connection.
BEHIND = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

#: Defects behind which a reply can be read all the same, and what it says.
READABLE = {
    "PLAIN-JSON": "1 2 3 4 5 6 ",
    "SPLIT-SURROGATES": "1 \U0001f6004 5 6 ",
    "CONTENT-PARTS": "1 2 3 4 5 6 ",
    "NULL-USAGE": "1 2 3 4 5 6 ",
}

Send = Callable[["Crowd", random.Random], Awaitable[None]]


class Unread(Exception):
    """A reply that could have been read was not."""


class Crowd:
    """The server, its upstream, and what the hostile clients know of them. A context manager."""

    def __init__(self, folder: Path, *, rate: float = 50) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._port = free_port()
        self._upstream: subprocess.Popen[bytes] | None = None
        self.server = Server(
            folder / "server",
            models=[
                model(rate=rate, slots=64),
                model("few", rate=rate, slots=FEW),
                model("up", engine="upstream", path=f"http://127.0.0.1:{self._port}"),
                model("llama", engine="llama", path=str(bundled_gguf(folder)), slots=8, context=1024),
            ],
        )
        self.http = httpx.AsyncClient(
            base_url=self.server.url,
            timeout=PATIENCE,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> Crowd:
        try:
            await asyncio.to_thread(self._start)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        with (self._folder / "upstream.log").open("ab") as log:
            self._upstream = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.upstream", str(self._port)], stdout=log, stderr=log
            )
        wait_for(self._upstream_answers, "the upstream server")
        self.server.start()

    def _upstream_answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self._port}/v1/models", trust_env=False).status_code == 200
        return False

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()
        await asyncio.to_thread(self.server.stop)
        if self._upstream is not None:
            self._upstream.kill()
            self._upstream.wait()

    async def leave(self, requests: bytes, *, answered: bool) -> None:
        """Send *requests* over one connection, and go away: once the first is *answered*, or once it is under way."""
        parts = urlsplit(self.server.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(requests)
        await writer.drain()
        if answered:
            assert b" 200 " in await reader.readline()
        else:
            await asyncio.sleep(0.1)
        writer.transport.abort()

    async def job(self, **body: Any) -> str:
        answer = await self.http.post("/v1/jobs", json={"prompt": "hello", "max_tokens": 20, **body})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])


# ---------------------------------------------------------------------------------------------- what is sent


async def half_a_character_in_a_call(crowd: Crowd, dice: random.Random) -> None:
    """In a past call's arguments, to a template that is rendered for llama.cpp."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": HALF}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {"model": "llama", "messages": messages, "tools": [tool], "max_tokens": 4}
    await crowd.http.post(dice.choice(["/v1/chat/completions", "/tokenize"]), json=body)


def defect(word: str) -> Send:
    """A prompt for which the upstream server's reply has a defect (see upstream.py). What can be read has to arrive."""

    async def ask(crowd: Crowd, stream: bool) -> None:
        body = {"model": "up", "messages": [{"role": "user", "content": word}], "max_tokens": 6, "stream": stream}
        answer = await crowd.http.post("/v1/chat/completions", json=body)
        if word not in READABLE:
            return
        if answer.status_code != 200 or '"error"' in answer.text:
            raise Unread(answer.text[-500:])
        if not stream and (text := answer.json()["choices"][0]["message"]["content"]) != READABLE[word]:
            raise Unread(repr(text))

    async def send(crowd: Crowd, dice: random.Random) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(BURST):
                tasks.create_task(ask(crowd, number % 2 > 0))

    return send


async def head_with_another_behind_it(crowd: Crowd, dice: random.Random) -> None:
    """HEAD of an event route with the next request already sent, then gone. One of the two streams has no end."""
    for path in (f"/v1/jobs/{await crowd.job()}/events", "/v1/events?user_id=hostile"):
        await crowd.leave(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n{BEHIND}".encode(), answered=True)


async def stream_with_another_behind_it(crowd: Crowd, dice: random.Random) -> None:
    path = "/v1/events?user_id=hostile"
    await crowd.leave(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n{BEHIND}".encode(), answered=True)


async def reply_with_another_behind_it(crowd: Crowd, dice: random.Random) -> None:
    """A JSON reply that nobody waits for any more, with the next request already sent: its job has to be cancelled."""
    body = '{"model": "synthetic", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 100000}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    await crowd.leave(f"{head}{body}{BEHIND}".encode(), answered=False)


async def eight_choices(crowd: Crowd, dice: random.Random) -> None:
    """Jobs that are as many sequences as their model has slots, several at once."""
    for _ in range(3):
        await crowd.job(model="few", n=FEW, max_tokens=20, user_id=EIGHT)


INPUTS: Mapping[str, Send] = {
    "half-a-character": half_a_character_in_a_call,
    **{f"upstream-{word.lower()}": defect(word) for word in DEFECTS},
    "head-pipelined": head_with_another_behind_it,
    "stream-pipelined": stream_with_another_behind_it,
    "reply-pipelined": reply_with_another_behind_it,
    "eight-choices": eight_choices,
}


# ---------------------------------------------------------------------------------------------- the storm


class Calm(Embedded):
    """Nothing is struck. Afterwards nothing waits or runs, nobody reads, and every engine process is the one it was."""

    def __init__(self, crowd: Crowd) -> None:
        super().__init__(crowd.server)
        self._crowd = crowd
        self._engines = crowd.server.engine_pids()

    def fallen(self) -> list[str]:
        dead = set(self._engines) - set(self.server.engine_pids())
        return [*super().fallen(), *([f"{len(dead)} engine processes died"] if dead else [])]

    async def leftovers(self) -> list[str]:
        look = {"unfinished": self._unfinished, "readers": self._readers}
        for _ in range(400):
            left = {name: found for name, each in look.items() if (found := await each())}
            if not left:
                return []
            await asyncio.sleep(0.05)
        return [f"left over: {left}"]

    async def _unfinished(self) -> list[str]:
        jobs = (await self._crowd.http.get("/v1/jobs", params={"limit": 500})).json()["data"]
        return [f"{job['id']} {job['status']}" for job in jobs if job["status"] in ("queued", "running")]

    async def _readers(self) -> list[str]:
        lines = (await self._crowd.http.get("/metrics")).text.splitlines()
        return [line for line in lines if line.startswith("llm_sse_connections") and not line.endswith(" 0.0")]


async def storm(
    crowd: Crowd, plan: Plan, inputs: Sequence[str], on_progress: Callable[[int, int], None] | None = None
) -> Outcome:
    """Ordinary streams on every model, first alone, then beside hostile clients that send *inputs*.

    The outcome is that of the second (of the first if that broke a promise); its `gaps` are the others', without
    and with them, on each model.
    """
    models = itertools.cycle(["synthetic", "synthetic", "up", "llama", "few"])
    bodies = [_body(next(models), plan) for _ in range(plan.streams)]
    alone = Storm(Calm(crowd), replace(plan, drops=0), on_progress=on_progress)
    outcome = await alone.run(bodies)
    if outcome.problems:
        return outcome
    beside = Storm(
        Calm(crowd),
        replace(plan, drops=0),
        on_progress=on_progress,
        beside=lambda: _annoy(crowd, plan, inputs),
    )
    outcome = await beside.run(bodies)
    if outcome.attempts > 1:
        outcome.problems.append(f"a stream had to be begun {outcome.attempts} times")
    outcome.faults.update(dict.fromkeys(inputs, ROUNDS * max(1, plan.streams // 10)))
    for of in ("synthetic", "up", "llama", "few"):
        outcome.gaps[of] = [_gap([r for r in each.readers if r.body["model"] == of]) for each in (alone, beside)]
    return outcome


def _body(of: str, plan: Plan) -> dict[str, Any]:
    body: dict[str, Any] = {"model": of, "max_tokens": plan.tokens}
    if of in ("up", "llama"):
        return {
            **body,
            "messages": [{"role": "user", "content": "hello"}],
            **({"ignore_eos": True} if of == "llama" else {}),
        }
    return {**body, "prompt": plan.prompt}


def _gap(readers: Sequence[Reader]) -> float:
    gaps = [later - earlier for reader in readers for (earlier, _), (later, _) in itertools.pairwise(reader.arrivals)]
    found = quantiles(gaps)
    return found["p99"] if found else 0.0


async def _annoy(crowd: Crowd, plan: Plan, inputs: Sequence[str]) -> list[str]:
    """One hostile client for ten others; each sends everything, in an order of its own. What was not answered."""
    found: list[str] = []

    async def client(seed: int) -> None:
        dice = random.Random(seed)
        for name in (name for _ in range(ROUNDS) for name in dice.sample(list(inputs), len(inputs))):
            try:
                await INPUTS[name](crowd, dice)
            except* (httpx.TransportError, OSError, Unread) as group:
                found.append(f"{name}: {first_of(group)!r}")

    async with asyncio.TaskGroup() as watching:
        watch = watching.create_task(_watch_slots(crowd, found))
        async with asyncio.TaskGroup() as clients:
            for number in range(max(1, plan.streams // 10)):
                clients.create_task(client(plan.seed + number))
        watch.cancel()
    return found


async def _watch_slots(crowd: Crowd, found: list[str]) -> None:
    """Until it is more than there are slots: the choices that run at once on the model `few`."""
    running = 0
    while running <= FEW:
        query = {"status": "running", "model": "few", "limit": 100}
        jobs = (await crowd.http.get("/v1/jobs", params=query)).json()["data"]
        running = sum(FEW if job["user_id"] == EIGHT else 1 for job in jobs)
        await asyncio.sleep(0.02)
    found.append(f"{running} sequences run on {FEW} slots")
