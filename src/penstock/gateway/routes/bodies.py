"""The request fields that every generation route shares, with their bounds, and their way into a `Request`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from penstock.core.errors import InvalidRequest, NotFound, PreviousResponseNotFound, Unsupported
from penstock.core.events import Completion
from penstock.core.job import (
    Choices,
    Deadline,
    Identifier,
    Job,
    LogitBias,
    MaxTokens,
    Message,
    Metadata,
    MinP,
    OnDisconnect,
    OptionalIdentifier,
    Penalty,
    Priority,
    RepetitionPenalty,
    Request,
    ResponseFormat,
    Sampling,
    Seed,
    Stop,
    StopString,
    Temperature,
    Tool,
    ToolCall,
    TopK,
    TopP,
    fingerprint,
)
from penstock.core.tools import MAX_SCHEMA_BYTES, check_schema
from penstock.gateway.http import Call
from penstock.gateway.service import Gateway, Submission

T = TypeVar("T")

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
#: A number that is compared or told again, but counts nothing here.
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
PriorityName = Literal["interactive", "normal", "batch"]
#: As OpenAI has it: names go into prompts, and into pointers of a schema.
ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
MAX_TOOLS = 128
#: What ``max_tokens`` is where it is more: that of a context is far below.
MOST_TOKENS = 1_000_000
#: What ``top_p`` is where it is 0: only the likeliest token is left, and engines need not know a case more.
LEAST_TOP_P = 1e-9
Role = Annotated[str, Meta(min_length=1, max_length=64)]


class TextPart(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class CalledFunction(msgspec.Struct, frozen=True):
    name: ToolName
    arguments: str = "{}"


class AssistantCall(msgspec.Struct, frozen=True):
    """A call that an earlier reply made, as it came."""

    id: Identifier
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """A message; its content is a text or a list of text parts. A tool's answer says which call it belongs to."""

    role: Role
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[AssistantCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Identifier | None = None

    def plain(self, where: str) -> Message:
        """*where* the message is, for errors: ``messages[3]``."""
        if self.role == "tool" and self.tool_call_id is None:
            raise InvalidRequest(
                f"{where}: a message of the role 'tool' needs the tool_call_id that it answers.", param=where
            )
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ())
        return Message(self.role, self._text(where), calls, self.tool_call_id)

    def _text(self, where: str) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        for number, part in enumerate(self.content):
            if part.type not in ("text", "input_text"):
                raise not_text(f"{where}.content[{number}]", part.type)
        return "".join(part.text for part in self.content)


ChatMessages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]


def plain(messages: ChatMessages) -> tuple[Message, ...]:
    return tuple(message.plain(f"messages[{number}]") for number, message in enumerate(messages))


def not_text(where: str, kind: str) -> Unsupported:
    """The error for an image, a sound or a file in a message: a part of the type *kind* at *where*."""
    return Unsupported(
        f"{where}: content of type {kind!r} is not supported. Models here read text only: leave it out.", param=where
    )


class FunctionBody(msgspec.Struct, frozen=True):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Accepted and without effect: what the parameters' schema says is always enforced where a call is."""


class ToolBody(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: FunctionBody


class NamedFunction(msgspec.Struct, frozen=True):
    name: ToolName


class NamedTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: NamedFunction


class JsonSchemaBody(msgspec.Struct, frozen=True):
    """``strict`` makes no difference: the schema is always enforced."""

    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormatBody(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaBody | None = None


class SamplingBody(msgspec.Struct, kw_only=True, frozen=True):
    """Sampling fields as clients send them; null means "the default", and so does what others' clients say for it."""

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
            max_tokens=min(_or(self.max_tokens, max_tokens), MOST_TOKENS),
            temperature=_or(self.temperature, temperature),
            top_p=_or(self.top_p, 1.0) or LEAST_TOP_P,
            top_k=max(0, _or(self.top_k, 0)),
            min_p=_or(self.min_p, 0.0),
            seed=None if self.seed == -1 else self.seed,
            stop=stops(self.stop),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=_token_ids(self.logit_bias or {}),
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
        )


class JobBody(SamplingBody, kw_only=True, frozen=True):
    """What Penstock's own fields add: who asks, how urgent it is, and under which key."""

    user_id: OptionalIdentifier | None = None
    priority: PriorityName | None = None
    deadline: Deadline | None = None
    request_id: OptionalIdentifier | None = None
    metadata: Metadata | None = None


class StructuredBody(JobBody, kw_only=True, frozen=True):
    """What the reply has to be, and which tools it may call."""

    response_format: ResponseFormatBody | None = None
    tools: Annotated[list[ToolBody], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def structured(self, request: Request) -> Request:
        """*request* with these fields. Raises `InvalidRequest` for what contradicts itself or is too large."""
        tools = tuple(
            Tool(tool.function.name, tool.function.description or "", tool.function.parameters or {})
            for tool in self.tools or ()
        )
        choice = self.tool_choice
        return structured(
            request,
            self._format,
            tools,
            choice="required" if isinstance(choice, NamedTool) else choice or "auto",
            name=choice.function.name if isinstance(choice, NamedTool) else None,
            parallel=self.parallel_tool_calls is not False,
            where="tools[{}].function.parameters",
        )

    @property
    def _format(self) -> ResponseFormat | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return ResponseFormat("json_object")
        if wanted.json_schema is None:
            raise InvalidRequest("response_format json_schema needs its json_schema.", param="response_format")
        check_schema(wanted.json_schema.schema, "response_format.json_schema.schema")
        return ResponseFormat("json_schema", wanted.json_schema.schema)


#: What a body may meet that refers to what is kept for a time only. A repeated one may have been answered before.
REFERENCE_GONE = (PreviousResponseNotFound, NotFound)


class Prepared(msgspec.Struct, frozen=True):
    """A body's job: what to run, and what the route needs to show it again."""

    request: Request
    view: bytes = b""


class Operation(msgspec.Struct, frozen=True):
    """One of OpenAI's POST routes without its HTTP, as a line of a batch has it: the type of its body, and its job.

    ``prepare(gateway, tenant, body)`` raises `PenstockError` for what cannot be run, one of `REFERENCE_GONE` for what
    perhaps could once. ``reply(gateway, body, job, completion)`` is what came of it as JSON.
    """

    body: type
    prepare: Callable[[Gateway, str, Any], Awaitable[Prepared]]
    reply: Callable[[Gateway, Any, Job, Completion], Any]


def structured(
    request: Request,
    form: ResponseFormat | None,
    tools: tuple[Tool, ...],
    *,
    choice: Literal["none", "auto", "required"],
    name: str | None,
    parallel: bool,
    where: str,
) -> Request:
    """*request* with the *form* of its reply and its *tools*; *name*: the one that must be called.

    *where* is the field of the number {} tool's parameters, for errors. Raises `InvalidRequest` for what contradicts
    itself or is too large.
    """
    if tools and request.messages is None:
        raise InvalidRequest("Tools need messages instead of a prompt.", param="tools")
    known = [tool.name for tool in tools]
    if (twice := next((tool for tool in known if known.count(tool) > 1), None)) is not None:
        raise InvalidRequest(f"There are two tools named {twice!r}.", param="tools")
    if not tools and choice == "required":
        raise InvalidRequest("tool_choice asks for a call, but there are no tools.", param="tool_choice")
    if name is not None and name not in known:
        raise InvalidRequest(f"tool_choice names the tool {name!r}; given are {', '.join(known)}.", param="tool_choice")
    for i, tool in enumerate(tools):
        if tool.parameters.get("type", "object") != "object":
            raise InvalidRequest(f"{where.format(i)}: the arguments of a call are an object.", param="tools")
        check_schema(tool.parameters, where.format(i))
    if sum(len(msgspec.json.encode(tool.parameters)) for tool in tools) > MAX_SCHEMA_BYTES * 4:
        raise InvalidRequest("The tools' schemas are too large together.", param="tools")
    if request.continue_final and (tools or form is not None):
        raise InvalidRequest("A begun reply cannot have tools or a response_format.", param="continue_final_message")
    return msgspec.structs.replace(
        request,
        response_format=form,
        tools=tools,
        tool_choice=choice,
        tool_name=name,
        parallel_tool_calls=parallel,
    )


def submission(
    call: Call, body: JobBody, *, user: str | None, on_disconnect: OnDisconnect, priority: Priority = Priority.NORMAL
) -> Submission:
    """Everything around the request; *on_disconnect* and *priority* are the route's defaults."""
    metadata = dict(body.metadata or {})
    wish = metadata.get("on_disconnect")
    if wish is not None and wish not in ("continue", "cancel"):
        raise InvalidRequest("metadata.on_disconnect is 'continue' or 'cancel'.", param="metadata.on_disconnect")
    key = call.headers.get("idempotency-key") or body.request_id or None
    if key is not None and (len(key) > 256 or not key.isprintable()):
        raise InvalidRequest("An idempotency key is at most 256 printable characters.", param="request_id")
    return Submission(
        tenant=call.tenant,
        user=user or None,
        priority=priority if body.priority is None else Priority[body.priority.upper()],
        deadline=body.deadline,
        idempotency_key=key,
        fingerprint=fingerprint([call.scope["path"], body]) if key is not None else b"",
        request_id=call.request_id,
        metadata=metadata,
        on_disconnect="cancel" if wish == "cancel" else "continue" if wish == "continue" else on_disconnect,
    )


def stops(given: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings as they were *given*, less empty ones: those are how some clients say that there is none."""
    return tuple(filter(None, [given] if isinstance(given, str) else given or ()))


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise InvalidRequest("logit_bias maps token ids (as strings) to numbers.", param="logit_bias") from None
