"""The engine contract on every engine of the box, and what the process around an engine adds."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
from tests.support.encoder import encoder
from tests.support.engines import OneProcess
from tests.support.gguf import bundled_gguf
from tests.support.torch import NO_TORCH, TORCH

from penstock.core.errors import EngineDied, ModelLoadError
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.testing.engine import EngineContract, TaskContract
from penstock.testing.engine.driver import forever, lease, run


async def started(spec: EngineSpec, **settings: float) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(spec, **settings)  # type: ignore[arg-type]
    await engine.start()
    yield engine
    await engine.close()


class TestSynthetic(OneProcess, EngineContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def spec() -> EngineSpec:
        return EngineSpec("synthetic", "synthetic", None, {"rate": "2000", "slots": "64"})


class TestOpenVINO(OneProcess, EngineContract):
    """The model in the box at f32."""

    @pytest.fixture(scope="class")
    @staticmethod
    def spec() -> EngineSpec:
        return EngineSpec("openvino", "millrace")


class TestOpenVINOInt4(OneProcess, EngineContract):
    """The same in 4 bits, its embedding in 8: replies depend on nothing but the request, however weights are stored."""

    @pytest.fixture(scope="class")
    @staticmethod
    def spec() -> EngineSpec:
        return EngineSpec("openvino", "millrace", None, {"precision": "int4"})


@pytest.mark.long
class TestOpenVINOGguf(OneProcess, EngineContract):
    """The same as a quantised GGUF file, read into the default engine."""

    @pytest.fixture(scope="class")
    @staticmethod
    def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
        return EngineSpec("openvino", "millrace", str(bundled_gguf(tmp_path_factory.mktemp("gguf"), "q4_1")))


class TestOpenVINOEmbedding(OneProcess, TaskContract):
    """A small encoder at f32."""

    @pytest.fixture(scope="class")
    @staticmethod
    def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
        return EngineSpec("openvino", "encoder", str(encoder(tmp_path_factory.mktemp("encoder"))))


class TestLlama(OneProcess, EngineContract):
    """The model in the box as a GGUF file, in llama.cpp."""

    @pytest.fixture(scope="class")
    @staticmethod
    def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
        path = bundled_gguf(tmp_path_factory.mktemp("gguf"))
        return EngineSpec("llama", "millrace", str(path), {"slots": "16", "context": "512"})


@pytest.mark.skipif(TORCH is None, reason=NO_TORCH)
class TestTransformers(OneProcess, EngineContract):
    """The model in the box at f32, in torch."""

    @pytest.fixture(scope="class")
    @staticmethod
    def spec() -> EngineSpec:
        return EngineSpec("transformers", "millrace", None, {"batching": "continuous"})


@pytest.mark.skipif(TORCH is None, reason=NO_TORCH)
class TestTransformersStatic(OneProcess, EngineContract):
    """The same through the library's `generate`, in batches that nobody can join."""

    @pytest.fixture(scope="class")
    @staticmethod
    def spec() -> EngineSpec:
        options = {"batching": "static", "slots": "16", "window": "30"}
        return EngineSpec("transformers", "millrace", None, options)


class TestProcess:
    @pytest.fixture
    async def engine(self) -> AsyncIterator[EngineProcess]:
        async for engine in started(EngineSpec("synthetic", "s", None, {"rate": "100"}), hang_timeout=1.0):
            yield engine

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
    async def test_a_dead_or_hung_engine_is_noticed_and_starts_again(self, engine: EngineProcess, number: int) -> None:
        engine.add(1, lease(engine, max_tokens=100_000))
        await engine.step()
        assert engine.pid is not None
        os.kill(engine.pid, number)
        with pytest.raises(EngineDied):
            await forever(engine)
        await engine.start()
        (result,) = await run(engine, lease(engine, max_tokens=3, prefix=[1], attempt=2))
        assert result.text == "2@2 3@2 "

    async def test_an_idle_engine_is_not_taken_for_hung(self, engine: EngineProcess) -> None:
        await asyncio.sleep(2.5)
        (result,) = await run(engine, lease(engine, max_tokens=2))
        assert result.text == "1@1 2@1 "

    async def test_a_reader_that_is_behind_slows_the_engine_and_loses_nothing(self) -> None:
        async for engine in started(EngineSpec("synthetic", "s", None, {"rate": "0"})):
            engine.add(1, lease(engine, max_tokens=200_000))
            await asyncio.sleep(0.5)
            ids: list[int] = []
            while len(ids) < 200_000:
                ids += [token for output in await engine.step() for token in output.ids]
            assert ids == list(range(1, 200_001))

    async def test_what_cannot_be_loaded_says_why(self) -> None:
        engine = EngineProcess(EngineSpec("synthetic", "s", None, {"rats": "5"}))
        with pytest.raises(ModelLoadError, match="rats"):
            await engine.start()
        engine = EngineProcess(EngineSpec("openvino", "x", "/nowhere/at/all"))
        with pytest.raises(ModelLoadError, match="/nowhere/at/all"):
            await engine.start()
