"""The moment between an engine's death and its burial, on the loop that the server runs on."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from penstock.core.errors import EngineDied
from penstock.core.job import Job, Request, Sampling, new_job_id
from penstock.core.ports import Lease
from penstock.engines.host.process import EngineProcess, EngineSpec

uvloop = pytest.importorskip("uvloop")


def lease() -> Lease:
    request = Request(model="s", prompt="x", sampling=Sampling(max_tokens=100_000))
    return Lease(Job(id=new_job_id(), tenant="t", request=request), 1)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_job_given_to_an_engine_that_has_just_died_is_no_crash(run) -> None:  # type: ignore[no-untyped-def]
    async def scenario() -> None:
        engine = EngineProcess(EngineSpec("synthetic", "s", None, {"rate": "100"}))
        await engine.start()
        try:
            engine.add(1, lease())
            await engine.step()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            async with asyncio.timeout(30):
                await engine._readable.wait()
                while engine._death is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            # The worker doesn't know yet: it admits, and aborts.
            engine.add(2, lease())
            engine.abort(1)
            engine._unread.clear()
            with pytest.raises(EngineDied):
                await engine.step()
        finally:
            await engine.close()

    run(scenario())
