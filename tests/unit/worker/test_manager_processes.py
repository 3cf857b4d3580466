"""The manager with real (synthetic) engine processes: their memory, their spares, their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.manager import MB, ManagerHost, until, watch

from penstock.core.job import Status
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.engines.host.standby import Standby
from penstock.worker.manager import Model


class Host(ManagerHost):
    def add(
        self, name: str, *, engine: str = "synthetic", path: str | None = None, standby: int = 0, **options: object
    ) -> Standby:
        spec = EngineSpec(engine, name, path, {key: str(value) for key, value in options.items()})
        process = Standby(spec, lambda: EngineProcess(spec), wanted=standby, on_progress=self.progress(name))
        self.models.append(Model(name, process, process, on_demand=True))
        return process


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made = Host(tmp_path)
    await made.broker.open()
    yield made
    await made.stop()
    await made.broker.close()


async def test_the_budget_holds_at_every_moment(host: Host) -> None:
    processes = [host.add(name, memory_mb=60) for name in ("a", "b", "c")]
    host.start(memory_budget=200 * MB, swap_after=0.0)
    most = 0

    async def measure() -> None:
        nonlocal most
        while True:
            most = max(most, await asyncio.to_thread(lambda: sum(process.measure() for process in processes)))
            await asyncio.sleep(0)

    measuring = asyncio.create_task(measure())
    jobs = [await host.submit(name) for name in "abc" for _ in range(3)]
    assert {(await host.ended(job)).status for job in jobs} == {Status.COMPLETED}
    measuring.cancel()
    assert 60 * MB < most <= 200 * MB


async def test_the_estimate_of_what_can_never_fit_is_of_its_files(host: Host, tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(5_000 * MB)  # takes no room on the disk
    host.add("huge", engine="openvino", path=str(tmp_path))
    host.start(memory_budget=1_000 * MB)
    job = await host.run("huge")
    assert job.error is not None
    assert "needs 2.6 GB" in job.error.message  # in 8 bits, as "auto" stores what is so large


async def test_a_spare_of_a_model_on_demand_becomes_its_process(host: Host) -> None:
    spared = host.add("a", memory_mb=60, standby=1)
    host.start(memory_budget=160 * MB)
    await until(lambda: spared.spares == 1)
    [pid] = [spare.pid for spare in spared._spares]
    await host.run("a")
    assert spared._active.pid == pid


async def test_unload_gives_running_jobs_back(host: Host) -> None:
    process = host.add("a", rate=100)
    host.start()
    job = await host.submit("a", tokens=60)
    await host.begun(job)
    first = process._active.pid
    steps = await watch(host.manager.unload("a"))
    assert "unloading" in {step.state for step in steps}
    # Its job is still wanted: it is loaded again, and nothing was lost or counted as a failure.
    done = await host.ended(job)
    assert (done.status, done.tokens, done.retries, done.crashes) == (Status.COMPLETED, 60, 0, 0)
    assert process._active.pid != first
