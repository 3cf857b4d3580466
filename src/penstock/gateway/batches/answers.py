"""What is told of batches."""

from __future__ import annotations

from typing import Any, Literal

from penstock.api.base import WireType
from penstock.gateway.dialects.answers import CachedTokens, ReasoningTokens


class BatchErrorView(WireType, frozen=True):
    code: str
    message: str
    param: str | None
    line: int | None
    """From 1."""


class BatchErrors(WireType, frozen=True):
    object: Literal["list"]
    data: list[BatchErrorView]


class BatchCounts(WireType, frozen=True):
    total: int
    completed: int
    failed: int


class BatchUsage(WireType, frozen=True):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class BatchView(WireType, frozen=True):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    """Why it failed: of its input, nothing was run."""
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(WireType, frozen=True):
    object: Literal["list"]
    data: list[BatchView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class LineResponse(WireType, frozen=True):
    """What came of one request."""

    status_code: int
    request_id: str
    body: Any
    """As its route would answer."""


class LineNotRun(WireType, frozen=True):
    """Why there is no response."""

    code: str
    message: str


class LineResult(WireType, frozen=True):
    """A line of a batch's output, or of its errors."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineNotRun | None
