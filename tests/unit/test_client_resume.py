"""How long the client waits before it tries again, and when it gives up."""

from __future__ import annotations

import pytest

from penstock.client import Unreachable, resume
from penstock.client.resume import RetryBudget
from penstock.core import aio


def test_a_budget_counts_from_the_first_failure_and_starts_anew_with_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "BACKOFF", 0.001)
    monkeypatch.setattr(resume, "BACKOFF_MAX", 0.002)
    now = 100.0
    budget = RetryBudget(10.0, lambda: now)
    error = Unreachable("away")
    now = 500.0
    assert budget.pause(error) <= resume.BACKOFF
    now = 509.0
    assert budget.pause(error, asked=0.5) >= 0.5
    budget.progress()
    now = 515.0
    budget.pause(error)
    now = 524.999
    assert budget.pause(error) <= 0.001
    now = 525.0
    with pytest.raises(Unreachable):
        budget.pause(error)


def test_a_budget_does_not_wait_for_what_comes_too_late_and_can_be_none() -> None:
    with pytest.raises(Unreachable):
        RetryBudget(10.0).pause(Unreachable("away"), asked=11)
    with pytest.raises(Unreachable):
        RetryBudget(0.0).pause(Unreachable("away"))


def test_the_backoff_grows_on_top_of_what_the_server_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "BACKOFF", 1.0)
    monkeypatch.setattr(resume, "BACKOFF_MAX", 4.0)
    monkeypatch.setattr(aio.random, "uniform", lambda low, high: high)
    budget = RetryBudget(60.0, lambda: 0.0)
    assert [budget.pause(Unreachable("away"), 0.5) for _ in range(4)] == [1.5, 2.5, 4.5, 4.5]
    budget.progress()
    assert budget.pause(Unreachable("away"), 0.5) == 1.5
