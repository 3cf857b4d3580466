"""Who asks, and what they may do. Today everybody who reaches the server is the same; keys will tell them apart."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.types import Scope

from penstock.core.errors import Forbidden

#: What a caller must be allowed to do. ``public`` needs nobody; every other one has to be granted.
Right = Literal["public", "tenant", "viewer", "operator", "admin"]


class Identity(msgspec.Struct, frozen=True):
    """A principal: whose jobs it sees, and its rights."""

    tenant: str
    rights: frozenset[Right] = frozenset({"tenant"})

    def require(self, right: Right) -> None:
        """Raise `Forbidden` without *right*."""
        if right != "public" and right not in self.rights:
            raise Forbidden(
                f"This needs the right {right!r}: it is given on a loopback address only, since there is no "
                "authentication. On a closed network, PENSTOCK_INSECURE_PUBLIC=true gives it elsewhere."
            )


def anybody(*, operates: bool) -> Identity:
    """Whoever reaches a server without authentication. *operates*: may they load and unload its models?"""
    return Identity("default", frozenset({"tenant", "viewer", *(("operator",) if operates else ())}))


def identify(scope: Scope, default: Identity) -> Identity:
    """Who sent a request: who an authenticating layer says (``penstock.identity``), or *default*."""
    found: Identity = scope.get("penstock.identity", default)
    return found
