"""A storm and its judge: many streams, faults at seeded moments, and every stream checked by the oracle.

Faults: ``kill`` (kill -9 of the server, then a restart), ``engine`` (kill -9 of the engine process), ``hang``
(SIGSTOP of the engine process; the watchdog must find it). Readers drop their connection at random and whenever the
server takes it away, and come back with their last event id. Nothing here measures time: a fault comes after a seeded
number of tokens have been seen, so the same seed hurts at about the same places on any machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from penstock.testing.oracle import Token, flatten, problems, view_problems
from tests.support.http import send
from tests.support.server import Server
from tests.support.sse import Event, open_stream

FAULTS = ("kill", "engine", "hang")

#: Seconds without any progress after which a storm is given up (a stuck job is a finding, not a reason to wait).
PATIENCE = 90.0


@dataclass(frozen=True)
class Plan:
    """What a storm does. ``faults`` happen in this order, spread over the expected tokens."""

    seed: int
    streams: int = 50
    tokens: int = 150
    faults: Sequence[str] = ("kill", "kill")
    drops: float = 0.3
    """Connections that a reader drops by itself, per stream and on average."""
    prompt: str = "hello"


@dataclass
class Reader:
    """One client: submits its job under a key, follows it to the end whatever happens, keeps all it saw."""

    key: str
    body: dict[str, Any]
    job: str = ""
    events: list[Event] = field(default_factory=list)
    connections: int = 0

    @property
    def last_id(self) -> str | None:
        return next((event.id for event in reversed(self.events) if event.id is not None), None)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].event in ("done", "error")


@dataclass
class Outcome:
    """What came of it."""

    seed: int
    streams: int
    tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    reconnects: int = 0
    attempts: int = 0
    interrupted: int = 0
    """Streams that went on under a later attempt: those that a fault really hit."""
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "faults": dict(self.faults), "statuses": dict(self.statuses)}


class Storm:
    def __init__(self, server: Server, plan: Plan, *, on_progress: Callable[[int, int], None] | None = None) -> None:
        self.server = server
        self.plan = plan
        self.dice = random.Random(plan.seed)
        self.outcome = Outcome(plan.seed, plan.streams)
        self._on_progress = on_progress or (lambda done, total: None)
        self._seen = 0
        self._up = asyncio.Event()
        self._up.set()
        self._progress = asyncio.Event()
        self._over = False

    async def run(self, bodies: Sequence[dict[str, Any]] | None = None) -> Outcome:
        """Run the storm. *bodies*: one request per reader (default: the plan's)."""
        began = time.monotonic()
        plan = self.plan
        if bodies is None:
            bodies = [
                {"prompt": plan.prompt, "max_tokens": max(1, plan.tokens + self.dice.randint(-20, 20))}
                for _ in range(plan.streams)
            ]
        self.readers = [Reader(f"storm-{plan.seed}-{n}-{os.urandom(4).hex()}", body) for n, body in enumerate(bodies)]
        total = sum(body["max_tokens"] for body in bodies)
        # Fault times as numbers of tokens seen by all readers together, in the middle of the storm.
        moments = sorted(self.dice.randint(total // 20, total * 7 // 10) for _ in plan.faults)
        seeds = [self.dice.randrange(2**32) for _ in self.readers]
        watch = asyncio.create_task(self._watch(total))
        try:
            async with asyncio.timeout(PATIENCE) as self._patience, asyncio.TaskGroup() as tasks:
                following = [
                    tasks.create_task(self._follow(reader, random.Random(seed), plan.drops))
                    for reader, seed in zip(self.readers, seeds, strict=True)
                ]
                tasks.create_task(self._strike(list(zip(moments, plan.faults, strict=True))))
                await asyncio.wait(following)
                self._over = True
                self._progress.set()
        except TimeoutError:
            missing = [reader.job for reader in self.readers if not reader.ended]
            if not self.outcome.problems:
                self.outcome.problems.append(f"no progress for {PATIENCE:.0f} s; not ended: {missing}")
        finally:
            watch.cancel()
        self.outcome.seconds = time.monotonic() - began
        if not self.outcome.problems:
            await self._judge()
        return self.outcome

    # ------------------------------------------------------------------------------------ clients

    async def _follow(self, reader: Reader, dice: random.Random, drops: float) -> None:
        while not reader.ended:
            await self._up.wait()
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                if not reader.job:
                    await self._submit(reader)
                await self._read(reader, dice, drops)
                continue
            await asyncio.sleep(dice.uniform(0.01, 0.1))

    async def _submit(self, reader: Reader) -> None:
        """Submit until it is acknowledged: the key makes sending it twice harmless."""
        headers = {"idempotency-key": reader.key}
        async with await send(f"{self.server.url}/v1/jobs", "POST", json_body=reader.body, headers=headers) as answer:
            if answer.status == 202:
                reader.job = (await answer.json())["id"]
            elif answer.status not in (429, 503):
                raise AssertionError(f"submit: {answer.status} {await answer.body()!r}")

    async def _read(self, reader: Reader, dice: random.Random, drops: float) -> None:
        """One connection, until it ends or the reader has had enough of it."""
        if not reader.job:
            return
        left = dice.randint(1, int(self.plan.tokens / drops) + 1) if drops else 2**31
        url = f"{self.server.url}/v1/jobs/{reader.job}/events"
        async with await open_stream(url, after=reader.last_id) as stream:
            if stream.status != 200:
                body = await stream.answer.body()
                if stream.status in (429, 503):
                    return
                raise AssertionError(f"{reader.job} after {reader.last_id}: {stream.status} {body!r}")
            reader.connections += 1
            while left > 0:
                event = await stream.next(PATIENCE)
                if event is None:
                    return
                reader.events.append(event)
                left -= 1
                self._seen += 1
                self._progress.set()
                self._patience.reschedule(asyncio.get_running_loop().time() + PATIENCE)
                if reader.ended:
                    return

    # ------------------------------------------------------------------------------------ faults

    async def _strike(self, moments: list[tuple[int, str]]) -> None:
        for moment, fault in moments:
            while self._seen < moment and not self._over:
                self._progress.clear()
                await self._progress.wait()
            await asyncio.sleep(self.dice.uniform(0, 0.02))  # anywhere within a step
            if self._over:
                return
            await self._do(fault)
            self.outcome.faults[fault] += 1

    async def _do(self, fault: str) -> None:
        if fault == "kill":
            self._up.clear()
            await asyncio.to_thread(self.server.kill9)
            await asyncio.to_thread(self.server.restart)
            self._up.set()
            return
        engine = await asyncio.to_thread(self.server.engine_pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL if fault == "engine" else signal.SIGSTOP)
        # The next fault must meet a new engine, not the one that is just dying.
        await asyncio.to_thread(self._await_new_engine, engine)

    def _await_new_engine(self, old: int) -> None:
        until = time.monotonic() + PATIENCE
        process = self.server.process
        while [pid for pid in self.server.engine_pids() if pid != old] == []:
            if process is None or process.poll() is not None:
                return  # `_watch` tells
            if time.monotonic() > until:
                self.outcome.problems.append("no new engine was started")
                return
            time.sleep(0.02)

    # ------------------------------------------------------------------------------------ the judge

    async def _watch(self, total: int) -> None:
        while True:
            self._on_progress(self._seen, total + len(self.readers))
            process = self.server.process
            if self._up.is_set() and process is not None and process.poll() is not None:
                self.outcome.problems.append(f"the server exited with {process.returncode} by itself")
                self._patience.reschedule(0)
                return
            await asyncio.sleep(0.1)

    async def _judge(self) -> None:
        """Every stream on its own, against the log as it stands now, and against the job."""
        outcome = self.outcome
        jobs = [reader.job for reader in self.readers]
        if len(set(jobs)) != len(jobs):
            outcome.problems.append("two readers share a job")
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60, trust_env=False) as http:
            for reader in self.readers:
                if not reader.ended:
                    continue
                async with await open_stream(f"{self.server.url}/v1/jobs/{reader.job}/events") as stream:
                    log = await stream.rest()
                view = (await http.get(f"/v1/jobs/{reader.job}")).json()
                found = [
                    *problems(reader.events, job=reader.job),
                    *problems(log, job=reader.job),
                    *view_problems([reader.events, log]),
                    *self._text_problems(reader, view),
                ]
                outcome.problems += [f"{reader.job}: {problem}" for problem in found]
                tokens = [item for item in flatten(reader.events) if isinstance(item, Token)]
                attempts = {token.attempt for token in tokens}
                outcome.tokens += len(tokens)
                outcome.reconnects += max(0, reader.connections - 1)
                outcome.attempts = max(outcome.attempts, view["attempt"])
                outcome.interrupted += len(attempts) > 1
                outcome.statuses[view["status"]] += 1

    def _text_problems(self, reader: Reader, view: dict[str, Any]) -> list[str]:
        """The synthetic engine writes position and attempt into each token: what is delivered must say where it is."""
        found = []
        for token in flatten(reader.events):
            if isinstance(token, Token) and token.text != f"{token.position}@{token.attempt} ":
                found.append(f"position {token.position} of attempt {token.attempt} has the text {token.text!r}")
        if view["status"] == "completed":
            text = "".join(token.text for token in flatten(reader.events) if isinstance(token, Token))
            if view["result"]["text"] != text:
                found.append("the result is not what was streamed")
            if view["usage"]["completion_tokens"] != reader.body["max_tokens"]:
                found.append(f"{view['usage']['completion_tokens']} tokens instead of {reader.body['max_tokens']}")
        else:
            found.append(f"it ended {view['status']}: {view['error']}")
        if view["status"] != reader.events[-1].data["status"]:
            found.append(f"the stream ended {reader.events[-1].data['status']}, the job says {view['status']}")
        return found
