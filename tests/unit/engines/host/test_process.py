"""What the parent of an engine process tells the telemetry: of the process, and what the engine in it has to say."""

from __future__ import annotations

import os
import signal

import pytest
from tests.support.odd_engine import spawn

from penstock.core.errors import EngineDied, ModelLoadError
from penstock.core.telemetry import Fact, NoTelemetry
from penstock.engines.host.process import EngineProcess, EngineSpec


class Heard(NoTelemetry):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Fact]]] = []

    def event(self, name: str, /, **facts: Fact) -> None:
        self.events.append((name, facts))

    def take(self) -> list[str]:
        """The names of the events since the last call, all of them of our model."""
        names = [name for name, facts in self.events]
        assert all((facts["model"], facts["engine"]) == ("m", "odd") for _, facts in self.events)
        return names


@pytest.fixture
def heard() -> Heard:
    return Heard()


async def test_a_life_with_a_death(heard: Heard) -> None:
    engine = EngineProcess(EngineSpec("odd", "m"), telemetry=heard, spawn=spawn)
    try:
        await engine.start()
        assert heard.take() == ["engine.started", "odd.loading", "engine.loaded"]
        started, loading, loaded = (facts for _, facts in heard.events)
        assert started["pid"] == loaded["pid"] == engine.pid
        assert isinstance(loaded["memory"], int)
        assert loaded["memory"] > 10_000_000, "an interpreter takes more"
        assert loading["half"] == "\N{REPLACEMENT CHARACTER}", "half a character is told as well as can be"
        heard.events.clear()

        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            await engine.step()
        await engine.start()
        assert heard.take() == ["engine.died", "engine.started", "odd.loading", "engine.restarted"]
        assert heard.events[0][1]["error"] == "The engine process for 'm' died."
        heard.events.clear()

        await engine.close()
        await engine.start()
        assert heard.take() == ["engine.started", "odd.loading", "engine.loaded"], "a close is no death"
    finally:
        await engine.close()


async def test_one_that_cannot_load_has_not_died(heard: Heard) -> None:
    engine = EngineProcess(EngineSpec("odd", "m", None, {"rate": "fast"}), telemetry=heard, spawn=spawn)
    with pytest.raises(ModelLoadError, match="Option rate is a number, at least 0, not 'fast'"):
        await engine.start()
    assert heard.take() == ["engine.started"]
