"""What an engine promises of the tasks that it offers: refuse the others, tokenize, embed."""

from __future__ import annotations

from typing import Any

from penstock.core.job import Task
from penstock.core.ports import Engine, Finish
from penstock.testing.engine.driver import INPUTS, PROMPTS, Contract, Driver, needs_task, run, task_lease


class TaskContract(Contract):
    """What an engine promises of the tasks that it offers (`ModelInfo.tasks`): the suite of one that does not generate,
    and a part of `EngineContract`."""

    def close_to(self, vectors: list[list[float]], others: list[list[float]]) -> bool:
        """Are they the same, but for that?"""
        most = self.vector_tolerance
        return all(
            len(ours) == len(theirs) and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < most
            for ours, theirs in zip(vectors, others, strict=True)
        )

    async def test_it_refuses_what_it_does_not_offer(self, engine: Engine) -> None:
        offered = engine.models[0].tasks
        asked: dict[Task, dict[str, Any]] = {
            "generate": {"prompt": "x"},
            "tokenize": {"prompt": "x"},
            "embed": {"inputs": ("x",)},
            "score": {"prompt": "x"},
        }
        missing = [task_lease(engine, task, **fields) for task, fields in asked.items() if task not in offered]
        for result in await run(engine, *missing) if missing else []:
            assert not result.ids
            assert result.finish is not None
            assert result.finish.error is not None
            assert (result.finish.error.code, result.finish.error.param) == ("unsupported", "model")

    # ------------------------------------------------------------------------------------ tokenize

    async def test_a_prompt_as_tokens_and_back(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        (result,) = await run(engine, task_lease(engine, "tokenize", prompt=PROMPTS[4]))
        found = result.tokenized
        assert found.token_strs is not None
        assert len(found.tokens) == len(found.token_strs) == result.prompt_counts[0] > 5
        assert all(found.token_strs)
        assert PROMPTS[4].lower() in found.text.lower()
        (back,) = await run(engine, task_lease(engine, "tokenize", prompt_ids=tuple(found.tokens)))
        assert (back.tokenized.tokens, back.tokenized.text) == (found.tokens, found.text)
        assert back.tokenized.token_strs in (found.token_strs, None)

    async def test_a_prompt_without_special_tokens(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        whole, bare = await run(
            engine,
            task_lease(engine, "tokenize", prompt="Rain"),
            task_lease(engine, "tokenize", prompt="Rain", add_special_tokens=False),
        )
        assert bare.tokenized.tokens
        assert set(bare.tokenized.tokens) <= set(whole.tokenized.tokens)

    async def test_nothing_has_no_tokens(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        (result,) = await run(engine, task_lease(engine, "tokenize", prompt_ids=()))
        assert result.tokenized.tokens == []
        assert result.tokenized.text == ""

    async def test_ids_that_the_model_does_not_have_are_refused(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        bad, good = await run(
            engine,
            task_lease(engine, "tokenize", prompt_ids=(5, 10_000_000)),
            task_lease(engine, "tokenize", prompt_ids=(5, 6)),
        )
        assert bad.finish is not None
        assert bad.finish.error is not None
        assert bad.finish.error.code == "invalid_request"
        assert good.tokenized.tokens == [5, 6]

    # ------------------------------------------------------------------------------------ embed

    async def test_every_input_has_a_vector(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        (result,) = await run(engine, task_lease(engine, "embed", inputs=INPUTS))
        assert sorted(result.ids) == list(range(len(INPUTS)))
        assert result.finish == Finish(("stop",))
        sizes = {len(vector) for vector in result.vectors}
        assert len(sizes) == 1
        assert sizes <= {engine.models[0].dimensions or next(iter(sizes))}
        assert not self.close_to(result.vectors[:1], result.vectors[1:2])

    async def test_a_vector_is_the_same_alone_and_among_others(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        alone = [(await run(engine, task_lease(engine, "embed", inputs=(each,))))[0] for each in INPUTS]
        first, second = await run(
            engine,
            task_lease(engine, "embed", inputs=INPUTS),
            task_lease(engine, "embed", inputs=tuple(reversed(INPUTS))),
        )
        wanted = [result.vectors[0] for result in alone]
        assert self.close_to(first.vectors, wanted)
        assert self.close_to(second.vectors, wanted[::-1])
        assert sum(result.prompt_counts[0] for result in alone) == first.prompt_counts[0] == second.prompt_counts[0]

    async def test_token_ids_are_embedded_as_their_text_is(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        needs_task(engine, "tokenize")
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt=INPUTS[1]))
        (result,) = await run(engine, task_lease(engine, "embed", inputs=(INPUTS[1], tuple(found.tokenized.tokens))))
        assert self.close_to(result.vectors[:1], result.vectors[1:])

    async def test_an_embedding_goes_on_behind_what_is_logged(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        (whole,) = await run(engine, task_lease(engine, "embed", inputs=INPUTS))
        for cut in (1, len(INPUTS) - 1, len(INPUTS)):
            logged: dict[str, Any] = {"prefix": whole.ids[:cut], "texts": whole.texts[:cut], "attempt": 2}
            (rest,) = await run(engine, task_lease(engine, "embed", inputs=INPUTS, **logged))
            assert sorted(whole.ids[:cut] + rest.ids) == list(range(len(INPUTS)))
            assert rest.finish == Finish(("stop",))
            assert self.close_to(rest.vectors, [whole.vector_of(index) for index in sorted(rest.ids)])

    async def test_many_inputs_do_not_keep_one_waiting(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        driver = Driver(engine)
        many = driver.add(task_lease(engine, "embed", inputs=INPUTS * 300))
        one = driver.add(task_lease(engine, "embed", inputs=INPUTS[:1]))
        await driver.finish(one)
        assert driver.results[many].finish is None
        (result,) = await driver.finish(many)
        assert sorted(result.ids) == list(range(300 * len(INPUTS)))

    async def test_an_aborted_embedding_is_over(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        driver = Driver(engine)
        many = driver.add(task_lease(engine, "embed", inputs=INPUTS * 400))
        driver.abort(many)
        (result,) = await driver.finish(driver.add(task_lease(engine, "embed", inputs=INPUTS[:1])))
        assert result.ids == [0]
        assert len(driver.results[many].ids) < 400 * len(INPUTS)

    async def test_too_long_an_input_is_refused_and_disturbs_nobody(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        context = engine.models[0].context_length
        bad, good = await run(
            engine,
            task_lease(engine, "embed", inputs=(INPUTS[0], tuple([7] * (context + 1)))),
            task_lease(engine, "embed", inputs=INPUTS[:1]),
        )
        assert bad.finish is not None
        assert bad.finish.error is not None
        assert (bad.finish.error.code, bad.finish.error.param) == ("context_length_exceeded", "input")
        assert str(context) in bad.finish.error.message
        assert good.ids == [0]
