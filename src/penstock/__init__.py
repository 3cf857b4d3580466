"""Penstock: submit once, stream anywhere, lose nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    """The clients on first use: engine processes import this package too, and have no use for an HTTP client."""
    if name in ("AsyncClient", "Client"):
        return getattr(importlib.import_module("penstock.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
