"""The models that a server serves."""

from __future__ import annotations

from typing import Literal

from penstock.api.base import WireType


class ModelView(WireType, frozen=True):
    """A model and how it stands. ``state``: ready, loading, restarting, unloading, draining, unloaded, failed, or
    unavailable (no worker, or nobody behind it). What only its engine knows is there once it was loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: str
    root: str | None = None
    """The model whose weights are loaded: itself, or its parent."""
    parent: str | None = None
    """The model that it is a LoRA adapter of."""
    engine: str | None = None
    context_length: int | None = None
    precision: str | None = None
    deterministic: bool | None = None
    chat: bool | None = None
    tasks: list[str] | None = None
    unsupported: list[str] | None = None
    """Request fields that it cannot honour."""
    dimensions: int | None = None
    """Of a vector, where it makes some."""


class ModelList(WireType, frozen=True):
    object: Literal["list"]
    data: list[ModelView]
