"""The Redis broker: jobs, queue and logs in a Redis or Valkey server, for any number of gateways and workers."""

from __future__ import annotations

from penstock.brokers.redis.broker import RedisBroker
from penstock.brokers.redis.options import RedisOptions, check_address
from penstock.brokers.registry import BrokerType
from penstock.core.ports import QueuePolicy
from penstock.core.telemetry import Telemetry

__all__ = ["BROKER", "RedisBroker", "RedisOptions"]


def _make(address: str, options: RedisOptions, policy: QueuePolicy, telemetry: Telemetry) -> RedisBroker:
    return RedisBroker(address, options, policy=policy, telemetry=telemetry)


BROKER = BrokerType(make=_make, options=RedisOptions, check=check_address, remote=True)
