"""What OpenAI's Responses answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from penstock.api.base import WireType
from penstock.api.errors import Error
from penstock.gateway.dialects.answers import ChatTokenLogprob, ReasoningTokens

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(WireType, tag_field="type", tag="output_text", frozen=True):
    annotations: Annotated[list[Any], Meta(max_length=0)]
    logprobs: list[ChatTokenLogprob]
    text: str


class InputText(WireType, tag_field="type", tag="input_text", frozen=True):
    text: str


class ReasoningText(WireType, tag_field="type", tag="reasoning_text", frozen=True):
    text: str


class ReasoningItem(WireType, tag_field="type", tag="reasoning", frozen=True):
    """What the model thought. It is no secret here, so that there is neither a summary nor anything encrypted."""

    id: str
    status: ItemStatus
    summary: Annotated[list[Any], Meta(max_length=0)]
    content: list[ReasoningText]


class MessageItem(WireType, tag_field="type", tag="message", frozen=True):
    id: str
    status: ItemStatus
    content: list[OutputText | InputText]
    role: str


class FunctionCallItem(WireType, tag_field="type", tag="function_call", kw_only=True, frozen=True):
    id: str
    status: ItemStatus
    arguments: str
    """JSON, as the model wrote it."""
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    """Of the function, where it was given in one."""


class FunctionCallOutputItem(WireType, tag_field="type", tag="function_call_output", frozen=True):
    id: str
    status: ItemStatus
    call_id: str
    output: str


OutputItem = ReasoningItem | MessageItem | FunctionCallItem
InputItemView = ReasoningItem | MessageItem | FunctionCallItem | FunctionCallOutputItem


class ResponseFailure(WireType, frozen=True):
    """``code`` is one of OpenAI's."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt", "context_length_exceeded"]
    message: str
    type: str
    param: str | None


class IncompleteDetails(WireType, frozen=True):
    reason: Literal["max_output_tokens", "content_filter"]


class ReasoningView(WireType, frozen=True):
    effort: str | None
    summary: None


class TextFormatView(WireType, kw_only=True, frozen=True):
    """Beyond the type: what a ``json_schema`` has."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    schema: dict[str, Any] | UnsetType = UNSET
    strict: bool | UnsetType = UNSET


class TextView(WireType, frozen=True):
    format: TextFormatView
    verbosity: Literal["medium"]


class FunctionToolView(WireType, tag_field="type", tag="function", frozen=True):
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class NamespaceToolView(WireType, tag_field="type", tag="namespace", frozen=True):
    name: str
    description: str | None
    tools: list[FunctionToolView]


ToolView = FunctionToolView | NamespaceToolView


class InputTokensDetails(WireType, frozen=True):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(WireType, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseView(WireType, frozen=True):
    """A response: what was asked, how far it is, and what came of it. Times are seconds since the epoch."""

    id: str
    object: Literal["response"]
    created_at: int
    status: ResponseStatus
    background: bool
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningView
    safety_identifier: str | None
    service_tier: Literal["default", "flex"]
    store: bool
    temperature: float
    text: TextView
    tool_choice: str | dict[str, Any]
    tools: list[ToolView]
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class ResponseDeleted(WireType, frozen=True):
    id: str
    object: Literal["response"]
    deleted: bool


class InputItems(WireType, frozen=True):
    object: Literal["list"]
    data: list[InputItemView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseInputTokens(WireType, frozen=True):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseEvent(WireType, frozen=True):
    """That the response was created, is queued, runs or ended."""

    type: str
    response: ResponseView
    sequence_number: int


class OutputItemEvent(WireType, frozen=True):
    type: str
    output_index: int
    item: OutputItem
    sequence_number: int


class ContentPartEvent(WireType, frozen=True):
    type: str
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText
    sequence_number: int


class TextDeltaEvent(WireType, frozen=True):
    type: str
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatTokenLogprob]
    sequence_number: int


class TextDoneEvent(WireType, frozen=True):
    type: str
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatTokenLogprob]
    sequence_number: int


class ReasoningDeltaEvent(WireType, frozen=True):
    type: str
    item_id: str
    output_index: int
    content_index: int
    delta: str
    sequence_number: int


class ReasoningDoneEvent(WireType, frozen=True):
    type: str
    item_id: str
    output_index: int
    content_index: int
    text: str
    sequence_number: int


class ArgumentsDeltaEvent(WireType, frozen=True):
    type: str
    item_id: str
    output_index: int
    delta: str
    sequence_number: int


class ArgumentsDoneEvent(WireType, frozen=True):
    type: str
    item_id: str
    output_index: int
    arguments: str
    name: str
    sequence_number: int


class ResponseErrorEvent(WireType, frozen=True):
    """The log was rewound: no part of the sequence."""

    type: Literal["error"]
    code: str
    message: str
    param: str | None
    error: Error
    sequence_number: int


#: What has a place in the sequence of a response's events.
SequenceEvent = (
    ResponseEvent
    | OutputItemEvent
    | ContentPartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
)
