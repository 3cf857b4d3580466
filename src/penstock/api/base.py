"""What all wire types have in common."""

from __future__ import annotations

import msgspec


class WireType(msgspec.Struct, frozen=True, omit_defaults=True):
    """One JSON object of the native API. Fields are written in the order in which they stand."""
