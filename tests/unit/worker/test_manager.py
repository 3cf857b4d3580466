"""The manager does what the placement says, and tells how it goes: on fake engines and a real broker. With real
processes it is in `test_manager_processes.py`; who is to be loaded when, in `test_placement.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.engine import FakeProcess
from tests.support.manager import MB, ManagerHost, until, watch

from penstock.core.errors import BrokerUnavailable, ModelLoadError, ModelNotFound, first_of
from penstock.core.job import Status
from penstock.core.ports import WorkerInfo
from penstock.worker.manager import Model


class Host(ManagerHost):
    def add(self, name: str, *, demand: bool = True, need: int = 100 * MB, standby: int = 0) -> FakeProcess:
        process = FakeProcess(name, self.progress(name), need=need, standby=standby)
        self.models.append(Model(name, process, process, on_demand=demand))
        return process


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made = Host(tmp_path)
    await made.broker.open()
    yield made
    await made.stop()
    await made.broker.close()


async def rounds(process: FakeProcess, count: int = 3) -> None:
    """Until the manager has decided so often again."""
    seen = len(process.kept)
    await until(lambda: len(process.kept) >= seen + count)


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
        process = host.add("b")
        process.gate.clear()
        host.start()

        async def worker(state: str) -> WorkerInfo | None:
            workers = (await host.broker.stats()).workers
            assert len(workers) <= 1, "it stays the same worker through its lives"
            return workers[0] if workers and workers[0].state == state else None

        seen = await until(lambda: worker("unloaded"))
        assert (seen.on_demand, seen.models[0].name) == (True, "b")
        await host.submit("b")
        await until(lambda: worker("loading"))
        process.gate.set()
        await until(lambda: worker("ready"))
        await watch(host.manager.unload("b"))
        await until(lambda: worker("unloaded"))

    async def test_one_that_has_jobs_is_not_idle(self, host: Host) -> None:
        process = host.add("a", standby=1)
        process.instant = False
        host.start(idle_unload=60)
        job = await host.submit("a")
        await until(lambda: process.jobs == {job})
        host.clock.advance(61)
        await rounds(process)
        assert host.loaded() == {"a"}
        process.emit(job, 3, end=True)
        await host.ended(job)
        host.clock.advance(59)
        await rounds(process)
        assert host.loaded() == {"a"}, "it was in use until now"
        host.clock.advance(2)
        await until(lambda: host.state("a") == "unloaded")

    async def test_a_hint_is_looked_at_at_once(self, host: Host) -> None:
        process = host.add("a", standby=1)
        host.start(poll_interval=3600)
        await until(lambda: process.kept)
        job = await host.submit("a")
        host.manager.notify("nobody's")
        host.manager.notify("a")
        assert (await host.ended(job)).status is Status.COMPLETED

    async def test_an_engine_that_dies_is_restarted_and_stays(self, host: Host) -> None:
        process = host.add("a")
        process.instant = False
        host.start()
        job = await host.submit("a")
        await until(lambda: process.jobs == {job})
        process.die()
        await until(lambda: process.starts == 2 and process.jobs == {job})
        process.emit(job, 3, end=True)
        assert (await host.ended(job)).status is Status.COMPLETED
        assert host.loaded() == {"a"}


# ---------------------------------------------------------------------------------------------- memory


class TestBudget:
    async def test_at_the_start_what_fits_is_loaded_and_the_rest_is_left_for_later(self, host: Host) -> None:
        for name in ("a", "b"):
            host.add(name, demand=False)
        manager = host.start(memory_budget=150 * MB)
        await until(lambda: host.loaded() == {"a"})
        assert host.deferred == ["b"]
        assert manager.ready
        assert (await host.run("b")).status is Status.COMPLETED
        assert host.loaded() == {"b"}

    async def test_the_least_recently_used_model_makes_room(self, host: Host) -> None:
        for name in ("a", "b", "c"):
            host.add(name)
        host.start(memory_budget=250 * MB)
        for name in ("a", "b", "a", "c"):
            host.clock.advance(1)
            await host.run(name)
        await until(lambda: host.loaded() == {"a", "c"})

    async def test_it_is_told_what_a_model_waits_for_as_long_as_it_does(self, host: Host) -> None:
        busy = host.add("a")
        busy.instant = False
        host.add("b")
        host.start(memory_budget=150 * MB)
        running = await host.submit("a")
        await until(lambda: busy.jobs == {running})
        waiting = await host.submit("b")
        waits = "waits for memory: it needs 100 MB, and a hold the budget of 150 MB"
        await until(lambda: host.manager.models["b"].info.detail == waits)
        await host.broker.cancel("t", waiting)
        await until(lambda: not host.manager.models["b"].info.detail)

    async def test_what_can_never_fit_fails_and_says_so(self, host: Host) -> None:
        host.add("huge", need=5_200 * MB)
        host.add("a")
        host.start(memory_budget=1_000 * MB)
        await host.run("a")
        job = await host.run("huge")
        assert job.error is not None
        assert job.error.code == "model_load_error"
        assert "needs 5.2 GB of memory, and memory_budget is 1.0 GB" in job.error.message
        assert host.loaded() == {"a"}, "nobody made room in vain"

    async def test_at_the_start_it_ends_the_process(self, host: Host) -> None:
        host.add("a", demand=False, need=400 * MB)
        host.start(memory_budget=300 * MB)
        with pytest.raises(ExceptionGroup) as caught:
            await host.running
        assert isinstance(first_of(caught.value), ModelLoadError)

    async def test_what_turns_out_too_large_fails_too(self, host: Host) -> None:
        process = host.add("a")
        process.takes, process.instant = 400 * MB, False
        host.start(memory_budget=300 * MB)
        job = await host.ended(await host.submit("a"))
        assert job.error is not None
        assert "needs 400 MB of memory, and memory_budget is 300 MB" in job.error.message
        await until(lambda: host.state("a") == "failed")

    async def test_what_turns_out_too_large_at_the_start_ends_the_process(self, host: Host) -> None:
        host.add("a", demand=False).takes = 400 * MB
        host.start(memory_budget=300 * MB)
        with pytest.raises(ExceptionGroup) as caught:
            await host.running
        assert "needs 400 MB" in str(first_of(caught.value))

    async def test_who_has_grown_is_seen_and_idle_ones_make_room(self, host: Host) -> None:
        host.add("a")
        grows = host.add("b")
        host.start(memory_budget=300 * MB)
        await host.run("a")
        await host.run("b")
        await until(lambda: host.loaded() == {"a", "b"})
        host.clock.advance(1)
        await host.run("b")
        grows.takes = 250 * MB
        host.clock.advance(6)  # it is measured
        await until(lambda: host.loaded() == {"b"})


# ---------------------------------------------------------------------------------------------- what cannot be loaded


class TestFailure:
    async def test_jobs_of_a_model_that_cannot_be_loaded_fail_and_others_run(self, host: Host) -> None:
        host.add("good")
        host.add("bad").failure = "rats"
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
        process = host.add("a")
        process.failure = "rats"
        host.start()
        assert (await host.run("a")).status is Status.FAILED
        process.failure = ""
        assert (await host.run("a")).status is Status.FAILED, "but not at once"
        host.clock.advance(31)
        assert (await host.run("a")).status is Status.COMPLETED

    async def test_a_model_of_the_start_that_cannot_be_loaded_ends_it(self, host: Host) -> None:
        host.add("a", demand=False)
        host.add("b", demand=False).failure = "rats"
        host.start()
        with pytest.raises(ExceptionGroup, match="unhandled") as caught:
            await host.running
        assert "rats" in str(first_of(caught.value))


# ---------------------------------------------------------------------------------------------- by hand


class TestControl:
    async def test_load_tells_how_it_goes(self, host: Host) -> None:
        process = host.add("a")
        process.gate.clear()
        host.start()
        steps = []
        async for step in host.manager.load("a"):
            steps.append((step.state, step.what, step.fraction))
            if step.fraction is not None:
                process.gate.set()
        assert steps[0][0] in ("unloaded", "loading")
        assert ("loading", "reading", 0.5) in steps
        assert steps[-1] == ("ready", "", None)
        assert [step.state for step in await watch(host.manager.load("a"))] == ["ready"]

    async def test_unload_takes_the_spares_too(self, host: Host) -> None:
        process = host.add("a", standby=1)
        host.start()
        await host.run("a")
        await until(lambda: process.spares == 1)
        await watch(host.manager.unload("a"))
        await rounds(process)
        assert (host.state("a"), process.held) == ("unloaded", 0)

    async def test_unload_breaks_off_a_load(self, host: Host) -> None:
        process = host.add("a")
        process.gate.clear()
        host.start()
        loading = asyncio.create_task(watch(host.manager.load("a")))
        await until(lambda: host.manager.models["a"].fraction is not None)
        await watch(host.manager.unload("a"))
        assert host.state("a") == "unloaded"
        loading.cancel()

    async def test_unload_at_the_moment_in_which_a_load_is_done(self, host: Host) -> None:
        process = host.add("a")
        process.gate.clear()
        host.start()
        loading = asyncio.create_task(watch(host.manager.load("a")))
        await until(lambda: host.manager.models["a"].fraction is not None)
        process.gate.set()
        await watch(host.manager.unload("a"))
        assert (host.state("a"), process.starts) == ("unloaded", 1)
        assert (await host.run("a")).status is Status.COMPLETED
        loading.cancel()

    async def test_load_takes_an_idle_models_place(self, host: Host) -> None:
        for name in ("a", "b"):
            host.add(name)
        host.start(memory_budget=150 * MB)
        await host.run("a")
        steps = await watch(host.manager.load("b"))
        assert any("waits for memory" in step.what for step in steps)
        assert host.loaded() == {"b"}

    async def test_load_says_why_it_failed_and_tries_again_when_asked(self, host: Host) -> None:
        process = host.add("a")
        process.failure = "rats"
        host.start()
        with pytest.raises(ModelLoadError, match="rats"):
            await watch(host.manager.load("a"))
        process.failure = ""
        assert (await watch(host.manager.load("a")))[-1].state == "ready"

    async def test_who_watches_is_told_that_it_ends(self, host: Host) -> None:
        host.add("a").gate.clear()
        host.start()
        loading = asyncio.create_task(watch(host.manager.load("a")))
        await until(lambda: host.state("a") == "loading")
        host.manager.stop()
        with pytest.raises(BrokerUnavailable, match="shutting down"):
            await loading

    async def test_another_workers_model(self, host: Host) -> None:
        host.add("a")
        host.start()
        for progress in (host.manager.load("x"), host.manager.unload("x")):
            with pytest.raises(ModelNotFound, match="It has: a"):
                await watch(progress)
