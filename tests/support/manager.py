"""A manager over a broker of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.job import Job, Request, Sampling, new_job_id
from penstock.core.ports import LoadProgress, QueuePolicy
from penstock.testing.clock import ManualClock
from penstock.worker.manager import Model, ModelManager
from penstock.worker.placement import Policy
from penstock.worker.worker import Worker

MB = 1_000_000
POLICY = Policy(poll_interval=0.01, all_loaded_interval=0.01, first_retry=0)


class ManagerHost:
    """A manager, its broker and the time. Models are added before it starts."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.broker = EmbeddedBroker(folder / "broker", policy=QueuePolicy(lease_ttl=60))
        self.models: list[Model] = []
        self.deferred: list[str] = []
        self.manager: ModelManager
        self.running: asyncio.Task[None]

    def progress(self, name: str) -> Callable[[str, float | None], None]:
        return lambda what, fraction: self.manager.progress(name, what, fraction)

    def start(self, *, memory_budget: int = 0, **policy: float) -> ModelManager:
        def worker(model: Model, up: Callable[[], None]) -> Worker:
            return Worker(
                self.broker, model.engine, on_ready=up, about=model.about, lease_ttl=60,
                drain_timeout=0.02, restart_backoff=0.01, clock=self.clock,
            )  # fmt: skip

        self.manager = ModelManager(
            self.broker, self.models, worker, heartbeat=0.05, on_deferred=self.deferred.append,
            memory_budget=memory_budget, clock=self.clock, policy=msgspec.structs.replace(POLICY, **policy),
        )  # fmt: skip
        self.running = asyncio.create_task(self.manager.run())
        return self.manager

    async def stop(self) -> None:
        self.manager.stop()
        await asyncio.gather(self.running, return_exceptions=True)

    def state(self, name: str) -> str:
        return self.manager.models[name].info.state

    def loaded(self) -> set[str]:
        return {name for name, model in self.manager.models.items() if model.ready}

    async def submit(self, model: str, tokens: int = 3) -> str:
        request = Request(model=model, prompt="x", sampling=Sampling(max_tokens=tokens))
        return (await self.broker.submit(Job(id=new_job_id(), tenant="t", request=request))).id

    async def ended(self, job: str) -> Job:
        async def look() -> Job | None:
            found = await self.broker.get("t", job)
            return found if found.status.terminal else None

        return await until(look)

    async def begun(self, job: str) -> None:
        async def look() -> bool:
            return (await self.broker.get("t", job)).tokens > 0

        await until(look)

    async def run(self, model: str) -> Job:
        return await self.ended(await self.submit(model))


async def until(look: Callable[[], Any | Awaitable[Any]]) -> Any:
    """Look until what is seen is true."""
    async with asyncio.timeout(20):
        while True:
            seen = look()
            if isinstance(seen, Awaitable):
                seen = await seen
            if seen:
                return seen
            await asyncio.sleep(0.005)


async def watch(progress: AsyncIterator[LoadProgress]) -> list[LoadProgress]:
    return [step async for step in progress]
