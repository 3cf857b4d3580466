"""How each job went, told by who saw it: ``job.attempt`` when an attempt is over, ``job.ended`` when the job is.

A job's wait in the queue and its attempts are spans of its trace. They are told as events when they are over: the
process that sees one end need not have seen it begin.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Self, cast

import msgspec

from penstock.core.errors import NotFound
from penstock.core.events import Event, Tokens
from penstock.core.job import Job, Status
from penstock.core.ports import (
    Append,
    Broker,
    Clock,
    Lease,
    LeaseKey,
    Release,
    SystemClock,
    Verdict,
    WorkerInfo,
    elapsed,
)
from penstock.core.telemetry import Fact, Telemetry
from penstock.observability.wrapper import Wrapper

#: The facts of ``job.ended`` that have a name in OpenTelemetry's conventions.
_NAMES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
    "error": "error.type",
}


class JobRecord(msgspec.Struct, kw_only=True, rename=_NAMES):
    """How one job went: the facts of ``job.ended``. Durations in seconds."""

    job: str
    tenant: str
    model: str
    request_id: str | None
    status: Status
    error: str | None
    attempt: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    queue_wait: float | None
    processing_time: float
    total_time: float
    time_to_first_token: float | None
    time_per_token: float | None
    trace: str | None = None

    @property
    def facts(self) -> Mapping[str, Fact]:
        return cast("Mapping[str, Fact]", msgspec.to_builtins(self))

    @classmethod
    def of(cls, facts: Mapping[str, Fact]) -> Self:
        return msgspec.convert(facts, cls)


class _Progress(msgspec.Struct):
    """*ahead*: by how many seconds the store's clock, which wrote the job's times, was ahead of ours."""

    lease: Lease
    since: float
    """Our clock, when it was claimed."""
    ahead: float
    tokens: int
    prompt_tokens: int | None
    """None: not told yet. It counts once, with what was cached of it."""
    cached_tokens: int
    reasoning_tokens: int
    first_at: float | None

    @classmethod
    def of(cls, lease: Lease, since: float = 0.0, ahead: float = 0.0) -> Self:
        """As the job stands."""
        job = lease.job
        return cls(
            lease,
            since,
            ahead,
            job.tokens,
            job.prompt_tokens,
            job.cached_tokens,
            job.reasoning_tokens,
            job.first_token_at,
        )


class JobWatch(Wrapper[Broker]):
    """A `Broker` that tells *telemetry* ``job.ended`` of every job that this process saw to its end.

    Mostly the process that ran it: a gateway sees only the end of what it cancels in the queue.
    """

    def __init__(self, broker: Broker, telemetry: Telemetry, clock: Clock | None = None) -> None:
        super().__init__(broker)
        self.tokens_read = 0
        """Tokens that readers got."""
        self._telemetry = telemetry
        self._clock = clock or SystemClock()
        self._progress: dict[str, _Progress] = {}
        self._ahead = 0.0

    @property
    def broker(self) -> Broker:
        """Itself: it has every verb, its own or passed on."""
        return cast("Broker", self)

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        leases = await self._wrapped.claim(worker, models, limit, wait)
        now = self._clock.now()
        for lease in leases:
            job = lease.job
            if lease.attempt == 1 and job.started_at is not None:  # that is this moment
                self._ahead = job.started_at - now
            self._progress[job.id] = _Progress.of(lease, now, self._ahead)
        return leases

    async def append(self, appends: Sequence[Append]) -> dict[str, Verdict]:
        verdicts = await self._wrapped.append(appends)
        at = self._clock.now()
        for append in appends:
            if (progress := self._held(append.lease)) is None:
                continue
            now = at + progress.ahead
            if append.ids:
                progress.tokens = append.position + len(append.ids) - 1
                progress.reasoning_tokens = append.reasoning_tokens
                progress.first_at = progress.first_at or now
            if append.prompt_tokens is not None and progress.prompt_tokens is None:
                progress.prompt_tokens, progress.cached_tokens = append.prompt_tokens, append.cached_tokens
            verdict = verdicts[append.lease.job]
            if verdict is Verdict.LOST:
                self._attempt_over(append.lease, "lost")
            elif verdict is Verdict.CANCELLED or verdict is Verdict.EXPIRED:
                self._end(progress, Status(verdict.value), verdict.value, now)
            elif append.finish is not None:
                error = append.finish.error
                status = Status.COMPLETED if error is None else Status.FAILED
                self._end(progress, status, error.code if error is not None else None, now)
        return verdicts

    async def release(self, releases: Sequence[Release]) -> None:
        await self._wrapped.release(releases)
        for release in releases:
            failed = "crashed" if release.crashed_beside is not None else "retried" if release.retry else "released"
            self._attempt_over(release.lease, failed)
            if release.retry is not None or release.crashed_beside is not None:
                await self._see(release.lease.tenant, release.lease.job)

    async def cancel(self, tenant: str, job: str) -> Job:
        before = await self._wrapped.get(tenant, job)
        after = await self._wrapped.cancel(tenant, job)
        # A running job's end is seen by its worker's next append; a waiting one has nobody else to tell of it.
        if before.status is Status.QUEUED:
            await self._see(tenant, job)
        return after

    async def forget(self, tenant: str, job: str) -> None:
        with contextlib.suppress(NotFound):
            await self.cancel(tenant, job)  # its end is told of
        await self._wrapped.forget(tenant, job)

    async def _see(self, tenant: str, job: str) -> None:
        """Record the end of a job that the broker itself may have ended."""
        found = await self._wrapped.get(tenant, job)
        if found.status.terminal:
            progress = _Progress.of(Lease(found, found.attempt))
            self._end(progress, found.status, found.error.code if found.error else None, found.ended_at or 0.0)

    def _held(self, key: LeaseKey) -> _Progress | None:
        """The attempt *key*, if it runs here: an earlier one of the same job may still be heard of."""
        progress = self._progress.get(key.job)
        return progress if progress is not None and progress.lease.attempt == key.attempt else None

    def _attempt_over(self, key: LeaseKey, outcome: str) -> None:
        """Tell of the attempt that ran here, if it did. *outcome*: the job's status, or why it may run again."""
        if (progress := self._held(key)) is None:
            return
        del self._progress[key.job]
        lease = progress.lease
        self._telemetry.event(
            "job.attempt",
            job=key.job,
            tenant=lease.job.tenant,
            attempt=lease.attempt,
            outcome=outcome,
            seconds=elapsed(progress.since, self._clock.now()),
            trace=lease.job.trace,
            **{_NAMES["model"]: lease.job.request.model},
        )

    def _end(self, progress: _Progress, status: Status, error: str | None, now: float) -> None:
        job = progress.lease.job
        self._attempt_over(progress.lease.key, status.value)
        started = job.started_at or now
        # What a log has instead of tokens, where its job is not to generate, counts as none and has no first one.
        generated = progress.tokens if job.request.task == "generate" else 0
        later = generated - 1
        first = progress.first_at if generated else None
        record = JobRecord(
            job=job.id,
            tenant=job.tenant,
            model=job.request.model,
            request_id=job.request_id,
            status=status,
            error=error,
            attempt=progress.lease.attempt,
            prompt_tokens=progress.prompt_tokens or 0,
            cached_tokens=progress.cached_tokens,
            completion_tokens=generated,
            reasoning_tokens=progress.reasoning_tokens,
            queue_wait=elapsed(job.created_at, started),
            processing_time=elapsed(started, now),
            total_time=elapsed(job.created_at, now),
            time_to_first_token=elapsed(job.created_at, first) if first is not None else None,
            time_per_token=elapsed(first, now) / later if first is not None and later > 0 else None,
            trace=job.trace,
        )
        self._telemetry.event("job.ended", **record.facts)

    async def tail(self, tenant: str, job: str, after: int = 0) -> AsyncGenerator[Event]:
        async with contextlib.aclosing(self._wrapped.tail(tenant, job, after)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    self.tokens_read += len(event.ids)
                yield event
