"""What operators are told."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from penstock.api.base import WireType
from penstock.api.errors import Error
from penstock.core.ports import ModelInfo


class ModelView(WireType, frozen=True):
    """A model and how it stands. What only its engine knows is there once it was loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: str
    engine: str | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    precision: str | UnsetType = UNSET
    deterministic: bool | UnsetType = UNSET
    chat: bool | UnsetType = UNSET
    tasks: list[str] | UnsetType = UNSET
    dimensions: int | UnsetType = UNSET
    """Of a vector, where it makes some."""
    unsupported: list[str] | UnsetType = UNSET


class ModelList(WireType, frozen=True):
    object: Literal["list"]
    data: list[ModelView]


class ProgressEvent(WireType, frozen=True):
    state: str
    what: str
    fraction: float | None


class Live(WireType, frozen=True):
    status: Literal["ok"]
    broker: Literal["connected", "unavailable"]


class Checks(WireType, frozen=True):
    broker: bool
    worker: bool
    accepting: bool


class Ready(WireType, frozen=True):
    status: Literal["ready", "not ready"]
    checks: Checks


class BrokerHealth(WireType, frozen=True):
    kind: str
    connected: bool
    durability: str | UnsetType = UNSET


class QueueHealth(WireType, frozen=True):
    queued: int
    jobs: dict[str, int]
    ended_per_second: float
    leases_lost: int


class WorkerHealth(WireType, frozen=True):
    id: str
    state: str
    slots: int
    models: list[str]
    seen_at: float
    on_demand: bool
    detail: str | None
    error: Error | None
    memory_bytes: int | None
    standby: int


class ModelHealth(WireType, frozen=True):
    id: str
    ready: bool
    state: str
    queued: int
    workers: dict[str, str]
    info: ModelInfo | None


class Health(WireType, kw_only=True, frozen=True):
    """The queue and the workers are known while the broker is reachable."""

    status: Literal["ok", "degraded"]
    broker: BrokerHealth
    queue: QueueHealth | UnsetType = UNSET
    workers: list[WorkerHealth] | UnsetType = UNSET
    models: list[ModelHealth]
    manageable: bool
