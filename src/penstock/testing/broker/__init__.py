"""The broker contract: every promise of `penstock.core.ports.Broker` as a test that any broker must pass unchanged.

To run it on a broker of your own, install ``penstock[testing]``, set ``asyncio_mode = "auto"``, and give the suite a
harness: a store and a clock (`BrokerHarness` has four methods to write)::

    # conftest.py: readable assertion messages
    pytest.register_assert_rewrite("penstock.testing.broker")

    # test_my_broker.py
    from penstock.testing.broker import BrokerContract, BrokerHarness

    class MyHarness(BrokerHarness): ...

    class TestMyBroker(BrokerContract):
        @pytest.fixture
        def make_harness(self, tmp_path_factory):
            return lambda: MyHarness(tmp_path_factory.mktemp("store"))

The suite never sleeps for a lease: time is the harness's clock, and `Broker.sweep` is what acts on it. ``wait`` of a
claim is the one real duration. Where the ports leave a choice, the test says which answers it accepts.

The model comparison follows Hypothesis's profile (``--hypothesis-profile``): more examples there, a longer run here.
"""

from __future__ import annotations

from penstock.testing.broker.append import AppendContract
from penstock.testing.broker.cancel import CancelContract
from penstock.testing.broker.claim import ClaimContract
from penstock.testing.broker.fairness import FairnessContract, ReserveContract
from penstock.testing.broker.harness import AdjustableClock, BrokerHarness
from penstock.testing.broker.leases import DeadlineContract, LeaseContract
from penstock.testing.broker.machine import ModelContract
from penstock.testing.broker.phases import PhaseContract
from penstock.testing.broker.query import QueryContract
from penstock.testing.broker.restart import RestartContract
from penstock.testing.broker.retention import ForgetContract, RetentionContract
from penstock.testing.broker.submit import SubmitContract
from penstock.testing.broker.tail import TailContract

__all__ = ["AdjustableClock", "BrokerContract", "BrokerHarness"]


class BrokerContract(
    SubmitContract,
    ClaimContract,
    ReserveContract,
    FairnessContract,
    AppendContract,
    PhaseContract,
    TailContract,
    CancelContract,
    DeadlineContract,
    LeaseContract,
    RetentionContract,
    ForgetContract,
    RestartContract,
    QueryContract,
    ModelContract,
):
    """Everything. Override the fixture ``make_harness``."""
