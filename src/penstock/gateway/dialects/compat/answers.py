"""What the classic routes answer."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from penstock.core.job import Status
from penstock.gateway.dialects.answers import UsageView
from penstock.gateway.dialects.native.answers import Timings
from penstock.gateway.http import Answer, Error


class Received(Answer):
    received: str
    """The job's id."""
    msg: str | list[int]


class Task(Answer):
    task_id: str


class PromptResult(Answer):
    """What became of one prompt: its text, or an error."""

    job_id: str
    text: str | UnsetType = UNSET
    texts: list[str] | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    usage: UsageView | UnsetType = UNSET
    error: Error | UnsetType = UNSET


class PromptResults(Answer):
    """Of several prompts, in their order."""

    model: str
    results: list[PromptResult]


class BasicResult(Answer):
    """Of one prompt its result, of several prompts their ``results``."""

    model: str
    results: list[PromptResult] | UnsetType = UNSET
    job_id: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    texts: list[str] | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    usage: UsageView | UnsetType = UNSET


class TaskPending(Answer):
    status: Literal["processing"]
    task_id: str


class TaskResult(Answer):
    status: Literal["completed", "failed", "cancelled", "expired"]
    task_id: str
    result: str | UnsetType = UNSET
    metrics: Timings | UnsetType = UNSET
    error_message: str | UnsetType = UNSET


class TaskStatus(Answer):
    task_id: str
    status: Status
    position_in_queue: int | None
