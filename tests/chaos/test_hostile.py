"""One client in ten sends what has broken others' work before: nobody else loses, repeats or begins anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.harness import Plan
from tests.chaos.hostile import INPUTS, Crowd, storm


def plan(seed: int) -> Plan:
    return Plan(seed, streams=20, tokens=100, faults=())


@pytest.mark.skipif(os.environ.get("PENSTOCK_HYPOTHESIS_PROFILE") != "long", reason="minutes: long runs only")
@pytest.mark.parametrize("name", INPUTS)
async def test_one_input(tmp_path: Path, seed: int, name: str) -> None:
    async with Crowd(tmp_path) as crowd:
        outcome = await storm(crowd, plan(seed), [name])
    assert not outcome.problems, "\n".join(outcome.problems[:20])


async def test_all_of_them(tmp_path: Path, seed: int) -> None:
    async with Crowd(tmp_path) as crowd:
        outcome = await storm(crowd, plan(seed), list(INPUTS))
    assert not outcome.problems, "\n".join(outcome.problems[:20])
    assert outcome.statuses == {"completed": outcome.streams}, outcome
