"""A short storm over Redis: every kind of fault once, several at a time; what dies is replaced, and no stream is torn.

``python -m tests.chaos --redis`` is the long one. ``PENSTOCK_TEST_SEED`` repeats a storm.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.chaos.fleet import FAULTS, Fleet
from tests.chaos.harness import Outcome, Plan, Storm
from tests.support.server import wait_for


def check(outcome: Outcome, *, interrupted: int) -> None:
    assert not outcome.problems, "\n".join([*outcome.problems[:20], *map(str, outcome.strikes)])
    assert set(outcome.statuses) <= {"completed", "cancelled"}, outcome
    # A storm that hit nothing proves nothing.
    assert outcome.interrupted >= interrupted, outcome


async def test_some_faults(tmp_path: Path, seed: int) -> None:
    """Of each kind of process one, and the network."""
    faults = random.Random(seed).sample(["worker-kill", "gateway-kill", "redis-kill", "engine-kill", "worker-drop"], 5)
    plan = Plan(seed, streams=12, tokens=150, faults=faults, twins=0.25, cancels=0.1, every=100, overlap=5)
    async with Fleet(tmp_path, workers=2, rate=100, lease_ttl=1) as fleet:
        outcome = await Storm(fleet, plan).run()
        check(outcome, interrupted=1)
        assert set(outcome.faults) == set(faults)


@pytest.mark.long
async def test_every_kind_of_fault(tmp_path: Path, seed: int) -> None:
    """The stopped worker comes first, and alone: its jobs go to others, and then it wakes up and writes."""
    others = [fault for fault in FAULTS if fault != "worker-stop"]
    faults = random.Random(seed).sample(others, len(others))
    alone = Plan(seed, streams=18, tokens=250, faults=["worker-stop"], drops=0, every=500)
    plan = Plan(seed, streams=18, tokens=150, faults=faults, twins=0.25, cancels=0.1, every=100, overlap=9)
    async with Fleet(  # two workers have no room for all streams: each of the three has some
        tmp_path, rate=100, slots=8, lease_ttl=1, clocks=any(fault.endswith("-clock") for fault in faults)
    ) as fleet:
        check(await Storm(fleet, alone).run(), interrupted=1)
        await asyncio.to_thread(wait_for, fleet.zombies, "a refused write of the worker that was stopped")
        outcome = await Storm(fleet, plan).run()
        check(outcome, interrupted=5)
        assert set(outcome.faults) == set(others)


async def test_a_drain_waits_for_no_lease(tmp_path: Path, seed: int) -> None:
    """Its running jobs are given back, and go on elsewhere at once: no lease ran out (they are a minute long)."""
    plan = Plan(seed, streams=12, tokens=300, faults=["worker-drain"], drops=0, every=1000)
    async with Fleet(tmp_path, gateways=1, workers=2, rate=100, lease_ttl=60) as fleet:
        outcome = await Storm(fleet, plan).run()
        check(outcome, interrupted=1)
        assert outcome.attempts == 2
        assert await fleet.leases_lost() == 0
    print("pauses:", sorted(round(recovery.pause, 2) for recovery in outcome.recoveries))


@pytest.mark.long
async def test_a_cluster_loses_a_node_and_a_worker(tmp_path: Path, seed: int) -> None:
    plan = Plan(seed, streams=18, tokens=400, faults=["worker-kill", "redis-kill"], twins=0.25, every=800, overlap=2)
    async with Fleet(tmp_path, nodes=3, workers=2, rate=100) as fleet:
        outcome = await Storm(fleet, plan).run()
        check(outcome, interrupted=1)
        assert set(outcome.faults) == {"redis-kill", "worker-kill"}
