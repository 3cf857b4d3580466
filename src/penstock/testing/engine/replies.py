"""A reply: its shape, its tokens, its one end, and what its sampling fields do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from penstock.core.job import Message, ResponseFormat
from penstock.core.ports import Engine, Finish
from penstock.testing.engine.driver import (
    FIELDS,
    Contract,
    entries_of,
    lease,
    needs,
    needs_determinism,
    needs_task,
    run,
    spelled,
    task_lease,
)


class ReplyContract(Contract):
    async def test_it_says_what_it_serves(self, engine: Engine) -> None:
        (info,) = engine.models
        assert info.name
        assert info.engine
        assert info.context_length > 0
        assert engine.slots >= 1

    async def test_a_reply_has_max_tokens_tokens_and_one_end(self, engine: Engine) -> None:
        (result,) = await run(engine, lease(engine, max_tokens=10))
        assert len(result.ids) == 10
        assert result.finish == Finish(("length",))
        assert result.text

    async def test_the_prompt_is_counted_once(self, engine: Engine) -> None:
        (result,) = await run(engine, lease(engine, prompt_ids=(5, 6, 7, 8, 9)))
        assert result.prompt_counts == [5]

    async def test_a_single_token(self, engine: Engine) -> None:
        (result,) = await run(engine, lease(engine, max_tokens=1))
        assert len(result.ids) == 1
        assert result.finish == Finish(("length",))

    async def test_messages(self, engine: Engine) -> None:
        if not engine.models[0].chat:
            pytest.skip("no chat template")
        (result,) = await run(engine, lease(engine, messages=(Message("user", "Hello!"),), max_tokens=5))
        assert result.finish is not None
        assert result.finish.error is None

    async def test_n_choices_each_have_their_tokens(self, engine: Engine) -> None:
        needs(engine, "n")
        (result,) = await run(engine, lease(engine, n=3, max_tokens=7))
        assert [result.choices.count(choice) for choice in range(3)] == [7, 7, 7]
        assert result.finish == Finish(("length",) * 3)
        assert all(result.folded.texts)

    async def test_too_long_a_prompt_is_refused_and_disturbs_nobody(self, engine: Engine) -> None:
        context = engine.models[0].context_length
        good, bad = await run(engine, lease(engine), lease(engine, prompt_ids=tuple([7] * (context + 1))))
        assert bad.finish is not None
        assert bad.finish.error is not None
        assert bad.finish.error.code == "context_length_exceeded"
        assert str(context) in bad.finish.error.message
        assert len(good.ids) == 24

    @pytest.mark.parametrize("field", FIELDS)
    async def test_what_it_declares_unsupported_it_refuses(self, engine: Engine, field: str) -> None:
        """A job may have been accepted before anything was known of its model."""
        if field not in engine.models[0].unsupported:
            pytest.skip("this engine honours it")
        (result,) = await run(engine, lease(engine, **{field: FIELDS[field]}))
        assert result.finish is not None
        assert result.finish.error is not None
        assert (result.finish.error.code, result.finish.error.param) == ("unsupported", field)

    async def test_stop_strings_end_the_text_before_them(self, engine: Engine) -> None:
        needs(engine, "stop")
        needs_determinism(engine)
        (free,) = await run(engine, lease(engine, max_tokens=40))
        stop = free.text[15:19]
        (stopped,) = await run(engine, lease(engine, max_tokens=40, stop=("no such words", stop)))
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.finish == Finish(("stop",), stops=(stop,) if self.tells_stops else ())

    async def test_a_biased_token_is_drawn(self, engine: Engine) -> None:
        needs(engine, "logit_bias")
        (result,) = await run(engine, lease(engine, max_tokens=5, logit_bias={42: 100.0}))
        if set(result.ids) == {-1}:  # an engine that is not told ids, only texts
            assert len(result.texts) == 5
            assert len(set(result.texts)) == 1
        else:
            assert result.ids == [42] * 5

    async def test_logprobs_come_with_every_token(self, engine: Engine) -> None:
        needs(engine, "logprobs")
        (result,) = await run(engine, lease(engine, max_tokens=6, logprobs=3))
        logprobs = [entry for output in result.outputs for entry in output.logprobs or []]
        assert len(logprobs) == 6
        for token, entry in zip(result.ids, logprobs, strict=True):
            assert entry is not None
            assert entry.logprob <= 0
            assert len(entry.top) == 3
            assert entry.top[0].id == token, "greedy draws the likeliest"

    async def test_logprobs_are_of_the_tokens_themselves(self, engine: Engine) -> None:
        """Whatever a token added to the text: its entry has its own, and it is one of the alternatives."""
        needs(engine, "logprobs")
        settings: dict[str, Any] = {"max_tokens": 24, "temperature": 1.2, "seed": 5, "logprobs": 2}
        (free,) = await run(engine, lease(engine, **settings))
        stop = free.text[15:19]
        (stopped,) = await run(engine, lease(engine, stop=(stop,), **settings))
        for result in (free, stopped):
            entries = entries_of(result)
            assert len(entries) == len(result.ids)
            for id, entry in zip(result.ids, entries, strict=True):
                assert (id, entry.text, entry.logprob, entry.data) in [
                    (top.id, top.text, top.logprob, top.data) for top in entry.top
                ]
                assert 2 <= len(entry.top) <= 3
            own = spelled(entries)
            assert own.startswith(result.text)
            assert (stop in own[len(result.text) :]) == (result is stopped and stop in own)

    async def test_half_a_character_has_an_entry_of_its_own(self, engine: Engine) -> None:
        needs(engine, "logprobs", "logit_bias", "response_format")
        needs_task(engine, "tokenize")
        if not self.tells_bytes:
            pytest.skip("this engine is not told the tokens' bytes")
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt="水", add_special_tokens=False))
        half = found.tokenized.tokens[-1]
        biased = lease(engine, max_tokens=4, logprobs=2, logit_bias={half: 100.0})
        words = ResponseFormat("json_schema", {"const": "水車 🚰"})
        never, whole = await run(engine, biased, lease(engine, max_tokens=60, logprobs=1, response_format=words))
        for result in (never, whole):
            entries = entries_of(result)
            assert [id for id in result.ids if id < 0] == []
            assert len(entries) == len(result.ids)
            assert any(entry.data is not None for entry in entries), "half a character is no text"
        assert set(never.ids) == {half}
        assert spelled(entries_of(whole)).startswith(json.dumps("水車 🚰", ensure_ascii=False))

    # ------------------------------------------------------------------------------------ where a reply may end

    async def test_no_end_before_min_tokens(self, engine: Engine) -> None:
        needs(engine, "min_tokens", "stop_token_ids")
        (free,) = await run(engine, lease(engine, max_tokens=30))
        end, stop = free.ids[2], free.text[:2]
        first = free.ids.index(end)
        settings: dict[str, Any] = {"max_tokens": 30, "stop_token_ids": (end,)}
        at_once, later, words = await run(
            engine,
            lease(engine, **settings),
            lease(engine, min_tokens=12, **settings),
            lease(engine, max_tokens=30, min_tokens=12, stop=(stop,)),
        )
        assert at_once.ids == free.ids[: first + 1]
        assert free.text.startswith(at_once.text)
        if engine.models[0].deterministic:  # elsewhere tokens that came together have one text
            assert at_once.text == "".join(free.texts[:first])
        assert at_once.finish is not None
        assert at_once.finish.finish_reasons == ("stop",)
        assert end not in later.ids[:12]
        assert len(later.ids) > 12
        assert len(words.ids) >= 12
        assert words.text.startswith(stop)
        if engine.models[0].deterministic:
            for cut in (1, 5, 11, 13):
                logged: dict[str, Any] = {"prefix": later.ids[:cut], "texts": later.texts[:cut], "attempt": 2}
                (rest,) = await run(engine, lease(engine, min_tokens=12, **settings, **logged))
                assert later.ids[:cut] + rest.ids == later.ids

    async def test_bad_words_are_not_written(self, engine: Engine) -> None:
        needs(engine, "bad_words")
        (free,) = await run(engine, lease(engine, max_tokens=40))
        bad = tuple(word for word in re.findall(r"\w+", free.text)[:8])
        (result,) = await run(engine, lease(engine, max_tokens=40, bad_words=bad))
        found = [entry for entry in re.findall(r" (\w+)(?= )", result.text) if entry in bad]
        assert result.text != free.text
        assert len(found) < len([entry for entry in re.findall(r" (\w+)(?= )", free.text) if entry in bad])
        if engine.models[0].deterministic:
            logged: dict[str, Any] = {"prefix": result.ids[:9], "texts": result.texts[:9], "attempt": 2}
            (rest,) = await run(engine, lease(engine, max_tokens=40, bad_words=bad, **logged))
            assert result.ids[:9] + rest.ids == result.ids

    async def test_ids_to_stop_at_are_the_models(self, engine: Engine) -> None:
        needs(engine, "stop_token_ids")
        (result,) = await run(engine, lease(engine, stop_token_ids=(10_000_000,)))
        assert result.finish is not None
        assert result.finish.error is not None
        assert (result.finish.error.code, result.finish.error.param) == ("invalid_request", "stop_token_ids")
