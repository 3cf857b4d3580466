"""What answers of several dialects have."""

from __future__ import annotations

from typing import Literal

from penstock.gateway.http import Answer


class UsageView(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FunctionCall(Answer):
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCallView(Answer):
    id: str
    type: Literal["function"]
    function: FunctionCall


class CachedTokens(Answer):
    cached_tokens: int


class ReasoningTokens(Answer):
    reasoning_tokens: int


class ChatLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]
