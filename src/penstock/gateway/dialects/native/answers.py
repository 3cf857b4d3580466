"""What Penstock's own routes answer."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from penstock.core.job import Status
from penstock.gateway.dialects.answers import ToolCallView, UsageView
from penstock.gateway.http import Answer, Error


class Links(Answer):
    self_: str = msgspec.field(name="self")
    events: str
    cancel: str


class Submitted(Answer):
    """A job that is durable and waits."""

    id: str
    status: Status
    position_in_queue: int | None
    links: Links


class JobSummary(Answer):
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


class JobResult(Answer):
    text: str
    texts: list[str] | UnsetType = UNSET
    """Of each choice, where there are several."""
    tool_calls: list[ToolCallView] | UnsetType = UNSET
    """Those of the first choice, where there were tools to call."""
    embeddings: list[str] | UnsetType = UNSET
    """Of a job that embeds: base64 of float32, in the order of its inputs."""


class Timings(Answer):
    """Durations in seconds."""

    queue_wait_time: float
    processing_time: float | None
    total_time: float
    time_to_first_token: float | None
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float | None


class JobView(JobSummary):
    """A job; an ended one with its result, usage and timings."""

    result: JobResult | UnsetType = UNSET
    finish_reasons: list[str] | UnsetType = UNSET
    usage: UsageView | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class JobPage(Answer):
    data: list[JobSummary]
    next_cursor: str | None


class Deleted(Answer):
    id: str
    deleted: Literal[True]


class Generated(Answer, kw_only=True):
    job_id: str
    model: str
    text: str
    texts: list[str] | None
    tool_calls: list[ToolCallView] | UnsetType = UNSET
    finish_reason: str | None
    usage: UsageView


class TopLogprobView(Answer):
    token: str
    token_id: int
    logprob: float


class TokenEvent(Answer):
    """One token; the event's ``id`` is its position. ``index``: its choice, where there are several."""

    job_id: str
    token: str
    token_id: int
    attempt: int
    index: int | UnsetType = UNSET
    logprob: float | UnsetType = UNSET
    top_logprobs: list[TopLogprobView] | UnsetType = UNSET


class DoneEvent(Answer, kw_only=True):
    """The end of a job that completed."""

    job_id: str
    status: Literal["completed"]
    finish_reason: str
    finish_reasons: list[str] | UnsetType = UNSET
    usage: UsageView


class ErrorEvent(Answer):
    """The end of a job that did not complete, or (without ``id``) a position beyond the log."""

    job_id: str
    status: Status
    error: Error


class UserTokenEvent(TokenEvent, kw_only=True):
    """A token on the stream of all of a user's jobs; the event's ``id`` is a cursor."""

    position: int


class JobCompleteEvent(Answer, kw_only=True):
    """The end of one of the user's jobs."""

    job_id: str
    status: Status
    finish_reason: str | None
    finish_reasons: list[str] | UnsetType = UNSET
    usage: UsageView
    error: Error | None


class UserErrorEvent(Answer):
    """The store has less of a job's log than this reader has seen."""

    job_id: str
    error: Error
