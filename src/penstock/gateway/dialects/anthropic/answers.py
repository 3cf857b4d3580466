"""What Anthropic's routes answer."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from penstock.api.base import WireType

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


class MessageError(WireType, frozen=True):
    """As ours, with one of Anthropic's types."""

    message: str
    type: str
    param: str | None
    code: str | None
    details: dict[str, Any] | UnsetType = UNSET
    """Of a ``thread``, which is not kept: what Anthropic's SDK looks for to go on without it."""


class MessageErrorBody(WireType, frozen=True):
    """A failure of Anthropic's routes."""

    type: Literal["error"]
    error: MessageError
    request_id: str


class DirectCaller(WireType, frozen=True):
    type: Literal["direct"]


class TextBlock(WireType, tag_field="type", tag="text", frozen=True):
    text: str
    citations: list[Any]


class ThinkingBlock(WireType, tag_field="type", tag="thinking", frozen=True):
    """``signature``: Anthropic signs thoughts, and its clients send that back. Here it says where the thought was."""

    thinking: str
    signature: str


class ToolUseBlock(WireType, tag_field="type", tag="tool_use", frozen=True):
    id: str
    name: str
    input: dict[str, Any]
    caller: DirectCaller


ContentBlock = ThinkingBlock | TextBlock | ToolUseBlock


class OutputTokensDetails(WireType, frozen=True):
    thinking_tokens: int


class MessageUsage(WireType, frozen=True):
    """``input_tokens`` are those that had to be computed: the cached ones stand beside them."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens_details: OutputTokensDetails
    server_tool_use: None


class WholeMessageUsage(WireType, frozen=True):
    input_tokens: int
    output_tokens: int
    cache_creation: None
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    inference_geo: None
    output_tokens_details: OutputTokensDetails
    server_tool_use: None
    service_tier: Literal["standard", "batch"]


class MessageStop(WireType, frozen=True):
    """Why a message ended; null while it has not."""

    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None
    container: None


class MessageView(WireType, frozen=True):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: WholeMessageUsage


class MessageStartEvent(WireType, frozen=True):
    type: Literal["message_start"]
    message: MessageView


class BlockStartEvent(WireType, frozen=True):
    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class TextDelta(WireType, tag_field="type", tag="text_delta", frozen=True):
    text: str


class ThinkingDelta(WireType, tag_field="type", tag="thinking_delta", frozen=True):
    thinking: str


class SignatureDelta(WireType, tag_field="type", tag="signature_delta", frozen=True):
    signature: str


class InputJsonDelta(WireType, tag_field="type", tag="input_json_delta", frozen=True):
    partial_json: str


BlockDelta = TextDelta | InputJsonDelta | ThinkingDelta | SignatureDelta


class BlockDeltaEvent(WireType, frozen=True):
    type: Literal["content_block_delta"]
    index: int
    delta: BlockDelta


class BlockStopEvent(WireType, frozen=True):
    type: Literal["content_block_stop"]
    index: int


class MessageDeltaEvent(WireType, frozen=True):
    type: Literal["message_delta"]
    delta: MessageStop
    usage: MessageUsage


class MessageStopEvent(WireType, frozen=True):
    type: Literal["message_stop"]


BlockEvent = BlockStartEvent | BlockDeltaEvent | BlockStopEvent
MessageEvent = MessageStartEvent | BlockEvent | MessageDeltaEvent | MessageStopEvent


class InputTokens(WireType, frozen=True):
    input_tokens: int


class MessageModel(WireType, frozen=True):
    """A model as Anthropic's clients know it. ``max_input_tokens``: null while it was never loaded."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None


class MessageModelList(WireType, frozen=True):
    data: list[MessageModel]
    has_more: bool
    first_id: str | None
    last_id: str | None
