"""Spares and warm processes, with real engine processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from penstock.core.errors import EngineDied, ModelLoadError
from penstock.engines.host import standby as module
from penstock.engines.host.memory import BASE, estimate, held_by
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.engines.host.standby import Standby, WarmPool
from penstock.testing.engine import EngineContract
from penstock.testing.engine.driver import lease, run

Make = Callable[..., Standby]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares are looked after at once."""
    monkeypatch.setattr(module, "SETTLE", 0.0)
    monkeypatch.setattr(module, "LOOK", 0.05)


@pytest.fixture
async def warm() -> AsyncIterator[WarmPool]:
    pool = WarmPool(1)
    yield pool
    await pool.aclose()


@pytest.fixture
async def make(warm: WarmPool) -> AsyncIterator[Make]:
    made: list[Standby] = []

    def make(*, wanted: int = 0, **options: object) -> Standby:
        spec = EngineSpec("synthetic", "s", None, {name: str(value) for name, value in options.items()})
        made.append(Standby(spec, lambda: EngineProcess(spec, spawn=warm.take), wanted=wanted, warm=warm))
        return made[-1]

    yield make
    for each in made:
        await each.shut_down()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def pids(standby: Standby) -> list[int]:
    """The active process first, then the spares."""
    return [process.pid for process in (standby._active, *standby._spares) if process.pid]


class TestContract(EngineContract):
    """An engine with spares is an engine."""

    @pytest.fixture
    async def engine(self, make: Make) -> Standby:
        engine = make(wanted=1, rate=2000, slots=64)
        await engine.start()
        return engine


class TestSpares:
    async def test_when_the_engine_dies_a_spare_goes_on_without_loading(self, make: Make) -> None:
        engine = make(wanted=1)
        await engine.start()
        await engine.keep(1)
        await until(lambda: engine.spares == 1)
        active, spare = pids(engine)
        os.kill(active, signal.SIGKILL)
        with pytest.raises(EngineDied):
            await engine.step()
        await engine.start()
        assert pids(engine)[0] == spare
        (result,) = await run(engine, lease(engine, max_tokens=3, prefix=[1], attempt=2))
        assert result.text == "2@2 3@2 "
        await until(lambda: engine.spares == 1)  # and there is a new one
        assert active not in pids(engine)
        assert len(pids(engine)) == 2

    async def test_a_model_that_is_not_loaded_is_there_at_once(self, make: Make) -> None:
        engine = make(wanted=1)
        await engine.keep(1)
        await until(lambda: engine.spares == 1)
        assert engine.models[0].context_length > 0
        [spare] = pids(engine)
        await engine.start()
        assert pids(engine)[0] == spare
        await engine.close()
        await until(lambda: engine.spares == 1)  # unloaded, it keeps its spare

    async def test_a_dead_spare_is_replaced_and_never_taken(self, make: Make) -> None:
        engine = make(wanted=1)
        await engine.keep(1)
        await until(lambda: engine.spares == 1)
        [dead] = pids(engine)
        os.kill(dead, signal.SIGKILL)
        await until(lambda: engine.spares == 1 and pids(engine) != [dead])
        [spare] = pids(engine)
        await engine.start()
        assert pids(engine)[0] == spare

    async def test_spares_that_are_too_many_are_gone_when_keep_returns(self, make: Make) -> None:
        engine = make(wanted=2)
        await engine.keep(5)
        await until(lambda: engine.spares == 2)
        ended = [psutil.Process(pid) for pid in pids(engine)]
        await engine.keep(0)
        assert not any(process.is_running() for process in ended)
        assert engine.held == 0

    async def test_a_spare_that_is_being_loaded_is_given_up_too(self, make: Make) -> None:
        engine = make(wanted=1, load_seconds=600)
        await engine.keep(1)
        await until(lambda: engine.held == 1)
        await engine.keep(0)
        assert engine.held == 0
        assert not [
            child for child in psutil.Process().children() if "penstock.engines.child" in " ".join(child.cmdline())
        ]

    async def test_a_spare_that_cannot_be_loaded_is_tried_again_and_harms_nobody(self, make: Make) -> None:
        engine = make(wanted=1, rats=1)
        await engine.keep(1)
        await asyncio.sleep(0.5)
        assert engine.spares == 0
        with pytest.raises(ModelLoadError, match="rats"):
            await engine.start()


class TestWarmPool:
    async def test_a_model_is_loaded_in_a_process_that_waits(self, warm: WarmPool, make: Make) -> None:
        warm.fill("synthetic")
        await until(lambda: warm._children["synthetic"])
        [child] = warm._children["synthetic"]
        engine = make()
        await engine.start()
        assert pids(engine) == [child.process.pid]
        await until(lambda: warm._children["synthetic"])  # filled again
        assert warm.measure() > 1_000_000

    async def test_one_that_died_is_not_given(self, warm: WarmPool, make: Make) -> None:
        warm.fill("synthetic")
        await until(lambda: warm._children["synthetic"])
        [child] = warm._children["synthetic"]
        child.process.kill()
        await child.process.wait()
        engine = make()
        await engine.start()
        (result,) = await run(engine, lease(engine, max_tokens=1))
        assert result.text == "1@1 "


class TestProcess:
    async def test_the_servers_settings_stay_in_the_server(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """The broker's URL may hold a password."""
        monkeypatch.setenv("PENSTOCK_BROKER", "redis://:secret@10.0.0.1")
        monkeypatch.setenv("PENSTOCK_CACHE", "/somewhere")
        monkeypatch.setenv("HF_TOKEN", "needed for downloads")
        engine = make()
        await engine.start()
        environment = psutil.Process(pids(engine)[0]).environ()
        ours = {name: value for name, value in environment.items() if name.startswith("PENSTOCK_")}
        assert ours == {"PENSTOCK_CACHE": "/somewhere"}
        assert environment["HF_TOKEN"]


class TestMemory:
    async def test_what_a_model_holds_is_measured(self, make: Make) -> None:
        engine = make(memory_mb=200)
        assert engine.measure() == 0
        await engine.start()
        assert 200_000_000 < engine.measure() < 400_000_000

    def test_children_count_and_the_dead_do_not(self) -> None:
        with psutil.Popen(["sh", "-c", "sleep 100 & wait"]) as parent:
            alone = held_by(os.getpid())
            assert held_by(parent.pid) > 0
            assert alone > held_by(parent.pid)
            for child in parent.children():
                child.kill()
            parent.kill()
        assert held_by(parent.pid) == 0

    def test_the_files_tell_before_it_was_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"x" * 3_000_000)
        (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 9_000_000)  # the same weights again

        def told(path: str | None, name: str = "m", **options: str) -> tuple[int, int]:
            return estimate(EngineSpec("openvino", name, path, options))

        assert told(str(tmp_path)) == (BASE + 3_000_000, BASE + 6_000_000)
        assert told(str(tmp_path), precision="int8") == (BASE + 1_500_000, BASE + 3_000_000)
        assert told(str(tmp_path / "model.safetensors"))[0] == BASE + 3_000_000
        assert told(None, "some/where") == (BASE, BASE)
        assert told(None, "millrace")[0] > BASE
