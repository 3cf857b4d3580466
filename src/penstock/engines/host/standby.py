"""Engine processes kept ready: spares with the model loaded, and processes that only lack one.

`Standby` is an `Engine` over several `EngineProcess`es of one model. One of them is active; when it dies, or when a
model that was unloaded is wanted, ``start`` swaps in a spare at once. `WarmPool` has children whose engine library is
imported already, so that loading any model of that engine costs its weights only.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from penstock.core.aio import Backoff, wait_for_event
from penstock.core.errors import ModelLoadError
from penstock.core.ports import Lease, ModelInfo, Output
from penstock.core.telemetry import Telemetry
from penstock.engines.adapters import adapter_names, served
from penstock.engines.frames import Progress
from penstock.engines.host.memory import estimate, held_by
from penstock.engines.host.process import NO_TELEMETRY, Child, EngineProcess, EngineSpec

#: Seconds after a swap before the next spare is loaded: the jobs that were interrupted come first.
SETTLE = 2.0
#: How often spares are looked after, in seconds.
LOOK = 1.0
#: Longest pause between attempts to load a spare, in seconds.
MAX_BACKOFF = 60.0


class WarmPool:
    """Children without a model, *size* for each engine. `take` never waits longer than starting a new one takes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._children: defaultdict[str, list[Child]] = defaultdict(list)
        self._filling: dict[str, asyncio.Task[None]] = {}

    async def take(self, engine: str) -> Child:
        """A child for *engine*: a warm one if there is one."""
        children = self._children[engine]
        while children:
            child = children.pop(0)
            if child.alive:
                return child
            await child.kill()
        return await Child.spawn(engine)

    def fill(self, engine: str) -> None:
        """Start what is missing, in the background (best after a load, which wants the processors for itself)."""
        task = self._filling.get(engine)
        if self._size and (task is None or task.done()):
            self._filling[engine] = asyncio.create_task(self._fill(engine), name=f"warm pool: {engine}")

    async def _fill(self, engine: str) -> None:
        children = self._children[engine]
        for dead in [child for child in children if not child.alive]:
            children.remove(dead)
            await dead.kill()
        while len(children) < self._size:
            children.append(await Child.spawn(engine))

    def measure(self) -> int:
        """Bytes that all of them hold. For a thread."""
        children = [child for children in list(self._children.values()) for child in children]
        return sum(held_by(child.process.pid) for child in children if child.alive)

    async def aclose(self) -> None:
        for task in self._filling.values():
            task.cancel()
        await asyncio.gather(*self._filling.values(), return_exceptions=True)
        for child in [child for children in self._children.values() for child in children]:
            await child.kill()
        self._children.clear()


class Standby:
    """`penstock.core.ports.Engine` of one model over an active process and up to *wanted* spares.

    *make* makes a process, *warm* has children to load in. ``close`` ends the active process only: spares outlive it,
    so that an unloaded model is back at once; `shut_down` ends everything.
    """

    def __init__(
        self,
        spec: EngineSpec,
        make: Callable[[], EngineProcess],
        *,
        wanted: int = 0,
        warm: WarmPool | None = None,
        on_progress: Progress = lambda what, fraction: None,
        telemetry: Telemetry = NO_TELEMETRY,
    ) -> None:
        self.spec = spec
        self.wanted = wanted
        self._make = make
        self._warm = warm
        self._on_progress = on_progress
        self._telemetry = telemetry
        self._active = make()
        self._spares: list[EngineProcess] = []
        self._loading = 0
        self._keep = 0
        self._quiet_until = 0.0
        self._filler: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        unloaded = ModelInfo(name=spec.model, engine=spec.engine, context_length=0)
        self._unloaded = served(unloaded, adapter_names(spec.options))

    # ------------------------------------------------------------------------------------ Engine

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """What is known of the model: before it was ever loaded, not more than its name and engine."""
        processes = (self._active, *self._spares)
        return next((process.models for process in processes if process.models), self._unloaded)

    @property
    def slots(self) -> int:
        return self._active.slots

    async def start(self) -> None:
        """Make a spare the active process, or load the model. Raises `ModelLoadError`."""
        spare = next((spare for spare in self._spares if spare.alive), None)
        if spare is not None:
            self._spares.remove(spare)
            self._quiet_until = time.monotonic() + SETTLE
            dead, self._active = self._active, spare
            self._changed.set()
            await dead.close()
            self._telemetry.event("engine.spare_taken", model=self.spec.model, left=len(self._spares))
            return
        self._active.on_progress = self._on_progress
        try:
            await self._active.start()
        finally:
            if self._warm is not None:
                self._warm.fill(self.spec.engine)

    def add(self, key: int, lease: Lease) -> None:
        self._active.add(key, lease)

    def abort(self, key: int) -> None:
        self._active.abort(key)

    async def step(self) -> list[Output]:
        return await self._active.step()

    async def close(self) -> None:
        await self._active.close()

    # ------------------------------------------------------------------------------------ spares

    @property
    def spares(self) -> int:
        """How many are ready."""
        return sum(spare.alive for spare in self._spares)

    @property
    def held(self) -> int:
        """How many spares take memory: those that are ready, and one that is being loaded."""
        return len(self._spares) + self._loading

    async def keep(self, count: int) -> None:
        """Hold *count* spares (at most `wanted`) from now on: those too many are ended before this returns, those
        missing are loaded in the background, one at a time."""
        self._keep = min(count, self.wanted)
        if self._loading and self.held > self._keep:
            await self._stop_filling()
        while len(self._spares) > self._keep:
            await self._spares.pop().close()
        if self._keep and self._filler is None:
            self._filler = asyncio.create_task(self._fill(), name=f"standby: {self.spec.model}")
        self._changed.set()

    async def shut_down(self) -> None:
        await self.keep(0)
        await self._stop_filling()
        await self.close()

    async def _stop_filling(self) -> None:
        if self._filler is not None:
            self._filler.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._filler
            self._filler = None

    async def _fill(self) -> None:
        backoff = Backoff(LOOK, MAX_BACKOFF, jitter=0)
        while True:
            for dead in [spare for spare in self._spares if not spare.alive]:
                self._spares.remove(dead)
                await dead.close()
            pause = max(LOOK, self._quiet_until - time.monotonic())
            if len(self._spares) < self._keep and time.monotonic() >= self._quiet_until:
                try:
                    await self._load_spare()
                    backoff.reset()
                    continue
                except ModelLoadError as error:
                    pause = backoff.next()
                    self._telemetry.event(
                        "engine.spare_failed", model=self.spec.model, error=error.message, retry_in=pause
                    )
            self._changed.clear()
            await wait_for_event(self._changed, pause)

    async def _load_spare(self) -> None:
        spare = self._make()
        self._loading += 1
        try:
            await spare.start()
            self._spares.append(spare)
        finally:
            self._loading -= 1

    # ------------------------------------------------------------------------------------ memory

    def estimate(self) -> tuple[int, int]:
        """Bytes that a process with this model will hold: at least, and likely."""
        return estimate(self.spec)

    def measure(self) -> int:
        """Bytes that its largest process holds, spares included; 0 while none is up. For a thread."""
        return max((held_by(pid) for pid in self._pids()), default=0)

    def _pids(self) -> Iterable[int]:
        return [process.pid for process in (self._active, *self._spares) if process.alive and process.pid]
