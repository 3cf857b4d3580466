"""What can be set of the Redis broker, and the addresses it takes."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from penstock.core.errors import InvalidRequest

Durability = Literal["strict", "fast", "replicated"]


class RedisOptions(msgspec.Struct, frozen=True, kw_only=True):
    durability: Durability = "strict"
    """What a crash of Redis may cost. The server must be set up for it."""
    shards: int = 1
    """Parts of the queue, each in one slot of a cluster. Order among a tenant's jobs, strict classes and exact bounds
    hold within a shard."""
    prefix: str = "penstock"
    """Beginning of every key."""
    replicas: int = 1
    """Those that must have a write before it is answered, where the durability is ``replicated``."""
    timeout: float = 5.0
    """Seconds that a verb waits for a Redis that is away."""

    def __post_init__(self) -> None:
        if "{" in self.prefix or "}" in self.prefix or not self.prefix:
            raise InvalidRequest("The prefix of the keys must not be empty and have no braces.")


def check_address(address: str) -> None:
    """Raise `InvalidRequest` unless *address* is a URL of a Redis, or several, separated by commas, of one cluster."""
    urls = address.split(",")
    for url in urls:
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in ("redis", "rediss", "unix"):
            raise InvalidRequest(
                "each URL begins with redis://, rediss:// (TLS) or unix://; several, separated by commas, are for a "
                "cluster (a comma in a password is written %2C, other special characters as %XX too)",
                param="broker",
            )
        try:
            parts = urlsplit(url)
            usable = bool(parts.path if scheme == "unix" else parts.hostname and (parts.port or 1))
        except ValueError:
            usable = False
        if not usable or (scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path)):
            raise InvalidRequest(
                "the URL is not of the form redis://[user:password@]host[:port][/database] (special characters in "
                "a password are written as %XX)",
                param="broker",
            )
    if len(urls) > 1 and any(url.startswith("unix:") for url in urls):
        raise InvalidRequest("several URLs are the nodes of a cluster, which has no unix:// sockets", param="broker")
