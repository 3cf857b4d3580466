"""The replicas behind one model: which is up, which is free, and what to do with one that fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import aiohttp

from penstock.core.aio import Backoff
from penstock.core.errors import EngineError, ModelLoadError, NoWorker, PenstockError, Unsupported
from penstock.core.foreign import Malformed, decode
from penstock.core.job import Task
from penstock.engines.child import notices
from penstock.engines.upstream.answers import read_vectors
from penstock.engines.upstream.dialects import DIALECTS, OWNERS, ModelCard, ServerDialect, describe, read_models
from penstock.engines.upstream.options import TASKS, ServerAddress, UpstreamOptions
from penstock.engines.upstream.stream import StreamError

#: Failed requests in a row after which a replica gets none for a while.
TRIP = 3
#: Seconds of that while: doubled with every further failure.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: Answers to one request that are no reply, after which it has failed.
GARBLED = 2
#: How many times the rounds that the option retries allows without a token one request may take in all.
BROKEN = 2
#: Seconds between two health checks of a replica that is up.
HEALTH_INTERVAL = 5.0
#: Seconds that a probe may take, once connected.
PROBE_TIMEOUT = 10.0
#: Seconds for the first vector or token that a server is asked for; it may have to load the model for it.
TASK_TIMEOUT = 60.0
#: Bytes of an answer that is an error or a list of models, and of one that is what was asked for.
MAX_ANSWER, MAX_RESULT = 1 << 20, 64 << 20


class Unreachable(Exception):
    """A probe failed; with what a person should know."""


class Broken(Exception):
    """A call came to nothing, or to an end too early; another replica, or the same one later, may do better.

    ``lost``: the server cannot be reached. ``garbled``: it answered, and what it said is no reply. ``retry_after``:
    seconds it asked for (it is well, but busy).
    """

    def __init__(
        self, why: str, *, lost: bool = False, garbled: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(why)
        self.lost = lost
        self.garbled = garbled
        self.retry_after = retry_after


class Unable(Exception):
    """The server is well, and has no route for this; another replica may."""


class Replica:
    """One server. ``dialect`` is None until it has answered for the first time.

    Two things keep requests from it: it is ``down`` (it cannot be reached; health checks find out when it can), or its
    circuit is open: requests failed `TRIP` times in a row, whatever health checks say, and then a single one at a time
    tries whether they still do.
    """

    def __init__(self, address: ServerAddress, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self.dialect: ServerDialect | None = None
        self.model = ""
        self.limit_field = "max_tokens"
        """What its chat calls the limit: OpenAI's newer models want ``max_completion_tokens``, and say so."""
        self.floats = False
        """Does it give vectors as numbers only?"""
        self.card: ModelCard | None = None
        self.tasks: tuple[Task, ...] = ()
        """What it can do, once this is known."""
        self.dimensions = 0
        """Of a vector; 0: not known."""
        self.streams = 0
        self.failures = 0
        self.down = False
        self.on_change: Callable[[], None] = lambda: None
        """Is called when it went down, or came up again."""
        self._clock = clock
        self._shut_until = 0.0
        self._busy_until = 0.0
        self._trial = False

    @property
    def open(self) -> bool:
        """Is the circuit open?"""
        return self.failures >= TRIP

    def available(self) -> bool:
        """May it have a request now?"""
        now = self._clock()
        if self.dialect is None or self.down or now < self._busy_until:
            return False
        return not self.open or (now >= self._shut_until and not self._trial)

    def begin(self) -> None:
        self.streams += 1
        self._trial = self.open

    def end(self) -> None:
        self.streams -= 1
        self._trial = False

    def succeeded(self) -> None:
        """A request was answered."""
        if self.failures:
            if self.open:
                self.notify("back")
            self.failures = 0

    def failed(self, why: str) -> None:
        """A request was not."""
        self.failures += 1
        if self.open:
            # Not less than half of it: the pause is for the server to recover, not to spread requests.
            pauses = Backoff(FIRST_PAUSE, LONGEST_PAUSE, jitter=0.5)
            self._shut_until = self._clock() + pauses.after(self.failures - TRIP + 1)
            if self.failures == TRIP:
                self.notify("resting", why)

    def lost(self, why: str) -> None:
        """It cannot be reached."""
        if not self.down:
            self.down = True
            self.notify("down", why)
            self.on_change()

    def found(self) -> None:
        """It answered a health check."""
        if self.down:
            self.down = False
            self.failures = 0
            self.notify("up")
            self.on_change()

    def busy(self, seconds: float) -> None:
        """It asked not to be asked for so long."""
        self._busy_until = self._clock() + seconds

    def wait(self) -> float:
        """Seconds until it may have a request, by what is known now."""
        return max(0.0, self._busy_until - self._clock(), self._shut_until - self._clock() if self.open else 0.0)

    def notify(self, what: str, error: str | None = None) -> None:
        """For the operator: what happened to it, and how it went wrong."""
        facts = {"replica": str(self.address)} | ({} if error is None else {"error": error})
        notices.notify(f"replica.{what}", **facts)


class Replicas:
    """Chooses among the replicas, and looks after them."""

    def __init__(
        self, replicas: list[Replica], session: aiohttp.ClientSession, name: str, options: UpstreamOptions
    ) -> None:
        self.all = replicas
        self._session = session
        self._name = name
        self._options = options
        self._secret = options.secret
        self.retries = options.retries

    @property
    def up(self) -> list[Replica]:
        """Those that can be reached, as far as is known."""
        return [each for each in self.all if each.dialect is not None and not each.down]

    def able(self, task: Task) -> list[Replica]:
        """Those that can do *task*, whether they are up or not."""
        return [each for each in self.all if task in each.tasks]

    def choose(self, task: Task, without: Collection[Replica] = ()) -> Replica | None:
        """The least loaded of those that may have a request to do *task*, but none of *without*."""
        free = [each for each in self.able(task) if each not in without and each.available()]
        return min(free, key=lambda each: (each.failures, each.streams, random.random()), default=None)

    def pause(self) -> float:
        """Seconds until one of those that are up may have a request."""
        return min((each.wait() for each in self.all if not each.down), default=0.0)

    def for_clients(self, text: str) -> str:
        """*text* of a server, or about one, which may quote the key, or name hosts that are nobody else's business."""
        for private in (self._secret, *(each.address.host for each in self.all)):
            text = text.replace(private, "***") if private else text
        return text

    # ---------------------------------------------------------------------------- probes

    async def load(self, progress: Callable[[str], None]) -> list[Replica]:
        """Probe all of them; those that answer. Raises `ModelLoadError` when none does, or one can never be used."""
        progress(f"asking {describe([str(each.address) for each in self.all])}")
        results = await asyncio.gather(*(self.probe(each) for each in self.all), return_exceptions=True)
        reasons = []
        for replica, result in zip(self.all, results, strict=True):
            if isinstance(result, Unreachable):
                replica.down = True
                replica.notify("down", f"it does not answer: {result}")
                reasons.append(str(result))
            elif isinstance(result, ModelLoadError):
                replica.notify("refused", str(result))
                raise ModelLoadError(self.for_clients(result.message))
            elif isinstance(result, BaseException):
                raise result
        if len(reasons) == len(self.all):
            why = self.for_clients("; ".join(dict.fromkeys(reasons)))
            raise ModelLoadError(
                f"No upstream server of {self._name!r} answers ({why}). Start it, or correct the address in --model "
                "NAME=URL."
            )
        for reason in reasons:
            progress(f"warning: {reason}")
        return [each for each in self.all if each.dialect is not None]

    async def probe(self, replica: Replica) -> None:
        """Learn what a replica is and what it calls the model. Raises `Unreachable`, `ModelLoadError`."""
        status, answer = await self._get(f"{replica.address.api}/models")
        if status in (401, 403):
            raise ModelLoadError(f"{replica.address} refuses the key (HTTP {status}): see the options key_env and key.")
        if status >= 500 or status == 429:
            raise Unreachable(f"HTTP {status}")
        if 300 <= status < 400:
            raise ModelLoadError(f"{replica.address} redirects (HTTP {status}): give the address it redirects to.")
        cards: list[ModelCard] = []
        if status == 200:
            try:
                cards = read_models(answer)
            except Malformed:
                raise ModelLoadError(
                    f"{replica.address.api}/models does not answer as an OpenAI-compatible server does."
                ) from None
        self._settle_model(replica, cards)
        dialect: str = self._options.dialect
        if dialect == "auto":
            owners = {OWNERS.get(card.owned_by, "") for card in cards[:1]}
            dialect = next(iter(owners), "") or await self._recognise(replica)
        away = replica.dialect is None or replica.down  # it may have come back as another
        replica.dialect = DIALECTS[dialect]
        replica.found()
        await self._settle_tasks(replica, replica.dialect, ask=away)

    def _settle_model(self, replica: Replica, cards: list[ModelCard]) -> None:
        wanted = self._options.model or self._name
        known = {card.id: card for card in cards}
        if wanted not in known and len(cards) == 1 and not self._options.model:
            wanted = cards[0].id  # it has one model, whatever it is called
        if cards and wanted not in known:
            raise ModelLoadError(
                f"{replica.address} has no model {wanted!r}. It has {describe(sorted(known))}: say which with --option "
                "model=…"
            )
        replica.model = wanted
        replica.card = known.get(wanted)

    async def _recognise(self, replica: Replica) -> str:
        """By what only one kind of server answers."""
        for path, field, name in (("/version", "version", "vllm"), ("/props", "default_generation_settings", "llama")):
            status, answer = await self._get(replica.address.root + path)
            if status == 200:
                with contextlib.suppress(Malformed):
                    if field in decode(answer, dict[str, Any]):
                        return name
        return "openai"

    # ---------------------------------------------------------------------------- what a server can do

    async def _settle_tasks(self, replica: Replica, dialect: ServerDialect, *, ask: bool) -> None:
        """What the operator says, or the server: its card, or (*ask*) its answers to one small request each.

        Servers that embed do nothing else at vLLM and llama.cpp; others are asked for a token as well. Where an answer
        says neither yes nor no, it stays as it was, at first: it generates.
        """
        if stated := self._options.stated_tasks:
            replica.tasks = stated
        elif dialect.name == "penstock":
            card = replica.card
            replica.tasks = (card and card.tasks) or TASKS  # until it has loaded the model, it refuses for itself
            replica.dimensions = card.dimensions if card else 0
        elif ask:
            before: tuple[Task, ...] = replica.tasks or ("generate",)
            embeds, tokenizes = await asyncio.gather(self._embeds(replica), self._tokenizes(replica, dialect))
            generates: bool | None = not embeds
            if embeds and dialect.name == "openai":
                generates = await self._generates(replica)
            scores = generates and dialect.scores
            answers = {"generate": generates, "embed": embeds, "tokenize": tokenizes, "score": scores}
            replica.tasks = tuple(
                task for task in TASKS if (task in before if answers[task] is None else answers[task])
            )

    async def _embeds(self, replica: Replica) -> bool | None:
        sent = {"model": replica.model, "input": ["x"]}
        able, answer = await self._can(replica, f"{replica.address.api}/embeddings", sent)
        if able:
            try:
                _, replica.dimensions, _ = read_vectors(answer, 1)
            except StreamError:
                return False
        return able

    async def _tokenizes(self, replica: Replica, dialect: ServerDialect) -> bool | None:
        field = "content" if dialect.name == "llama" else "prompt"
        able, answer = await self._can(
            replica, f"{replica.address.root}/tokenize", {"model": replica.model, field: "x"}
        )
        return able and b'"tokens"' in answer

    async def _generates(self, replica: Replica) -> bool | None:
        sent = {"model": replica.model, "max_tokens": 1}
        able, _ = await self._can(
            replica, f"{replica.address.api}/chat/completions", sent | {"messages": [{"role": "user", "content": "x"}]}
        )
        if able is False:
            able, _ = await self._can(replica, f"{replica.address.api}/completions", sent | {"prompt": "x"})
        return able

    async def _can(self, replica: Replica, url: str, sent: dict[str, Any]) -> tuple[bool | None, bytes]:
        """Does the server do what it is asked, and its answer. None: it cannot be told now."""
        try:
            status, answer = await self._fetch("POST", url, TASK_TIMEOUT, sent)
        except Unreachable as error:
            why = str(error)
        else:
            if status == 200:
                return True, answer
            if status not in (408, 425, 429) and (status < 500 or status == 501):
                return False, b""
            why = f"HTTP {status}"
        route = url.removeprefix(replica.address.root)
        replica.notify("unclear", f"it does not tell whether it has {route} ({why}): see the option tasks")
        return None, b""

    # ---------------------------------------------------------------------------- calls

    async def _get(self, url: str) -> tuple[int, bytes]:
        return await self._fetch("GET", url, PROBE_TIMEOUT)

    async def _fetch(
        self, method: str, url: str, seconds: float, sent: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=self._options.connect_timeout)
        try:
            async with self._session.request(
                method, url, json=sent, timeout=timeout, allow_redirects=False
            ) as response:
                return response.status, await read_answer(response)
        except TimeoutError:
            raise Unreachable("no answer in time") from None
        except aiohttp.ClientError as error:
            raise Unreachable(reason(error)) from None

    async def watch(self) -> None:
        """Health checks, for ever."""
        await asyncio.gather(*(self._watch(replica) for replica in self.all))

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.8, 1.2) * (FIRST_PAUSE if replica.down else HEALTH_INTERVAL))
            try:
                await self.probe(replica)
            except (Unreachable, ModelLoadError) as error:
                replica.lost(str(error))


class Faults:
    """What went wrong with the calls for one request, over all its *choices*. It bounds what they may cost."""

    def __init__(self, choices: int = 1) -> None:
        self.choices = choices
        self.broken = 0
        self.garbled = 0


class Tries:
    """The calls that one piece of work takes, on one replica after another, until one succeeds.

    A request ends that was answered twice with what is no reply (`GARBLED`): asking again does not cure that, and may
    cost money. One whose calls break off goes back to the queue after `BROKEN` times the rounds that it may take
    without a token, however far each call came.
    """

    def __init__(self, replicas: Replicas, task: Task, faults: Faults | None = None) -> None:
        self._replicas = replicas
        self._task = task
        self._faults = faults or Faults()
        self._pauses = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._failed: set[Replica] = set()
        self._unable: set[Replica] = set()
        self._why = "none that can is up"

    async def next(self) -> Replica:
        """Who is called next, after a pause where one is due.

        Raises what is to be tried again from the queue when none can serve, `Unsupported` when none ever can.
        """
        while (replica := self._replicas.choose(self._task, self._failed | self._unable)) is None:
            if self._unable and self._unable.issuperset(self._replicas.able(self._task)):
                raise Unsupported(f"The upstream server cannot {self._task}: {self._why}.", param="model")
            # All have failed, or none may have a request: once more, after a pause.
            if self._pauses.failures == self._replicas.retries:
                raise self._given_up()
            self._failed.clear()
            await asyncio.sleep(max(self._pauses.next(), self._replicas.pause()))
        return replica

    @contextlib.contextmanager
    def on(self, replica: Replica) -> Iterator[None]:
        """Around a call to *replica*: takes in that it came to nothing."""
        replica.begin()
        try:
            yield
        except (Broken, Unable) as error:
            why = self._why = self._replicas.for_clients(str(error))
            if isinstance(error, Unable):
                self._unable.add(replica)
                return
            self._failed.add(replica)
            if error.garbled:  # whether another request fares better is not known from this one
                replica.notify("garbled", why)
                self._faults.garbled += 1
                if self._faults.garbled >= GARBLED:
                    raise EngineError(f"The upstream server answers what cannot be read: {why}.") from None
                return
            self._faults.broken += 1
            if error.retry_after is not None:
                replica.busy(error.retry_after)
            else:
                replica.failed(why)
                if error.lost:
                    replica.lost(why)
        finally:
            replica.end()
        rounds = BROKEN * (1 + self._replicas.retries)
        if self._faults.broken >= rounds * len(self._replicas.all) * self._faults.choices:
            raise self._given_up()

    def _given_up(self) -> PenstockError:
        kind = EngineError if self._replicas.up else NoWorker
        error = kind(f"No upstream server can serve this: {self._why}.")
        error.retryable = True
        return error

    def progressed(self) -> None:
        """Something came before it broke: retries are for those who get nothing."""
        self._pauses.reset()


async def read_answer(response: aiohttp.ClientResponse, most: int = MAX_ANSWER) -> bytes:
    """The body of an answer that is no stream; what is longer than *most* is cut off."""
    parts: list[bytes] = []
    while sum(map(len, parts)) < most and (part := await response.content.readany()):
        parts.append(part)
    return b"".join(parts)


def reason(error: Exception) -> str:
    """What a transport error says, for people."""
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno  # its text has the address
        return f"cannot connect ({os.strerror(number) if number else type(error.os_error).__name__})"
    return str(error) or type(error).__name__
