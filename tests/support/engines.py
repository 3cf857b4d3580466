"""Real engine processes for the contract suites."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from penstock.engines.host.process import EngineProcess, EngineSpec


@pytest.mark.asyncio(loop_scope="class")
class OneProcess:
    """One engine process for all tests of a class, since its start costs more than most of them.

    The class brings a fixture ``spec`` of its scope. A process that a test has ended is started again.
    """

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def process(cls, spec: EngineSpec) -> AsyncIterator[EngineProcess]:
        engine = EngineProcess(spec)
        await engine.start()
        yield engine
        await engine.close()

    @pytest_asyncio.fixture(loop_scope="class")
    async def engine(self, process: EngineProcess) -> EngineProcess:
        if not process.alive:
            await process.start()
        return process
