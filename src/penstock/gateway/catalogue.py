"""Which models there are, how they stand, and what can be asked of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from penstock.core.errors import BrokerUnavailable, ModelNotFound, NoWorker, Unsupported
from penstock.core.job import Request, Task
from penstock.core.ports import WORKER_STATES, Broker, ModelInfo, QueueStats, WorkerInfo


class Catalogue:
    """Which models exist, from the configuration and from what workers say, refreshed once a second.

    *own*: the workers of this very process, of which it always knows the latest.
    """

    def __init__(self, broker: Broker, configured: tuple[str, ...], own: Callable[[], list[WorkerInfo]] = list) -> None:
        self._broker = broker
        self._configured = configured
        self._own = own
        self._known: dict[str, ModelInfo] = {}
        self.stats: QueueStats | None = None
        self.reachable = False
        self._looked_at = 0.0
        self.started_at = time.time()

    async def run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(1.0 if self.ready(None) else 0.1)

    async def refresh(self) -> None:
        try:
            self.stats = await self._broker.stats()
        except BrokerUnavailable:
            self.reachable = False
            return
        self.reachable = True
        self._looked_at = time.monotonic()
        self._learn()

    def _learn(self) -> None:
        for worker in self.workers:
            for model in worker.models:
                if model.context_length or model.name not in self._known:
                    self._known[model.name] = model

    @property
    def workers(self) -> list[WorkerInfo]:
        """Those that are alive, as far as is known."""
        found = {worker.id: worker for worker in (self.stats.workers if self.stats is not None else ())}
        now = self.now()
        found |= {worker.id: msgspec.structs.replace(worker, seen_at=now) for worker in self._own()}
        return list(found.values())

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._configured, *sorted(self._known)]))  # every gateway says the same

    @property
    def default(self) -> str:
        """The first model that generates (see `default_for`)."""
        return self.default_for("generate")

    def default_for(self, task: Task) -> str:
        """The first model that can do *task*, as far as is known. Raises `NoWorker`, or `Unsupported` if none can."""
        self._some()
        for name in self.names:
            if (info := self.info(name)) is None or info.may(task):
                return name
        raise Unsupported(f"No model here can {task}. Served: {', '.join(self.names)}.", param="model")

    def _some(self) -> None:
        """Raise `NoWorker` where no model is known: that one does not exist cannot be said then."""
        if not self.names:
            raise NoWorker("No model is served yet: no worker has registered.", retry_after=2.0)

    def offering(self, task: Task) -> list[str]:
        """Models that are known to do *task*."""
        return [name for name in self.names if (info := self.info(name)) and info.context_length and info.may(task)]

    def now(self) -> float:
        """Seconds since the epoch by the store's clock, which may not be this machine's."""
        if self.stats is None:
            return time.time()
        return self.stats.now + time.monotonic() - self._looked_at

    def info(self, model: str) -> ModelInfo | None:
        """What is known of *model*; ``context_length`` 0 while it never was loaded."""
        self._learn()
        return self._known.get(model)

    def served_by(self, engine: str) -> list[str]:
        """Models that live workers serve with *engine*."""
        return [name for name in self.names if (info := self.info(name)) and info.engine == engine and self.ready(name)]

    def workers_of(self, model: str) -> list[WorkerInfo]:
        return [worker for worker in self.workers if any(info.name == model for info in worker.models)]

    def state(self, model: str) -> str:
        """The best state that it has on a live worker (`WORKER_STATES`); ``unavailable`` without any, and where it is
        away on all."""
        states = {worker.state_of(model) for worker in self.workers_of(model)}
        return next((state for state in WORKER_STATES if state in states), "unavailable")

    def ready(self, model: str | None) -> bool:
        """Does a live worker serve *model* (None: the first one), or load it when a job comes?"""
        if not self.names:
            return False
        name = model or self.names[0]
        states = [(worker.state_of(name), worker.on_demand) for worker in self.workers_of(name)]
        return any(
            state == "ready" or (on_demand and state in ("unloaded", "loading", "unloading"))
            for state, on_demand in states
        )

    def away(self, model: str) -> str:
        """Why no live worker of *model* can serve it, though they are up; empty where one can, or none is up."""
        if self.state(model) != "unavailable":
            return ""
        told = (info.away for worker in self.workers_of(model) for info in worker.models if info.name == model)
        return next(filter(None, told), "")

    def check_serving(self, model: str) -> None:
        """Raise `NoWorker` for a *model* whose jobs would only fail now."""
        if why := self.away(model):
            raise NoWorker(
                f"The model {model!r} cannot be served right now: {why}. Try again in a moment.", retry_after=2.0
            )

    def require(self, name: str) -> None:
        """Raise `ModelNotFound` for a model that is none."""
        if name not in self.names:
            raise ModelNotFound(f"The model {name!r} does not exist here.", param="model")

    def check(self, request: Request) -> None:
        """Refuse an unknown model, or a field that the model's engine cannot honour."""
        self._some()
        if request.model not in self._known and request.model not in self._configured:
            served = ", ".join(self.names)
            raise ModelNotFound(f"The model {request.model!r} does not exist here. Served: {served}.", param="model")
        if (info := self._known.get(request.model)) is None:
            return
        if not info.may(request.task):
            others = ", ".join(self.offering(request.task)) or "none"
            raise Unsupported(
                f"The model {request.model!r} cannot {request.task}: it can {' and '.join(info.tasks)}. "
                f"Models here that can {request.task}: {others}.",
                param="model",
            )
        info.check(request)
