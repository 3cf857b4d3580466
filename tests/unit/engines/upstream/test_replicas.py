"""The circuit breaker, on a clock by hand."""

from __future__ import annotations

from penstock.engines.upstream.options import ServerAddress
from penstock.engines.upstream.replicas import TRIP, Replica


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def a_replica(clock: Time) -> Replica:
    from penstock.engines.upstream.dialects import DIALECTS

    replica = Replica(ServerAddress("http://x", "http://x/v1"), clock)
    replica.dialect = DIALECTS["openai"]
    return replica


def test_a_replica_that_fails_rests_and_is_tried_by_one_request() -> None:
    clock = Time()
    replica = a_replica(clock)
    for _ in range(TRIP - 1):
        replica.failed("why")
    assert replica.available()
    replica.failed("why")
    assert not replica.available()
    assert 0.25 <= replica.wait() <= 0.5
    clock.now += 0.5
    assert replica.available()
    replica.begin()
    assert not replica.available(), "one at a time"
    replica.failed("why")
    replica.end()
    assert 0.5 <= replica.wait() <= 1.0
    clock.now += 1.0
    replica.begin()
    replica.succeeded()
    assert replica.available()


def test_the_pause_grows_up_to_a_limit() -> None:
    clock = Time()
    replica = a_replica(clock)
    for _ in range(40):
        replica.failed("why")
    assert 15 <= replica.wait() <= 30


def test_who_asks_for_a_pause_gets_it_and_is_not_blamed() -> None:
    clock = Time()
    replica = a_replica(clock)
    replica.busy(7)
    assert not replica.available()
    assert replica.wait() == 7
    clock.now += 7
    assert replica.available()
    assert replica.failures == 0


def test_who_is_down_gets_nothing_until_a_health_check_finds_it() -> None:
    clock = Time()
    replica = a_replica(clock)
    replica.failed("refused")
    replica.lost("refused")
    clock.now += 100
    assert not replica.available()
    replica.found()
    assert replica.available()
    assert replica.failures == 0
