"""Several models on one machine: which are loaded, which wait, and who makes room.

Each model has one `Worker` from the moment it is loaded until it is unloaded. What is wanted is seen in the queue: jobs
stay queued while their model loads, so that any other worker that has it may take them. Under a memory budget a model
that is wanted takes the place of spares, then of the idle models that were not used for the longest time; of busy ones
only when its jobs have waited for `swap_after` seconds, so that neither starves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from penstock.core.errors import BrokerUnavailable, ModelLoadError, ModelNotFound, PenstockError
from penstock.core.ports import WORKER_STATES, Append, Broker, Engine, Finish, LoadProgress, QueueStats, WorkerInfo
from penstock.worker.worker import Worker, new_worker_id

log = structlog.get_logger("penstock.models")

#: Seconds between two looks: at the queue while some model is not loaded, else at what is idle.
LOOK = 0.2
#: Seconds between two measurements of the memory.
MEASURE = 5.0
#: How often loading a model is tried before its jobs fail, and the first pause between two attempts (s).
ATTEMPTS, BACKOFF = 3, 0.5
#: Seconds after which a model that could not be loaded is tried again when a job asks for it.
FAILED_FOR = 30.0
#: How long (s) jobs must have waited before a model is loaded that another worker has up, or is loading.
DEFER_READY, DEFER_LOADING = 2.0, 120.0
#: Jobs that are refused in one go.
REFUSED = 64


class Loadable(Protocol):
    """What is asked of an engine that can be unloaded, beyond running it (`penstock.engines.host.standby.Standby`)."""

    wanted: int
    """Spare processes that its operator wants."""
    used_at: float
    """When it last had work, by `time.monotonic`."""

    @property
    def spares(self) -> int:
        """How many spares are ready."""
        ...

    @property
    def held(self) -> int:
        """How many spares take memory."""
        ...

    async def keep(self, count: int) -> None:
        """Hold *count* spares from now on, at most ``wanted``."""
        ...

    def estimate(self) -> tuple[int, int]:
        """Bytes that a process with the model will hold: at least, and likely."""
        ...

    def measure(self) -> int:
        """Bytes that one process with the model holds; 0 while none is up. May be slow."""
        ...

    async def shut_down(self) -> None: ...


class Model:
    """One configured model and how it stands. *engine* is what its workers run: *process*, perhaps observed."""

    def __init__(self, name: str, engine: Engine, process: Loadable, *, on_demand: bool = False) -> None:
        self.name = name
        self.engine = engine
        self.process = process
        self.on_demand = on_demand
        """Loaded when it is wanted for the first time, not at the start."""
        self.about = WorkerInfo(id=new_worker_id(), on_demand=on_demand)
        """What is told of it beyond what its worker knows."""
        self.worker: Worker | None = None
        self.rest = "unloaded" if on_demand else "loading"
        """Its state while it has no worker."""
        self.fraction: float | None = None
        self.need = 0
        """Bytes that one process takes: estimated, and measured from the first load on."""
        self.ready_at = 0.0
        self.leaving = False
        self.too_large: ModelLoadError | None = None
        self.waiting_since: float | None = None
        self.elsewhere, self.elsewhere_since = "", 0.0
        """The best state that other workers had it in while jobs waited, and since when."""
        self.wished = False
        """Its operator wants it loaded, whether or not jobs wait."""
        self.emptied = False
        """Its operator wants its memory back: no spares either, until it is loaded again."""
        self.failures = 0
        self.try_at = 0.0
        self.changed = asyncio.Event()

    @property
    def state(self) -> str:
        return self.worker.info.state if self.worker is not None else self.rest

    @property
    def info(self) -> WorkerInfo:
        if self.worker is not None:
            return self.worker.info
        return msgspec.structs.replace(self.about, models=self.engine.models, slots=self.engine.slots, state=self.rest)

    @property
    def ready(self) -> bool:
        return self.state == "ready" and not self.leaving

    @property
    def held(self) -> int:
        """Bytes that are taken by it, or set aside for it."""
        return self.need * (self.process.held + (self.worker is not None))

    def tell(self, **facts: Any) -> None:
        """Change what is told of it, and wake whoever watches."""
        self.about = msgspec.structs.replace(self.about, **facts)
        if self.worker is not None:
            self.worker.about = self.about
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class ModelManager:
    """Runs workers for *models*. ``run`` returns after `stop`; to the operator it is the process's `ModelControl`."""

    def __init__(
        self,
        broker: Broker,
        models: Sequence[Model],
        make_worker: Callable[[Model, Callable[[], None]], Worker],
        *,
        memory_budget: int = 0,
        overhead: Callable[[], int] = lambda: 0,
        idle_unload: float = 0.0,
        swap_after: float = 30.0,
        heartbeat: float = 1.0,
        on_deferred: Callable[[str], None] = lambda model: None,
    ) -> None:
        """*make_worker* makes a worker that calls what it is given when it is up.

        *memory_budget*: bytes, 0 for none. *overhead*: bytes that no model holds (slow: called in a thread). Models on
        demand are unloaded after *idle_unload* idle seconds (0: never). Busy ones make room for a model whose jobs have
        waited for *swap_after* seconds. *on_deferred* is told of a model that does not fit beside others at the start.
        """
        self.models = {model.name: model for model in models}
        self._broker = broker
        self._make_worker = make_worker
        self._budget = memory_budget
        self._measure_overhead = overhead
        self._overhead = 0
        self._idle_unload = idle_unload
        self._swap_after = swap_after
        self._heartbeat = heartbeat
        self._on_deferred = on_deferred
        self._stopping = asyncio.Event()
        self._failure: ModelLoadError | None = None
        self._changed = asyncio.Event()
        self._measured_at = time.monotonic()
        self._serving: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------ life

    async def run(self) -> None:
        """Load what is to be loaded at the start, and work until `stop`. When that fails, stops by itself, and raises
        the `ModelLoadError`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                await self._begin()
                others = [
                    tasks.create_task(self._announce_loop(), name="models: announce"),
                    tasks.create_task(self._look_loop(), name="models: look"),
                ]
                await self._stopping.wait()
                for task in others:
                    task.cancel()
                await asyncio.wait(others)
                for model in self.models.values():
                    if model.worker is not None:
                        model.worker.stop()
                await asyncio.gather(*self._serving)
                if self._failure is not None:
                    raise self._failure
        finally:
            for model in self.models.values():
                await model.process.shut_down()

    async def stopped(self) -> None:
        """Returns when it is about to end, by `stop` or by itself: jobs get their time from here on."""
        await self._stopping.wait()

    def _give_up(self, error: ModelLoadError) -> None:
        """End, as `stop` does, with *error*."""
        self._failure = self._failure or error
        self.stop()

    def stop(self) -> None:
        self._stopping.set()
        for model in self.models.values():
            model.tell()

    @property
    def ready(self) -> bool:
        """Is every model up, or will be when it is wanted?"""
        if self._stopping.is_set():
            return False
        states = [(model.info.state_of(model.name), model.about.on_demand) for model in self.models.values()]
        return all(
            state == "ready" or (on_demand and state not in ("failed", "restarting", "unavailable"))
            for state, on_demand in states
        )

    async def _begin(self) -> None:
        for model in self.models.values():
            least, likely = await asyncio.to_thread(model.process.estimate)
            model.need = likely
            if self._budget and least > self._budget:
                model.too_large = self._too_large(model, least)
            if model.on_demand:
                continue
            if model.too_large is not None:
                self._give_up(model.too_large)
                return
            if self._fits(model):
                self._load(model)
                continue
            model.rest = "unloaded"
            model.tell(on_demand=True)
            log.warning("model_deferred", model=model.name, needs=model.need, free=self._free())
            self._on_deferred(model.name)

    # ------------------------------------------------------------------------------------ one model

    def _load(self, model: Model) -> None:
        model.emptied, model.waiting_since = False, None
        model.worker = self._make_worker(model, lambda: self._up(model))
        model.tell(detail="", error=None)
        task = self._tasks.create_task(self._serve(model, model.worker), name=f"model: {model.name}")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, model: Model, worker: Worker) -> None:
        """One life of a model, from loading to unloading."""
        log.info("model_loading", model=model.name)
        self._tasks.create_task(self._announce(model), name=f"announce: {model.name}")  # a store that is away may wait
        error = None
        try:
            await worker.run()
        except ModelLoadError as failure:
            error = failure
        model.worker, model.leaving, model.fraction = None, False, None
        model.rest = "unloaded"
        model.tell(detail="", memory=0)
        if error is not None and not model.about.on_demand:
            self._fail(model, error)
            self._give_up(error)
        elif error is not None:
            self._load_failed(model, error)
        elif model.too_large is not None:
            self._fail(model, model.too_large)
        elif not self._stopping.is_set():
            log.info("model_unloaded", model=model.name)
        await self._announce(model)
        self._changed.set()

    def _up(self, model: Model) -> None:
        model.ready_at = time.monotonic()
        model.wished, model.failures, model.fraction = False, 0, None
        at_start = not model.about.on_demand
        model.tell(on_demand=True, detail="")
        self._tasks.create_task(self._settle(model, at_start), name=f"measure: {model.name}")

    async def _settle(self, model: Model, at_start: bool) -> None:
        """It is loaded: see what it took."""
        await self._measure(model)
        log.info("model_loaded", model=model.name, memory=model.need)
        if self._budget and model.need > self._budget:
            model.too_large = self._too_large(model, model.need)
            if at_start:
                self._give_up(model.too_large)
            else:
                self._unload(model)
        self._changed.set()

    def _load_failed(self, model: Model, error: ModelLoadError) -> None:
        model.failures += 1
        if model.failures >= ATTEMPTS:
            self._fail(model, error)
            return
        pause = BACKOFF * 2 ** (model.failures - 1)
        model.try_at = time.monotonic() + pause
        model.tell(error=error.info, detail=f"loading it failed: tried again in {pause:.1f} s")
        log.warning("model_load_failed", model=model.name, error=error.message, retry_in=pause)

    def _fail(self, model: Model, error: ModelLoadError) -> None:
        """Its jobs fail from now on; after a while the next one makes it try again."""
        model.rest, model.wished = "failed", False
        model.failures, model.try_at = 0, time.monotonic() + FAILED_FOR
        model.tell(error=error.info, detail="")
        log.error("model_failed", model=model.name, error=error.message)

    def _unload(self, model: Model) -> None:
        if model.worker is not None and not model.leaving:
            log.info("model_unloading", model=model.name)
            model.leaving = True
            model.worker.stop("unloading")
            model.tell()

    # ------------------------------------------------------------------------------------ what is told

    async def _announce(self, model: Model) -> None:
        """Say how it stands, for as long as it has no worker that says so itself."""
        with contextlib.suppress(PenstockError):
            await self._broker.claim(model.info, [], 0, 0)

    async def _announce_loop(self) -> None:
        while True:
            for model in self.models.values():
                if model.worker is None or model.state == "loading":
                    await self._announce(model)
            await asyncio.sleep(self._heartbeat)

    def progress(self, name: str, what: str, fraction: float | None) -> None:
        """An engine tells how loading goes."""
        model = self.models[name]
        model.fraction = fraction
        model.tell(detail=what)

    # ------------------------------------------------------------------------------------ ModelControl

    def workers(self) -> list[WorkerInfo]:
        return [model.info for model in self.models.values()]

    def nudge(self, name: str) -> None:
        model = self.models.get(name)
        if model is not None and model.worker is None and model.waiting_since is None:
            self._changed.set()

    async def load(self, name: str) -> AsyncIterator[LoadProgress]:
        model = self._find(name)
        if not model.ready:
            if model.rest == "failed":
                model.rest = "unloaded"
            model.wished, model.try_at = model.worker is None or model.leaving, 0.0
            self._changed.set()
        async for progress in self._watch(model):
            yield progress
            if model.state == "failed" and model.about.error is not None:
                raise ModelLoadError(model.about.error.message)
            if model.ready:
                return

    async def unload(self, name: str) -> AsyncIterator[LoadProgress]:
        model = self._find(name)
        model.wished, model.emptied = False, True
        worker = model.worker
        self._unload(model)
        await model.process.keep(0)
        async for progress in self._watch(model):
            yield progress
            if worker is None or model.worker is not worker:  # where jobs wait, it is loaded again at once
                return

    async def _watch(self, model: Model) -> AsyncIterator[LoadProgress]:
        told = None
        while not self._stopping.is_set():
            changed = model.changed
            now = LoadProgress(model.state, model.about.detail, model.fraction)
            if now != told:
                yield now
                told = now
            with contextlib.suppress(TimeoutError):  # not everything that changes a worker's state says so
                async with asyncio.timeout(LOOK):
                    await changed.wait()
        raise BrokerUnavailable("The server is shutting down. Try again in a moment.", retry_after=2.0)

    def _find(self, name: str) -> Model:
        if name not in self.models:
            raise ModelNotFound(
                f"This process has no model {name!r}. It has: {', '.join(self.models)}. If another worker has it, ask "
                "that one.",
                param="model",
            )
        return self.models[name]

    # ------------------------------------------------------------------------------------ who is loaded

    async def _look_loop(self) -> None:
        while True:
            self._changed.clear()
            await self._look()
            dormant = any(model.worker is None for model in self.models.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK if dormant else 1.0):
                    await self._changed.wait()

    async def _look(self) -> None:
        now = time.monotonic()
        if self._budget and now - self._measured_at > MEASURE:
            self._measured_at = now
            self._overhead = await asyncio.to_thread(self._measure_overhead)
            for model in self.models.values():
                await self._measure(model)
        queue = await self._queue() if any(model.worker is None for model in self.models.values()) else None
        waiting = self._waiting(queue, now)
        for model in waiting:
            if model.too_large is not None and model.state != "failed":
                self._fail(model, model.too_large)
            if model.state == "failed":
                await self._refuse(model, queue)
            elif self._fits(model) or await self._make_room(model, queue, now):
                self._load(model)
        for model in self.models.values():
            idle = now - max(model.process.used_at, model.ready_at)
            if self._idle_unload and model.on_demand and self._idle(model, queue) and idle > self._idle_unload:
                self._unload(model)
        if all(model.state == "failed" for model in waiting):
            await self._shrink(queue)
            await self._keep_spares()

    async def _queue(self) -> QueueStats | None:
        try:
            return await self._broker.stats()
        except PenstockError:
            return None

    def _waiting(self, queue: QueueStats | None, now: float) -> list[Model]:
        """The unloaded models that are to be loaded (or refused) now, those first that wait longest."""
        found = []
        for model in self.models.values():
            if model.worker is not None:
                continue
            if not model.wished and (queue is None or not _depth(queue, model.name)):
                if model.waiting_since is not None and queue is not None:
                    model.waiting_since = None
                    model.tell(detail="")
                continue
            if model.waiting_since is None:
                model.waiting_since = now
            if model.state == "failed":
                if now >= model.try_at:
                    model.rest = "unloaded"
                found.append(model)
            elif now >= model.try_at and (model.wished or not self._deferred(model, queue, now)):
                found.append(model)
        return sorted(found, key=lambda model: (not model.wished, model.waiting_since))

    def _deferred(self, model: Model, queue: QueueStats | None, now: float) -> bool:
        """Is it left to another worker for now? One may be about to take the jobs, and of several that could load the
        model one is enough to begin with."""
        others = _elsewhere(queue, model) if queue is not None else []
        states = {state for state, _ in others}
        state = next((state for state in WORKER_STATES if state in states), "")
        if state != model.elsewhere:
            model.elsewhere, model.elsewhere_since = state, now
        if state == "loading":
            pause = DEFER_LOADING
        elif state in ("ready", "restarting"):
            pause = DEFER_READY
        else:
            pause = 2 * LOOK * sum(state == "unloaded" and id < model.about.id for state, id in others)
        assert model.waiting_since is not None
        return now - max(model.waiting_since, model.elsewhere_since) < pause

    async def _refuse(self, model: Model, queue: QueueStats | None) -> None:
        """End the jobs of a model that cannot be loaded, unless another worker may have it."""
        if queue is None or any(state != "failed" for state, _ in _elsewhere(queue, model)):
            return
        error = model.about.error
        assert error is not None
        with contextlib.suppress(PenstockError):
            leases = await self._broker.claim(model.info, [model.name], REFUSED, 0)
            finish = Finish(error=error)
            await self._broker.append([Append(lease.key, len(lease.ids) + 1, finish=finish) for lease in leases])

    # ------------------------------------------------------------------------------------ memory

    def _free(self) -> int:
        return self._budget - self._overhead - sum(model.held for model in self.models.values())

    def _fits(self, model: Model) -> bool:
        return not self._budget or model.process.spares > 0 or self._wanted(model) <= self._free()

    def _wanted(self, model: Model) -> int:
        """What is made free for it: an estimate may say more than there can be."""
        return max(0, min(model.need, self._budget - self._overhead))

    async def _make_room(self, model: Model, queue: QueueStats | None, now: float) -> bool:
        """Give up spares and begin to unload others until *model* fits; does it fit now?"""
        others = [other for other in self._least_recent() if other is not model]
        missing = await self._drop_spares(self._wanted(model) - self._free() - self._leaving(), others)
        if self._fits(model):
            return True
        assert model.waiting_since is not None
        victims = [other for other in others if self._idle(other, queue)]
        if now - model.waiting_since >= self._swap_after:
            busy = (other for other in others if other.ready and now - other.ready_at >= self._swap_after)
            victims += sorted((other for other in busy if other not in victims), key=lambda other: other.ready_at)
        if sum(victim.need for victim in victims) >= missing:  # else nobody would be helped
            self._unload_until(missing, victims)
        names = ", ".join(other.name for other in others if other.worker is not None)
        waits = f"waits for memory: it needs {_size(model.need)}, and {names} hold the budget of {_size(self._budget)}"
        if model.about.detail != waits:
            model.tell(detail=waits)
        return False

    async def _shrink(self, queue: QueueStats | None) -> None:
        """Come back into the budget, where a model took more than was expected or has grown."""
        excess = -self._free() - self._leaving()
        if self._budget and excess > 0:
            models = self._least_recent()
            excess = await self._drop_spares(excess, models)
            self._unload_until(excess, [model for model in models if self._idle(model, queue)])

    def _least_recent(self) -> list[Model]:
        return sorted(self.models.values(), key=lambda model: model.process.used_at)

    def _leaving(self) -> int:
        """Bytes that are about to be free."""
        return sum(model.need for model in self.models.values() if model.leaving)

    async def _drop_spares(self, missing: int, models: Sequence[Model]) -> int:
        """End spares until *missing* bytes are free; how many are missing then."""
        for model in models:
            if missing > 0 and model.process.held:
                missing -= model.need * model.process.held
                await model.process.keep(0)
        return missing

    def _unload_until(self, missing: int, models: Sequence[Model]) -> None:
        for model in models:
            if missing > 0:
                missing -= model.need
                self._unload(model)

    def _idle(self, model: Model, queue: QueueStats | None) -> bool:
        if model.worker is None or model.worker.busy or not model.ready:
            return False
        return queue is None or not _depth(queue, model.name)

    async def _keep_spares(self) -> None:
        """Hold the spares that are wanted, as far as there is room."""
        for model in self.models.values():
            process = model.process
            if not process.wanted:
                continue
            count = process.wanted
            if model.emptied or not (model.on_demand or model.ready_at) or model.state == "failed":
                count = 0
            elif self._budget and model.need:
                count = min(count, process.held + max(0, self._free()) // model.need)
            await process.keep(count)
            if model.about.standby != process.spares:
                model.tell(standby=process.spares)

    async def _measure(self, model: Model) -> None:
        if measured := await asyncio.to_thread(model.process.measure):
            model.need = measured
            model.tell(memory=model.held)

    def _too_large(self, model: Model, need: int) -> ModelLoadError:
        return ModelLoadError(
            f"The model {model.name!r} needs {_size(need)} of memory, and memory_budget is {_size(self._budget)}: "
            "raise it, or serve a smaller model."
        )


def _depth(queue: QueueStats, model: str) -> int:
    return sum(count for (name, _), count in queue.depth.items() if name == model)


def _elsewhere(queue: QueueStats, model: Model) -> list[tuple[str, str]]:
    """(state, id) of the other live workers that have *model* loaded or can load it."""
    return [
        (worker.state, worker.id)
        for worker in queue.workers
        if worker.id != model.about.id and any(info.name == model.name for info in worker.models)
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
