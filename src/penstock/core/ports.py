"""The seams. Everything else in the package talks to these, never to a concrete broker or engine."""

from __future__ import annotations

import enum
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Sequence
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from penstock.core.errors import ErrorInfo, Unsupported
from penstock.core.events import Event, Logprob, TokenPhase, Tokens, joined_phases
from penstock.core.job import Job, Priority, Request, Status, Task

#: How much faster or slower than real time a clock runs that was set wrong: an hour takes twenty.
SLEW = 0.05


class Clock(Protocol):
    """Where time comes from; injected so that one contract test runs on every backend without sleeping."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...


class SystemClock:
    """The wall clock without its jumps: when somebody sets that, this one runs a little faster or slower until they
    agree again. What lies between two times of a process is what has passed, also while the machine slept."""

    def __init__(self) -> None:
        self._latest = (_steady(), time.time())

    def now(self) -> float:
        then, told = self._latest
        at = _steady()
        passed = at - then
        behind = time.time() - (told + passed)
        now = told + passed + max(-SLEW * passed, min(SLEW * passed, behind))
        self._latest = (at, now)
        return now


def _steady() -> float:
    """Seconds that nobody sets. Python's own monotonic clock stops on some systems while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # Linux
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_MONOTONIC"):  # macOS
        return time.clock_gettime(time.CLOCK_MONOTONIC)
    return time.monotonic()


def elapsed(earlier: float, later: float) -> float:
    """Seconds between two times of a job, never negative: different processes may have written them, by clocks that
    disagree."""
    return max(0.0, later - earlier)


# ---------------------------------------------------------------------------------------------- broker


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of a model that it serves."""

    name: str
    engine: str
    context_length: int
    parent: str = ""
    """The model whose weights it changes a little, where it is a LoRA adapter of one."""
    precision: str = ""
    deterministic: bool = False
    """Greedy replies are the same alone, in any batch and after a resume."""
    vocab_size: int = 0
    chat: bool = True
    no_chat: str = ""
    """Why it cannot chat, where it is not that it has no chat template."""
    unsupported: tuple[str, ...] = ()
    """Request fields this model's engine cannot honour; asking for one is a 400 ``unsupported``."""
    tasks: tuple[Task, ...] = ("generate",)
    dimensions: int = 0
    """Of a vector, where it embeds and this is known."""
    away: str = ""
    """Why it cannot serve right now, though its engine is up: what is behind that does not answer. For clients too."""
    tool_format: str = ""
    """How it writes calls, by its family's name; empty where it has none of its own."""
    reasoning_format: str = ""
    """How it marks its thoughts; empty where it has none."""

    def may(self, task: Task) -> bool:
        """Can it be asked for *task*? Of a model that was never loaded (``context_length`` 0) nobody knows."""
        return not self.context_length or task in self.tasks

    def check(self, request: Request) -> None:
        """Raise `Unsupported` for what this model's engine cannot honour."""
        if not self.may(request.task):
            raise Unsupported(f"{self.name} cannot {request.task}: it can {' and '.join(self.tasks)}.", param="model")
        if request.messages is not None and not self.chat:
            reason = self.no_chat or f"{self.name} has no chat template"
            raise Unsupported(f"{reason}: send a prompt instead.", param="messages")
        for field in self.unsupported:
            if (name := _asked_for(request, field)) is not None:
                raise Unsupported(f"The {self.engine} engine of {self.name} cannot honour {name!r}.", param=name)


_NEUTRAL = Request(model="", prompt="")


def _asked_for(request: Request, field: str) -> str | None:
    """The name under which *request* asks for *field*, if it does."""
    if field == "response_format" and request.form is not None:
        return field if request.response_format is not None else "tool_choice"  # a call that must be made is a format
    given, neutral = (request, _NEUTRAL) if hasattr(request, field) else (request.sampling, _NEUTRAL.sampling)
    return field if getattr(given, field) != getattr(neutral, field) else None


#: What a worker may be doing with its models, the most useful first.
WORKER_STATES = ("ready", "loading", "restarting", "unloading", "draining", "unloaded", "failed")


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself: it runs one engine, usually with one model."""

    id: str
    models: tuple[ModelInfo, ...] = ()
    """Also those that are not loaded (``context_length`` 0 where one never was)."""
    slots: int = 0
    state: str = "ready"
    """One of `WORKER_STATES`."""
    on_demand: bool = False
    """It loads its models when jobs wait for them; jobs may be queued whatever its state, unless it failed."""
    detail: str = ""
    """For people: what it is doing, or what it waits for."""
    error: ErrorInfo | None = None
    """Why the latest load failed."""
    memory: int = 0
    """Bytes of main memory that its engine processes hold; 0: not measured."""
    standby: int = 0
    """Spare engine processes that have the model loaded."""
    reserve: int = 0
    """Slots that jobs of the batch class leave free, so that more urgent ones need not wait for one of them to end."""
    takes_suspects: bool = True
    """May it be given suspects of an engine's death now? Where it may not, a broker with other workers leaves them."""
    seen_at: float = 0.0

    def state_of(self, model: str) -> str:
        """How *model* stands on it: its own state, or ``unavailable`` while it is ready and the model is away."""
        away = any(info.name == model and info.away for info in self.models)
        return "unavailable" if away and self.state == "ready" else self.state


class Lease(msgspec.Struct, frozen=True):
    """A worker's right to append to a job's log, until it is fenced by the next attempt.

    ``ids``/``texts``/``choices``/``phases`` are the log so far: the prefix that this attempt continues.
    """

    job: Job
    attempt: int
    ids: list[int] = []
    texts: list[str] = []
    choices: list[int] | None = None
    phases: list[TokenPhase] | None = None

    @property
    def key(self) -> LeaseKey:
        return LeaseKey(self.job.tenant, self.job.id, self.attempt)


class LeaseKey(msgspec.Struct, frozen=True):
    tenant: str
    job: str
    attempt: int


class Finish(msgspec.Struct, frozen=True):
    """How a worker closes a log: completed with reasons (one per choice), or failed with an error."""

    finish_reasons: tuple[str, ...] = ()
    error: ErrorInfo | None = None
    stops: tuple[str | None, ...] = ()
    """The stop string that ended each choice. Empty where none did, or the engine is not told."""

    @classmethod
    def of(cls, ends: Iterable[tuple[str, str | None]]) -> Finish:
        """Of each choice the reason and the stop string, if it was one."""
        reasons, stops = zip(*ends, strict=True)
        return cls(reasons, stops=stops if any(stops) else ())


class Append(msgspec.Struct, frozen=True):
    """New tokens of one job, the first at ``position``; with none it is a heartbeat. ``finish`` closes the log.

    ``reasoning_tokens``: how many of all tokens up to the last of these are thoughts. ``prompt_tokens``, and how many
    of them were cached, count once: the first that is told.
    """

    lease: LeaseKey
    position: int
    ids: list[int] = []
    texts: list[str] = []
    choices: list[int] | None = None
    logprobs: list[Logprob | None] | None = None
    prompt_tokens: int | None = None
    finish: Finish | None = None
    phases: list[TokenPhase] | None = None
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    @property
    def run(self) -> Tokens:
        """Its tokens, as the log has them."""
        return Tokens(self.position, self.lease.attempt, self.ids, self.texts, self.choices, self.logprobs, self.phases)


class Verdict(enum.StrEnum):
    """What became of an append. Anything but OK means: stop generating this job."""

    OK = "ok"
    LOST = "lost"  # another attempt holds the lease, or the job is gone
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Release(msgspec.Struct, frozen=True):
    """A lease given back before its job ended.

    Plain (drain): the job goes to the head of its tenant's queue at no cost. ``crashed_beside`` (the number of jobs
    that ran when the engine died, this one included) makes it a suspect, or quarantines it when it died alone for
    the second time. ``retry`` (a failure that a retry may cure) costs one of ``max_attempts``; ``delay`` seconds
    pass before the job can be claimed again.
    """

    lease: LeaseKey
    crashed_beside: int | None = None
    retry: ErrorInfo | None = None
    delay: float = 0.0


#: Bytes of requests that one page of a list brings, about: nobody holds all of many large ones in memory.
PAGE_BYTES = 16 << 20


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs to list; newest first. ``cursor`` is opaque, from the previous page.

    A page has ``limit`` jobs, or fewer if their requests are large (`PAGE_BYTES`); the last one has no cursor.
    """

    tenant: str
    user: str | None = None
    status: tuple[Status, ...] = ()
    model: str | None = None
    idempotency_key: str | None = None
    """At most one job was submitted under it."""
    cursor: str | None = None
    limit: int = 50


class Page(msgspec.Struct, frozen=True):
    jobs: list[Job]
    cursor: str | None = None


class QueueStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for health, metrics and Retry-After. ``depth`` is keyed by (model, priority)."""

    depth: dict[tuple[str, Priority], int]
    jobs: dict[Status, int]
    workers: list[WorkerInfo]
    drain_rate: float = 0.0
    """Jobs that end a second, by the last minute, or by the part of it in which any did (five seconds at least)."""
    leases_lost: int = 0
    durability: str = ""
    now: float = 0.0
    """The store's clock, by which jobs are dated."""

    @property
    def queued(self) -> int:
        return sum(self.depth.values())


class QueuePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's numbers that every broker obeys. Times in seconds; a limit of 0 means none.

    Those with a description are the section ``[queue]`` of the settings.
    """

    max_queued: Annotated[int, Meta(ge=0, description="Jobs that may wait in all; 0: no limit.")] = 10_000
    max_queued_per_tenant: Annotated[int, Meta(ge=0, description="Jobs that may wait per tenant; 0: no limit.")] = 1_000
    max_bytes_per_tenant: Annotated[
        int,
        Meta(ge=0, description="Bytes of requests and logs that one tenant may have in Redis; 0: no limit."),
    ] = 1 << 30
    max_running_per_tenant: Annotated[
        int, Meta(ge=0, description="Jobs that may run at once per tenant; 0: no limit.")
    ] = 0
    weights: Annotated[dict[str, float], Meta(description="Fair share per tenant (default 1.0).")] = msgspec.field(
        default={}, name="tenant_weights"
    )
    input_cost: float = 1.0
    output_cost: float = 2.0
    lease_ttl: Annotated[
        float, Meta(gt=0, description="Seconds a worker may be silent before its jobs go to another.")
    ] = 5.0
    result_ttl: Annotated[float, Meta(gt=0, description="Seconds that results and logs are kept after the end.")] = (
        3600.0
    )
    max_attempts: Annotated[int, Meta(ge=0, description="Retries of failures that a retry can cure.")] = 3
    max_losses: int = 16
    """Leases that may run out on a job before it is taken for the cause and quarantined."""


class Broker(Protocol):
    """Stores jobs, queue and logs. Thirteen verbs; another one needs an ADR (docs/adr/0003-broker-verbs.md).

    Every verb may raise `BrokerUnavailable`. Tenants are part of every key: a foreign id is `NotFound`.
    """

    @property
    def kind(self) -> str:
        """Which broker it is, in a word."""
        ...

    @property
    def durability(self) -> str:
        """What it promises of what is acknowledged, for people."""
        ...

    async def open(self) -> None:
        """Connect to the store, once, before any verb. Raises `BrokerUnavailable`, and `InvalidRequest` for one that
        is set up wrongly."""
        ...

    async def close(self) -> None:
        """Let go of the store. Nothing is lost by it, nor without it."""
        ...

    async def submit(self, job: Job) -> Job:
        """Store *job* durably and queue it; the stored job, with its queue position.

        A store in parts may give a job with an idempotency key another id: the one that is answered counts.

        Idempotent by (tenant, idempotency key): the same key and fingerprint give back the first job. Raises
        `IdempotencyMismatch` for another fingerprint, `Overloaded` when the queue or the tenant's share is full.
        """
        ...

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        """Lease jobs for *models* that fill up to *limit* slots, waiting up to *wait* seconds for the first.

        Each choice takes a slot; a job with more of them than ``worker.slots`` counts as that many, so that it runs
        alone. Order: priority class, then Virtual Token Counter across tenants, then oldest first; nothing overtakes a
        job that does not fit yet. Jobs of the batch class leave ``worker.reserve`` of *limit* free, or all where they
        take more than is beside it. Registers the worker.
        """
        ...

    async def register(self, worker: WorkerInfo) -> None:
        """Say that *worker* is alive and how it stands, while it claims nothing. One that does neither for a while is
        not counted any more."""
        ...

    async def append(self, appends: Sequence[Append]) -> dict[str, Verdict]:
        """Append one engine step of all running jobs in one transaction; verdicts by job id.

        Fenced by attempt, deduplicated by position, renews the leases; returns after it is durable.
        """
        ...

    async def release(self, releases: Sequence[Release]) -> None:
        """Give leases back. A lease that is no longer held is ignored."""
        ...

    def tail(self, tenant: str, job: str, after: int = 0) -> AsyncGenerator[Event]:
        """The log beyond position *after*: replay, follow, end after the terminal event.

        Raises `NotFound`/`ExpiredResult`, and `LogRewound` when *after* lies beyond the log's head.
        """
        ...

    def arrivals(self, tenant: str, user: str) -> AsyncGenerator[str]:
        """Ids of the user's jobs as they are submitted, from the call on. A hint: `list` is the truth."""
        ...

    async def cancel(self, tenant: str, job: str) -> Job:
        """End the job now if it has not ended; its worker learns at its next append. Idempotent."""
        ...

    async def forget(self, tenant: str, job: str) -> None:
        """Drop the job now, with its log and its idempotency key; end it as `cancel` does if it has not ended.

        It is `NotFound` from then on. Where there is no such job there is nothing to do: idempotent.
        """
        ...

    async def get(self, tenant: str, job: str) -> Job: ...

    async def list(self, query: Query) -> Page: ...

    async def stats(self) -> QueueStats: ...

    async def sweep(self) -> int:
        """Requeue jobs with dead leases, expire deadlines, wake delayed retries, drop what retention ended.

        Returns how many jobs it touched. Safe to run anywhere, any number of times.
        """
        ...


# ---------------------------------------------------------------------------------------------- engine


class Output(msgspec.Struct, array_like=True):
    """What one or more engine steps produced for one job's sequences. Fields as in `Tokens` and `Append`.

    ``key`` is the number under which the worker added them (one per lease: an old attempt's late output can never be
    taken for the new one's).
    """

    key: int
    ids: list[int] = []
    texts: list[str] = []
    choices: list[int] | None = None
    logprobs: list[Logprob | None] | None = None
    prompt_tokens: int | None = None
    finish: Finish | None = None
    retryable: bool = False
    phases: list[TokenPhase] | None = None
    cached_tokens: int = 0

    def extend(self, later: Output) -> None:
        """Take in what the same key produced next."""
        self.phases = joined_phases(self.phases, len(self.ids), later.phases, len(later.ids))
        self.ids += later.ids
        self.texts += later.texts
        if later.choices is not None:
            self.choices = (self.choices or []) + later.choices
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if self.prompt_tokens is None:
            self.prompt_tokens = later.prompt_tokens
            self.cached_tokens = later.cached_tokens
        self.finish = later.finish
        self.retryable = later.retryable


class Engine(Protocol):
    """Runs sequences with continuous batching. All of them advance together; one call drains one or more steps.

    ``start`` loads (raises `ModelLoadError`); ``add`` and ``abort`` never block; ``step`` waits for the next outputs of
    any sequence and raises `EngineDied` when the engine is gone (then every sequence is gone with it; call ``start``
    again). A sequence that is refused (context, unsupported field) ends with ``finish.error``. ``models`` tells at any
    time how they stand (`ModelInfo.away`).
    """

    @property
    def models(self) -> tuple[ModelInfo, ...]: ...

    @property
    def slots(self) -> int: ...

    async def start(self) -> None: ...

    def add(self, key: int, lease: Lease) -> None:
        """Begin, or continue after the lease's logged prefix, a generation under *key*."""
        ...

    def abort(self, key: int) -> None: ...

    async def step(self) -> list[Output]: ...

    async def close(self) -> None: ...


# ---------------------------------------------------------------------------------------------- models


class LoadProgress(msgspec.Struct, frozen=True):
    """How loading or unloading goes: the worker's state, what it does, and how much of it is done (0 … 1)."""

    state: str
    what: str = ""
    fraction: float | None = None


class ModelControl(Protocol):
    """The models of this process's own workers, in the hands of their operator."""

    def workers(self) -> list[WorkerInfo]: ...

    def notify(self, model: str) -> None:
        """A job for *model* was queued in this process. A hint: it is seen in the queue anyway, a moment later."""
        ...

    def load(self, model: str) -> AsyncIterator[LoadProgress]:
        """Load *model*, if need be at the cost of idle ones; ends when it is ready. Leaving early stops nothing.

        Raises `ModelNotFound` and `ModelLoadError`.
        """
        ...

    def unload(self, model: str) -> AsyncIterator[LoadProgress]:
        """Unload *model* once its jobs have ended or are given back. Jobs load it again. Raises `ModelNotFound`."""
        ...
