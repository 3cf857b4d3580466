"""Many requests at once: they join, leave and are aborted at any step."""

from __future__ import annotations

from penstock.core.ports import Engine
from penstock.testing.engine.driver import PROMPTS, Contract, Driver, lease, run


class BatchingContract(Contract):
    async def test_joins_and_leaves_at_any_step(self, engine: Engine) -> None:
        driver = Driver(engine)
        keys = []
        for i, prompt in enumerate(PROMPTS):
            keys.append(driver.add(lease(engine, prompt, max_tokens=5 + 9 * (i % 3))))
            await driver.step()
        results = await driver.finish()
        assert [len(result.ids) for result in results] == [5 + 9 * (i % 3) for i in range(len(PROMPTS))]

    async def test_all_slots_advance_together(self, engine: Engine) -> None:
        driver = Driver(engine)
        keys = [driver.add(lease(engine, PROMPTS[i % 8], max_tokens=200)) for i in range(min(engine.slots, 64))]
        while not all(driver.results[key].ids for key in keys):
            await driver.step()
            assert all(driver.results[key].finish is None for key in keys), "one ended before another began"
        for key in keys:
            driver.abort(key)

    async def test_abort_ends_the_outputs_and_frees_the_slot(self, engine: Engine) -> None:
        driver = Driver(engine)
        for _ in range(3):  # more than the slots in all
            keys = [driver.add(lease(engine, max_tokens=500)) for _ in range(engine.slots)]
            await driver.step()
            for key in keys:
                driver.abort(key)
        counts = {key: len(result.ids) for key, result in driver.results.items()}
        last = driver.add(lease(engine, max_tokens=8))
        await driver.finish(last)
        assert len(driver.results[last].ids) == 8
        late = {key: len(driver.results[key].ids) - count for key, count in counts.items()}
        # What was on its way may still come, but it stops long before the 500 that were asked for.
        assert all(len(driver.results[key].ids) < 500 for key in counts), late

    async def test_aborting_the_unknown_is_harmless(self, engine: Engine) -> None:
        engine.abort(123_456)
        (result,) = await run(engine, lease(engine, max_tokens=3))
        assert len(result.ids) == 3
