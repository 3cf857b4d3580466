"""How many jobs the batches of a tenant may have, and how a batch is told to stop."""

from __future__ import annotations

import asyncio
import random

from penstock.core.aio import run_until, wait_for_event
from penstock.gateway.batches.store import Outcome

#: Batches of one tenant and model whose files are open at once; the others are in progress, too, but wait.
MAX_OPEN = 32


class StopSignal:
    """Tells a batch to stop before all of its lines have run."""

    def __init__(self) -> None:
        self.outcome: Outcome = "completed"
        """What the batch becomes: why it is told to stop, once it is."""
        self._requested = asyncio.Event()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def request(self, outcome: Outcome) -> None:
        """The first request counts."""
        if not self.requested:
            self.outcome = outcome
            self._requested.set()

    async def wait(self) -> None:
        await self._requested.wait()

    async def sleep(self, seconds: float) -> bool:
        """Wait about so long, or until the batch has to stop; has it?"""
        return await wait_for_event(self._requested, spread(seconds))

    async def acquire(self, semaphore: asyncio.Semaphore) -> bool:
        """Wait for *semaphore*. False if the batch has to stop first."""
        if self.requested:
            return False
        if not semaphore.locked():
            return await semaphore.acquire()
        return await run_until(self._requested, semaphore.acquire())


class TenantSlots:
    """What all batches of a tenant share. *window*: jobs for one model at once; for all models, twice as many."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._lines = asyncio.Semaphore(2 * window)
        self._models: dict[str | None, ModelSlots] = {}

    def of(self, model: str | None) -> ModelSlots:
        return self._models.setdefault(model, ModelSlots(self.window, self._lines))


class ModelSlots:
    """What a tenant's batches for one model share: a model that is unavailable holds up no other model's batches."""

    def __init__(self, window: int, all_lines: asyncio.Semaphore) -> None:
        self.window = window
        self.open = asyncio.Semaphore(MAX_OPEN)
        """For batches whose files are open."""
        self.closing = asyncio.Semaphore(MAX_OPEN)
        """For those that only have to close theirs: they need not wait for the others."""
        self.submitting = asyncio.Lock()
        """Of the lines that a full queue refuses, only the one that has it tries again."""
        self._lines = asyncio.Semaphore(window)
        self._all_lines = all_lines

    async def acquire(self, stop: StopSignal | None) -> bool:
        """Wait until a line may have a job. False if *stop* is requested first; without one, never."""
        if not await _acquire(self._lines, stop):
            return False
        taken = False
        try:
            taken = await _acquire(self._all_lines, stop)
        finally:
            if not taken:
                self._lines.release()
        return taken

    def release(self) -> None:
        self._lines.release()
        self._all_lines.release()


async def _acquire(semaphore: asyncio.Semaphore, stop: StopSignal | None) -> bool:
    return await semaphore.acquire() if stop is None else await stop.acquire(semaphore)


def spread(seconds: float) -> float:
    """About *seconds*: those who wait for the same thing don't come back together."""
    return seconds * random.uniform(0.75, 1.25)
