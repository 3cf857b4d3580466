"""What OpenAI's Responses answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from penstock.gateway.dialects.answers import ChatTokenLogprob, ReasoningTokens
from penstock.gateway.http import Answer, Error

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer, tag_field="type", tag="output_text"):
    text: str
    annotations: Annotated[list[Any], Meta(max_length=0)]
    logprobs: list[ChatTokenLogprob]


class InputText(Answer, tag_field="type", tag="input_text"):
    text: str


class MessageItem(Answer, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    role: str
    content: list[OutputText | InputText]


class FunctionCallItem(Answer, tag_field="type", tag="function_call", kw_only=True):
    id: str
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    """Of the function, where it was given in one."""
    arguments: str
    """JSON, as the model wrote it."""


class FunctionCallOutputItem(Answer, tag_field="type", tag="function_call_output"):
    id: str
    status: ItemStatus
    call_id: str
    output: str


class ResponseFailure(Answer):
    """``code`` is one of OpenAI's."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt", "context_length_exceeded"]
    message: str
    type: str
    param: str | None


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens", "content_filter"]


class ReasoningView(Answer):
    effort: None
    summary: None


class TextFormatView(Answer, kw_only=True):
    """Beyond the type: what a ``json_schema`` has."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    schema: dict[str, Any] | UnsetType = UNSET
    strict: bool | UnsetType = UNSET


class TextView(Answer):
    format: TextFormatView
    verbosity: Literal["medium"]


class FunctionToolView(Answer, tag_field="type", tag="function"):
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class NamespaceToolView(Answer, tag_field="type", tag="namespace"):
    name: str
    description: str | None
    tools: list[FunctionToolView]


class InputTokensDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseView(Answer):
    """A response: what was asked, how far it is, and what came of it. Times are seconds since the epoch."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[MessageItem | FunctionCallItem]
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
    tools: list[FunctionToolView | NamespaceToolView]
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class ResponseDeleted(Answer):
    id: str
    object: Literal["response"]
    deleted: bool


class InputItems(Answer):
    object: Literal["list"]
    data: list[MessageItem | FunctionCallItem | FunctionCallOutputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseInputTokens(Answer):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseEvent(Answer):
    """That the response was created, is queued, runs or ended."""

    type: str
    response: ResponseView
    sequence_number: int


class OutputItemEvent(Answer):
    type: str
    output_index: int
    item: MessageItem | FunctionCallItem
    sequence_number: int


class ContentPartEvent(Answer):
    type: str
    item_id: str
    output_index: int
    content_index: int
    part: OutputText
    sequence_number: int


class TextDeltaEvent(Answer):
    type: str
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatTokenLogprob]
    sequence_number: int


class TextDoneEvent(Answer):
    type: str
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatTokenLogprob]
    sequence_number: int


class ArgumentsDeltaEvent(Answer):
    type: str
    item_id: str
    output_index: int
    delta: str
    sequence_number: int


class ArgumentsDoneEvent(Answer):
    type: str
    item_id: str
    output_index: int
    arguments: str
    name: str
    sequence_number: int


class ResponseErrorEvent(Answer):
    """The log was rewound: no part of the sequence."""

    type: Literal["error"]
    code: str
    message: str
    param: str | None
    error: Error
    sequence_number: int
