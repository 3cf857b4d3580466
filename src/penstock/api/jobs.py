"""Jobs: what a submit, a look and a list answer. Times are seconds since the epoch, durations are seconds."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.api.base import WireType
from penstock.api.errors import Error
from penstock.core.job import Status


class UsageView(WireType, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    reasoning_tokens: int | None = None
    """Those of the completion that were thoughts, if any."""
    cached_tokens: int | None = None
    """Those of the prompt that need not be computed, if any."""


class FunctionCall(WireType, frozen=True):
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCallView(WireType, frozen=True):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Links(WireType, frozen=True):
    self_: str = msgspec.field(name="self")
    events: str
    cancel: str


class Submitted(WireType, frozen=True):
    """A job that is durable and waits."""

    id: str
    status: Status
    position_in_queue: int | None
    links: Links


class JobSummary(WireType, frozen=True):
    """A job. Times are seconds since the epoch."""

    id: str
    status: Status
    model: str
    user_id: str | None
    priority: Literal["interactive", "normal", "batch"]
    position_in_queue: int | None
    attempt: int
    created_at: float
    started_at: float | None
    ended_at: float | None
    deadline_at: float | None
    request_id: str | None
    metadata: dict[str, str]
    tokens: int
    finish_reason: str | None
    error: Error | None
    links: Links


class JobResult(WireType, frozen=True):
    """What a job made. The texts are without thoughts and calls."""

    text: str
    embeddings: list[str] | None = None
    """Of a job that embeds: base64 of float32, in the order of its inputs."""
    tool_calls: list[ToolCallView] | None = None
    """Those of the first choice, where there were tools to call."""
    texts: list[str] | None = None
    """Of each choice, where there are several."""
    reasoning: str | None = None
    """What the model thought before the first choice's text, if anything."""


class Timings(WireType, frozen=True):
    """Durations in seconds."""

    queue_wait_time: float
    processing_time: float | None
    total_time: float
    time_to_first_token: float | None
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float | None


class JobView(JobSummary, frozen=True):
    """A job; an ended one with its result, usage and timings."""

    result: JobResult | None = None
    finish_reasons: list[str] | None = None
    """Of each choice, where there are several."""
    usage: UsageView | None = None
    timings: Timings | None = None


class JobPage(WireType, frozen=True):
    data: list[JobSummary]
    next_cursor: str | None


class Deleted(WireType, frozen=True):
    id: str
    deleted: Literal[True]


class Generated(WireType, frozen=True, kw_only=True):
    job_id: str
    model: str
    text: str
    texts: list[str] | None
    tool_calls: list[ToolCallView] | None = None
    reasoning: str | None = None
    finish_reason: str | None
    usage: UsageView
