"""The replicas behind one model: which is up, which is free, and what to do with one that fails."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Collection

import aiohttp
import msgspec

from penstock.core.errors import ModelLoadError
from penstock.engines.upstream.dialects import DIALECTS, OWNERS, Dialect, ModelCard, describe, read_models
from penstock.engines.upstream.options import Address, Options

#: Failed requests in a row after which a replica gets none for a while.
TRIP = 3
#: Seconds of that while: doubled with every further failure.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: Seconds between two health checks of a replica that is up.
HEALTH_INTERVAL = 5.0
#: Seconds that a probe may take, once connected.
PROBE_TIMEOUT = 10.0
#: Bytes of an answer that is not a stream.
MAX_ANSWER = 1 << 20


class Unreachable(Exception):
    """A probe failed; with what a person should know."""


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row: exponential, with full jitter."""
    return random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** max(0, failures - 1)))


class Replica:
    """One server. ``dialect`` is None until it has answered for the first time.

    Two things keep requests from it: it is ``down`` (it cannot be reached; health checks find out when it can), or its
    circuit is open: requests failed `TRIP` times in a row, whatever health checks say, and then a single one at a time
    tries whether they still do.
    """

    def __init__(self, address: Address, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self.dialect: Dialect | None = None
        self.model = ""
        self.limit_field = "max_tokens"
        """What its chat calls the limit: OpenAI's newer models want ``max_completion_tokens``, and say so."""
        self.card: ModelCard | None = None
        self.streams = 0
        self.failures = 0
        self.down = False
        self.heard_at = 0.0
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
        self.heard_at = self._clock()
        if self.failures:
            if self.open:
                self._say("is back")
            self.failures = 0

    def failed(self, why: str) -> None:
        """A request was not."""
        self.failures += 1
        if self.open:
            # Not less than half of it: the pause is for the server to recover, not to spread requests.
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(16, self.failures - TRIP))
            self._shut_until = self._clock() + pause * random.uniform(0.5, 1)
            if self.failures == TRIP:
                self._say(f"is out of service: {why}")

    def lost(self, why: str) -> None:
        """It cannot be reached."""
        if not self.down:
            self.down = True
            self._say(f"is down: {why}")

    def found(self) -> None:
        """It answered a health check."""
        self.heard_at = self._clock()
        if self.down:
            self.down = False
            self.failures = 0
            self._say("is up again")

    def busy(self, seconds: float) -> None:
        """It asked not to be asked for so long."""
        self._busy_until = self._clock() + seconds

    def wait(self) -> float:
        """Seconds until it may have a request, by what is known now."""
        return max(0.0, self._busy_until - self._clock(), self._shut_until - self._clock() if self.open else 0.0)

    def _say(self, what: str) -> None:
        print(f"upstream {self.address} {what}", file=sys.stderr, flush=True)


class Replicas:
    """Chooses among the replicas, and looks after them."""

    def __init__(self, replicas: list[Replica], session: aiohttp.ClientSession, name: str, options: Options) -> None:
        self.all = replicas
        self._session = session
        self._name = name
        self._options = options

    def choose(self, without: Collection[Replica] = ()) -> Replica | None:
        """The least loaded of those that may have a request, but none of *without*."""
        free = [each for each in self.all if each not in without and each.available()]
        return min(free, key=lambda each: (each.failures, each.streams, random.random()), default=None)

    def pause(self) -> float:
        """Seconds until one of those that are up may have a request."""
        return min((each.wait() for each in self.all if not each.down), default=0.0)

    # ---------------------------------------------------------------------------- probes

    async def load(self, progress: Callable[[str], None]) -> list[Replica]:
        """Probe all of them; those that answer. Raises `ModelLoadError` when none does, or one can never be used."""
        progress(f"asking {describe([str(each.address) for each in self.all])}")
        results = await asyncio.gather(*(self.probe(each) for each in self.all), return_exceptions=True)
        reasons = []
        for replica, result in zip(self.all, results, strict=True):
            if isinstance(result, Unreachable):
                replica.down = True
                reasons.append(f"{replica.address}: {result}")
            elif isinstance(result, BaseException):
                raise result
        if len(reasons) == len(self.all):
            raise ModelLoadError(
                f"No upstream server of {self._name!r} answers ({'; '.join(reasons)}). Start it, or correct the "
                "address in --model NAME=URL."
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
            except msgspec.MsgspecError:
                raise ModelLoadError(
                    f"{replica.address.api}/models does not answer as an OpenAI-compatible server does."
                ) from None
        self._settle_model(replica, cards)
        dialect = self._options.dialect
        if dialect == "auto":
            owners = {OWNERS.get(card.owned_by, "") for card in cards[:1]}
            dialect = next(iter(owners), "") or await self._recognise(replica)
        replica.dialect = DIALECTS[dialect]
        replica.found()

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
                try:
                    value = msgspec.json.decode(answer)
                except msgspec.MsgspecError:
                    continue
                if isinstance(value, dict) and field in value:
                    return name
        return "openai"

    async def _get(self, url: str) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT, sock_connect=self._options.connect_timeout)
        try:
            async with self._session.get(url, timeout=timeout, allow_redirects=False) as response:
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


async def read_answer(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer that is no stream; what is too long for one is cut off."""
    parts: list[bytes] = []
    while sum(map(len, parts)) < MAX_ANSWER and (part := await response.content.readany()):
        parts.append(part)
    return b"".join(parts)


def reason(error: Exception) -> str:
    """What a transport error says, for people."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect ({error.os_error.strerror or error.os_error})"
    return str(error) or type(error).__name__
