"""The Redis broker: jobs, queue and logs in a Redis or Valkey server, for any number of gateways and workers."""

from penstock.brokers.redis.broker import RedisBroker

__all__ = ["RedisBroker"]
