"""One batch from its input to its outputs.

Nothing is kept in memory that a successor would need. The results on the disk say which lines are done; each other line
is submitted (again) under an idempotency key of its own, so the broker answers with the job that it may have. A job is
forgotten once its result is on the disk, never before.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, TypeVar

import structlog

from penstock.core.errors import PenstockError
from penstock.gateway.batches.input import MAX_ENVELOPE, LineError, check_input, read_lines
from penstock.gateway.batches.line import LineRunner
from penstock.gateway.batches.results import MAX_WRITE, Result, ResultLog
from penstock.gateway.batches.slots import ModelSlots, StopSignal, TenantSlots
from penstock.gateway.batches.store import Batch, BatchStore, State
from penstock.gateway.files.disk import in_thread
from penstock.gateway.files.store import StoredFile, new_id
from penstock.gateway.identity import Identity
from penstock.gateway.jobs import Jobs
from penstock.gateway.operation import Batchable

log = structlog.get_logger("penstock.batches")

T = TypeVar("T")

#: Seconds before something that the disk refused is tried again.
DISK_RETRY_INTERVAL = 5.0
#: Seconds between two saves of a batch's counts.
SAVE_INTERVAL = 1.0
#: Lines that are read at once.
CHUNK = 32


class RunContext(NamedTuple):
    """What batches are run with. *jobs*: nobody's; *operations*: what can be run, by endpoint."""

    jobs: Jobs
    store: BatchStore
    operations: Mapping[str, Batchable]


class BatchRun:
    """One batch in this process's hands."""

    task: asyncio.Task[None] | None = None

    def __init__(self, context: RunContext, slots: TenantSlots, tenant: str, id: str) -> None:
        jobs, self.store, self.operations = context
        self.jobs = jobs.of(Identity(tenant))
        self.tenant = tenant
        self.id = id
        self.batch: Batch
        self._slots = slots
        self._folder = self.store.folder_of(tenant, id)
        self._clock = self.store.clock
        self._stop = StopSignal()
        self._saved_at = 0.0

    def apply_cancellation(self, batch: Batch) -> None:
        """Stop if *batch*, as it is in the store, was cancelled or has expired."""
        if batch.status == "cancelling":
            self._stop.request("cancelled")
        elif batch.expires_at <= self._clock.now():
            self._stop.request("expired")

    async def __call__(self) -> None:
        batch = self.batch = await in_thread(self.store.get, self.tenant, self.id)
        if batch.ended:
            return  # its last runner was faster
        self.apply_cancellation(batch)
        if batch.state == "validating":
            await self._validate()
        if batch.state == "in_progress":
            async with self._opened() as (slots, results):
                await self._process(slots, results)
        if batch.state == "finalizing":
            await self._finish()

    # ------------------------------------------------------------------------------------ validating

    async def _validate(self) -> None:
        batch = self.batch
        limit = self.jobs.config.max_body
        summary = await in_thread(check_input, self._folder / "input.jsonl", batch.endpoint, limit)
        errors = summary.errors
        if not errors and (error := await self._unknown_model(summary.model or "", summary.line)) is not None:
            errors = [error]
        if errors:
            batch.errors = errors
            await self._enter("failed")
            await self._clean()
            return
        batch.total = summary.total
        batch.model = summary.model
        await self._enter("in_progress")

    async def _unknown_model(self, model: str, line: int | None) -> LineError | None:
        catalogue = self.jobs.catalogue
        while not (catalogue.reachable and catalogue.names):
            if await self._stop.sleep(0.2):
                return None
        if model in catalogue.names:
            return None
        message = f"The model {model!r} does not exist here. Served: {', '.join(catalogue.names)}."
        return LineError("model_not_found", message, "body.model", line)

    # ------------------------------------------------------------------------------------ in progress

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncGenerator[tuple[ModelSlots, ResultLog]]:
        """The outputs, open as soon as the batch may have open files."""
        slots = self._slots.of(self.batch.model)
        place = slots.open
        if not await self._stop.acquire(place):  # what is left to do takes no time
            place = slots.closing
            await place.acquire()
        results = ResultLog(self._folder, self.batch)
        try:
            await self._forget(await self._retry_on_disk_error(results.open))
            yield slots, results
        finally:
            results.close()
            place.release()

    async def _process(self, slots: ModelSlots, results: ResultLog) -> None:
        batch, stop = self.batch, self._stop
        log.info("batch_runs", batch_id=self.id, tenant=self.tenant, lines=batch.total, done=len(results.done))
        runner = LineRunner(batch, self.jobs, self.operations, slots, stop, self._clock)
        queue: asyncio.Queue[Result | None] = asyncio.Queue(MAX_WRITE)
        held = _Held(slots)
        known = batch.submitted

        async def run(number: int, text: bytes) -> None:
            await queue.put(await runner.run(number, text))

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(queue, results, held))
                cancelling = group.create_task(runner.cancel_when_stopped())
                async with asyncio.TaskGroup() as lines, contextlib.aclosing(self._read()) as reading:
                    async for number, text in reading:
                        if number in results.done:
                            continue
                        # A line that an earlier runner submitted has a job, which has to be known in any case.
                        if await held.acquire(None if number <= known else stop):
                            if number > batch.submitted:
                                batch.submitted = number + slots.window
                                await self._save()
                            lines.create_task(run(number, text))
                        else:
                            await queue.put(runner.skip(number, text))
                cancelling.cancel()
                await queue.put(None)
        finally:
            held.release_all()
        batch.outcome = "completed" if stop.outcome == "expired" and not runner.skipped else stop.outcome
        now = self._clock.now()
        batch.output_file_id = new_id("file-", now) if batch.completed else None
        batch.error_file_id = new_id("file-", now) if batch.failed else None
        await self._enter("finalizing")

    async def _read(self) -> AsyncGenerator[tuple[int, bytes]]:
        lines = read_lines(self._folder / "input.jsonl", self.jobs.config.max_body + MAX_ENVELOPE)
        try:
            while chunk := await in_thread(_next_chunk, lines):
                for each in chunk:
                    yield each
        finally:
            lines.close()  # type: ignore[attr-defined]

    async def _write(self, queue: asyncio.Queue[Result | None], results: ResultLog, held: _Held) -> None:
        """Write results, as many at once as have come meanwhile; then nobody needs their jobs any more."""
        while True:
            group = [await queue.get()]
            while len(group) < MAX_WRITE and not queue.empty():
                group.append(queue.get_nowait())
            found = [each for each in group if each is not None]
            jobs = []
            for succeeded in (True, False):
                jobs += await self._retry_on_disk_error(results.append, found, succeeded)
            await self._forget(jobs)
            held.release(sum(result.has_slot for result in found))
            if time.monotonic() - self._saved_at > SAVE_INTERVAL:
                await self._save()
            if group[-1] is None:
                return

    async def _forget(self, jobs: Iterable[str]) -> None:
        """A job that cannot be reached now goes after `RESULT_RETENTION`."""
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
        """The outputs become files. After a crash it is done again, to the same end."""
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

    # ------------------------------------------------------------------------------------ the disk

    async def _enter(self, state: State) -> None:
        self.batch.enter(state, self._clock.now())
        await self._save()

    async def _save(self) -> None:
        self._saved_at = time.monotonic()
        await self._retry_on_disk_error(self.store.save, self.tenant, self.batch)

    async def _clean(self) -> None:
        with contextlib.suppress(OSError):  # the sweep does it later
            await in_thread(self.store.clean, self.tenant, self.batch)

    async def _retry_on_disk_error(self, work: Callable[..., T], *arguments: object) -> T:
        """Do *work* in a thread, again and again while the disk refuses it: a full disk has space again some day."""
        while True:
            try:
                return await in_thread(work, *arguments)
            except OSError as error:
                log.warning("batch_waits_for_the_disk", batch_id=self.id, tenant=self.tenant, error=str(error))
                await asyncio.sleep(DISK_RETRY_INTERVAL)


class _Held:
    """The slots that a batch has."""

    def __init__(self, slots: ModelSlots) -> None:
        self._slots = slots
        self._count = 0

    async def acquire(self, stop: StopSignal | None) -> bool:
        taken = await self._slots.acquire(stop)
        self._count += taken
        return taken

    def release(self, count: int) -> None:
        self._count -= count
        for _ in range(count):
            self._slots.release()

    def release_all(self) -> None:
        self.release(self._count)


def _next_chunk(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return list(islice(lines, CHUNK))
