"""A storm and its judge: many streams, faults at seeded moments, and every stream checked by the oracle.

Faults are the target's own (see `target.py` and `fleet.py`), and ``clients``: every connection is dropped at once,
and all come back together. Readers also drop their connection at random and whenever it is taken away, and come back to
any of the target's addresses with their last event id. Faults come after a seeded number of tokens, not after a time,
so that the same seed hurts at about the same places on any machine. Time is measured (`Recovery`), and judges nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from penstock.testing.oracle import Token, problems, tokens_of, view_problems
from tests.chaos.target import Strike, Target
from tests.support.http import send
from tests.support.sse import Event, Stream, open_stream

#: Seconds without any progress after which a storm is given up (a stuck job is a finding, not a reason to wait).
PATIENCE = 60.0

#: Seconds without a token after which a paced stream counts as silent.
SILENCE = 0.3

Says = Callable[[dict[str, Any], Sequence[Token], dict[str, Any]], list[str]]
"""Judges a reply: the request's body, the tokens that a reader saw, the job as it is told at the end → problems."""

BROKEN = (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError)
"""How a connection to a dying server may end (the last: half a chunk's length)."""


@dataclass(frozen=True)
class Plan:
    """What a storm does. ``faults`` happen in this order."""

    seed: int
    streams: int = 50
    tokens: int = 150
    faults: Sequence[str] = ("kill", "kill")
    drops: float = 0.3
    """Connections that a reader drops by itself, per stream and on average."""
    twins: float = 0.0
    """The part of the streams that two readers follow at the same time."""
    cancels: float = 0.0
    """The part of the streams that are cancelled on the way."""
    every: int = 0
    """Tokens (of all streams together) between two faults, on average; new streams take the place of those that end,
    until the last fault is over. 0: the faults are spread over the streams there are at the beginning."""
    overlap: int = 1
    """Faults that may go on at once. With 1, each waits until the streams flow again, and recovery is measured."""
    prompt: str = "hello"


@dataclass
class Reader:
    """One client: submits its job under a key, follows it to the end whatever happens, keeps all it saw."""

    key: str
    body: dict[str, Any]
    cancel_after: int | None = None
    job: str = ""
    submitted: asyncio.Event = field(default_factory=asyncio.Event)
    events: list[Event] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When each event came, and of which attempt it is."""
    connections: int = 0
    stream: Stream | None = None
    cancelled: bool = False

    @property
    def last_id(self) -> str | None:
        return next((event.id for event in reversed(self.events) if event.id is not None), None)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].event in ("done", "error")


@dataclass(frozen=True)
class Recovery:
    """One stream that one fault hit: seconds from the fault (or from the repair, see `Strike.since`) to the next token,
    and how long its reader saw nothing."""

    fault: str
    seconds: float
    pause: float


@dataclass
class Outcome:
    """What came of it."""

    seed: int
    overlap: int = 1
    measured: bool = False
    """Are there `recoveries`?"""
    streams: int = 0
    tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    """Faults that found nothing to hit."""
    reconnects: int = 0
    attempts: int = 0
    interrupted: int = 0
    """Streams that went on under a later attempt: those that a fault really hit."""
    statuses: Counter[str] = field(default_factory=Counter)
    recoveries: list[Recovery] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    """What else the target counted."""
    gaps: dict[str, list[float]] = field(default_factory=dict)
    """The 99th percentile of seconds between two tokens of a stream, by model: alone, and beside hostile clients."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "faults": dict(self.faults),
            "missed": dict(self.missed),
            "statuses": dict(self.statuses),
            "recoveries": [asdict(each) for each in self.recoveries],
            "strikes": [asdict(each) for each in self.strikes],
        }


class Storm:
    def __init__(
        self,
        target: Target,
        plan: Plan,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        beside: Callable[[], Awaitable[list[str]]] | None = None,
        says: Says | None = None,
    ) -> None:
        """*beside*: what else goes on meanwhile; new streams take the place of those that end until it is through. What
        it returns are problems. *says*: what a reply must be (default: `positions`)."""
        self.target = target
        self._beside = beside
        self._says = says or positions
        self._given = False
        self.plan = plan
        self.dice = random.Random(plan.seed)
        self.outcome = Outcome(plan.seed, plan.overlap, bool(plan.every) and plan.overlap == 1)
        self.readers: list[Reader] = []
        self._on_progress = on_progress or (lambda done, total: None)
        self._seen = 0
        self._progress = asyncio.Event()
        self._over = False
        self._struck = not plan.faults and beside is None
        self._began = 0.0

    async def run(self, bodies: Sequence[dict[str, Any]] | None = None) -> Outcome:
        """Run the storm. *bodies*: one request per stream, and that of those that take its place (default: the
        plan's)."""
        self._given = bodies is not None
        self._began = time.monotonic()
        plan = self.plan
        first = list(bodies) if bodies is not None else [self._body(self.dice) for _ in range(plan.streams)]
        faults = list(
            zip(self._moments(first), plan.faults, [self.dice.randrange(2**32) for _ in plan.faults], strict=True)
        )
        seeds = [self.dice.randrange(2**32) for _ in first]
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(PATIENCE) as self._patience, asyncio.TaskGroup() as self._tasks:
                streaming = [
                    self._tasks.create_task(self._keep_streaming(body, random.Random(seed)))
                    for body, seed in zip(first, seeds, strict=True)
                ]
                self._tasks.create_task(self._strike_all(faults))
                await asyncio.wait(streaming)
                self._over = True
                self._progress.set()
        except TimeoutError:
            missing = [reader.job or reader.key for reader in self.readers if not reader.ended]
            if not self.outcome.problems:
                self.outcome.problems.append(f"no progress for {PATIENCE:.0f} s; not ended: {missing}")
        finally:
            watch.cancel()
        self.outcome.seconds = time.monotonic() - self._began
        if not self.outcome.problems:
            self.outcome.problems += await self.target.leftovers()
            await self._judge()
        return self.outcome

    def _body(self, dice: random.Random) -> dict[str, Any]:
        return {"prompt": self.plan.prompt, "max_tokens": max(1, self.plan.tokens + dice.randint(-20, 20))}

    def _moments(self, bodies: Sequence[dict[str, Any]]) -> list[int]:
        """Fault times as numbers of tokens seen by all readers together."""
        plan = self.plan
        if plan.every:
            return list(
                itertools.accumulate(self.dice.randint(plan.every // 2, plan.every * 3 // 2) for _ in plan.faults)
            )
        total = sum(body["max_tokens"] for body in bodies)
        return sorted(self.dice.randint(total // 20, total * 7 // 10) for _ in plan.faults)

    # ------------------------------------------------------------------------------------ clients

    async def _keep_streaming(self, body: dict[str, Any], dice: random.Random) -> None:
        """One stream; and with `Plan.every` another one after it, until the faults are over."""
        while True:
            await self._stream(body, dice)
            if self._struck or not (self.plan.every or self._beside):
                return
            body = body if self._given else self._body(dice)

    async def _stream(self, body: dict[str, Any], dice: random.Random) -> None:
        """One job and its one or two readers."""
        plan = self.plan
        key = f"storm-{plan.seed}-{len(self.readers)}-{os.urandom(4).hex()}"
        cancel_after = dice.randint(1, plan.tokens) if dice.random() < plan.cancels else None
        reader = Reader(key, body, cancel_after)
        readers = [reader]
        self.readers.append(reader)
        self.outcome.streams += 1
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(reader, random.Random(dice.random())))
            if dice.random() < plan.twins:
                twin = Reader(key, body)
                readers.append(twin)
                self.readers.append(twin)
                tasks.create_task(self._follow(twin, random.Random(dice.random()), reader))

    async def _follow(self, reader: Reader, dice: random.Random, twin: Reader | None = None) -> None:
        if twin is not None:
            await twin.submitted.wait()
            reader.job, reader.cancelled = twin.job, twin.cancel_after is not None
        while not reader.ended:
            with contextlib.suppress(*BROKEN):
                if not reader.job:
                    await self._submit(reader, dice)
                if reader.job:
                    await self._read(reader, dice)
            if not reader.ended:
                await asyncio.sleep(dice.uniform(0.01, 0.1))

    async def _submit(self, reader: Reader, dice: random.Random) -> None:
        """Submit until it is acknowledged: the key makes sending it twice harmless."""
        headers = {"idempotency-key": reader.key}
        url = f"{dice.choice(self.target.urls)}/v1/jobs"
        async with await send(url, "POST", json_body=reader.body, headers=headers) as answer:
            if answer.status == 202:
                reader.job = (await answer.json())["id"]
                reader.submitted.set()
            elif answer.status not in (429, 503):
                raise AssertionError(f"submit: {answer.status} {await answer.body()!r}")

    async def _read(self, reader: Reader, dice: random.Random) -> None:
        """One connection, until it ends or the reader has had enough of it."""
        drops = self.plan.drops
        left = dice.randint(1, int(self.plan.tokens / drops) + 1) if drops else 2**31
        url = f"{dice.choice(self.target.urls)}/v1/jobs/{reader.job}/events"
        async with await open_stream(url, after=reader.last_id) as stream:
            if stream.status != 200:
                body = await stream.answer.body()
                if stream.status in (429, 503):
                    return
                raise AssertionError(f"{reader.job} after {reader.last_id}: {stream.status} {body!r}")
            reader.connections += 1
            reader.stream = stream
            while left > 0 and not reader.ended:
                event = await stream.next(PATIENCE)
                if event is None:
                    return
                self._note(reader, event)
                left -= 1

    def _note(self, reader: Reader, event: Event) -> None:
        reader.events.append(event)
        attempt = event.data.get("attempt") or (reader.arrivals[-1][1] if reader.arrivals else 0)
        reader.arrivals.append((time.monotonic(), attempt))
        self._seen += 1
        self._progress.set()
        self._patience.reschedule(asyncio.get_running_loop().time() + PATIENCE)
        if reader.cancel_after == len(reader.events) and not reader.ended:
            reader.cancelled = True
            self._tasks.create_task(self._cancel(reader))

    async def _cancel(self, reader: Reader) -> None:
        """Cancel until it is acknowledged."""
        while True:
            with contextlib.suppress(*BROKEN):
                url = f"{self.dice.choice(self.target.urls)}/v1/jobs/{reader.job}/cancel"
                async with await send(url, "POST") as answer:
                    if answer.status == 200:
                        return
                    if answer.status not in (429, 503):
                        raise AssertionError(f"cancel: {answer.status} {await answer.body()!r}")
            await asyncio.sleep(0.05)

    # ------------------------------------------------------------------------------------ faults

    async def _strike_all(self, faults: Sequence[tuple[int, str, int]]) -> None:
        free = asyncio.Semaphore(self.plan.overlap)
        async with asyncio.TaskGroup() as tasks:
            for moment, fault, seed in faults:
                while self._seen < moment and not self._over:
                    self._progress.clear()
                    await self._progress.wait()
                await free.acquire()
                await asyncio.sleep(self.dice.uniform(0, 0.02))  # anywhere within a step
                if self._over:
                    break
                strike = tasks.create_task(self._strike(fault, random.Random(seed)))
                strike.add_done_callback(lambda done: free.release())
        if self._beside is not None:
            self.outcome.problems += await self._beside()
        self._struck = True

    async def _strike(self, fault: str, dice: random.Random) -> None:
        flowing = [(reader, len(reader.arrivals)) for reader in self.readers if reader.arrivals and not reader.ended]
        if fault == "clients":
            strike = Strike(fault, "all", time.monotonic(), time.monotonic())
            for reader in self.readers:
                if reader.stream is not None:
                    reader.stream.answer.close()
        else:
            strike = await self.target.strike(fault, dice)
        self.outcome.faults[fault] += 1
        self.outcome.strikes.append(strike)
        if self.outcome.measured:
            await self._calm(strike, [reader for reader, _ in flowing])
            self.outcome.recoveries += self._recoveries(strike, flowing)

    async def _calm(self, strike: Strike, flowing: Sequence[Reader]) -> None:
        """Wait until every stream that flowed before the fault flows again."""

        def flows(reader: Reader) -> bool:
            last, _ = reader.arrivals[-1]
            return reader.ended or (last > strike.since + SILENCE and last > time.monotonic() - SILENCE)

        until = time.monotonic() + PATIENCE
        while still := [reader.job for reader in flowing if not flows(reader)]:
            if time.monotonic() > until:
                self.outcome.problems.append(f"{len(still)} streams stand still since {strike}: {still[:5]}")
                self._patience.reschedule(0)
                return
            await asyncio.sleep(0.02)

    @staticmethod
    def _recoveries(strike: Strike, flowing: Sequence[tuple[Reader, int]]) -> list[Recovery]:
        found = []
        for reader, before in flowing:
            seen = reader.arrivals[before - 1 :]
            gaps = [(later[0], earlier[0]) for earlier, later in itertools.pairwise(seen) if later[0] > strike.at]
            if not gaps:
                continue
            end, begin = max(gaps, key=lambda gap: gap[0] - gap[1])
            if end - begin >= SILENCE or seen[-1][1] > seen[0][1]:
                found.append(Recovery(strike.fault, max(0.0, end - strike.since), end - begin))
        return found

    # ------------------------------------------------------------------------------------ the judge

    async def _watch(self) -> None:
        while True:
            self._on_progress(self._seen, len(self.outcome.strikes))
            if fallen := self.target.fallen():
                self.outcome.problems += fallen
                self._patience.reschedule(0)
                return
            await asyncio.sleep(0.1)

    async def _judge(self) -> None:
        """Every stream on its own, against its twin and the log as it stands now, and against the job."""
        outcome = self.outcome
        by_job: dict[str, list[Reader]] = {}
        for reader in self.readers:
            by_job.setdefault(reader.job, []).append(reader)
        if len(by_job) != outcome.streams:
            outcome.problems.append(f"{outcome.streams} submits made {len(by_job)} jobs")
        url = self.target.urls[0]
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
            for job, readers in by_job.items():
                reply = await http.get(f"/v1/jobs/{job}")
                if reply.status_code != 200:
                    outcome.problems.append(f"{job}: {reply.status_code} {reply.text}")
                    continue
                view = reply.json()
                async with await open_stream(f"{url}/v1/jobs/{job}/events") as stream:
                    log = await stream.rest()
                found = [*problems(log, job=job), *view_problems([log, *(reader.events for reader in readers)])]
                for reader in readers:
                    found += [*problems(reader.events, job=job), *self._reply_problems(reader, view)]
                    outcome.reconnects += max(0, reader.connections - 1)
                outcome.problems += [f"{job}: {problem}" for problem in found]
                attempts = Counter(token.attempt for token in tokens_of(log))
                outcome.tokens += attempts.total()
                outcome.attempts = max(outcome.attempts, view["attempt"])
                outcome.interrupted += len(attempts) > 1
                outcome.statuses[view["status"]] += 1

    def _reply_problems(self, reader: Reader, view: dict[str, Any]) -> list[str]:
        found = []
        if view["status"] == "completed" or (view["status"] == "cancelled" and reader.cancelled):
            found += self._says(reader.body, tokens_of(reader.events), view)
        else:
            found.append(f"it ended {view['status']}: {view['error']}")
        if view["status"] != reader.events[-1].data["status"]:
            found.append(f"the stream ended {reader.events[-1].data['status']}, the job says {view['status']}")
        return found


def positions(body: dict[str, Any], tokens: Sequence[Token], view: dict[str, Any]) -> list[str]:
    """The synthetic engine writes position and attempt into each token: what is delivered must say where it is."""
    found = []
    if body.get("model", "synthetic") in ("synthetic", "few"):
        for token in tokens:
            if token.text != f"{token.position}@{token.attempt} ":
                found.append(f"position {token.position} of attempt {token.attempt} has the text {token.text!r}")
    if view["result"]["text"] != "".join(token.text for token in tokens):
        found.append("the result is not what was streamed")
    expected = body["max_tokens"] if view["status"] == "completed" else len(tokens)
    if view["usage"]["completion_tokens"] != expected:
        found.append(f"{view['usage']['completion_tokens']} tokens instead of {expected}")
    return found
