"""What a broker's own tests give to the suite: a store, a clock, and a crash."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from penstock.core.ports import Broker, QueuePolicy


class AdjustableClock(Protocol):
    """The clock of the broker under test (`penstock.testing.clock.ManualClock`, or whatever moves its time)."""

    def now(self) -> float: ...

    def advance(self, seconds: float) -> None: ...


class BrokerHarness(ABC):
    """One store, empty at first, and the brokers opened on it one after another."""

    clock: AdjustableClock

    total_order = True
    """False for a store that is split into parts: order, classes, bounds and fairness are exact within a part only."""

    @abstractmethod
    async def broker(self, policy: QueuePolicy | None = None) -> Broker:
        """An opened broker on this harness's store, under *policy* (None: the defaults)."""

    @abstractmethod
    async def crash(self) -> None:
        """Lose every open broker as a kill -9 would; what was acknowledged is still in the store."""

    @abstractmethod
    async def close(self) -> None:
        """Tear everything down. Safe to call more than once."""

    async def advance(self, seconds: float) -> None:
        """Let *seconds* pass for the broker."""
        self.clock.advance(seconds)

    async def stored_bytes(self) -> int | None:
        """How much the store holds, or None where that can't be observed."""
        return None


F = TypeVar("F", bound=Callable[..., Any])


def total_order(test: F) -> F:
    """Mark a test of what only a store in one piece promises (`BrokerHarness.total_order`)."""
    test.total_order = True  # type: ignore[attr-defined]
    return test
