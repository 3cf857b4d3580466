"""What operators are told."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from penstock.core.ports import ModelInfo
from penstock.gateway.http import Answer, Error


class ModelView(Answer):
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


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelView]


class ProgressEvent(Answer):
    state: str
    what: str
    fraction: float | None


class Live(Answer):
    status: Literal["ok"]
    broker: Literal["connected", "unavailable"]


class Checks(Answer):
    broker: bool
    worker: bool
    accepting: bool


class Ready(Answer):
    status: Literal["ready", "not ready"]
    checks: Checks


class BrokerHealth(Answer):
    kind: str
    connected: bool
    durability: str | UnsetType = UNSET


class QueueHealth(Answer):
    queued: int
    jobs: dict[str, int]
    ended_per_second: float
    leases_lost: int


class WorkerHealth(Answer):
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


class ModelHealth(Answer):
    id: str
    ready: bool
    state: str
    queued: int
    workers: dict[str, str]
    info: ModelInfo | None


class Health(Answer, kw_only=True):
    """The queue and the workers are known while the broker is reachable."""

    status: Literal["ok", "degraded"]
    broker: BrokerHealth
    queue: QueueHealth | UnsetType = UNSET
    workers: list[WorkerHealth] | UnsetType = UNSET
    models: list[ModelHealth]
    manageable: bool
