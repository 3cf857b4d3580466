"""The models of one machine: runs a worker for each that is loaded, and does what the placement says.

Each model has one `Worker` from the moment it is loaded until it is unloaded. What is wanted is seen in the queue: jobs
stay queued while their model loads, so that any other worker that has it may take them. Who is loaded, who waits and
who makes room is decided in `penstock.worker.placement`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from penstock.core.aio import wait_for_event
from penstock.core.errors import BrokerUnavailable, ModelLoadError, ModelNotFound, PenstockError
from penstock.core.ports import (
    Append,
    Broker,
    Clock,
    Engine,
    Finish,
    LoadProgress,
    QueueStats,
    SystemClock,
    WorkerInfo,
)
from penstock.worker.placement import (
    Action,
    Fail,
    KeepSpares,
    Load,
    Memory,
    ModelState,
    Phase,
    Policy,
    Refuse,
    Unload,
    Wait,
    plan,
    plan_start,
    too_large,
)
from penstock.worker.worker import Worker, new_worker_id

log = structlog.get_logger("penstock.models")

#: Seconds between two measurements of the memory.
MEASURE_INTERVAL = 5.0
#: Jobs that are refused in one go.
REFUSED = 64


class Loadable(Protocol):
    """What is asked of an engine that can be unloaded, beyond running it (`penstock.engines.host.standby.Standby`)."""

    wanted: int
    """Spare processes that its operator wants."""

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
    """One configured model. *engine* is what its workers run: *process*, perhaps observed."""

    def __init__(self, name: str, engine: Engine, process: Loadable, *, on_demand: bool = False) -> None:
        """*on_demand*: it is loaded when it is wanted for the first time, not at the start."""
        self.name = name
        self.engine = engine
        self.process = process
        self.about = WorkerInfo(id=new_worker_id(), on_demand=on_demand)
        """What is told of it beyond what its worker knows."""
        adapters = tuple(info.name for info in engine.models if info.parent)
        self.state = ModelState(
            name=name, adapters=adapters, id=self.about.id, on_demand=on_demand, required=not on_demand
        )
        self.worker: Worker | None = None
        self.fraction: float | None = None
        """How much of its load is done."""
        self.changed = asyncio.Event()

    @property
    def info(self) -> WorkerInfo:
        if self.worker is not None:
            return self.worker.info
        state = "loading" if self.state.required else self.state.phase.value
        return msgspec.structs.replace(self.about, models=self.engine.models, slots=self.engine.slots, state=state)

    @property
    def ready(self) -> bool:
        return self.state.phase is Phase.READY and self.info.state == "ready"

    def observe(self, queue: QueueStats | None, now: float) -> None:
        """Bring its state up to date with its worker, its spares and *queue*."""
        waited = self.state.waiting_since is not None
        self.state = msgspec.structs.replace(
            self.state,
            spares=self.process.spares,
            held_spares=self.process.held,
            wanted_spares=self.process.wanted,
            busy=self.worker is not None and (self.worker.busy or self.info.state != "ready"),
            used_at=max(self.state.used_at, self.worker.used_at if self.worker is not None else 0.0),
        ).seen(queue, now)
        if waited and self.state.waiting_since is None:
            self.report(detail="")
        if self.about.standby != self.process.spares:
            self.report(standby=self.process.spares)

    def report(self, **facts: Any) -> None:
        """Change what others are told of it, and wake whoever watches."""
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
        policy: Policy | None = None,
        heartbeat: float = 1.0,
        clock: Clock | None = None,
        on_deferred: Callable[[str], None] = lambda model: None,
    ) -> None:
        """*make_worker* makes a worker that calls what it is given when it is up.

        *memory_budget*: bytes, 0 for none. *overhead*: bytes that no model holds (slow: called in a thread).
        *on_deferred* is told of a model that does not fit beside others at the start.
        """
        self.models = {model.name: model for model in models}
        self._by_name = self.models | {name: model for model in models for name in model.state.adapters}
        self._broker = broker
        self._make_worker = make_worker
        self._memory = Memory(memory_budget)
        self._measure_overhead = overhead
        self._policy = policy or Policy()
        self._heartbeat = heartbeat
        self._clock = clock or SystemClock()
        self._on_deferred = on_deferred
        self._stopping = asyncio.Event()
        self._failure: ModelLoadError | None = None
        self._changed = asyncio.Event()
        """Set whenever there may be something to decide."""
        self._measured_at = self._clock.now()
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
                    tasks.create_task(self._reconcile_loop(), name="models: reconcile"),
                ]
                await self._stopping.wait()
                for task in others:
                    task.cancel()
                await asyncio.wait(others)
                for model in self.models.values():
                    self._end_worker(model, "draining")
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
            model.report()

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
            model.state = msgspec.structs.replace(model.state, least=least, need=likely)
        for action in plan_start([model.state for model in self.models.values()], self._memory):
            if isinstance(action, Fail):
                self._give_up(self._too_large(self.models[action.model]))
                return
            self._load(self.models[action.model])
        for model in self.models.values():
            if model.state.required and model.worker is None:
                model.state = msgspec.structs.replace(model.state, required=False)
                model.report(on_demand=True)
                log.warning("model_deferred", model=model.name, needs=model.state.need)
                self._on_deferred(model.name)

    # ------------------------------------------------------------------------------------ look, decide, do

    async def _reconcile_loop(self) -> None:
        while True:
            self._changed.clear()
            await self._reconcile()
            pause = self._policy.poll_interval if self._some_unloaded() else self._policy.all_loaded_interval
            await wait_for_event(self._changed, pause)

    async def _reconcile(self) -> None:
        if self._memory.budget and self._clock.now() - self._measured_at > MEASURE_INTERVAL:
            self._measured_at = self._clock.now()
            self._memory = Memory(self._memory.budget, await asyncio.to_thread(self._measure_overhead))
            for model in self.models.values():
                await self._measure(model)
        queue = await self._queue() if self._some_unloaded() else None
        now = self._clock.now()
        for model in self.models.values():
            model.observe(queue, now)
        states = [model.state for model in self.models.values()]
        for action in plan(states, queue, self._memory, now, self._policy):
            await self._execute(action)

    async def _execute(self, action: Action) -> None:
        model = self.models[action.model]
        match action:
            case Load():
                self._load(model)
            case Unload():
                self._unload(model)
            case KeepSpares(count=count):
                await model.process.keep(count)
            case Refuse():
                await self._refuse(model)
            case Fail():
                model.state = model.state.failed(self._clock.now(), self._policy)
                self._report_failure(model, self._too_large(model))
            case Wait(holders=holders):
                need, budget = _size(model.state.need), _size(self._memory.budget)
                why = f"waits for memory: it needs {need}, and {', '.join(holders)} hold the budget of {budget}"
                if model.about.detail != why:
                    model.report(detail=why)

    def _some_unloaded(self) -> bool:
        return any(model.worker is None for model in self.models.values())

    async def _queue(self) -> QueueStats | None:
        try:
            return await self._broker.stats()
        except PenstockError:
            return None

    async def _refuse(self, model: Model) -> None:
        """End the jobs that wait for a model that cannot be loaded."""
        error = model.about.error
        assert error is not None
        with contextlib.suppress(PenstockError):
            leases = await self._broker.claim(model.info, [model.name, *model.state.adapters], REFUSED, 0)
            finish = Finish(error=error)
            await self._broker.append([Append(lease.key, len(lease.ids) + 1, finish=finish) for lease in leases])

    # ------------------------------------------------------------------------------------ one model's life

    def _load(self, model: Model) -> None:
        model.state = model.state.loading(self._clock.now())
        model.worker = self._make_worker(model, lambda: self._up(model))
        model.report(detail="", error=None)
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
        model.observe(None, self._clock.now())
        model.worker, model.fraction = None, None
        self._ended(model, error)
        await self._announce(model)
        self._changed.set()

    def _ended(self, model: Model, error: ModelLoadError | None) -> None:
        """Its worker has ended: it was unloaded, or could not be loaded because of *error*."""
        now, required = self._clock.now(), model.state.required
        if error is None:
            model.state = model.state.ended(self._memory, now, self._policy)
        else:
            model.state = model.state.load_failed(now, self._policy)
        if model.state.phase is Phase.FAILED:
            error = error or self._too_large(model)
            self._report_failure(model, error)
            if required:
                self._give_up(error)
        elif error is not None:
            pause = model.state.retry_at - now
            model.report(error=error.info, detail=f"loading it failed: tried again in {pause:.1f} s", memory=0)
            log.warning("model_load_failed", model=model.name, error=error.message, retry_in=pause)
        else:
            model.report(detail="", memory=0)
            if not self._stopping.is_set():  # else it goes with all others
                log.info("model_unloaded", model=model.name)

    def _report_failure(self, model: Model, error: ModelLoadError) -> None:
        model.report(error=error.info, detail="", memory=0)
        log.error("model_failed", model=model.name, error=error.message)

    def _up(self, model: Model) -> None:
        if model.state.phase is not Phase.LOADING:
            return  # it is to be unloaded again already
        at_start = model.state.required
        model.state = model.state.loaded(self._clock.now())
        model.fraction = None
        model.report(on_demand=True, detail="")
        self._tasks.create_task(self._settle(model, at_start), name=f"measure: {model.name}")

    async def _settle(self, model: Model, at_start: bool) -> None:
        """It is loaded: see what it took."""
        await self._measure(model)
        log.info("model_loaded", model=model.name, memory=model.state.need)
        model.state = msgspec.structs.replace(model.state, least=model.state.need)
        if too_large(model.state, self._memory):
            if at_start:
                self._give_up(self._too_large(model))
            else:
                self._unload(model)
        self._changed.set()

    def _unload(self, model: Model) -> None:
        if self._end_worker(model, "unloading"):
            log.info("model_unloading", model=model.name)
            model.report()

    def _end_worker(self, model: Model, as_state: str) -> bool:
        """Let its worker end; False if it has none, or is about to."""
        if model.worker is None or model.state.phase is Phase.UNLOADING:
            return False
        model.state = model.state.to(Phase.UNLOADING)
        model.worker.stop(as_state)
        return True

    async def _measure(self, model: Model) -> None:
        if measured := await asyncio.to_thread(model.process.measure):
            model.state = msgspec.structs.replace(model.state, need=measured)
            model.report(memory=model.state.held)

    def _too_large(self, model: Model) -> ModelLoadError:
        return ModelLoadError(
            f"The model {model.name!r} needs {_size(model.state.least)} of memory, and memory_budget is "
            f"{_size(self._memory.budget)}: raise it, or serve a smaller model."
        )

    # ------------------------------------------------------------------------------------ what is told

    async def _announce(self, model: Model) -> None:
        """Say how it stands, for as long as it has no worker that says so itself."""
        with contextlib.suppress(PenstockError):
            await self._broker.register(model.info)

    async def _announce_loop(self) -> None:
        while True:
            for model in self.models.values():
                if model.worker is None or model.info.state == "loading":
                    await self._announce(model)
            await asyncio.sleep(self._heartbeat)

    def progress(self, name: str, what: str, fraction: float | None) -> None:
        """An engine tells how loading goes."""
        model = self.models[name]
        model.fraction = fraction
        model.report(detail=what)

    # ------------------------------------------------------------------------------------ ModelControl

    def workers(self) -> list[WorkerInfo]:
        return [model.info for model in self.models.values()]

    def notify(self, name: str) -> None:
        model = self._by_name.get(name)
        if model is not None and model.worker is None and model.state.waiting_since is None:
            self._changed.set()

    async def load(self, name: str) -> AsyncIterator[LoadProgress]:
        model = self._find(name)
        if not model.ready:
            state = model.state.to(Phase.UNLOADED) if model.state.phase is Phase.FAILED else model.state
            under_way = state.phase in (Phase.LOADING, Phase.READY)
            model.state = msgspec.structs.replace(state, requested=not under_way, retry_at=0.0)
            self._changed.set()
        async for progress in self._watch(model):
            yield progress
            if model.state.phase is Phase.FAILED and model.about.error is not None:
                raise ModelLoadError(model.about.error.message)
            if model.ready:
                return

    async def unload(self, name: str) -> AsyncIterator[LoadProgress]:
        model = self._find(name)
        model.state = msgspec.structs.replace(model.state, requested=False, emptied=True)
        worker = model.worker
        self._unload(model)
        await model.process.keep(0)
        async for progress in self._watch(model):
            yield progress
            if worker is None or model.worker is not worker:  # where jobs wait, it is loaded again at once
                return

    async def _watch(self, model: Model) -> AsyncIterator[LoadProgress]:
        reported = None
        while not self._stopping.is_set():
            changed = model.changed
            now = LoadProgress(model.info.state, model.about.detail, model.fraction)
            if now != reported:
                yield now
                reported = now
            await wait_for_event(changed, self._policy.poll_interval)  # not all that changes a worker's state says so
        raise BrokerUnavailable("The server is shutting down. Try again in a moment.", retry_after=2.0)

    def _find(self, name: str) -> Model:
        if name not in self._by_name:
            raise ModelNotFound(
                f"This process has no model {name!r}. It has: {', '.join(self.models)}. If another worker has it, ask "
                "that one.",
                param="model",
            )
        return self._by_name[name]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
