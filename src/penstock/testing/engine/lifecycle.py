"""An engine that is closed, and started again."""

from __future__ import annotations

import pytest

from penstock.core.errors import EngineDied
from penstock.core.ports import Engine
from penstock.testing.engine.driver import Contract, forever, lease, run


class LifecycleContract(Contract):
    async def test_close_and_start_again(self, engine: Engine) -> None:
        await engine.close()
        await engine.start()
        (result,) = await run(engine, lease(engine, max_tokens=4))
        assert len(result.ids) == 4

    async def test_step_fails_once_the_engine_is_closed(self, engine: Engine) -> None:
        engine.add(1, lease(engine, max_tokens=1000))
        await engine.step()
        await engine.close()
        with pytest.raises(EngineDied):
            await forever(engine)
