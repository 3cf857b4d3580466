"""The request fields that every generation route shares, with their bounds, and their way into a `Request`.

A field that was added after jobs were stored is `UNSET` by default, not None: the digest by which a repeated request is
known again (`fingerprint`) then is that of the same body before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from penstock.core.bounds import MAX_SCHEMA_BYTES, check_schema
from penstock.core.errors import InvalidRequest, Unsupported
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
from penstock.gateway.http import Call
from penstock.gateway.jobs import Submission

T = TypeVar("T")

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
#: A number that is compared or told again, but counts nothing here.
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
StopTokenIds = Annotated[list[TokenId], Meta(max_length=64)]
BadWords = Annotated[list[Annotated[str, Meta(max_length=256)]], Meta(max_length=64)]
MinTokens = Annotated[int, Meta(ge=0, le=2**63 - 1)]
#: A regular expression or a grammar.
Rules = Annotated[str, Meta(max_length=MAX_SCHEMA_BYTES)]
Options = Annotated[list[Annotated[str, Meta(min_length=1, max_length=4096)]], Meta(max_length=1024)]
#: What is refused whatever it says; null says nothing.
Anything = bool | float | str | list[Any] | dict[str, Any]
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
    """A part of a message's content; of the known types those with text. A refusal is what an earlier reply said."""

    type: str
    text: str = ""
    refusal: str | UnsetType = UNSET

    def plain(self, where: str) -> str:
        """*where* it stands, for errors."""
        if self.type == "refusal":
            return self.refusal or ""
        if self.type not in ("text", "input_text", "output_text"):
            raise not_text(where, self.type)
        return self.text


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
    refusal: str | UnsetType = UNSET
    """What an earlier reply said instead of a content."""
    reasoning: str | UnsetType = UNSET
    """What an earlier reply thought. The name is vLLM's; the next one is that of most others."""
    reasoning_content: str | UnsetType = UNSET
    name: Annotated[str, Meta(max_length=256)] | UnsetType = UNSET
    """Who says it, for templates that show it."""

    def plain(self, where: str) -> Message:
        """*where* the message is, for errors: ``messages[3]``."""
        if self.role == "tool" and self.tool_call_id is None:
            raise InvalidRequest(
                f"{where}: a message of the role 'tool' needs the tool_call_id that it answers.", param=where
            )
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ())
        reasoning = self.reasoning or self.reasoning_content or ""
        return Message(self.role, self._text(where), calls, self.tool_call_id, reasoning, self.name or None)

    def _text(self, where: str) -> str:
        if not isinstance(self.content, list):
            return self.content or self.refusal or ""
        return "".join(part.plain(f"{where}.content[{number}]") for number, part in enumerate(self.content))


def several(value: str | list[Any], most: int, param: str) -> tuple[str | tuple[int, ...], ...]:
    """What the field *param* brings: a text, a list of token ids, or a list of such, *most* of them."""
    if isinstance(value, str):
        return (value,)
    ids = tuple(each for each in value if isinstance(each, int))
    if len(ids) == len(value):
        return (ids,)
    if ids:
        raise InvalidRequest(
            f"{param} is a text or a list of token ids, or a list of such; not texts and ids in one.", param=param
        )
    if len(value) > most:
        raise InvalidRequest(
            f"{param} brings {len(value)}; one call takes {most}. A batch takes any number.", param=param
        )
    return tuple(tuple(each) if isinstance(each, list) else str(each) for each in value)


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


class NamedTool(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    """A function; as a choice, the one that must be called."""

    function: NamedFunction


class AllowedTools(msgspec.Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(max_length=MAX_TOOLS)]


class AllowedChoice(msgspec.Struct, frozen=True, tag_field="type", tag="allowed_tools"):
    """Some of the functions, which may be called or one of which must be."""

    allowed_tools: AllowedTools


class JsonSchemaBody(msgspec.Struct, frozen=True):
    """``strict`` makes no difference: the schema is always enforced."""

    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormatBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the reply has to be. ``regex`` has a ``pattern``, ``grammar`` a ``grammar``; a ``schema`` may come as it is,
    beside ``json_object`` also, as other servers have it."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"] = "text"
    json_schema: JsonSchemaBody | None = None
    schema: dict[str, Any] | UnsetType = UNSET
    pattern: Rules | UnsetType = UNSET
    grammar: Rules | UnsetType = UNSET
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    strict: bool | UnsetType = UNSET

    def form(self) -> ResponseFormat | None:
        """As a `ResponseFormat`; None for any text. Raises `InvalidRequest`."""
        schema = self.schema or (self.json_schema.schema if self.json_schema is not None else UNSET)
        given = {
            "json_schema": self.json_schema is not None or bool(self.schema),
            "regex": bool(self.pattern),
            "grammar": bool(self.grammar),
        }
        needed = "json_schema" if self.type == "json_object" else self.type
        if (other := next((kind for kind, there in given.items() if there and kind != needed), None)) is not None:
            raise InvalidRequest(f"response_format {self.type} does not go with a {other}.", param="response_format")
        match self.type:
            case "text":
                return None
            case "regex" if self.pattern:
                return ResponseFormat("regex", pattern=self.pattern)
            case "grammar" if self.grammar:
                return ResponseFormat("grammar", grammar=self.grammar)
            case "json_object" if not schema:
                return ResponseFormat("json_object")
            case "json_object" | "json_schema" if schema is not UNSET:
                where = "response_format.schema" if self.schema else "response_format.json_schema.schema"
                return json_schema(schema, where)
        field = {"regex": "pattern"}.get(self.type, self.type)
        raise InvalidRequest(f"response_format {self.type} needs its {field}.", param="response_format")


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's way to say what the reply has to be: exactly one of the first five. What cannot be honoured is refused."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: Rules | None = None
    choice: Options | None = None
    grammar: Rules | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None


class TypedGrammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Text Generation Inference's ``grammar``."""

    type: Literal["json", "json_schema", "regex"]
    value: dict[str, Any] | str


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
    min_tokens: MinTokens | UnsetType = UNSET
    stop_token_ids: StopTokenIds | UnsetType = UNSET
    bad_words: BadWords | UnsetType = UNSET

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
            min_tokens=self.min_tokens or 0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            bad_words=stops(self.bad_words or None),
        )


class JobBody(SamplingBody, kw_only=True, frozen=True):
    """What Penstock's own fields add: who asks, how urgent it is, and under which key."""

    user_id: OptionalIdentifier | None = None
    priority: PriorityName | None = None
    deadline: Deadline | None = None
    request_id: OptionalIdentifier | None = None
    metadata: Metadata | None = None


class ConstrainedBody(JobBody, kw_only=True, frozen=True):
    """What other servers have instead of a ``response_format``. It is honoured or refused: nobody shall take a reply
    for what it was not held to."""

    structured_outputs: StructuredOutputs | UnsetType = UNSET
    guided_json: dict[str, Any] | str | UnsetType = UNSET
    guided_regex: Rules | UnsetType = UNSET
    guided_choice: Options | UnsetType = UNSET
    guided_grammar: Rules | UnsetType = UNSET
    json_schema: dict[str, Any] | str | UnsetType = UNSET
    regex: Rules | UnsetType = UNSET
    ebnf: Rules | UnsetType = UNSET
    grammar: Rules | TypedGrammar | UnsetType = UNSET
    allowed_token_ids: Anything | UnsetType = UNSET
    custom_logit_processor: Anything | UnsetType = UNSET
    grammar_lazy: Anything | UnsetType = UNSET
    guided_whitespace_pattern: Anything | UnsetType = UNSET
    logits_processors: Anything | UnsetType = UNSET
    stop_regex: Anything | UnsetType = UNSET
    structural_tag: Anything | UnsetType = UNSET

    def constraint(self, name: str, form: ResponseFormat | None) -> ResponseFormat | None:
        """What the reply has to be: *form*, which the field *name* says, or what one of these fields does.

        Raises `InvalidRequest` where there are two, `Unsupported` for what cannot be honoured.
        """
        found = {name: form} if form is not None else {}
        wanted = {field: getattr(self, field) for field in CONSTRAINTS}
        if self.structured_outputs:
            wanted |= {f"structured_outputs.{f}": getattr(self.structured_outputs, f) for f in STRUCTURED_OUTPUTS}
        kinds = CONSTRAINTS | {f"structured_outputs.{field}": kind for field, kind in STRUCTURED_OUTPUTS.items()}
        for field, value in wanted.items():
            if value is None or value is UNSET or value in ("", [], False):
                continue
            kind = kinds[field]
            if kind is None:
                raise Unsupported(f"{field} is not supported: leave it out.", param=field)
            if isinstance(value, TypedGrammar):
                kind, value = "regex" if value.type == "regex" else "json_schema", value.value
            found[field] = _form(kind, value, field)
        if len(found) > 1:
            first, second = [*found][:2]
            raise InvalidRequest(f"{first} and {second} both say what the reply has to be: send one.", param=second)
        return next(iter(found.values()), None)


#: What a field says about the text of the reply, as the type of a `ResponseFormat`; None: it cannot be honoured.
CONSTRAINTS: dict[str, str | None] = {
    # vLLM's
    "guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    # SGLang's; llama.cpp's and Text Generation Inference's
    "json_schema": "json_schema", "regex": "regex", "ebnf": "grammar", "grammar": "grammar",
    "allowed_token_ids": None, "custom_logit_processor": None, "grammar_lazy": None, "guided_whitespace_pattern": None,
    "logits_processors": None, "stop_regex": None, "structural_tag": None,
}  # fmt: skip
STRUCTURED_OUTPUTS: dict[str, str | None] = {
    "json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice", "grammar": "grammar",
    "structural_tag": None, "whitespace_pattern": None, "disable_any_whitespace": None,
    "disable_additional_properties": None,
}  # fmt: skip


def _form(kind: str, value: Any, where: str) -> ResponseFormat:
    match kind, value:
        case "json_object", _:
            return ResponseFormat("json_object")
        case "json_schema", dict():
            return json_schema(value, where)
        case "json_schema", str():
            try:
                return json_schema(msgspec.json.decode(value, type=dict[str, Any]), where)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InvalidRequest(f"{where} is no JSON schema: {error}", param=where) from error
        case "choice", list():
            if sum(len(option.encode()) for option in value) > MAX_SCHEMA_BYTES:
                raise InvalidRequest(f"{where} may have {MAX_SCHEMA_BYTES} bytes.", param=where)
            return ResponseFormat("choice", choices=tuple(dict.fromkeys(value)))
        case "regex", str():
            return ResponseFormat("regex", pattern=value)
        case "grammar", str():
            return ResponseFormat("grammar", grammar=value)
    raise InvalidRequest(f"{where} is not a {kind}.", param=where)


def json_schema(schema: dict[str, Any], where: str) -> ResponseFormat:
    """The format of a reply that obeys *schema*. Raises `InvalidRequest` for one that is too large."""
    check_schema(schema, where)
    return ResponseFormat("json_schema", schema)


#: How much to think, as models and other servers call it: none, minimal, low, medium, high …
Effort = Annotated[str, Meta(pattern=r"^[a-z]{1,16}$")]
#: Variables of every chat template: they say what the messages and the tools do.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"})
TemplateValues = Annotated[dict[Annotated[str, Meta(pattern=r"^[A-Za-z_]\w{0,63}$")], Any], Meta(max_length=64)]


class Thinking(msgspec.Struct, frozen=True):
    """Whether to think before the reply, as GLM, DeepSeek and Anthropic ask it. A budget is not enforced."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]


class Reasoning(msgspec.Struct, frozen=True):
    """OpenRouter's way: how much to think, and whether to show it. A number of tokens is not enforced."""

    effort: Effort | None = None
    enabled: bool | None = None
    exclude: bool = False


class ThinkingBody(ConstrainedBody, kw_only=True, frozen=True):
    """What the chat template is told besides the messages: how much to think, and by its own variables' names. What it
    does not know makes no difference."""

    reasoning_effort: Effort | UnsetType = UNSET
    chat_template_kwargs: TemplateValues | UnsetType = UNSET
    enable_thinking: bool | UnsetType = UNSET
    thinking: Thinking | UnsetType = UNSET
    documents: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | UnsetType = UNSET

    def told(self, request: Request) -> Request:
        """*request* with these fields. Raises `InvalidRequest` for a variable that has a field of its own, for values
        that are too large, and where there are no messages."""
        values: dict[str, Any] = dict(self.chat_template_kwargs or {})
        if taken := sorted(RESERVED.intersection(values)):
            raise InvalidRequest(
                f"chat_template_kwargs sets {taken[0]!r}, which the request itself says.", param="chat_template_kwargs"
            )
        if self.documents:
            values.setdefault("documents", self.documents)
        thinks = self.enable_thinking
        if not isinstance(thinks, bool) and self.thinking and self.thinking.type in ("enabled", "disabled"):
            thinks = self.thinking.type == "enabled"
        if isinstance(thinks, bool):
            values.setdefault("enable_thinking", thinks)
        effort = self.reasoning_effort or None
        if not values and effort is None:
            return request
        if request.messages is None:
            raise InvalidRequest(
                "A prompt is taken as it is: what a chat template is told needs messages.",
                param="chat_template_kwargs" if values else "reasoning_effort",
            )
        check_schema(values, "chat_template_kwargs")
        return msgspec.structs.replace(request, reasoning_effort=effort, chat_template_kwargs=values)


class StructuredBody(ThinkingBody, kw_only=True, frozen=True):
    """What the reply has to be, and which tools it may call."""

    response_format: ResponseFormatBody | None = None
    tools: Annotated[list[ToolBody], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None

    def structured(self, request: Request) -> Request:
        """*request* with these fields. Raises `InvalidRequest` for what contradicts itself or is too large."""
        tools = tuple(
            Tool(tool.function.name, tool.function.description or "", tool.function.parameters or {})
            for tool in self.tools or ()
        )
        choice: Literal["none", "auto", "required"]
        name: str | None
        match self.tool_choice:
            case NamedTool(function=function):
                choice, name = "required", function.name
            case AllowedChoice(allowed_tools=allowed):
                tools = allowed_only(tools, (tool.function.name for tool in allowed.tools))
                choice, name = allowed.mode, None
            case given:
                choice, name = given or "auto", None
        return structured(
            self.told(request),
            self.constraint("response_format", self.response_format.form() if self.response_format else None),
            tools,
            choice=choice,
            name=name,
            parallel=self.parallel_tool_calls is not False,
            where="tools[{}].function.parameters",
        )


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


def allowed_only(tools: tuple[Tool, ...], allowed: Iterable[str]) -> tuple[Tool, ...]:
    """Those of the *tools* that a ``tool_choice`` names as *allowed*. Raises `InvalidRequest` for a name of none."""
    names = frozenset(allowed)
    if unknown := sorted(names - {tool.name for tool in tools}):
        raise InvalidRequest(f"tool_choice allows the tool {unknown[0]!r}, which is not given.", param="tool_choice")
    return tuple(tool for tool in tools if tool.name in names)


def submission_of(
    call: Call, body: JobBody, *, user: str | None, on_disconnect: OnDisconnect, priority: Priority = Priority.NORMAL
) -> Submission:
    """Everything around the request; *on_disconnect* and *priority* are the route's defaults."""
    metadata = dict(body.metadata or {})
    policy = metadata.get("on_disconnect")
    if policy is not None and policy not in ("continue", "cancel"):
        raise InvalidRequest("metadata.on_disconnect is 'continue' or 'cancel'.", param="metadata.on_disconnect")
    key = call.headers.get("idempotency-key") or body.request_id or None
    if key is not None and (len(key) > 256 or not key.isprintable()):
        raise InvalidRequest("An idempotency key is at most 256 printable characters.", param="request_id")
    return Submission(
        user=user or None,
        priority=priority if body.priority is None else Priority[body.priority.upper()],
        deadline=body.deadline,
        idempotency_key=key,
        fingerprint=fingerprint([call.scope["path"], body]) if key is not None else b"",
        request_id=call.request_id,
        trace=call.trace,
        metadata=metadata,
        on_disconnect="cancel" if policy == "cancel" else "continue" if policy == "continue" else on_disconnect,
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
