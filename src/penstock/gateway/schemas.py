"""What the routes answer, as types: the source of the responses in ``/openapi.json``.

Routes write their answers by hand, for speed. That these types are what they write is checked on every answer and every
event that the integration tests see (``tests/support/conformance.py``), which is why nothing here may be left open: an
answer has no other fields, and one that is not always there is ``UNSET`` by default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from penstock.core.job import FinishReason, Status
from penstock.core.ports import ModelInfo


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """One JSON object of ours."""


class Error(Answer):
    """What went wrong, and what to do (docs/api.md#errors)."""

    message: str
    type: str
    param: str | None
    """The request field that it is about."""
    code: str | None
    """What a program looks at."""


class ErrorBody(Answer):
    """The one shape of every failure."""

    error: Error


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


# ---------------------------------------------------------------------------------------------- jobs


class Links(Answer):
    self_: str = msgspec.field(name="self")
    events: str
    cancel: str


class Submitted(Answer):
    """A job that is durable and waits."""

    id: str
    status: Status
    position_in_queue: int | None
    links: Links


class JobSummary(Answer):
    """A job. Times are seconds since the epoch."""

    id: str
    status: Status
    model: str
    user_id: str | None
    priority: Literal["interactive", "normal", "batch"]
    position_in_queue: int | None
    attempt: int
    created_at: float
    started_at: float | None
    ended_at: float | None
    deadline_at: float | None
    request_id: str | None
    metadata: dict[str, str]
    tokens: int
    finish_reason: str | None
    error: Error | None
    links: Links


class JobResult(Answer):
    text: str
    texts: list[str] | UnsetType = UNSET
    """Of each choice, where there are several."""
    tool_calls: list[ToolCallView] | UnsetType = UNSET
    """Those of the first choice, where there were tools to call."""
    embeddings: list[str] | UnsetType = UNSET
    """Of a job that embeds: base64 of float32, in the order of its inputs."""


class Timings(Answer):
    """Durations in seconds."""

    queue_wait_time: float
    processing_time: float | None
    total_time: float
    time_to_first_token: float | None
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float | None


class JobView(JobSummary):
    """A job; an ended one with its result, usage and timings."""

    result: JobResult | UnsetType = UNSET
    finish_reasons: list[str] | UnsetType = UNSET
    usage: UsageView | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class JobPage(Answer):
    data: list[JobSummary]
    next_cursor: str | None


class Deleted(Answer):
    id: str
    deleted: Literal[True]


class Generated(Answer, kw_only=True):
    job_id: str
    model: str
    text: str
    texts: list[str] | None
    tool_calls: list[ToolCallView] | UnsetType = UNSET
    finish_reason: str | None
    usage: UsageView


class TopLogprobView(Answer):
    token: str
    token_id: int
    logprob: float


class TokenEvent(Answer):
    """One token; the event's ``id`` is its position. ``index``: its choice, where there are several."""

    job_id: str
    token: str
    token_id: int
    attempt: int
    index: int | UnsetType = UNSET
    logprob: float | UnsetType = UNSET
    top_logprobs: list[TopLogprobView] | UnsetType = UNSET


class DoneEvent(Answer, kw_only=True):
    """The end of a job that completed."""

    job_id: str
    status: Literal["completed"]
    finish_reason: str
    finish_reasons: list[str] | UnsetType = UNSET
    usage: UsageView


class ErrorEvent(Answer):
    """The end of a job that did not complete, or (without ``id``) a position beyond the log."""

    job_id: str
    status: Status
    error: Error


class UserTokenEvent(TokenEvent, kw_only=True):
    """A token on the stream of all of a user's jobs; the event's ``id`` is a cursor."""

    position: int


class JobCompleteEvent(Answer, kw_only=True):
    """The end of one of the user's jobs."""

    job_id: str
    status: Status
    finish_reason: str | None
    finish_reasons: list[str] | UnsetType = UNSET
    usage: UsageView
    error: Error | None


class UserErrorEvent(Answer):
    """The store has less of a job's log than this reader has seen."""

    job_id: str
    error: Error


# ---------------------------------------------------------------------------------------------- OpenAI


class ChatLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(Answer, kw_only=True):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCallView] | UnsetType = UNSET
    refusal: None
    annotations: Annotated[list[Any], Meta(max_length=0)]


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatReply(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageView


class FunctionCallDelta(Answer, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Answer, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallDelta


class ChatDelta(Answer):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Answer, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | UnsetType = UNSET
    finish_reason: FinishReason | None
    stop_reason: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageView | UnsetType | None = UNSET


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class TextReply(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageView


class TextChunkChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class TextChunk(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: UsageView | UnsetType | None = UNSET


# ---------------------------------------------------------------------------------------------- Anthropic


class MessageError(Answer):
    """As ours, with one of Anthropic's types."""

    type: str
    message: str
    param: str | None
    code: str | None
    details: dict[str, Any] | UnsetType = UNSET
    """Of a ``thread``, which is not kept: what Anthropic's SDK looks for to go on without it."""


class MessageErrorBody(Answer):
    """A failure of Anthropic's routes."""

    type: Literal["error"]
    error: MessageError
    request_id: str


class DirectCaller(Answer):
    type: Literal["direct"]


class TextBlock(Answer, tag_field="type", tag="text"):
    text: str
    citations: list[Any]


class ToolUseBlock(Answer, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: DirectCaller


class MessageUsage(Answer):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: Literal[0]
    output_tokens_details: None
    server_tool_use: None


class WholeMessageUsage(MessageUsage):
    cache_creation: None
    inference_geo: None
    service_tier: Literal["standard", "batch"]


class MessageStop(Answer):
    """Why a message ended; null while it has not."""

    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"] | None
    stop_sequence: str | None
    stop_details: None
    container: None


class MessageView(MessageStop):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock]
    usage: WholeMessageUsage


class MessageStartEvent(Answer):
    type: Literal["message_start"]
    message: MessageView


class BlockStartEvent(Answer):
    type: Literal["content_block_start"]
    index: int
    content_block: TextBlock | ToolUseBlock


class TextDelta(Answer, tag_field="type", tag="text_delta"):
    text: str


class InputJsonDelta(Answer, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDeltaEvent(Answer):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | InputJsonDelta


class BlockStopEvent(Answer):
    type: Literal["content_block_stop"]
    index: int


class MessageDeltaEvent(Answer):
    type: Literal["message_delta"]
    delta: MessageStop
    usage: MessageUsage


class MessageStopEvent(Answer):
    type: Literal["message_stop"]


class InputTokens(Answer):
    input_tokens: int


# ---------------------------------------------------------------------------------------------- models, tokens


class ModelView(Answer):
    """A model and how it stands. What only its engine knows is there once it was loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: str
    engine: str | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    precision: str | UnsetType = UNSET
    deterministic: bool | UnsetType = UNSET
    chat: bool | UnsetType = UNSET
    tasks: list[str] | UnsetType = UNSET
    dimensions: int | UnsetType = UNSET
    """Of a vector, where it makes some."""
    unsupported: list[str] | UnsetType = UNSET


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelView]


class MessageModel(Answer):
    """A model as Anthropic's clients know it. ``max_input_tokens``: null while it was never loaded."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None


class MessageModelList(Answer):
    data: list[MessageModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class ProgressEvent(Answer):
    state: str
    what: str
    fraction: float | None


class ResponseInputTokens(Answer):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Embedding(Answer):
    """``embedding``: numbers, or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    prompt: str


# ---------------------------------------------------------------------------------------------- the classic routes


class Received(Answer):
    received: str
    """The job's id."""
    msg: str | list[int]


class Task(Answer):
    task_id: str


class PromptResult(Answer):
    """What became of one prompt: its text, or an error."""

    job_id: str
    text: str | UnsetType = UNSET
    texts: list[str] | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    usage: UsageView | UnsetType = UNSET
    error: Error | UnsetType = UNSET


class PromptResults(Answer):
    """Of several prompts, in their order."""

    model: str
    results: list[PromptResult]


class BasicResult(Answer):
    """Of one prompt its result, of several prompts their ``results``."""

    model: str
    results: list[PromptResult] | UnsetType = UNSET
    job_id: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    texts: list[str] | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    usage: UsageView | UnsetType = UNSET


class TaskPending(Answer):
    status: Literal["processing"]
    task_id: str


class TaskResult(Answer):
    status: Literal["completed", "failed", "cancelled", "expired"]
    task_id: str
    result: str | UnsetType = UNSET
    metrics: Timings | UnsetType = UNSET
    error_message: str | UnsetType = UNSET


class TaskStatus(Answer):
    task_id: str
    status: Status
    position_in_queue: int | None


# ---------------------------------------------------------------------------------------------- operation


class Live(Answer):
    status: Literal["ok"]
    broker: Literal["connected", "unavailable"]


class Checks(Answer):
    broker: bool
    worker: bool
    accepting: bool


class Ready(Answer):
    status: Literal["ready", "not ready"]
    checks: Checks


class BrokerHealth(Answer):
    kind: str
    connected: bool
    durability: str | UnsetType = UNSET


class QueueHealth(Answer):
    queued: int
    jobs: dict[str, int]
    ended_per_second: float
    leases_lost: int


class WorkerHealth(Answer):
    id: str
    state: str
    slots: int
    models: list[str]
    seen_at: float
    on_demand: bool
    detail: str | None
    error: Error | None
    memory_bytes: int | None
    standby: int


class ModelHealth(Answer):
    id: str
    ready: bool
    state: str
    queued: int
    workers: dict[str, str]
    info: ModelInfo | None


class Health(Answer, kw_only=True):
    """The queue and the workers are known while the broker is reachable."""

    status: Literal["ok", "degraded"]
    broker: BrokerHealth
    queue: QueueHealth | UnsetType = UNSET
    workers: list[WorkerHealth] | UnsetType = UNSET
    models: list[ModelHealth]
    manageable: bool


# ---------------------------------------------------------------------------------------------- files and batches


class FileView(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileList(Answer):
    object: Literal["list"]
    data: list[FileView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Answer):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchErrorView(Answer):
    code: str
    message: str
    param: str | None
    line: int | None
    """From 1."""


class BatchErrors(Answer):
    object: Literal["list"]
    data: list[BatchErrorView]


class BatchCounts(Answer):
    total: int
    completed: int
    failed: int


class CachedTokens(Answer):
    cached_tokens: int


class ReasoningTokens(Answer):
    reasoning_tokens: int


class BatchUsage(Answer):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class BatchView(Answer):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    """Why it failed: of its input, nothing was run."""
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(Answer):
    object: Literal["list"]
    data: list[BatchView]
    first_id: str | None
    last_id: str | None
    has_more: bool


# ---------------------------------------------------------------------------------------------- OpenAI: responses

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


# ---------------------------------------------------------------------------------------------- who answers what

Key = tuple[str, str]
"""Method and path, as in the table of routes."""

#: The JSON that a route answers, by status. Failures are `ErrorBody` (`MessageErrorBody` on Anthropic's routes).
ANSWERS: dict[Key, dict[int, Any]] = {
    ("POST", "/v1/jobs"): {202: Submitted},
    ("GET", "/v1/jobs"): {200: JobPage},
    ("GET", "/v1/jobs/{id}"): {200: JobView},
    ("DELETE", "/v1/jobs/{id}"): {200: Deleted},
    ("POST", "/v1/jobs/{id}/cancel"): {200: JobView},
    ("POST", "/v1/generate"): {200: Generated},
    ("POST", "/v1/chat/completions"): {200: ChatReply},
    ("POST", "/v1/completions"): {200: TextReply},
    ("POST", "/v1/responses"): {200: ResponseView},
    ("POST", "/v1/responses/compact"): {404: ErrorBody},
    ("POST", "/v1/responses/input_tokens"): {200: ResponseInputTokens},
    ("GET", "/v1/responses/{id}"): {200: ResponseView},
    ("DELETE", "/v1/responses/{id}"): {200: ResponseDeleted},
    ("POST", "/v1/responses/{id}/cancel"): {200: ResponseView},
    ("GET", "/v1/responses/{id}/input_items"): {200: InputItems},
    ("POST", "/v1/files"): {200: FileView},
    ("GET", "/v1/files"): {200: FileList},
    ("GET", "/v1/files/{id}"): {200: FileView},
    ("DELETE", "/v1/files/{id}"): {200: FileDeleted},
    ("POST", "/v1/batches"): {200: BatchView},
    ("GET", "/v1/batches"): {200: BatchList},
    ("GET", "/v1/batches/{id}"): {200: BatchView},
    ("POST", "/v1/batches/{id}/cancel"): {200: BatchView},
    ("POST", "/v1/messages"): {200: MessageView},
    ("POST", "/v1/messages/count_tokens"): {200: InputTokens},
    ("POST", "/v1/embeddings"): {200: Embeddings},
    ("POST", "/tokenize"): {200: Tokens},
    ("POST", "/detokenize"): {200: Detokenized},
    ("GET", "/v1/models"): {200: ModelList},
    ("GET", "/v1/models/{model:path}"): {200: ModelView},
    ("POST", "/v1/models/{model:path}/load"): {200: ModelView},
    ("POST", "/v1/models/{model:path}/unload"): {200: ModelView},
    ("POST", "/submit_job"): {200: Received},
    ("POST", "/generate"): {200: PromptResults, 202: Task},
    ("GET", "/result/{id}"): {200: TaskResult, 202: TaskPending},
    ("GET", "/status/{id}"): {200: TaskStatus},
    ("POST", "/basic_generate"): {200: BasicResult},
    ("POST", "/generate_vllm"): {200: PromptResults},
    ("GET", "/healthz"): {200: Live},
    ("GET", "/readyz"): {200: Ready, 503: Ready},
    ("GET", "/health"): {200: Health},
}

#: What some of them answer instead to who says an ``anthropic-version``; so are their failures in Anthropic's envelope.
FOR_ANTHROPIC: dict[Key, Any] = {
    ("GET", "/v1/models"): MessageModelList,
    ("GET", "/v1/models/{model:path}"): MessageModel,
}

_JOB_EVENTS = {"token": TokenEvent, "done": DoneEvent, "error": ErrorEvent}
_USER_EVENTS = {"token": UserTokenEvent, "job_complete": JobCompleteEvent, "error": UserErrorEvent}
_RESPONSE_EVENTS = {
    **dict.fromkeys(
        (
            "response.created",
            "response.queued",
            "response.in_progress",
            "response.completed",
            "response.incomplete",
            "response.failed",
        ),
        ResponseEvent,
    ),
    "response.output_item.added": OutputItemEvent,
    "response.output_item.done": OutputItemEvent,
    "response.content_part.added": ContentPartEvent,
    "response.content_part.done": ContentPartEvent,
    "response.output_text.delta": TextDeltaEvent,
    "response.output_text.done": TextDoneEvent,
    "response.function_call_arguments.delta": ArgumentsDeltaEvent,
    "response.function_call_arguments.done": ArgumentsDoneEvent,
    "error": ResponseErrorEvent,
}
_MODEL_EVENTS = {"progress": ProgressEvent, "done": ModelView, "error": ErrorBody}

#: What a route that streams sends: the data of each event by its name ("message" for one without, as in browsers).
EVENTS: dict[Key, dict[str, Any]] = {
    ("GET", "/v1/jobs/{id}/events"): _JOB_EVENTS,
    ("GET", "/v1/events"): _USER_EVENTS,
    ("GET", "/events"): _USER_EVENTS,
    ("POST", "/v1/generate"): _JOB_EVENTS,
    ("POST", "/generate_stream"): _JOB_EVENTS,
    ("POST", "/api/v1/req"): _JOB_EVENTS,
    ("POST", "/v1/chat/completions"): {"message": ChatChunk},
    ("POST", "/v1/completions"): {"message": TextChunk},
    ("POST", "/v1/responses"): _RESPONSE_EVENTS,
    ("GET", "/v1/responses/{id}"): _RESPONSE_EVENTS,
    ("POST", "/v1/messages"): {
        "message_start": MessageStartEvent,
        "content_block_start": BlockStartEvent,
        "content_block_delta": BlockDeltaEvent,
        "content_block_stop": BlockStopEvent,
        "message_delta": MessageDeltaEvent,
        "message_stop": MessageStopEvent,
        "error": MessageErrorBody,
    },
    ("POST", "/v1/models/{model:path}/load"): _MODEL_EVENTS,
    ("POST", "/v1/models/{model:path}/unload"): _MODEL_EVENTS,
}
