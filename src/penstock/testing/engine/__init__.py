"""The engine contract: what every engine promises, as a suite that a third party can run against its own.

Install ``penstock[testing]``, subclass `EngineContract` in a test module and give it a fixture ``engine`` that yields a
started engine::

    class TestMine(EngineContract):
        @pytest.fixture
        async def engine(self):
            engine = EngineProcess(EngineSpec("mine", "small"))
            await engine.start()
            yield engine
            await engine.close()

An engine that is slow to start may be shared by the tests of the class (a fixture of that scope, on a loop of that
scope); some tests close it, so it has to be started where it is not running.

Promises that need a deterministic engine are skipped where `ModelInfo.deterministic` is false. An engine that does not
generate takes `TaskContract` alone. `ThoughtContract` is for a model whose thoughts and calls are known beforehand.
"""

from __future__ import annotations

from penstock.testing.engine.batching import BatchingContract
from penstock.testing.engine.guided import GuidedContract
from penstock.testing.engine.lifecycle import LifecycleContract
from penstock.testing.engine.prompts import PromptContract
from penstock.testing.engine.replies import ReplyContract
from penstock.testing.engine.resume import ResumeContract
from penstock.testing.engine.tasks import TaskContract
from penstock.testing.engine.thoughts import ThoughtContract

__all__ = ["EngineContract", "TaskContract", "ThoughtContract"]


class EngineContract(
    TaskContract, ReplyContract, GuidedContract, PromptContract, BatchingContract, ResumeContract, LifecycleContract
):
    """Everything. Override the fixture ``engine``, and the flags of `penstock.testing.engine.driver.Contract`."""
