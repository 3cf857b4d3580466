from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.testing.broker import BrokerContract, BrokerHarness


class TestRedisBroker(BrokerContract):
    @pytest.fixture
    def make_harness(self, make_redis_harness: Callable[[], BrokerHarness]) -> Callable[[], BrokerHarness]:
        return make_redis_harness
