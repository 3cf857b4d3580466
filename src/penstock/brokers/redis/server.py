"""Does a Redis server keep what a durability tier promises? Asked of its real configuration, at every connection."""

from __future__ import annotations

from typing import Any

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from penstock.brokers.redis.connection import Command, run_once
from penstock.brokers.redis.options import Durability
from penstock.core.errors import InvalidRequest

#: Milliseconds that replicas have to confirm that they received a write, and then that it is in their files (which are
#: synced once a second with ``appendfsync everysec``, and reported once a second).
RECEIVE_TIMEOUT = 1000
SYNC_TIMEOUT = 2500


class Tier(msgspec.Struct, frozen=True):
    """What is promised: a durability, and for ``replicated`` how many replicas confirm each write."""

    name: Durability
    replicas: int = 0

    @property
    def description(self) -> str:
        if self.name == "strict":
            return "strict (Redis, appendfsync always)"
        if self.name == "fast":
            return "fast (Redis; a crash of it may lose its last seconds)"
        return f"replicated (Redis, confirmed by {self.replicas} replica{'s' if self.replicas > 1 else ''})"


class Server(msgspec.Struct, frozen=True):
    version: tuple[int, ...]
    run_id: str

    def waiting(self, tier: Tier) -> list[Command]:
        """The commands that wait until replicas have what this connection wrote; none where none has to."""
        if tier.name != "replicated":
            return []
        received: Command = ("WAIT", tier.replicas, RECEIVE_TIMEOUT)
        # Before Redis 7.2 a replica confirms that it has received a write, from then on that it is in its file.
        if self.version < (7, 2):
            return [received]
        # Asked at once, a replica answers before its file is synced, and says no more until its report of every second.
        # Asked when it has received the write, it has synced it (with appendfsync always).
        return [received, ("WAITAOF", 1, tier.replicas, SYNC_TIMEOUT)]


async def inspect(connection: AbstractConnection, tier: Tier) -> Server:
    """What the server is. Raises `InvalidRequest`, saying what to set, unless it keeps what *tier* promises."""
    info = fields(await run_once(connection, "INFO"))
    version = tuple(int(part) for part in info.get("redis_version", "0").split(".")[:2])
    if version < (7, 0):
        raise InvalidRequest(f"Redis {info.get('redis_version')} is too old: Penstock needs 7.0 or newer, or Valkey.")
    if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
        raise InvalidRequest(
            f"Redis drops keys when it is full (maxmemory-policy {policy}), and would lose jobs. "
            "Set: CONFIG SET maxmemory-policy noeviction."
        )
    if tier.name != "fast":
        await _inspect_durability(connection, tier, info)
    return Server(version, info["run_id"])


async def _inspect_durability(connection: AbstractConnection, tier: Tier, info: dict[str, str]) -> None:
    if info.get("aof_enabled") != "1":
        raise InvalidRequest(
            f"Durability '{tier.name}' needs the append-only file, and this Redis keeps none. Set: CONFIG SET "
            "appendonly yes. Or choose --durability fast, and know what it may lose."
        )
    if tier.name == "strict":
        fsync = await _setting(connection, "appendfsync")
        if fsync != "always":
            raise InvalidRequest(
                f"Durability 'strict' needs appendfsync always, and this Redis is set to {fsync}: a crash may lose "
                "about a second of what was acknowledged. Set: CONFIG SET appendfsync always. Or choose "
                "--durability fast."
            )
        if await _setting(connection, "no-appendfsync-on-rewrite") != "no":
            raise InvalidRequest(
                "Durability 'strict' needs no-appendfsync-on-rewrite no: this Redis does not sync while it rewrites "
                "its file. Set: CONFIG SET no-appendfsync-on-rewrite no. Or choose --durability fast."
            )
    elif (connected := int(info.get("connected_slaves", 0))) < tier.replicas:
        raise InvalidRequest(
            f"Durability 'replicated' needs {tier.replicas} replicas, and this Redis has {connected}. "
            "Connect more, or change --replicas."
        )


async def _setting(connection: AbstractConnection, name: str) -> str:
    try:
        reply: Any = await run_once(connection, "CONFIG", "GET", name)
        return str(reply[1].decode())
    except (ResponseError, IndexError) as error:
        raise InvalidRequest(
            f"Durability 'strict' cannot be verified: this Redis does not tell its configuration (CONFIG GET {name}). "
            "Allow that, or choose --durability fast."
        ) from error


def fields(info: bytes) -> dict[str, str]:
    """The fields of an INFO reply."""
    pairs = (line.partition(":") for line in info.decode().splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in pairs}
