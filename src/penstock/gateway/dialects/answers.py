"""What answers of several dialects have."""

from __future__ import annotations

from penstock.api.base import WireType


class CachedTokens(WireType, frozen=True):
    cached_tokens: int


class ReasoningTokens(WireType, frozen=True):
    reasoning_tokens: int


class ChatLogprob(WireType, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob, frozen=True):
    top_logprobs: list[ChatLogprob]
