"""What the client takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import msgspec

from penstock.core.errors import ErrorInfo, PenstockError, error_from_info
from penstock.core.job import Status, Usage
from penstock.core.ports import LoadProgress


class Token(msgspec.Struct, frozen=True):
    """One token of a job's log. ``text`` is what it completed (may be empty); ``index``: which of the n choices."""

    position: int
    text: str
    id: int
    attempt: int
    index: int = 0
    logprob: float | None = None
    top_logprobs: tuple[dict[str, Any], ...] = ()


class End(msgspec.Struct, frozen=True):
    """The end of a job's log: ``error`` is set unless the job completed."""

    position: int
    status: Status
    finish_reasons: tuple[str, ...] = ()
    usage: Usage | None = None
    error: ErrorInfo | None = None

    @property
    def finish_reason(self) -> str | None:
        return self.finish_reasons[0] if self.finish_reasons else None

    def raise_for_status(self) -> None:
        """Raise the job's error unless it completed."""
        if self.error is not None:
            raise error_from_info(self.error)


class Result(msgspec.Struct, frozen=True):
    """A completed job: the text of each of its n choices, why each ended, and what it used."""

    job_id: str
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def finish_reason(self) -> str:
        return self.finish_reasons[0]


class Output(msgspec.Struct, frozen=True):
    """The result part of a `JobView`."""

    text: str
    texts: tuple[str, ...] | None = None


class Timings(msgspec.Struct, frozen=True):
    """Of a job that has ended; in seconds, None where it never got that far."""

    queue_wait_time: float | None = None
    processing_time: float | None = None
    total_time: float | None = None
    time_to_first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_second: float | None = None


class JobView(msgspec.Struct, frozen=True):
    """A job as the server shows it. A fresh submit has ``id``, ``status``, ``position_in_queue`` and ``links`` only;
    ``result``, ``usage`` and ``timings`` come with ``Client.job`` once it has ended. Times are seconds since the epoch.
    """

    id: str
    status: Status
    position_in_queue: int | None = None
    model: str | None = None
    user_id: str | None = None
    priority: str | None = None
    attempt: int = 0
    tokens: int = 0
    created_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    deadline_at: float | None = None
    request_id: str | None = None
    metadata: dict[str, str] = {}
    finish_reason: str | None = None
    finish_reasons: tuple[str, ...] | None = None
    error: ErrorInfo | None = None
    result: Output | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    links: dict[str, str] = {}


class ModelView(msgspec.Struct, frozen=True):
    """A served model. ``state``: ready, loading, restarting, unloading, draining, unloaded, failed, or unavailable (no
    worker, or nobody behind it); what comes after ``engine`` is known once a worker has had it up."""

    id: str
    state: str = "ready"
    engine: str | None = None
    context_length: int | None = None
    precision: str | None = None
    deterministic: bool | None = None
    chat: bool | None = None
    unsupported: tuple[str, ...] | None = None
    """Request fields that it cannot honour."""


class Options(TypedDict, total=False):
    """How to generate: the optional fields of ``POST /v1/jobs``. None means the server's default."""

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | None
    ignore_eos: bool | None
    n: int | None
    logprobs: int | None
    user_id: str | None
    priority: Literal["interactive", "normal", "batch"] | None
    deadline: float | None
    metadata: Mapping[str, str] | None
    idempotency_key: str | None
    """Of the caller's own; by default every submit gets a fresh one."""


Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]
OnRetry = Callable[[PenstockError, float], None]
OnProgress = Callable[[LoadProgress], None]
