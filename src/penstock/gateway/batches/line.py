"""The lines of a batch: each is a job at batch priority, whose folded log becomes a result."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import structlog

from penstock.api.errors import ErrorBody
from penstock.core.errors import (
    BrokerUnavailable,
    InsufficientStorage,
    LogRewound,
    ModelNotFound,
    NoWorker,
    PenstockError,
    RateLimited,
    RequestTooLarge,
    Unsupported,
    error_from_info,
)
from penstock.core.events import Ended, Event, fold
from penstock.core.job import Job, Priority, Status, fingerprint
from penstock.core.ports import Clock
from penstock.gateway.batches.answers import LineNotRun, LineResponse, LineResult
from penstock.gateway.batches.input import Line, decode_line
from penstock.gateway.batches.results import Result, result_id
from penstock.gateway.batches.slots import ModelSlots, StopSignal, spread
from penstock.gateway.batches.store import Batch
from penstock.gateway.http import decode
from penstock.gateway.jobs import Jobs, Submission
from penstock.gateway.operation import REFERENCE_GONE, Batchable

log = structlog.get_logger("penstock.batches")

#: Seconds for which a line's job outlives its end if nobody takes its result: no runner is away for longer.
RESULT_RETENTION = 3 * 86400.0
#: Seconds between two tries of a line that a full queue refuses. Only one line tries, so not the many seconds that
#: clients are told.
RETRY_INTERVAL = 0.5

#: Refusals that pass by themselves: a model that was there when the batch was checked may come back.
TRANSIENT = (RateLimited, InsufficientStorage, NoWorker, ModelNotFound)

_NOT_RUN = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was executed."),
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
}


class _NotRunError(Exception):
    """The batch had to stop before the line was run."""


class LineRunner:
    """Runs lines of *batch*, any number at once."""

    def __init__(
        self,
        batch: Batch,
        jobs: Jobs,
        operations: Mapping[str, Batchable],
        slots: ModelSlots,
        stop: StopSignal,
        clock: Clock,
    ) -> None:
        self.skipped = False
        """Was a line not run because the batch had to stop?"""
        self._batch = batch
        self._jobs = jobs
        self._operations = operations
        self._slots = slots
        self._stop = stop
        self._clock = clock
        self._running: set[str] = set()

    async def run(self, number: int, text: bytes) -> Result:
        """The result of a line that has a slot, whatever becomes of it."""
        line = decode_line(text)
        job: Job | None = None
        try:
            operation = self._operations[self._batch.endpoint]
            if len(line.body) > self._jobs.config.max_body:
                raise RequestTooLarge(f"The body is larger than {self._jobs.config.max_body} bytes.")
            body: Any = decode(bytes(line.body), operation.body)
            if getattr(body, "stream", False):
                raise Unsupported("A line of a batch cannot be streamed.", param="stream")
            job = await self._submit(number, line, body, operation)
            completion = fold(await self._follow(job), job.request.n)
            assert completion.ended is not None
            if completion.ended.error is not None:
                raise error_from_info(completion.ended.error)
            return self._finished(number, line, job, 200, operation.reply(self._jobs, body, job, completion))
        except _NotRunError:
            return self._not_run(number, line, job, has_slot=True)
        except PenstockError as error:
            return self._finished(number, line, job, error.status, ErrorBody.of(error.info))
        except Exception:
            log.exception("batch_line_failed", batch_id=self._batch.id, tenant=self._jobs.tenant, line=number)
            broken = PenstockError("Something broke inside the server; its log has the details.")
            return self._finished(number, line, job, broken.status, ErrorBody.of(broken.info))

    def skip(self, number: int, text: bytes) -> Result:
        """The result of a line that gets no slot, since the batch has to stop."""
        return self._not_run(number, decode_line(text), None, has_slot=False)

    async def cancel_when_stopped(self) -> None:
        """Cancel the jobs of all lines as soon as the batch has to stop."""
        await self._stop.wait()
        await asyncio.gather(*map(self._cancel, self._running))

    # ------------------------------------------------------------------------------------ the job of a line

    async def _submit(self, number: int, line: Line, body: Any, operation: Batchable) -> Job:
        """The line's job, which it may have from before. Raises `PenstockError` if the line cannot be run."""
        batch = self._batch
        submission = Submission(
            user=getattr(body, "user_id", None) or getattr(body, "user", None) or None,
            priority=Priority.BATCH,
            idempotency_key=f"{batch.id}/{number}",
            fingerprint=fingerprint([batch.endpoint, bytes(line.body)]),
            request_id=f"{batch.id}.{number}",
            metadata={"batch_id": batch.id, "custom_id": line.custom_id},
            retain_for=RESULT_RETENTION,
        )
        try:
            job = await self._submit_once(body, operation, submission)
        except TRANSIENT:
            async with self._slots.submitting:  # when this line is accepted, so may the next ones be
                job = await self._submit_until_accepted(body, operation, submission)
        self._running.add(job.id)
        if self._stop.requested:
            await self._cancel(job.id)
        return job

    async def _submit_until_accepted(self, body: Any, operation: Batchable, submission: Submission) -> Job:
        while not self._stop.requested:
            try:
                return await self._submit_once(body, operation, submission)
            except TRANSIENT as error:
                await self._stop.sleep(min(RETRY_INTERVAL, error.retry_after or RETRY_INTERVAL))
        raise _NotRunError

    async def _submit_once(self, body: Any, operation: Batchable, submission: Submission) -> Job:
        """Submit, however long the broker is away, and also if a response that the body refers to is gone by now."""
        deadline = getattr(body, "deadline", None)
        while True:
            left = max(0.001, self._batch.expires_at - self._clock.now())
            submission = msgspec.structs.replace(submission, deadline=left if deadline is None else min(left, deadline))
            try:
                try:
                    prepared = await operation.prepare(self._jobs, body)
                except REFERENCE_GONE:
                    if (known := await self._jobs.repeated(submission)) is None:
                        raise
                    return known
                return await self._jobs.submit(
                    prepared.request, msgspec.structs.replace(submission, view=prepared.view)
                )
            except BrokerUnavailable as error:  # it may have been accepted: find out
                await asyncio.sleep(spread(error.retry_after or 1.0))

    async def _follow(self, job: Job) -> list[Event]:
        """The whole log of a job, once it has ended."""
        try:
            while True:
                try:
                    events = [event async for event in self._jobs.log(job.id)]
                except (BrokerUnavailable, LogRewound):
                    await asyncio.sleep(spread(1.0))
                    continue
                if events and isinstance(ended := events[-1], Ended):
                    break
                await asyncio.sleep(0.1)
        finally:
            self._running.discard(job.id)
        if ended.status == Status.EXPIRED and self._clock.now() >= self._batch.expires_at - 1:
            self._stop.request("expired")
            raise _NotRunError
        if ended.status == Status.CANCELLED and self._stop.requested:
            raise _NotRunError
        return events

    async def _cancel(self, job: str) -> None:
        while True:
            try:
                await self._jobs.cancel(job)
                return
            except BrokerUnavailable:
                await asyncio.sleep(spread(1.0))
            except PenstockError:
                return  # it is gone

    # ------------------------------------------------------------------------------------ its result

    def _finished(self, number: int, line: Line, job: Job | None, status: int, body: Any) -> Result:
        response = LineResponse(status, f"{self._batch.id}.{number}", body)
        id = result_id(self._batch.id if job is None else job.id, number)
        return Result.of(LineResult(id, line.custom_id, response, None), succeeded=status == 200, has_slot=True)

    def _not_run(self, number: int, line: Line, job: Job | None, *, has_slot: bool) -> Result:
        self.skipped = True
        error = LineNotRun(*_NOT_RUN[self._stop.outcome])
        id = result_id(self._batch.id if job is None else job.id, number)
        return Result.of(LineResult(id, line.custom_id, None, error), succeeded=False, has_slot=has_slot)
