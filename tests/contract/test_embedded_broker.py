"""The embedded broker keeps every promise of the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.testing.broker import BrokerContract, BrokerHarness


class TestEmbeddedBroker(BrokerContract):
    @pytest.fixture
    def make_harness(self, make_embedded_harness: Callable[[], BrokerHarness]) -> Callable[[], BrokerHarness]:
        return make_embedded_harness
