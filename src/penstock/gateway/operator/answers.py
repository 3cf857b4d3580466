"""What operators are told."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from penstock.api.base import WireType
from penstock.api.errors import Error
from penstock.core.ports import ModelInfo


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
