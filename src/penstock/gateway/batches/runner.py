"""Finds the batches that are to be run, and has each of them run (`run.py`) by one process at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping

import structlog

from penstock.core.aio import wait_for_event
from penstock.core.errors import PenstockError
from penstock.gateway.batches.run import BatchRun, RunContext
from penstock.gateway.batches.slots import TenantSlots
from penstock.gateway.batches.store import Batch, BatchStore
from penstock.gateway.files.disk import in_thread
from penstock.gateway.jobs import Jobs
from penstock.gateway.operation import Batchable

log = structlog.get_logger("penstock.batches")

#: Seconds between looks for batches that other processes took in, were asked to cancel, or left.
INTERVAL = 2.0
#: Seconds between looks for what has expired.
SWEEP_INTERVAL = 600.0
#: Seconds before a batch that a bug stopped is tried again.
RETRY_DELAY = 5.0


class BatchRunner:
    """Runs the batches of every tenant whose lock it gets.

    *operations*: what can be run, by endpoint. *window*: jobs that all of a tenant's batches for one model
    have at once; those for all models have twice as many.
    """

    def __init__(
        self,
        jobs: Jobs,
        store: BatchStore,
        operations: Mapping[str, Batchable],
        *,
        window: int = 256,
        interval: float = INTERVAL,
    ) -> None:
        self.store = store
        self.operations = operations
        self._context = RunContext(jobs, store, operations)
        self._window = window
        self._interval = interval
        self._running: dict[str, TenantBatches] = {}
        self._ended: set[str] = set()
        self._retry_at: dict[str, float] = {}
        self._notified = asyncio.Event()

    def notify(self) -> None:
        """Something has changed in this process: look at once."""
        self._notified.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run(), name="gateway: batches")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        sweep_at = 0.0
        try:
            while True:
                self._notified.clear()
                try:
                    if time.monotonic() >= sweep_at:
                        sweep_at = time.monotonic() + SWEEP_INTERVAL
                        await in_thread(self._sweep)
                    await self._reconcile()
                except (PenstockError, OSError) as error:
                    log.warning("batches_unreadable", error=str(error))
                await wait_for_event(self._notified, self._interval)
        finally:
            await asyncio.gather(*(own.close() for own in self._running.values()))

    def _sweep(self) -> None:
        self.store.files.sweep()
        self.store.sweep()

    async def _reconcile(self) -> None:
        """Take what is to be done and not yet in anybody's hands; tell those in ours that they are to stop."""
        for tenant, batches in (await in_thread(self._unfinished)).items():
            own = self._running.get(tenant)
            if own is None:
                lock = self.store.lock(tenant)
                if lock is None:
                    continue  # another process has them
                own = self._running[tenant] = TenantBatches(lock, self._window)
            for batch in batches:
                run = own.runs.get(batch.id)
                if run is None and self._retry_at.get(batch.id, 0.0) <= time.monotonic():
                    run = own.runs[batch.id] = BatchRun(self._context, own.tenant_slots, tenant, batch.id)
                    run.task = asyncio.create_task(self._supervise(own, run), name=f"batch: {batch.id}")
                elif run is not None:
                    run.apply_cancellation(batch)
        for tenant, own in list(self._running.items()):
            if not own.runs and not any(id in self._retry_at for id in self.store.ids(tenant)):
                del self._running[tenant]
                await own.close()

    def _unfinished(self) -> dict[str, list[Batch]]:
        found: dict[str, list[Batch]] = {}
        there: set[str] = set()
        for tenant in self.store.files.tenants():
            ids = self.store.ids(tenant)
            there.update(ids)
            for id in sorted(set(ids) - self._ended):
                with contextlib.suppress(PenstockError):  # dropped a moment ago
                    batch = self.store.get(tenant, id)
                    if batch.ended:
                        self._ended.add(id)
                    else:
                        found.setdefault(tenant, []).append(batch)
        self._ended &= there
        return found

    async def _supervise(self, own: TenantBatches, run: BatchRun) -> None:
        """A batch to its end. One that a bug stops is tried again, and disturbs no other."""
        try:
            await run()
            self._retry_at.pop(run.id, None)
        except Exception:
            log.exception("batch_interrupted", batch_id=run.id, tenant=run.tenant)
            self._retry_at[run.id] = time.monotonic() + RETRY_DELAY
        finally:
            own.runs.pop(run.id, None)
            self.notify()


class TenantBatches:
    """A tenant's batches that are run here, under the tenant's lock."""

    def __init__(self, lock: int, window: int) -> None:
        self.lock = lock
        self.tenant_slots = TenantSlots(window)
        self.runs: dict[str, BatchRun] = {}

    async def close(self) -> None:
        """Let go of the lock, after everything that was under it."""
        tasks = [run.task for run in self.runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        os.close(self.lock)
