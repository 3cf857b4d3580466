"""The embedded broker: jobs, queue and logs in one SQLite file, for one machine and no other service."""

from penstock.brokers.embedded.broker import EmbeddedBroker

__all__ = ["EmbeddedBroker"]
