"""One client in ten sends what has broken others' work before: nobody else loses, repeats or begins anew."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.harness import Plan
from tests.chaos.hostile import INPUTS, Crowd, storm


async def test_some_of_them(tmp_path: Path, seed: int) -> None:
    inputs = random.Random(seed).sample(list(INPUTS), 3)
    async with Crowd(tmp_path) as crowd:
        outcome = await storm(crowd, Plan(seed, streams=10, tokens=40, faults=()), inputs)
    assert not outcome.problems, "\n".join(outcome.problems[:20])
    assert outcome.statuses == {"completed": outcome.streams}, outcome


@pytest.mark.long
async def test_all_of_them(tmp_path: Path, seed: int) -> None:
    async with Crowd(tmp_path) as crowd:
        outcome = await storm(crowd, Plan(seed, streams=20, tokens=100, faults=()), list(INPUTS))
    assert not outcome.problems, "\n".join(outcome.problems[:20])
    assert outcome.statuses == {"completed": outcome.streams}, outcome
