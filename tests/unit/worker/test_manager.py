"""The manager does what the placement says, with a real broker and real (synthetic) engine processes. Who is to be
loaded when is in `test_placement.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.errors import ModelLoadError, ModelNotFound, first_of
from penstock.core.job import Job, Request, Sampling, Status, new_job_id
from penstock.core.ports import LoadProgress, QueuePolicy, WorkerInfo
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.engines.host.standby import Standby
from penstock.testing.clock import ManualClock
from penstock.worker.manager import Model, ModelManager
from penstock.worker.placement import Policy
from penstock.worker.worker import Worker

MB = 1_000_000


POLICY = Policy(poll_interval=0.02, first_retry=0)


class Host:
    """A manager over a broker of its own. Models are synthetic unless said otherwise."""

    def __init__(self, folder: Path) -> None:
        self.broker = EmbeddedBroker(folder / "broker", policy=QueuePolicy(lease_ttl=60))
        self.models: list[Model] = []
        self.deferred: list[str] = []
        self.clock = ManualClock()
        self.manager: ModelManager
        self.running: asyncio.Task[None]

    def add(
        self, name: str, *, engine: str = "synthetic", path: str | None = None, demand: bool = True, standby: int = 0,
        **options: object,
    ) -> Standby:  # fmt: skip
        spec = EngineSpec(engine, name, path, {key: str(value) for key, value in options.items()})

        def tell(what: str, fraction: float | None) -> None:
            self.manager.progress(name, what, fraction)

        process = Standby(spec, lambda: EngineProcess(spec), wanted=standby, on_progress=tell)
        self.models.append(Model(name, process, process, on_demand=demand))
        return process

    def start(self, *, memory_budget: int = 0, **policy: float) -> ModelManager:
        def worker(model: Model, up: Callable[[], None]) -> Worker:
            return Worker(
                self.broker, model.engine, on_ready=up, about=model.about, lease_ttl=60,
                drain_timeout=0.05, restart_backoff=0.01, clock=self.clock,
            )  # fmt: skip

        self.manager = ModelManager(
            self.broker, self.models, worker, heartbeat=0.05, on_deferred=self.deferred.append,
            memory_budget=memory_budget, clock=self.clock, policy=msgspec.structs.replace(POLICY, **policy),
        )  # fmt: skip
        self.running = asyncio.create_task(self.manager.run())
        return self.manager

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


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made = Host(tmp_path)
    await made.broker.open()
    yield made
    made.manager.stop()
    await asyncio.gather(made.running, return_exceptions=True)
    await made.broker.close()


async def until(look: Callable[[], Any | Awaitable[Any]]) -> Any:
    """Look until what is seen is true."""
    async with asyncio.timeout(60):
        while True:
            seen = look()
            if isinstance(seen, Awaitable):
                seen = await seen
            if seen:
                return seen
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------------------------------------- on demand


class TestDemand:
    async def test_a_model_is_loaded_for_a_job_and_unloaded_when_it_was_idle_for_long(self, host: Host) -> None:
        host.add("a", demand=False)
        host.add("b")
        host.start(idle_unload=60)
        job = await host.run("b")
        assert (job.status, job.tokens, job.attempt) == (Status.COMPLETED, 3, 1)
        await until(lambda: host.loaded() == {"a", "b"})
        host.clock.advance(61)
        await until(lambda: host.state("b") == "unloaded")
        assert host.loaded() == {"a"}, "which is one of the start"

    async def test_what_is_not_loaded_is_told_to_the_broker(self, host: Host) -> None:
        host.add("b", load_seconds=0.3)
        host.start()

        async def worker(state: str) -> WorkerInfo | None:
            workers = (await host.broker.stats()).workers
            assert len(workers) <= 1  # it stays the same worker through its lives
            return workers[0] if workers and workers[0].state == state else None

        seen = await until(lambda: worker("unloaded"))
        assert (seen.on_demand, seen.models[0].name, seen.models[0].engine) == (True, "b", "synthetic")
        await host.submit("b")
        seen = await until(lambda: worker("loading"))
        await until(lambda: worker("ready"))
        async for _ in host.manager.unload("b"):
            pass
        seen = await until(lambda: worker("unloaded"))
        assert seen.models[0].context_length > 0  # known by now


# ---------------------------------------------------------------------------------------------- memory


class TestBudget:
    async def test_the_budget_holds_at_every_moment(self, host: Host) -> None:
        processes = [host.add(name, memory_mb=60, load_seconds=0.05) for name in ("a", "b", "c")]
        host.start(memory_budget=200 * MB, swap_after=0.0)
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, await asyncio.to_thread(lambda: sum(process.measure() for process in processes)))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        jobs = [await host.submit(name) for name in "abcabc" for _ in range(3)]
        assert {(await host.ended(job)).status for job in jobs} == {Status.COMPLETED}
        watching.cancel()
        assert 60 * MB < most <= 200 * MB

    async def test_a_spare_of_a_model_on_demand_needs_no_more_room(self, host: Host) -> None:
        spared = host.add("a", memory_mb=60, standby=1)
        host.start(memory_budget=160 * MB)
        await until(lambda: spared.spares == 1)
        [pid] = [spare.pid for spare in spared._spares]
        await host.run("a")
        assert spared._active.pid == pid

    async def test_what_can_never_fit_fails_and_says_so(self, host: Host, tmp_path: Path) -> None:
        weights = tmp_path / "model.safetensors"
        with weights.open("wb") as file:
            file.truncate(5_000 * MB)  # takes no room on the disk
        host.add("huge", engine="openvino", path=str(tmp_path))
        host.add("a")
        host.start(memory_budget=1_000 * MB)
        await host.run("a")
        job = await host.run("huge")
        assert job.error is not None
        assert job.error.code == "model_load_error"
        assert "5.2 GB" in job.error.message
        assert "memory_budget is 1.0 GB" in job.error.message
        assert host.loaded() == {"a"}  # nobody made room in vain

    async def test_what_turns_out_too_large_fails_too(self, host: Host) -> None:
        host.add("a", memory_mb=400, rate=20)
        host.start(memory_budget=300 * MB)
        job = await host.ended(await host.submit("a", tokens=1000))
        assert job.error is not None
        assert "memory_budget is 300 MB" in job.error.message
        await until(lambda: host.state("a") == "failed")

    async def test_at_the_start_what_fits_is_loaded_and_the_rest_is_left_for_later(self, host: Host) -> None:
        for name in ("a", "b"):
            host.add(name, memory_mb=100, demand=False)
        manager = host.start(memory_budget=200 * MB)
        await until(lambda: host.loaded() == {"a"})
        assert host.deferred == ["b"]
        assert manager.ready
        assert (await host.run("b")).status is Status.COMPLETED
        assert host.loaded() == {"b"}

    async def test_too_large_at_the_start_ends_it(self, host: Host) -> None:
        host.add("a", memory_mb=400, demand=False)
        host.start(memory_budget=300 * MB)
        with pytest.raises(ExceptionGroup) as caught:
            await host.running
        assert isinstance(first_of(caught.value), ModelLoadError)


# ---------------------------------------------------------------------------------------------- what cannot be loaded


class TestFailure:
    async def test_jobs_of_a_model_that_cannot_be_loaded_fail_and_others_run(self, host: Host) -> None:
        host.add("good")
        host.add("bad", rats=1)
        manager = host.start()
        jobs = [await host.submit("bad") for _ in range(3)]
        for job in [await host.ended(job) for job in jobs]:
            assert (job.status, job.error.code if job.error else "") == (Status.FAILED, "model_load_error")
            assert job.error is not None
            assert "rats" in job.error.message
        assert host.state("bad") == "failed"
        assert not manager.ready
        [info] = [worker for worker in (await host.broker.stats()).workers if worker.models[0].name == "bad"]
        assert (info.state, info.error is not None) == ("failed", True)
        assert (await host.run("good")).status is Status.COMPLETED

    async def test_it_is_tried_again_later(self, host: Host) -> None:
        """What was wrong may have been mended meanwhile."""
        process = host.add("a", rats=1)
        host.start()
        assert (await host.run("a")).status is Status.FAILED
        process._active.spec = EngineSpec("synthetic", "a")
        host.clock.advance(31)
        assert (await host.run("a")).status is Status.COMPLETED

    async def test_a_model_of_the_start_that_cannot_be_loaded_ends_it(self, host: Host) -> None:
        host.add("a", demand=False)
        host.add("b", demand=False, rats=1)
        host.start()
        with pytest.raises(ExceptionGroup, match="unhandled") as caught:
            await host.running
        assert "rats" in str(first_of(caught.value))


# ---------------------------------------------------------------------------------------------- by hand


async def watch(progress: AsyncIterator[LoadProgress]) -> list[LoadProgress]:
    return [step async for step in progress]


class TestControl:
    async def test_load_tells_how_it_goes(self, host: Host) -> None:
        host.add("a", load_seconds=0.3)
        host.start()
        steps = await watch(host.manager.load("a"))
        assert steps[0].state in ("unloaded", "loading")
        assert steps[-1].state == "ready"
        fractions = [step.fraction for step in steps if step.what == "sleeping" and step.fraction is not None]
        assert len(fractions) > 2
        assert fractions == sorted(fractions)
        assert [step.state for step in await watch(host.manager.load("a"))] == ["ready"]

    async def test_unload_gives_running_jobs_back(self, host: Host) -> None:
        spared = host.add("a", rate=100, standby=1)
        host.start()
        job = await host.submit("a", tokens=100)
        await host.begun(job)
        await until(lambda: spared.spares == 1)
        first = spared._active.pid
        steps = await watch(host.manager.unload("a"))
        assert "unloading" in {step.state for step in steps}
        assert steps[-1].state in ("unloaded", "loading", "ready")  # its job waits
        # Its job is still wanted: it is loaded again, and nothing was lost or counted as a failure.
        done = await host.ended(job)
        assert (done.status, done.tokens, done.retries, done.crashes) == (Status.COMPLETED, 100, 0, 0)
        assert spared._active.pid != first

    async def test_unload_takes_the_spares_too(self, host: Host) -> None:
        spared = host.add("a", standby=1)
        host.start()
        await host.run("a")
        await until(lambda: spared.spares == 1)
        await watch(host.manager.unload("a"))
        assert (host.state("a"), spared.held) == ("unloaded", 0)

    async def test_unload_breaks_off_a_load(self, host: Host) -> None:
        host.add("a", load_seconds=600)
        host.start()
        loading = asyncio.create_task(watch(host.manager.load("a")))
        await until(lambda: host.state("a") == "loading" and host.manager.models["a"].fraction is not None)
        await watch(host.manager.unload("a"))
        assert host.state("a") == "unloaded"
        loading.cancel()

    async def test_load_takes_an_idle_models_place(self, host: Host) -> None:
        host.add("a", memory_mb=100)
        host.add("b", memory_mb=100)
        host.start(memory_budget=200 * MB)
        await host.run("a")
        steps = await watch(host.manager.load("b"))
        assert any("waits for memory" in step.what for step in steps)
        assert host.loaded() == {"b"}

    async def test_load_says_why_it_failed(self, host: Host) -> None:
        host.add("a", rats=1)
        host.start()
        with pytest.raises(ModelLoadError, match="rats"):
            await watch(host.manager.load("a"))

    async def test_another_workers_model(self, host: Host) -> None:
        host.add("a")
        host.start()
        for progress in (host.manager.load("x"), host.manager.unload("x")):
            with pytest.raises(ModelNotFound, match="It has: a"):
                await watch(progress)
