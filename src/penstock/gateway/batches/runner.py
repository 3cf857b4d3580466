"""Finds the batches that are to be run, and has each of them run (`run.py`) by one process at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping

import structlog

from penstock.core.errors import PenstockError
from penstock.gateway.batches.run import Lanes, Means, Run
from penstock.gateway.batches.store import Batch, BatchStore
from penstock.gateway.files.store import in_thread
from penstock.gateway.jobs import Jobs
from penstock.gateway.operation import Batchable

log = structlog.get_logger("penstock.batches")

#: Seconds between looks for batches that other processes took in, were asked to cancel, or left.
INTERVAL = 2.0
#: Seconds between looks for what has expired.
SWEEP_INTERVAL = 600.0
#: Seconds before a batch that a bug stopped is tried again.
REST = 5.0


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
        self._means = Means(jobs, store, operations)
        self._window = window
        self._interval = interval
        self._crews: dict[str, Crew] = {}
        self._ended: set[str] = set()
        self._resting: dict[str, float] = {}
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Something has changed in this process: look at once."""
        self._nudged.set()

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
                self._nudged.clear()
                try:
                    if time.monotonic() >= sweep_at:
                        sweep_at = time.monotonic() + SWEEP_INTERVAL
                        await in_thread(self._sweep)
                    await self._look()
                except (PenstockError, OSError) as error:
                    log.warning("batches_unreadable", error=str(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval):
                        await self._nudged.wait()
        finally:
            await asyncio.gather(*(crew.close() for crew in self._crews.values()))

    def _sweep(self) -> None:
        self.store.files.sweep()
        self.store.sweep()

    async def _look(self) -> None:
        """Take what is to be done and not yet in anybody's hands; tell those in ours that they are to stop."""
        for tenant, batches in (await in_thread(self._unfinished)).items():
            crew = self._crews.get(tenant)
            if crew is None:
                lock = self.store.lock(tenant)
                if lock is None:
                    continue  # another process has them
                crew = self._crews[tenant] = Crew(lock, self._window)
            for batch in batches:
                run = crew.runs.get(batch.id)
                if run is None and self._resting.get(batch.id, 0.0) <= time.monotonic():
                    run = crew.runs[batch.id] = Run(self._means, crew.lanes, tenant, batch.id)
                    run.task = asyncio.create_task(self._care(crew, run), name=f"batch: {batch.id}")
                elif run is not None:
                    run.heed(batch)
        for tenant, crew in list(self._crews.items()):
            if not crew.runs and not any(id in self._resting for id in self.store.ids(tenant)):
                del self._crews[tenant]
                await crew.close()

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

    async def _care(self, crew: Crew, run: Run) -> None:
        """A batch to its end. One that a bug stops is tried again, and disturbs no other."""
        try:
            await run()
            self._resting.pop(run.id, None)
        except Exception:
            log.exception("batch_interrupted", batch_id=run.id, tenant=run.tenant)
            self._resting[run.id] = time.monotonic() + REST
        finally:
            crew.runs.pop(run.id, None)
            self.nudge()


class Crew:
    """A tenant's batches that are run here, under the tenant's lock."""

    def __init__(self, lock: int, window: int) -> None:
        self.lock = lock
        self.lanes = Lanes(window)
        self.runs: dict[str, Run] = {}

    async def close(self) -> None:
        """Let go of the lock, after everything that was under it."""
        tasks = [run.task for run in self.runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        os.close(self.lock)
