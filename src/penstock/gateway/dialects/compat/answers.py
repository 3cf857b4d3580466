"""What the compatibility routes answer."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from penstock.api import Timings
from penstock.api.base import WireType
from penstock.api.errors import Error
from penstock.api.jobs import UsageView
from penstock.core.job import Status

EndedStatus = Literal["completed", "failed", "cancelled", "expired"]


class Received(WireType, frozen=True):
    received: str
    """The job's id."""
    msg: str | list[int]


class Task(WireType, frozen=True):
    task_id: str


class PromptResult(WireType, frozen=True):
    """What became of one prompt: its text, or an error."""

    job_id: str
    text: str | UnsetType = UNSET
    texts: list[str] | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    usage: UsageView | UnsetType = UNSET
    error: Error | UnsetType = UNSET


class PromptResults(WireType, frozen=True):
    """Of several prompts, in their order."""

    model: str
    results: list[PromptResult]


class BasicResult(WireType, frozen=True):
    """Of one prompt its result, of several prompts their ``results``."""

    model: str
    results: list[PromptResult] | UnsetType = UNSET
    job_id: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    texts: list[str] | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    usage: UsageView | UnsetType = UNSET


class TaskPending(WireType, frozen=True):
    status: Literal["processing"]
    task_id: str


class TaskResult(WireType, frozen=True):
    status: EndedStatus
    task_id: str
    result: str | UnsetType = UNSET
    metrics: Timings | UnsetType = UNSET
    error_message: str | UnsetType = UNSET


class TaskStatus(WireType, frozen=True):
    task_id: str
    status: Status
    position_in_queue: int | None
