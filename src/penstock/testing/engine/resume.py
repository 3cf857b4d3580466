"""Determinism, and a reply that another attempt continues."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.ports import Engine, Finish
from penstock.testing.engine.driver import PROMPTS, Contract, lease, needs, needs_determinism, run


class ResumeContract(Contract):
    async def test_greedy_alone_is_greedy_in_a_batch(self, engine: Engine) -> None:
        needs_determinism(engine)
        alone = [(await run(engine, lease(engine, prompt)))[0].ids for prompt in PROMPTS]
        batch = await run(engine, *(lease(engine, PROMPTS[i % len(PROMPTS)]) for i in range(32)))
        for i, result in enumerate(batch):
            assert result.ids == alone[i % len(PROMPTS)]

    @pytest.mark.parametrize("temperature", [0.0, 0.9])
    async def test_a_resume_continues_as_if_nothing_had_happened(self, engine: Engine, temperature: float) -> None:
        needs_determinism(engine)
        # Few candidates: among thousands, a last-bit difference between a prefill and a step may tip a draw.
        settings: dict[str, Any] = {"max_tokens": 30, "temperature": temperature, "seed": 7, "top_k": 5}
        for prompt in PROMPTS[:4]:
            (whole,) = await run(engine, lease(engine, prompt, **settings))
            for cut in (1, 7, 29):
                logged: dict[str, Any] = {"prefix": whole.ids[:cut], "texts": whole.texts[:cut]}
                (rest,) = await run(engine, lease(engine, prompt, **logged, **settings))
                assert whole.ids[:cut] + rest.ids == whole.ids
                assert rest.texts == whole.texts[cut:]
                assert rest.finish == whole.finish

    async def test_a_resume_of_several_choices(self, engine: Engine) -> None:
        needs_determinism(engine)
        needs(engine, "n")
        (whole,) = await run(engine, lease(engine, n=2, temperature=0.9, seed=3, top_k=5))
        prefix, texts, choices = whole.ids[:13], whole.texts[:13], whole.choices[:13]
        (rest,) = await run(
            engine, lease(engine, n=2, temperature=0.9, seed=3, top_k=5, prefix=prefix, texts=texts, choices=choices)
        )
        joined = list(zip(prefix + rest.ids, choices + rest.choices, strict=True))
        for choice in range(2):
            expected = [token for token, c in zip(whole.ids, whole.choices, strict=True) if c == choice]
            assert [token for token, c in joined if c == choice] == expected

    async def test_a_resume_after_the_last_token_only_ends(self, engine: Engine) -> None:
        (whole,) = await run(engine, lease(engine, max_tokens=6))
        (rest,) = await run(engine, lease(engine, max_tokens=6, prefix=whole.ids, texts=whole.texts))
        assert rest.ids == []
        assert rest.finish == whole.finish

    async def test_a_resume_gives_the_rest_and_nothing_twice(self, engine: Engine) -> None:
        """What every engine promises, deterministic or not: max_tokens counts from the reply's start."""
        (whole,) = await run(engine, lease(engine, max_tokens=12))
        for cut in (1, 5, 11):
            (rest,) = await run(
                engine, lease(engine, max_tokens=12, prefix=whole.ids[:cut], texts=whole.texts[:cut], attempt=2)
            )
            assert len(rest.ids) == 12 - cut
            assert rest.finish == Finish(("length",))

    async def test_a_seed_repeats_and_another_differs(self, engine: Engine) -> None:
        needs_determinism(engine)
        needs(engine, "seed")
        first, again, other = await run(
            engine, *(lease(engine, temperature=1.0, seed=seed, max_tokens=32) for seed in (11, 11, 12))
        )
        assert first.ids == again.ids
        assert first.ids != other.ids
