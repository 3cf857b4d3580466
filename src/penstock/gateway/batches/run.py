"""One batch from its input to its outputs: each line is a job at batch priority, whose folded log becomes a line.

Nothing is kept in memory that a successor would need. What is done is in the output; a line that is not there is
submitted (again) under the idempotency key that only it has, so the broker gives back the job that it had, if any. A
job is forgotten once its line is on the disk, never before.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import msgspec
import structlog

from penstock.api.errors import Error, ErrorBody
from penstock.core.aio import wait_for_event
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
from penstock.core.events import Ended, fold
from penstock.core.job import Job, Priority, Status, fingerprint
from penstock.gateway.batches.answers import LineNotRun, LineResponse, LineResult
from penstock.gateway.batches.input import MAX_ENVELOPE, Line, LineError, check_input, decode_line, read_lines
from penstock.gateway.batches.store import Batch, BatchStore, Outcome
from penstock.gateway.files.disk import AppendOnlyFile, in_thread
from penstock.gateway.files.store import StoredFile, new_id
from penstock.gateway.http import decode
from penstock.gateway.identity import Identity
from penstock.gateway.jobs import Jobs, Submission
from penstock.gateway.operation import REFERENCE_GONE, Batchable
from penstock.gateway.sse import ascii_json

log = structlog.get_logger("penstock.batches")

T = TypeVar("T")

#: Seconds before something that the disk refused is tried again.
DISK_RETRY_INTERVAL = 5.0
#: Seconds between two saves of a batch's counts.
SAVE_INTERVAL = 1.0
#: Seconds for which a line's job outlives its end if nobody takes its result: no runner is away for longer.
RESULT_RETENTION = 3 * 86400.0
#: Results that go to the disk together, at most.
MAX_WRITE = 1024
#: Seconds between two tries of a line that a full queue does not take. It is one line that tries, so not the many
#: seconds that clients are told.
RETRY_INTERVAL = 0.5
#: Lines that are read at once.
CHUNK = 32
#: Batches of one tenant and model whose files are open at once; the others are in progress, too, but wait.
MAX_OPEN = 32

#: What a submit may meet that passes by itself: a model that was there when the batch was checked may come back.
TRANSIENT = (RateLimited, InsufficientStorage, NoWorker, ModelNotFound)

_NOT_RUN = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was executed."),
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
}


class _NotRunError(Exception):
    """The batch was over before the line was run."""


class _Usage(msgspec.Struct, frozen=True):
    """As a reply tells it, in the words of either dialect."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Reply(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


class _Response(msgspec.Struct, frozen=True):
    body: _Reply


class _LoggedResult(msgspec.Struct, frozen=True):
    """What an output's line tells a runner that comes later. Its id is made of the job's and the line's number."""

    id: str
    response: _Response | None = None

    @property
    def number(self) -> int:
        return int(self.id[42:], 16)

    @property
    def job(self) -> str:
        return "job_" + self.id[10:42]

    @property
    def usage(self) -> _Usage:
        return (self.response and self.response.body.usage) or _Usage()


_result = msgspec.json.Decoder(_LoggedResult)


class _Result(msgspec.Struct, frozen=True):
    """A line's result on its way to the disk."""

    text: bytes
    succeeded: bool
    slot: bool = True


class RunContext(NamedTuple):
    """What batches are run with. *operations*: what can be run, by endpoint."""

    jobs: Jobs
    store: BatchStore
    operations: Mapping[str, Batchable]


class ModelSlots:
    """What a tenant's batches for one model share: a model that is away holds up no other's."""

    def __init__(self, window: int) -> None:
        self.slots = asyncio.Semaphore(window)
        self.submit_lock = asyncio.Lock()
        self.open_runs = asyncio.Semaphore(MAX_OPEN)
        self.closing_runs = asyncio.Semaphore(MAX_OPEN)
        """The places of those that are over."""


class TenantSlots:
    """What all of a tenant's batches share. *window*: jobs of one model at once; of all models, twice as many."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.slots = asyncio.Semaphore(2 * window)
        self._models: dict[str | None, ModelSlots] = {}

    def of(self, model: str | None) -> ModelSlots:
        return self._models.setdefault(model, ModelSlots(self.window))


class BatchRun:
    """One batch in this process's hands."""

    task: asyncio.Task[None] | None = None

    def __init__(self, context: RunContext, tenant_slots: TenantSlots, tenant: str, id: str) -> None:
        jobs, self.store, self.operations = context
        self.jobs = jobs.of(Identity(tenant))
        self.tenant_slots = tenant_slots
        self.tenant = tenant
        self.id = id
        self.batch: Batch
        self._model_slots: ModelSlots
        self._folder = self.store.folder_of(tenant, id)
        self._clock = self.store.clock
        self._over = asyncio.Event()
        self._outcome: Outcome = "completed"
        self._cut = False
        """Was a line not run because the batch was over?"""
        self._done: set[int] = set()
        self._jobs: set[str] = set()
        self._slots = 0
        self._place: asyncio.Semaphore | None = None
        self._results: asyncio.Queue[_Result | None] = asyncio.Queue(MAX_WRITE)
        self._logs: dict[bool, AppendOnlyFile] = {}
        self._saved_at = 0.0

    def apply_cancellation(self, batch: Batch) -> None:
        """What *batch*, as it is in the store, says of going on."""
        if batch.status == "cancelling":
            self.stop("cancelled")
        elif batch.expires_at <= self._clock.now():
            self.stop("expired")

    def stop(self, outcome: Outcome) -> None:
        """No more lines are begun, and those that run are cancelled."""
        if not self._over.is_set():
            self._outcome = outcome
            self._over.set()

    async def __call__(self) -> None:
        batch = self.batch = await in_thread(self.store.get, self.tenant, self.id)
        if batch.ended:
            return  # by who had the lock before
        self.apply_cancellation(batch)
        try:
            if batch.state == "validating":
                await self._validate()
            if batch.state == "in_progress":
                await self._process()
            if batch.state == "finalizing":
                await self._finish()
        finally:
            for log_file in self._logs.values():
                log_file.close()
            while self._slots:
                self._free()
            if self._place is not None:
                self._place.release()

    # ------------------------------------------------------------------------------------ validating

    async def _validate(self) -> None:
        batch = self.batch
        limit = self.jobs.config.max_body
        checked = await in_thread(check_input, self._folder / "input.jsonl", batch.endpoint, limit)
        errors = checked.errors
        if not errors and (error := await self._unknown_model(checked.model or "", checked.line)) is not None:
            errors = [error]
        if errors:
            batch.errors = errors
            await self._enter("failed")
            await self._clean()
            return
        batch.total = checked.total
        batch.model = checked.model
        await self._enter("in_progress")

    async def _unknown_model(self, model: str, line: int | None) -> LineError | None:
        catalogue = self.jobs.catalogue
        while not (catalogue.reachable and catalogue.names):
            if await self._pause(0.2):
                return None
        if model in catalogue.names:
            return None
        message = f"The model {model!r} does not exist here. Served: {', '.join(catalogue.names)}."
        return LineError("model_not_found", message, "body.model", line)

    # ------------------------------------------------------------------------------------ in progress

    async def _process(self) -> None:
        batch = self.batch
        self._model_slots = self.tenant_slots.of(batch.model)
        place = self._model_slots.open_runs
        if not await self._acquire(place):  # it is over: what is left to do takes no time
            place = self._model_slots.closing_runs
            await place.acquire()
        self._place = place
        await self._forget(await self._retry_on_disk_error(self._open))
        log.info("batch_runs", batch_id=self.id, tenant=self.tenant, lines=batch.total, done=len(self._done))
        known = batch.submitted
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write())
            stopping = group.create_task(self._stop_jobs())
            async with asyncio.TaskGroup() as lines, contextlib.aclosing(self._read()) as reading:
                async for number, text in reading:
                    if number in self._done:
                        continue
                    if await self._slot(anyway=number <= known):
                        if number > batch.submitted:
                            batch.submitted = number + self.tenant_slots.window
                            await self._save()
                        lines.create_task(self._line(number, text))
                    else:
                        await self._results.put(self._not_run(number, decode_line(text), None, slot=False))
            stopping.cancel()
            await self._results.put(None)
        batch.outcome = "completed" if self._outcome == "expired" and not self._cut else self._outcome
        now = self._clock.now()
        batch.output_file_id = new_id("file-", now) if batch.completed else None
        batch.error_file_id = new_id("file-", now) if batch.failed else None
        await self._enter("finalizing")

    def _open(self) -> list[str]:
        """Open the outputs, learn from them what is done, and tell the jobs that may not have been forgotten."""
        batch = self.batch
        for log_file in self._logs.values():
            log_file.close()
        self._done.clear()
        batch.completed = batch.failed = batch.prompt_tokens = batch.completion_tokens = 0
        jobs: list[str] = []
        for succeeded, name in ((True, "output.jsonl"), (False, "errors.jsonl")):
            latest: deque[str] = deque(maxlen=MAX_WRITE)

            def learn(line: bytes, succeeded: bool = succeeded, latest: deque[str] = latest) -> None:
                latest.append(self._count(line, succeeded))

            self._logs[succeeded] = AppendOnlyFile(self._folder / name, learn)
            jobs += latest
        return jobs

    def _count(self, line: bytes, succeeded: bool) -> str:
        """Take in a result; its job's id. Raises `ValueError` for what is none."""
        result = _result.decode(line)
        batch, usage = self.batch, result.usage
        self._done.add(result.number)
        batch.completed += succeeded
        batch.failed += not succeeded
        batch.prompt_tokens += usage.prompt_tokens or usage.input_tokens
        batch.completion_tokens += usage.completion_tokens or usage.output_tokens
        return result.job

    async def _read(self) -> AsyncGenerator[tuple[int, bytes], None]:
        lines = read_lines(self._folder / "input.jsonl", self.jobs.config.max_body + MAX_ENVELOPE)
        try:
            while chunk := await in_thread(_some, lines):
                for each in chunk:
                    yield each
        finally:
            lines.close()  # type: ignore[attr-defined]

    async def _slot(self, *, anyway: bool) -> bool:
        """Wait for a place in the window; False if the batch is over before (*anyway*: also then)."""
        if not await self._acquire(self._model_slots.slots, anyway=anyway):
            return False
        taken = False
        try:
            taken = await self._acquire(self.tenant_slots.slots, anyway=anyway)
        finally:
            if not taken:
                self._model_slots.slots.release()
        self._slots += taken
        return taken

    def _free(self) -> None:
        self._slots -= 1
        self._model_slots.slots.release()
        self.tenant_slots.slots.release()

    async def _acquire(self, semaphore: asyncio.Semaphore, *, anyway: bool = False) -> bool:
        """Wait for *semaphore*; False if the batch is over before (*anyway*: also then)."""
        if self._over.is_set() and not anyway:
            return False
        if anyway or not semaphore.locked():
            return await semaphore.acquire()
        acquiring = asyncio.ensure_future(semaphore.acquire())
        ending = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait([acquiring, ending], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
            if not acquiring.done():
                acquiring.cancel()
        try:
            return await acquiring
        except asyncio.CancelledError:
            if self._over.is_set():
                return False
            raise

    # ------------------------------------------------------------------------------------ one line

    async def _line(self, number: int, text: bytes) -> None:
        line = decode_line(text)
        job: Job | None = None
        try:
            operation = self.operations[self.batch.endpoint]
            if len(line.body) > self.jobs.config.max_body:
                raise RequestTooLarge(f"The body is larger than {self.jobs.config.max_body} bytes.")
            body: Any = decode(bytes(line.body), operation.body)
            if getattr(body, "stream", False):
                raise Unsupported("A line of a batch cannot be streamed.", param="stream")
            job = await self._submit(number, line, body, operation)
            events = await self._follow(job)
            completion = fold(events, job.request.n)
            assert completion.ended is not None
            if completion.ended.error is not None:
                raise error_from_info(completion.ended.error)
            reply = operation.reply(self.jobs, body, job, completion)
            written = self._answer(number, line, job, 200, reply)
        except _NotRunError:
            written = self._not_run(number, line, job)
        except PenstockError as error:
            written = self._answer(number, line, job, error.status, ErrorBody(Error.of(error.info)))
        except Exception:
            log.exception("batch_line_failed", batch_id=self.id, tenant=self.tenant, line=number)
            broken = PenstockError("Something broke inside the server; its log has the details.")
            written = self._answer(number, line, job, broken.status, ErrorBody(Error.of(broken.info)))
        await self._results.put(written)

    async def _submit(self, number: int, line: Line, body: Any, operation: Batchable) -> Job:
        """The line's job, which it may have from before. Raises `PenstockError` for what cannot be run."""
        deadline = getattr(body, "deadline", None)
        submission = Submission(
            user=getattr(body, "user_id", None) or getattr(body, "user", None) or None,
            priority=Priority.BATCH,
            idempotency_key=f"{self.id}/{number}",
            fingerprint=fingerprint([self.batch.endpoint, bytes(line.body)]),
            request_id=f"{self.id}.{number}",
            metadata={"batch_id": self.id, "custom_id": line.custom_id},
            retain_for=RESULT_RETENTION,
        )
        try:
            job = await self._offer(operation, body, submission, deadline)
        except TRANSIENT:
            # One line tries again and again, and when it is let in so may the next ones be.
            async with self._model_slots.submit_lock:
                while True:
                    if self._over.is_set():
                        raise _NotRunError from None
                    try:
                        job = await self._offer(operation, body, submission, deadline)
                        break
                    except TRANSIENT as error:
                        await self._pause(min(RETRY_INTERVAL, error.retry_after or RETRY_INTERVAL))
        self._jobs.add(job.id)
        if self._over.is_set():
            await self._cancel(job.id)
        return job

    async def _offer(self, operation: Batchable, body: Any, submission: Submission, deadline: float | None) -> Job:
        """Submit, whether or not the broker is there, and what the body refers to still."""
        while True:
            left = max(0.001, self.batch.expires_at - self._clock.now())
            submission = msgspec.structs.replace(submission, deadline=left if deadline is None else min(left, deadline))
            try:
                try:
                    prepared = await operation.prepare(self.jobs, body)
                except REFERENCE_GONE:
                    if (known := await self.jobs.repeated(submission)) is None:
                        raise
                    return known
                return await self.jobs.submit(prepared.request, msgspec.structs.replace(submission, view=prepared.view))
            except BrokerUnavailable as error:  # it may have been accepted: it has to be known
                await asyncio.sleep(_spread(error.retry_after or 1.0))

    async def _follow(self, job: Job) -> list[Any]:
        """A job's log when it has ended."""
        try:
            while True:
                try:
                    events = [event async for event in self.jobs.log(job.id)]
                except (BrokerUnavailable, LogRewound):
                    await asyncio.sleep(_spread(1.0))
                    continue
                if events and isinstance(ended := events[-1], Ended):
                    break
                await asyncio.sleep(0.1)
        finally:
            self._jobs.discard(job.id)
        if (ended.status == Status.CANCELLED and self._over.is_set()) or (
            ended.status == Status.EXPIRED and self._clock.now() >= self.batch.expires_at - 1
        ):
            if not self._over.is_set():
                self.stop("expired")
            raise _NotRunError
        return events

    async def _stop_jobs(self) -> None:
        await self._over.wait()
        await asyncio.gather(*map(self._cancel, self._jobs))

    async def _cancel(self, job: str) -> None:
        while True:
            try:
                await self.jobs.cancel(job)
                return
            except BrokerUnavailable:
                await asyncio.sleep(_spread(1.0))
            except PenstockError:
                return  # gone

    def _answer(self, number: int, line: Line, job: Job | None, status: int, body: Any) -> _Result:
        response = LineResponse(status, f"{self.id}.{number}", body)
        return self._written(number, line, job, response, None, succeeded=status == 200)

    def _not_run(self, number: int, line: Line, job: Job | None, *, slot: bool = True) -> _Result:
        self._cut = True
        code, message = _NOT_RUN[self._outcome]
        return self._written(number, line, job, None, LineNotRun(code, message), succeeded=False, slot=slot)

    def _written(
        self,
        number: int,
        line: Line,
        job: Job | None,
        response: LineResponse | None,
        error: LineNotRun | None,
        *,
        succeeded: bool,
        slot: bool = True,
    ) -> _Result:
        owner = job.id.removeprefix("job_") if job is not None else self.id.removeprefix("batch_")
        value = LineResult(f"batch_req_{owner}{number:06x}", line.custom_id, response, error)
        return _Result(ascii_json(value).encode() + b"\n", succeeded, slot)

    # ------------------------------------------------------------------------------------ to the disk

    async def _write(self) -> None:
        """Results to the disk, as many at once as have come meanwhile; then their jobs are of no use any more."""
        while True:
            group = [await self._results.get()]
            while len(group) < MAX_WRITE and not self._results.empty():
                group.append(self._results.get_nowait())
            results = [each for each in group if each is not None]
            jobs = []
            for succeeded, log_file in self._logs.items():
                lines = [each.text for each in results if each.succeeded is succeeded]
                await self._retry_on_disk_error(log_file.append, lines)
                jobs += [self._count(line, succeeded) for line in lines]
            await self._forget(jobs)
            for each in results:
                if each.slot:
                    self._free()
            if time.monotonic() - self._saved_at > SAVE_INTERVAL:
                await self._save()
            if group[-1] is None:
                return

    async def _forget(self, jobs: Iterable[str]) -> None:
        """What is not reached now goes after `RESULT_RETENTION`."""
        forgetting = (self.jobs.forget(job) for job in jobs)
        for outcome in await asyncio.gather(*forgetting, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, PenstockError):
                raise outcome

    # ------------------------------------------------------------------------------------ finalizing

    async def _finish(self) -> None:
        batch = self.batch
        assert batch.outcome is not None
        await self._retry_on_disk_error(self._publish)
        await self._enter(batch.outcome)
        await self._clean()
        log.info(
            "batch_ended", batch_id=self.id, tenant=self.tenant, status=batch.state, completed=batch.completed,
            failed=batch.failed,
        )  # fmt: skip

    def _publish(self) -> None:
        """The outputs become files. Done again after a crash in between, to the same end."""
        batch, files = self.batch, self.store.files
        made = batch.moments["finalizing"]
        kept = files.ttl if batch.output_ttl is None else batch.output_ttl
        for id, name, kind in (
            (batch.output_file_id, "output.jsonl", "output"),
            (batch.error_file_id, "errors.jsonl", "error"),
        ):
            if id is not None:
                source = self._folder / name
                file = StoredFile(
                    id=id,
                    filename=f"{self.id}_{kind}.jsonl",
                    purpose="batch_output",
                    bytes=source.stat().st_size,
                    created_at=made,
                    expires_at=made + kept,
                )
                files.publish(self.tenant, source, file)

    # ------------------------------------------------------------------------------------ all of them

    async def _enter(self, state: Any) -> None:
        self.batch.enter(state, self._clock.now())
        await self._save()

    async def _save(self) -> None:
        self._saved_at = time.monotonic()
        await self._retry_on_disk_error(self.store.save, self.tenant, self.batch)

    async def _clean(self) -> None:
        with contextlib.suppress(OSError):  # it goes with the batch
            await in_thread(self.store.clean, self.tenant, self.batch)

    async def _pause(self, seconds: float) -> bool:
        """Wait, or until the batch is over; is it?"""
        return await wait_for_event(self._over, _spread(seconds))

    async def _retry_on_disk_error(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do it in a thread, again and again while the disk refuses: a full one has space again some day."""
        while True:
            try:
                return await in_thread(work, *arguments)
            except OSError as error:
                log.warning("batch_waits_for_the_disk", batch_id=self.id, tenant=self.tenant, error=str(error))
                await asyncio.sleep(DISK_RETRY_INTERVAL)


def _some(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return list(islice(lines, CHUNK))


def _spread(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1.25)
