"""Brokers by the scheme of their address, as ``redis`` in ``redis://host:6379/0``.

Each is an entry point of the group ``penstock.brokers``, ours like anybody's: its name is the scheme, its object a
`BrokerType`. ``embedded``, the one that needs no other server, is an address as it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import msgspec

from penstock.core.aio import Backoff
from penstock.core.errors import BrokerUnavailable, InvalidRequest
from penstock.core.ports import Broker, QueuePolicy
from penstock.core.telemetry import Telemetry

GROUP = "penstock.brokers"
EMBEDDED = "embedded"

#: Longest pause between two attempts to open a store, in seconds.
MAX_BACKOFF = 5.0


class BrokerType(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry point of the group gives: how to check an address, and how to make a broker for it."""

    make: Callable[[str, Any, QueuePolicy, Telemetry], Broker]
    """(address, options, policy, telemetry) → a broker that is not open yet."""
    options: type[msgspec.Struct]
    """What can be set of it beside the address. Every field has a default, and the name of the setting."""
    check: Callable[[str], None]
    """Raises `InvalidRequest` for an address that cannot be used. The message never has the address: it may hold a
    password."""
    remote: bool
    """Is it a server of its own, which any number of processes share? One that is away at the start is waited for."""


def broker_type(address: str) -> BrokerType:
    """The broker that *address* means. Raises `InvalidRequest` where there is none, or the address is malformed."""
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    scheme, separator, _ = address.partition("://")
    if scheme not in known or bool(separator) == (scheme == EMBEDDED):
        prefixes = ", ".join(f"{name}://" for name in sorted(known) if name != EMBEDDED)
        raise InvalidRequest(f"a broker is {EMBEDDED!r}, or an address that begins with {prefixes}", param="broker")
    found = known[scheme].load()
    assert isinstance(found, BrokerType), f"{known[scheme].value} is no BrokerType"
    found.check(address)
    return found


async def open_broker(
    address: str,
    options: Mapping[str, Any],
    policy: QueuePolicy,
    telemetry: Telemetry,
    waiting: Callable[[str, float], None],
) -> Broker:
    """An open broker. One whose server is away is waited for: *waiting* is told why, and how long until the next try.

    *options* may have those of other brokers, too. Raises `InvalidRequest` for what is set up wrongly, and
    `BrokerUnavailable` for a store of this machine that cannot be opened.
    """
    kind = broker_type(address)
    own = {name: options[name] for name in kind.options.__struct_fields__ if name in options}
    backoff = Backoff(0.2, MAX_BACKOFF)
    while True:
        broker = kind.make(address, kind.options(**own), policy, telemetry)
        try:
            await broker.open()
        except BrokerUnavailable as error:
            if not kind.remote:
                raise
            pause = backoff.next()
            waiting(error.message, pause)
            await asyncio.sleep(pause)
        else:
            return broker
