"""What answers of several dialects have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.api.base import WireType
from penstock.core.events import Logprob


class CachedTokens(WireType, frozen=True):
    cached_tokens: int


class ReasoningTokens(WireType, frozen=True):
    reasoning_tokens: int


class ChatLogprob(WireType, frozen=True):
    token: str
    bytes: list[int]
    logprob: float


class ChatTokenLogprob(ChatLogprob, frozen=True):
    top_logprobs: list[ChatLogprob]


class Identified(Protocol):
    @property
    def id(self) -> str: ...


def ends(views: Sequence[Identified]) -> tuple[str | None, str | None]:
    """The ids of the first and the last of a page."""
    return (views[0].id, views[-1].id) if views else (None, None)


def logprob_view(text: str, logprob: Logprob, count: int) -> ChatTokenLogprob:
    """A token with its *count* alternatives, itself among them. *text*: what it completed, for logs that have nothing
    of the token itself."""
    top = logprob.top
    if len(top) > count > 0:  # the chosen one stands behind the likeliest
        top = (*top[: count - 1], top[-1])
    own = text if logprob.text is None else logprob.text
    return ChatTokenLogprob(
        own,
        list(logprob.data or own.encode()),
        logprob.logprob,
        [ChatLogprob(each.text, list(each.data or each.text.encode()), each.logprob) for each in top],
    )
