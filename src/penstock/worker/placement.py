"""Which models are loaded, decided: a pure function of how each stands, of the queue, the memory and the time.

`plan` says what to do now; `penstock.worker.manager` does it, and asks again a moment later. A model is wanted when
jobs wait for it, or when its operator says so. To make room for one, spare processes go first, then the idle models
that were not used for the longest time; busy ones only when its jobs have waited for `Policy.swap_after` seconds. From
then on no model that began to wait later may take memory that comes free, so that every one gets its turn.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from penstock.core.aio import Backoff
from penstock.core.ports import WORKER_STATES, QueueStats


class Phase(enum.StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"

    @property
    def loaded(self) -> bool:
        """Has it a worker, whose engine process takes memory?"""
        return self in (Phase.LOADING, Phase.READY, Phase.UNLOADING)


#: Every legal move (drawn in docs/state-machine.md).
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.UNLOADED: frozenset({Phase.LOADING, Phase.FAILED}),
    # Unloaded: it is tried again in a moment. Failed: it was tried often enough.
    Phase.LOADING: frozenset({Phase.READY, Phase.UNLOADING, Phase.UNLOADED, Phase.FAILED}),
    Phase.READY: frozenset({Phase.UNLOADING}),
    Phase.UNLOADING: frozenset({Phase.UNLOADED, Phase.FAILED}),
    Phase.FAILED: frozenset({Phase.UNLOADED}),
}


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's numbers, which have a description, and ours. Times in seconds."""

    idle_unload: Annotated[
        float,
        Meta(ge=0, description="Seconds without a job after which a model on demand is unloaded; 0: never."),
    ] = 0.0
    swap_after: Annotated[
        float,
        Meta(ge=0, description="Seconds that jobs wait for memory before a busy model makes room for theirs."),
    ] = 30.0
    """… once that is up for as long."""
    poll_interval: float = 0.2
    """Between two decisions while some model is not loaded, …"""
    all_loaded_interval: float = 1.0
    """… and while all are."""
    attempts: int = 3
    """How often loading a model is tried before its jobs fail."""
    first_retry: float = 0.5
    """The pause after the first failure; it doubles."""
    failed_for: float = 30.0
    """After this a model that could not be loaded is tried again, when a job asks for it."""
    defer_ready: float = 2.0
    """How long jobs must have waited before a model is loaded that another worker has up, …"""
    defer_loading: float = 120.0
    """… or that another worker is loading."""


class Memory(msgspec.Struct, frozen=True):
    """Bytes: what all engine processes may hold (0: no limit), and what is held already by others than the models."""

    budget: int = 0
    overhead: int = 0


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """How a model stands. Times are the manager's clock's."""

    name: str
    adapters: tuple[str, ...] = ()
    """The names under which jobs ask for it too."""
    id: str = ""
    """Its worker's."""
    phase: Phase = Phase.UNLOADED
    on_demand: bool = False
    """Its operator lets it be unloaded when it is idle."""
    required: bool = False
    """It is to be loaded at the start, and has not been yet: the process ends when that fails."""
    requested: bool = False
    """Its operator wants it loaded, whether or not jobs wait."""
    emptied: bool = False
    """Its operator wants its memory back: no spares either, until it is loaded again."""
    need: int = 0
    """Bytes that one process takes: estimated, and measured from the first load on."""
    least: int = 0
    """Bytes that one takes at least."""
    spares: int = 0
    """Spare processes that are ready."""
    held_spares: int = 0
    """Spare processes that take memory: also one that is being loaded."""
    wanted_spares: int = 0
    from_spare: bool = False
    """A spare was ready when its latest load was decided."""
    busy: bool = False
    """It has jobs, or its engine is being restarted."""
    used_at: float = 0.0
    """When it last had work."""
    ready_at: float | None = None
    """When it was last loaded."""
    waiting_since: float | None = None
    """Since when it is wanted while it is not loaded."""
    elsewhere: str = ""
    """The best state that other workers have it in while it waits, …"""
    elsewhere_since: float = 0.0
    """… and since when."""
    failures: int = 0
    """Loads that failed in a row."""
    retry_at: float = 0.0
    """When it may be loaded again."""

    @property
    def held(self) -> int:
        """Bytes that are taken by it, or set aside for it."""
        return self.need * (self.held_spares + self.phase.loaded - self.takes_spare)

    @property
    def takes_spare(self) -> bool:
        """Is one of its spares about to become its process?"""
        return self.phase is Phase.LOADING and self.from_spare and self.spares > 0

    # ------------------------------------------------------------------------------------ moves

    def to(self, phase: Phase, **changes: Any) -> ModelState:
        if phase not in TRANSITIONS[self.phase]:
            raise ValueError(f"{self.name} cannot go from {self.phase} to {phase}")
        return msgspec.structs.replace(self, phase=phase, **changes)

    def loading(self, now: float) -> ModelState:
        return self.to(Phase.LOADING, emptied=False, waiting_since=None, used_at=now, from_spare=self.spares > 0)

    def loaded(self, now: float) -> ModelState:
        return self.to(Phase.READY, required=False, requested=False, failures=0, ready_at=now)

    def ended(self, memory: Memory, now: float, policy: Policy) -> ModelState:
        """Its worker has ended without a failure."""
        unloaded = self.to(Phase.UNLOADED)
        return unloaded.failed(now, policy) if too_large(self, memory) else unloaded

    def load_failed(self, now: float, policy: Policy) -> ModelState:
        """It is tried again after a pause, a few times."""
        failures = self.failures + 1
        if self.required or failures >= policy.attempts:
            return self.failed(now, policy)
        pause = Backoff(policy.first_retry, policy.failed_for, jitter=0).after(failures)
        return self.to(Phase.UNLOADED, failures=failures, retry_at=now + pause)

    def failed(self, now: float, policy: Policy) -> ModelState:
        """Its jobs fail from now on; after a while the next one makes it try again."""
        return self.to(Phase.FAILED, requested=False, failures=0, retry_at=now + policy.failed_for)

    def seen(self, queue: QueueStats | None, now: float) -> ModelState:
        """After a look at *queue* (None: it could not be seen): does it wait, and how do other workers have it?"""
        if self.phase.loaded or (queue is None and not self.requested):
            return self
        if not _wanted(self, queue):
            return msgspec.structs.replace(self, waiting_since=None)
        model = self.to(Phase.UNLOADED) if self.phase is Phase.FAILED and now >= self.retry_at else self
        if model.waiting_since is None:
            model = msgspec.structs.replace(model, waiting_since=now)
        states = {state for state, _ in _elsewhere(model, queue)}
        best = next((state for state in WORKER_STATES if state in states), "")
        if best != model.elsewhere:
            model = msgspec.structs.replace(model, elsewhere=best, elsewhere_since=now)
        return model


# ---------------------------------------------------------------------------------------------- what to do


class Load(msgspec.Struct, frozen=True):
    model: str


class Unload(msgspec.Struct, frozen=True):
    """Jobs that it runs end, or are given back."""

    model: str


class KeepSpares(msgspec.Struct, frozen=True):
    """Hold so many spares from now on. Those too many are ended before anything else is done."""

    model: str
    count: int


class Refuse(msgspec.Struct, frozen=True):
    """End the jobs that wait for it with what its load failed with."""

    model: str


class Fail(msgspec.Struct, frozen=True):
    """It can never be loaded: it needs more than the whole budget."""

    model: str


class Wait(msgspec.Struct, frozen=True):
    """There is no room for it yet: these models hold the memory."""

    model: str
    holders: tuple[str, ...]


Action = Load | Unload | KeepSpares | Refuse | Fail | Wait


def plan(
    models: Sequence[ModelState], queue: QueueStats | None, memory: Memory, now: float, policy: Policy
) -> list[Action]:
    """What to do now, to be done in this order. *models* have `seen` *queue*."""
    return _Plan(models, queue, memory, now, policy).decide()


def plan_start(models: Sequence[ModelState], memory: Memory) -> list[Load | Fail]:
    """What of the models of the start is loaded at once, in their order; the first that can never be is the last said.
    Those that are not mentioned are left for later."""
    actions: list[Load | Fail] = []
    states = {model.name: model for model in models}
    for model in models:
        if not model.required:
            continue
        if too_large(model, memory):
            return [*actions, Fail(model.name)]
        if not memory.budget or _target(model, memory) <= _free(states.values(), memory):
            actions.append(Load(model.name))
            states[model.name] = model.loading(0.0)
    return actions


def too_large(model: ModelState, memory: Memory) -> bool:
    return 0 < memory.budget < model.least


class _Plan:
    """Holds the models as they will be once what was decided so far is done. One that is unloaded has its memory for a
    while yet."""

    def __init__(
        self, models: Sequence[ModelState], queue: QueueStats | None, memory: Memory, now: float, policy: Policy
    ) -> None:
        self._models = {model.name: model for model in models}
        self._queue = queue
        self._memory = memory
        self._now = now
        self._policy = policy
        self._reserved = 0
        """Bytes that are set aside, of those that are free or coming free, for who waited longer."""
        self._actions: list[Action] = []

    def decide(self) -> list[Action]:
        waiting = sorted(filter(self._waits, self._models.values()), key=_turn)
        for model in waiting:
            self._serve(self._models[model.name])
        self._unload_idle()
        someone_waits = any(self._models[model.name].phase is not Phase.FAILED for model in waiting)
        if not someone_waits:
            self._shrink()
        self._keep_spares(more=not someone_waits)
        return self._actions

    # ------------------------------------------------------------------------------------ who is loaded

    def _waits(self, model: ModelState) -> bool:
        """Is it to be loaded (or refused) now?"""
        if model.phase.loaded or not _wanted(model, self._queue):
            return False
        if model.phase is Phase.FAILED:
            return True
        return self._now >= model.retry_at and (model.requested or not self._left_to_others(model))

    def _left_to_others(self, model: ModelState) -> bool:
        """For now: one may be about to take the jobs, and of several that could load it one is enough to begin with."""
        if model.elsewhere == "loading":
            pause = self._policy.defer_loading
        elif model.elsewhere in ("ready", "restarting"):
            pause = self._policy.defer_ready
        else:
            before = sum(state == "unloaded" and id < model.id for state, id in _elsewhere(model, self._queue))
            pause = 2 * self._policy.poll_interval * before
        return self._now - max(_since(model), model.elsewhere_since) < pause

    def _serve(self, model: ModelState) -> None:
        if model.phase is not Phase.FAILED and too_large(model, self._memory):
            self._actions.append(Fail(model.name))
            self._models[model.name] = model = model.failed(self._now, self._policy)
        if model.phase is Phase.FAILED:
            if self._queue is not None and all(state == "failed" for state, _ in _elsewhere(model, self._queue)):
                self._actions.append(Refuse(model.name))
        elif self._fits(model) or self._make_room(model):
            self._actions.append(Load(model.name))
            self._models[model.name] = model.loading(self._now)

    def _unload_idle(self) -> None:
        if not self._policy.idle_unload:
            return
        for model in list(self._models.values()):
            last = max(model.used_at, model.ready_at or 0.0)
            if model.on_demand and self._idle(model) and self._now - last > self._policy.idle_unload:
                self._unload(model)

    def _idle(self, model: ModelState) -> bool:
        return model.phase is Phase.READY and not model.busy and not _depth(self._queue, model)

    def _unload(self, model: ModelState) -> None:
        self._actions.append(Unload(model.name))
        self._models[model.name] = model.to(Phase.UNLOADING)

    # ------------------------------------------------------------------------------------ memory

    def _free(self) -> int:
        return _free(self._models.values(), self._memory)

    def _coming_free(self) -> int:
        """Bytes that are free or about to be, and are set aside for nobody."""
        leaving = sum(model.need for model in self._models.values() if model.phase is Phase.UNLOADING)
        return self._free() + leaving - self._reserved

    def _fits(self, model: ModelState) -> bool:
        if not self._memory.budget or model.spares > 0:
            return True
        return _target(model, self._memory) <= min(self._free(), self._coming_free())

    def _make_room(self, model: ModelState) -> bool:
        """Give up spares and begin to unload others until *model* fits; does it fit now?"""
        target = _target(model, self._memory)
        others = [other for other in self._least_recent() if other.name != model.name]
        self._drop_spares(target, others)
        if self._fits(model):
            return True
        due = self._now - _since(model) >= self._policy.swap_after
        victims = [other for other in others if self._idle(other)]
        if due:
            victims += sorted(
                (other for other in others if self._had_its_turn(other)), key=lambda other: other.ready_at or 0.0
            )
        helped = self._coming_free() + sum(victim.need for victim in victims) >= target
        if helped:  # else nobody would be
            self._unload_until(target, victims)
        if helped or due:
            self._reserved += target
        holders = tuple(other.name for other in others if other.phase.loaded)
        self._actions.append(Wait(model.name, holders))
        return False

    def _had_its_turn(self, model: ModelState) -> bool:
        """It is busy, and has been up for long enough to make room for another."""
        if model.phase is not Phase.READY or self._idle(model):
            return False
        return self._now - (model.ready_at or 0.0) >= self._policy.swap_after

    def _shrink(self) -> None:
        """Come back into the budget, where a model took more than was expected or has grown."""
        if self._memory.budget:
            self._drop_spares(0, self._least_recent())
            self._unload_until(0, [model for model in self._least_recent() if self._idle(model)])

    def _least_recent(self) -> list[ModelState]:
        return sorted(self._models.values(), key=lambda model: model.used_at)

    def _drop_spares(self, target: int, models: Sequence[ModelState]) -> None:
        """End spares of *models* until *target* bytes are free, or about to be."""
        for model in models:
            if self._coming_free() < target and model.held_spares and not model.takes_spare:
                self._keep(model, 0)

    def _unload_until(self, target: int, models: Sequence[ModelState]) -> None:
        for model in models:
            if self._coming_free() < target:
                self._unload(self._models[model.name])

    def _keep_spares(self, *, more: bool) -> None:
        """Hold the spares that are wanted, as far as there is room; no *more* than there are while somebody waits."""
        for model in list(self._models.values()):
            count = model.wanted_spares
            if not count or Load(model.name) in self._actions:  # that may take one
                continue
            if model.emptied or not (model.on_demand or model.ready_at is not None) or model.phase is Phase.FAILED:
                count = 0
            elif not more or model.phase is Phase.LOADING:
                count = min(count, model.held_spares)
            elif self._memory.budget and model.need:
                count = min(count, model.held_spares + max(0, self._free()) // model.need)
            self._keep(model, count)

    def _keep(self, model: ModelState, count: int) -> None:
        """Keep exactly *count* spares; those of them that are not there yet have their memory set aside."""
        if (action := KeepSpares(model.name, count)) not in self._actions:
            self._actions.append(action)
        ready = min(model.spares, count)
        self._models[model.name] = msgspec.structs.replace(model, spares=ready, held_spares=count)


# ---------------------------------------------------------------------------------------------- arithmetic


def _free(models: Iterable[ModelState], memory: Memory) -> int:
    return memory.budget - memory.overhead - sum(model.held for model in models)


def _target(model: ModelState, memory: Memory) -> int:
    """What is made free for it: an estimate may say more than there can be."""
    return max(0, min(model.need, memory.budget - memory.overhead))


def _since(model: ModelState) -> float:
    assert model.waiting_since is not None, f"{model.name} was not seen waiting"
    return model.waiting_since


def _turn(model: ModelState) -> tuple[bool, float]:
    """Who comes first of those that wait: those that an operator asks for, then those that wait longest."""
    return not model.requested, _since(model)


def _wanted(model: ModelState, queue: QueueStats | None) -> bool:
    return model.requested or _depth(queue, model) > 0


def _depth(queue: QueueStats | None, model: ModelState) -> int:
    """Jobs that wait for *model*."""
    names = (model.name, *model.adapters)
    return sum(count for (name, _), count in queue.depth.items() if name in names) if queue is not None else 0


def _elsewhere(model: ModelState, queue: QueueStats | None) -> list[tuple[str, str]]:
    """(state, id) of the other live workers that have *model* loaded or can load it."""
    return [
        (worker.state, worker.id)
        for worker in (queue.workers if queue is not None else ())
        if worker.id != model.id and any(info.name == model.name for info in worker.models)
    ]
