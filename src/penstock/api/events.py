"""The events of a job's stream, and those of the stream of all of a user's jobs (docs/protocol.md)."""

from __future__ import annotations

from typing import Literal

from penstock.api.base import WireType
from penstock.api.errors import Error
from penstock.api.jobs import UsageView
from penstock.core.job import Status


class TopLogprobView(WireType, frozen=True):
    token: str
    token_id: int
    logprob: float


#: What a token is part of, as `penstock.core.events.Phase` has it.
PhaseName = Literal["text", "reasoning", "tool"]


class TokenEvent(WireType, frozen=True):
    """One token; the event's ``id`` is its position. ``index``: its choice, where there are several.

    ``phase``: what it is part of, where that is not the text: "reasoning", "tool", or, of a token that ends one and
    begins another, each with its number of characters (Unicode code points), in order.
    """

    job_id: str
    token: str
    token_id: int
    attempt: int
    index: int | None = None
    logprob: float | None = None
    top_logprobs: list[TopLogprobView] | None = None
    phase: PhaseName | list[tuple[PhaseName, int]] | None = None


class DoneEvent(WireType, frozen=True):
    """The end of a job that completed."""

    job_id: str
    status: Literal["completed"]
    finish_reason: str
    usage: UsageView
    finish_reasons: list[str] | None = None


class ErrorEvent(WireType, frozen=True):
    """The end of a job that did not complete, or (without ``id``) a position beyond the log."""

    job_id: str
    status: Status
    error: Error


class UserTokenEvent(TokenEvent, frozen=True, kw_only=True):
    """A token on the stream of all of a user's jobs; the event's ``id`` is a cursor."""

    position: int


class JobCompleteEvent(WireType, frozen=True, kw_only=True):
    """The end of one of the user's jobs."""

    job_id: str
    status: Status
    finish_reason: str | None
    usage: UsageView
    finish_reasons: list[str] | None = None
    error: Error | None


class UserErrorEvent(WireType, frozen=True):
    """The store has less of a job's log than this reader has seen."""

    job_id: str
    error: Error
