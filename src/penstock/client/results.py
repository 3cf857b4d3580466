"""What the client takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import msgspec

from penstock.api import JobSummary, Submitted, TopLogprobView, UsageView
from penstock.api.events import PhaseName
from penstock.core.calls import named, read_calls
from penstock.core.errors import ErrorInfo, PenstockError, error_from_info
from penstock.core.job import Status, ToolCall
from penstock.core.ports import LoadProgress


class Token(msgspec.Struct, frozen=True):
    """One token of a job's log. ``text`` is what it adds to the reply's text (may be empty); ``index``: which of the n
    choices. ``reasoning`` is what it adds to a thought, ``calls`` to the calls of tools (as `penstock.core.calls`
    writes them)."""

    position: int
    text: str
    id: int
    attempt: int
    index: int = 0
    logprob: float | None = None
    top_logprobs: tuple[TopLogprobView, ...] = ()
    phase: PhaseName = "text"
    """What it counts as: of one that ends a phase and begins another, the first."""
    reasoning: str = ""
    calls: str = ""


class End(msgspec.Struct, frozen=True):
    """The end of a job's log: ``error`` is set unless the job completed."""

    position: int
    status: Status
    finish_reasons: tuple[str, ...] = ()
    usage: UsageView | None = None
    error: ErrorInfo | None = None

    @property
    def finish_reason(self) -> str | None:
        return self.finish_reasons[0] if self.finish_reasons else None

    def raise_for_status(self) -> None:
        """Raise the job's error unless it completed."""
        if self.error is not None:
            raise error_from_info(self.error)


class Result(msgspec.Struct, frozen=True):
    """A completed job: the text of each of its n choices, why each ended, and what it used.

    ``reasonings`` are what the model thought before each text, ``calls`` what it called (as `penstock.core.calls`
    writes them)."""

    job_id: str
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    usage: UsageView
    reasonings: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Of the first choice, without thoughts and calls."""
        return self.texts[0]

    @property
    def reasoning(self) -> str:
        return self.reasonings[0] if self.reasonings else ""

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Those of the first choice, with the ids that every reader sees."""
        return named(read_calls(self.calls[0]), self.job_id, 0) if self.calls else []

    @property
    def finish_reason(self) -> str:
        return self.finish_reasons[0]


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
    response_format: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_effort: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    user_id: str | None
    priority: Literal["interactive", "normal", "batch"] | None
    deadline: float | None
    metadata: Mapping[str, str] | None
    idempotency_key: str | None
    """Of the caller's own; by default every submit gets a fresh one."""


JobRef = str | Submitted | JobSummary
"""A job, by its id or as the server showed it."""

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
OnRetry = Callable[[PenstockError, float], None]
OnProgress = Callable[[LoadProgress], None]
