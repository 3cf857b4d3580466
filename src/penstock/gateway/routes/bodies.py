"""The request fields that every generation route shares, with their bounds, and their way into a `Request`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from penstock.core.errors import InvalidRequest
from penstock.core.job import (
    Choices,
    Deadline,
    Identifier,
    LogitBias,
    MaxTokens,
    Message,
    Metadata,
    MinP,
    OnDisconnect,
    Penalty,
    Priority,
    RepetitionPenalty,
    Sampling,
    Seed,
    Stop,
    StopString,
    Temperature,
    TopK,
    TopP,
    fingerprint,
)
from penstock.gateway.http import Call
from penstock.gateway.service import Submission

T = TypeVar("T")

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
PriorityName = Literal["interactive", "normal", "batch"]
Role = Annotated[str, Meta(min_length=1, max_length=64)]


class TextPart(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, frozen=True):
    """A message; its content is a text or a list of text parts."""

    role: Role
    content: str | list[TextPart] | None = None

    def plain(self) -> Message:
        if isinstance(self.content, list):
            other = next((part.type for part in self.content if part.type not in ("text", "input_text")), None)
            if other is not None:
                raise InvalidRequest(f"Content parts of type {other!r} are not supported: text only.", param="messages")
            return Message(self.role, "".join(part.text for part in self.content))
        return Message(self.role, self.content or "")


ChatMessages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]


class SamplingBody(msgspec.Struct, kw_only=True, frozen=True):
    """Sampling fields as clients send them; null means "the default"."""

    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    stop: StopString | Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool = False
    n: Choices | None = None

    def sampling(self, *, max_tokens: int, temperature: float, logprobs: int | None) -> Sampling:
        """As a `Sampling`; the arguments are the dialect's defaults (and its way to say logprobs)."""
        return Sampling(
            max_tokens=_or(self.max_tokens, max_tokens),
            temperature=_or(self.temperature, temperature),
            top_p=_or(self.top_p, 1.0),
            top_k=_or(self.top_k, 0),
            min_p=_or(self.min_p, 0.0),
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=_token_ids(self.logit_bias or {}),
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
        )


class JobBody(SamplingBody, kw_only=True, frozen=True):
    """What Penstock's own fields add: who asks, how urgent it is, and under which key."""

    user_id: Identifier | None = None
    priority: PriorityName | None = None
    deadline: Deadline | None = None
    request_id: Identifier | None = None
    metadata: Metadata | None = None


def submission(
    call: Call, body: JobBody, *, user: str | None, on_disconnect: OnDisconnect, priority: Priority = Priority.NORMAL
) -> Submission:
    """Everything around the request; *on_disconnect* and *priority* are the route's defaults."""
    metadata = dict(body.metadata or {})
    wish = metadata.get("on_disconnect")
    if wish is not None and wish not in ("continue", "cancel"):
        raise InvalidRequest("metadata.on_disconnect is 'continue' or 'cancel'.", param="metadata.on_disconnect")
    key = call.headers.get("idempotency-key") or body.request_id
    if key is not None and (len(key) > 256 or not key.isprintable()):
        raise InvalidRequest("An idempotency key is at most 256 printable characters.", param="request_id")
    return Submission(
        tenant=call.tenant,
        user=user,
        priority=priority if body.priority is None else Priority[body.priority.upper()],
        deadline=body.deadline,
        idempotency_key=key,
        fingerprint=fingerprint([call.scope["path"], body]) if key is not None else b"",
        request_id=call.request_id,
        metadata=metadata,
        on_disconnect="cancel" if wish == "cancel" else "continue" if wish == "continue" else on_disconnect,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise InvalidRequest("logit_bias maps token ids (as strings) to numbers.", param="logit_bias") from None
