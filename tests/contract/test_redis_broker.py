"""The Redis broker keeps every promise of the contract: on one server, in a cluster, and split into shards."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.testing.broker import BrokerContract, BrokerHarness


class TestRedisBroker(BrokerContract):
    @pytest.fixture
    def make_harness(self, make_redis_harness: Callable[[], BrokerHarness]) -> Callable[[], BrokerHarness]:
        return make_redis_harness


class TestRedisCluster(BrokerContract):
    @pytest.fixture
    def make_harness(self, make_cluster_harness: Callable[[], BrokerHarness]) -> Callable[[], BrokerHarness]:
        return make_cluster_harness

    @pytest.mark.long
    @pytest.mark.timeout(7200)
    def test_the_broker_does_what_the_model_does(self, make_harness: Callable[[], BrokerHarness]) -> None:
        super().test_the_broker_does_what_the_model_does(make_harness)


class TestShardedRedisCluster(BrokerContract):
    @pytest.fixture
    def make_harness(self, make_cluster_harness: Callable[..., BrokerHarness]) -> Callable[[], BrokerHarness]:
        return lambda: make_cluster_harness(shards=3)
