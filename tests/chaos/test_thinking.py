"""Thoughts and calls under faults: whatever dies, each reply is the one that the model has, told apart as ever.

The model's words are known (`tests.chaos.thinking`), so no attempt may lose, repeat or misplace a character, also where
it takes over within a thought, a mark, a character or a call.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.fleet import Fleet
from tests.chaos.harness import Outcome, Plan, Storm
from tests.chaos.target import Embedded
from tests.chaos.thinking import MUMBLER, THINKER, Thinker
from tests.support.families import Family
from tests.support.server import Server

FAULTS = ("worker-kill", "engine-kill", "gateway-kill", "worker-stop", "engine-stop", "gateway-stop", "clients")


def check(outcome: Outcome, *, interrupted: int) -> None:
    assert not outcome.problems, "\n".join([*outcome.problems[:20], *map(str, outcome.strikes)])
    assert set(outcome.statuses) <= {"completed", "cancelled"}, outcome
    # A storm that hit nothing proves nothing.
    assert outcome.interrupted >= interrupted, outcome


async def storm(server: Server, thinker: Thinker, plan: Plan, *, interrupted: int) -> None:
    bodies = thinker.bodies(plan.streams, random.Random(plan.seed))
    check(await Storm(Embedded(server), plan, says=thinker.says).run(bodies), interrupted=interrupted)


async def test_one_server(make_server: Callable[..., Server], tmp_path: Path, seed: int) -> None:
    """It dies, its engine dies, its engine hangs, and its clients go and come."""
    thinker = Thinker.make(THINKER, tmp_path / "model")
    faults = random.Random(seed).sample(["engine", "kill", "hang"], 3)
    plan = Plan(seed, streams=8, tokens=400, faults=[*faults, "clients"], twins=0.25, cancels=0.1, every=300)
    server = make_server(models=[thinker.served], settings={"hang_timeout": 2, "load_timeout": 10})
    await storm(server, thinker, plan, interrupted=4)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", [THINKER, MUMBLER], ids=["marks-are-tokens", "marks-are-text"])
async def test_one_server_again_and_again(
    make_server: Callable[..., Server], tmp_path: Path, seed: int, family: Family
) -> None:
    thinker = Thinker.make(family, tmp_path / "model")
    server = make_server(models=[thinker.served], settings={"hang_timeout": 2, "load_timeout": 10})
    for number in range(2):
        dice = random.Random(f"{seed}/{number}")
        faults = dice.sample(["engine", "kill", "hang", "engine", "kill", "clients"], 6)
        plan = Plan(seed, streams=18, tokens=400, faults=faults, drops=2, twins=0.25, cancels=0.1, every=1500)
        await storm(server, thinker, replace(plan, seed=dice.randrange(2**32)), interrupted=4)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", [THINKER, MUMBLER], ids=["marks-are-tokens", "marks-are-text"])
async def test_a_fleet(tmp_path: Path, seed: int, family: Family) -> None:
    """Gateways, workers and engines die and stop: a thought goes on in another worker, and the zombie is refused."""
    thinker = Thinker.make(family, tmp_path / "model")
    dice = random.Random(seed)
    faults = [*dice.sample(FAULTS, len(FAULTS)), *dice.sample(FAULTS, len(FAULTS))]
    plan = Plan(seed, streams=18, tokens=400, faults=faults, twins=0.25, cancels=0.1, every=1500, overlap=2)
    async with Fleet(tmp_path, workers=2, models=[thinker.served], lease_ttl=2) as fleet:
        bodies = thinker.bodies(plan.streams, random.Random(seed))
        outcome = await Storm(fleet, plan, says=thinker.says).run(bodies)
        check(outcome, interrupted=4)
        assert set(outcome.faults) == set(FAULTS)
