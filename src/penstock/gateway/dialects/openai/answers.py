"""What OpenAI's chat completions, completions and embeddings answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from penstock.api.base import WireType
from penstock.api.jobs import ToolCallView
from penstock.core.job import FinishReason, Usage
from penstock.gateway.dialects.answers import ChatTokenLogprob


class PromptTokensDetails(WireType, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(WireType, frozen=True):
    reasoning_tokens: int


class TokenUsage(WireType, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> TokenUsage:
        return cls(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            PromptTokensDetails(usage.cached_tokens),
            CompletionTokensDetails(usage.reasoning_tokens),
        )


class ChatLogprobs(WireType, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(WireType, kw_only=True, frozen=True):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | UnsetType = UNSET
    """What it thought before; once more under the name that most clients read."""
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallView] | UnsetType = UNSET
    refusal: None
    annotations: Annotated[list[Any], Meta(max_length=0)]


class ChatChoice(WireType, frozen=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatReply(WireType, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class FunctionCallDelta(WireType, kw_only=True, frozen=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(WireType, kw_only=True, frozen=True):
    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallDelta


class ChatDelta(WireType, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(WireType, kw_only=True, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | UnsetType = UNSET
    finish_reason: FinishReason | None
    stop_reason: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(WireType, frozen=True):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: TokenUsage | UnsetType | None = UNSET


class TextLogprobs(WireType, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(WireType, frozen=True):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class TextReply(WireType, frozen=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokenUsage


class TextChunkChoice(WireType, frozen=True):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class TextChunk(WireType, frozen=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: TokenUsage | UnsetType | None = UNSET


class Embedding(WireType, frozen=True):
    """``embedding``: numbers, or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(WireType, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(WireType, frozen=True):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
