"""An engine without a process or a model, in the hands of a test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from penstock.core.errors import EngineDied, ModelLoadError, PenstockError
from penstock.core.ports import Finish, Lease, ModelInfo, Output


class FakeEngine:
    """Runs what it is given until the test says what comes of it."""

    def __init__(self, model: str, slots: int = 8) -> None:
        self.models = (ModelInfo(name=model, engine="fake", context_length=1000),)
        self.slots = slots
        self.running: dict[int, Lease] = {}
        self.most = 0
        """Sequences that ever ran at once."""
        self.aborted: list[str] = []
        self.starts = 0
        self._outputs: asyncio.Queue[list[Output] | Exception] = asyncio.Queue()

    async def start(self) -> None:
        self.starts += 1

    def add(self, key: int, lease: Lease) -> None:
        self.running[key] = lease
        self.most = max(self.most, sum(lease.job.request.n for lease in self.running.values()))

    def abort(self, key: int) -> None:
        if (lease := self.running.pop(key, None)) is not None:
            self.aborted.append(lease.job.id)

    async def step(self) -> list[Output]:
        item = await self._outputs.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def close(self) -> None:
        pass

    @property
    def jobs(self) -> set[str]:
        return {lease.job.id for lease in self.running.values()}

    def emit(self, job: str, count: int = 1, *, end: bool = False, **fields: Any) -> None:
        """*fields*: more of the `Output`."""
        key, lease = next((key, lease) for key, lease in self.running.items() if lease.job.id == job)
        if end:
            del self.running[key]
        finish = Finish(("stop",) * lease.job.request.n) if end else None
        self._outputs.put_nowait([Output(key, [1] * count, ["x"] * count, finish=finish, **fields)])

    def fail(self, job: str, *, retryable: bool) -> None:
        key = next(key for key, lease in self.running.items() if lease.job.id == job)
        del self.running[key]
        error = PenstockError("It went wrong.").info
        self._outputs.put_nowait([Output(key, finish=Finish(error=error), retryable=retryable)])

    def die(self) -> None:
        self.running.clear()
        self._outputs.put_nowait(EngineDied("gone"))


class FakeProcess(FakeEngine):
    """As the manager sees an engine process and its spares (`penstock.worker.manager.Loadable`). It completes what it
    is given at once."""

    def __init__(
        self, model: str, on_progress: Callable[[str, float | None], None], *, need: int, standby: int = 0
    ) -> None:
        super().__init__(model)
        self.wanted = standby
        self.held = 0
        self.kept: list[int] = []
        """What it was told to keep: once in each round of a manager that was told of spares."""
        self.need = need
        """Bytes that it is estimated to take; twice as many at the most."""
        self.takes = need
        """Bytes that it takes."""
        self.failure = ""
        """Why it cannot be loaded."""
        self.gate = asyncio.Event()
        """Whether its load may come to an end."""
        self.gate.set()
        self.instant = True
        self._up = False
        self._on_progress = on_progress

    @property
    def spares(self) -> int:
        return self.held

    async def keep(self, count: int) -> None:
        self.kept.append(count)
        self.held = min(count, self.wanted)

    async def start(self) -> None:
        if self.held:
            self.held -= 1
        else:
            self._on_progress("reading", 0.5)
            await self.gate.wait()
            if self.failure:
                raise ModelLoadError(self.failure)
        self._up = True
        await super().start()

    def add(self, key: int, lease: Lease) -> None:
        super().add(key, lease)
        if self.instant:
            self.emit(lease.job.id, lease.job.request.sampling.max_tokens - len(lease.ids), end=True)

    async def close(self) -> None:
        self._up = False
        self.running.clear()

    async def shut_down(self) -> None:
        await self.close()

    def estimate(self) -> tuple[int, int]:
        return self.need, self.need

    def measure(self) -> int:
        return self.takes if self._up else 0
