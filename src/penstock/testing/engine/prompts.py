"""A prompt's tokens: that they are those of a reply, and their scores."""

from __future__ import annotations

import pytest

from penstock.core.job import Message
from penstock.core.ports import Engine, Finish
from penstock.testing.engine.driver import (
    HALF,
    PROMPTS,
    Contract,
    Driver,
    lease,
    needs,
    needs_determinism,
    needs_task,
    run,
    score_lease,
    task_lease,
)


class PromptContract(Contract):
    async def test_the_tokens_of_a_prompt_are_those_that_a_reply_is_made_from(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        needs_determinism(engine)
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt=PROMPTS[4]))
        by_text, by_ids = await run(
            engine, lease(engine, PROMPTS[4]), lease(engine, prompt_ids=tuple(found.tokenized.tokens))
        )
        assert by_ids.ids == by_text.ids
        assert by_ids.prompt_counts == by_text.prompt_counts == found.prompt_counts

    async def test_the_tokens_of_messages_are_those_that_a_reply_is_made_from(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        if not engine.models[0].chat:
            pytest.skip("no chat template")
        asked = (Message("user", "What is the colour of <|end|> the sky?"),)
        (found,) = await run(engine, task_lease(engine, "tokenize", messages=asked))
        (reply,) = await run(engine, lease(engine, messages=asked))
        assert found.prompt_counts == reply.prompt_counts == [len(found.tokenized.tokens)]
        if engine.models[0].deterministic:
            (by_ids,) = await run(engine, lease(engine, prompt_ids=tuple(found.tokenized.tokens)))
            assert by_ids.ids == reply.ids

    async def test_half_a_character_in_a_past_call_harms_nobody(self, engine: Engine) -> None:
        """Text that is made inside the engine is checked where it leaves for the tokenizer."""
        needs(engine, "tools")
        if not engine.models[0].chat:
            pytest.skip("no chat template")
        asked = [lease(engine), lease(engine, messages=HALF), lease(engine)]
        for result in await run(engine, *asked):
            assert result.finish == Finish(("length",))
        if "tokenize" in engine.models[0].tasks:
            (found,) = await run(engine, task_lease(engine, "tokenize", messages=HALF))
            assert found.tokenized.tokens

    async def test_tokens_do_not_wait_for_replies(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        driver = Driver(engine)
        replies = [driver.add(lease(engine, max_tokens=400)) for _ in range(min(engine.slots, 16))]
        (found,) = await driver.finish(driver.add(task_lease(engine, "tokenize", prompt="Rain")))
        assert found.tokenized.tokens
        assert any(driver.results[key].finish is None for key in replies)
        for key in replies:
            driver.abort(key)

    # ------------------------------------------------------------------------------------ score

    async def test_a_score_has_an_entry_for_each_token_of_the_prompt(self, engine: Engine) -> None:
        needs_task(engine, "score")
        prompt = " and ".join(PROMPTS * 4)  # more than is scored in a step
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt=prompt))
        (result,) = await run(engine, score_lease(engine, 3, prompt=prompt))
        assert result.ids == found.tokenized.tokens
        assert len(result.ids) > 100
        assert result.finish == Finish(("stop",))
        assert result.prompt_counts == [len(result.ids)]
        assert prompt in result.text
        first, *others = result.scores
        assert first is None
        for score in others:
            assert score is not None
            assert score.logprob <= 0
            assert [top.logprob for top in score.top[:3]] == sorted(
                (top.logprob for top in score.top[:3]), reverse=True
            )
            assert max(top.logprob for top in score.top) >= score.logprob

    async def test_a_score_is_what_a_reply_tells_of_its_tokens(self, engine: Engine) -> None:
        needs_task(engine, "score")
        needs_determinism(engine)
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt=PROMPTS[4]))
        begun = tuple(found.tokenized.tokens)
        driver = Driver(engine)
        (reply,) = await run(engine, lease(engine, prompt_ids=begun, max_tokens=90, logprobs=0))
        for others in (0, 3):  # alone, and beside those that draw
            beside = [driver.add(lease(engine, prompt, max_tokens=60)) for prompt in PROMPTS[:others]]
            (result,) = await driver.finish(driver.add(score_lease(engine, 0, prompt_ids=(*begun, *reply.ids))))
            told = [score.logprob for score in result.scores[len(begun) :] if score is not None]
            drawn = [score.logprob for score in reply.scores if score is not None]
            assert len(told) == len(drawn) == len(reply.ids)
            assert max(abs(a - b) for a, b in zip(told, drawn, strict=True)) < 1e-3
            await driver.finish(*beside)

    async def test_a_score_goes_on_where_an_earlier_attempt_was(self, engine: Engine) -> None:
        needs_task(engine, "score")
        needs_determinism(engine)
        prompt = " and ".join(PROMPTS * 2)
        (whole,) = await run(engine, score_lease(engine, 2, prompt=prompt))
        for had in (1, 2, 70, len(whole.ids) - 1, len(whole.ids)):
            logged = {"prefix": whole.ids[:had], "texts": whole.texts[:had]}
            (rest,) = await run(engine, score_lease(engine, 2, prompt=prompt, **logged))
            assert rest.ids == whole.ids[had:]
            assert rest.text == "".join(whole.texts[had:])
            assert [score and round(score.logprob, 3) for score in rest.scores] == [
                score and round(score.logprob, 3) for score in whole.scores[had:]
            ]

    async def test_a_prompt_of_one_token_and_one_of_the_whole_context_can_be_scored(self, engine: Engine) -> None:
        needs_task(engine, "score")
        context = engine.models[0].context_length
        one, whole, more = await run(
            engine,
            score_lease(engine, 1, prompt_ids=(7,)),
            score_lease(engine, 0, prompt_ids=(7, 8) * (context // 2)),
            score_lease(engine, 0, prompt_ids=(7,) * (context + 1)),
        )
        assert (one.ids, one.scores) == ([7], [None])
        assert len(whole.ids) == context // 2 * 2
        assert more.finish is not None
        assert more.finish.error is not None
        assert more.finish.error.code == "context_length_exceeded"

    async def test_scores_are_dropped_at_any_step(self, engine: Engine) -> None:
        needs_task(engine, "score")
        driver = Driver(engine)
        keys = [driver.add(score_lease(engine, 0, prompt=" and ".join(PROMPTS * 8))) for _ in range(4)]
        beside = driver.add(lease(engine, max_tokens=30))
        for key in keys[:3]:
            await driver.step()
            driver.abort(key)
        last, reply = await driver.finish(keys[3], beside)
        assert last.scores[1:]
        assert all(last.scores[1:])
        assert reply.ids
