"""The embedded broker: jobs, queue and logs in one SQLite file, for one machine and no other service."""

from __future__ import annotations

from pathlib import Path

import msgspec

from penstock.brokers.embedded.broker import EmbeddedBroker
from penstock.brokers.registry import BrokerType
from penstock.core.ports import QueuePolicy
from penstock.core.telemetry import Telemetry

__all__ = ["BROKER", "EmbeddedBroker", "EmbeddedOptions"]


class EmbeddedOptions(msgspec.Struct, frozen=True, kw_only=True):
    data_dir: Path = Path()


def _make(address: str, options: EmbeddedOptions, policy: QueuePolicy, telemetry: Telemetry) -> EmbeddedBroker:
    return EmbeddedBroker(options.data_dir / "broker", policy=policy, telemetry=telemetry)


BROKER = BrokerType(make=_make, options=EmbeddedOptions, check=lambda address: None, remote=False)
