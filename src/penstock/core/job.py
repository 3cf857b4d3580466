"""The vocabulary: a request, its sampling, the job that carries it and the states it passes through."""

from __future__ import annotations

import enum
import hashlib
import secrets
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from penstock.core.errors import ErrorInfo, InvalidRequest
from penstock.core.schema import closed, moved, without_unknown_formats

# Bounds of SPEC section 8. They are part of the types, so that a dialect cannot forget one. They let in what clients
# of other servers say for "none" or "all there is"; what that is comes of it in the gateway.
MaxTokens = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(ge=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=100_000)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=10)]
StopString = Annotated[str, Meta(max_length=256)]
Stop = Annotated[list[StopString], Meta(max_length=16)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[dict[str, Bias], Meta(max_length=300)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Choices = Annotated[int, Meta(ge=1, le=8)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
Identifier = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
#: An `Identifier`, or nothing.
OptionalIdentifier = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
Deadline = Annotated[float, Meta(gt=0, le=7 * 86400)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class Status(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.EXPIRED})

#: Every legal move (SPEC section 2; drawn in docs/state-machine.md).
TRANSITIONS: dict[Status, frozenset[Status]] = {
    # A queued job may fail without running again: poisoned, or out of retries.
    Status.QUEUED: frozenset({Status.RUNNING, Status.FAILED, Status.CANCELLED, Status.EXPIRED}),
    Status.RUNNING: TERMINAL | {Status.QUEUED},
    **dict.fromkeys(TERMINAL, frozenset()),
}

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
Task = Literal["generate", "embed", "tokenize", "score"]
OnDisconnect = Literal["continue", "cancel"]


class Priority(enum.IntEnum):
    """Classes served strictly in this order; fairness among tenants holds within a class."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model asked for; ``arguments`` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation. ``tool_calls`` are an assistant's; ``tool_call_id`` says which a tool answers.
    ``reasoning`` is what an assistant thought before it wrote."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str = ""
    name: str | None = None


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class ResponseFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the text of the reply has to be: any JSON object, JSON that obeys ``schema``, a text that the regular
    expression ``pattern`` matches as a whole, one of the ``choices``, or what the ``grammar`` (Lark or EBNF) derives.
    """

    type: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    schema: dict[str, Any] = {}
    pattern: str = ""
    choices: tuple[str, ...] = ()
    grammar: str = ""

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """None: it need not be JSON."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.schema if self.type == "json_schema" else None


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are drawn. Neutral values mean "off"; temperature 0 is greedy.

    ``logprobs``: None for none, else the number of alternatives to report beside the chosen token.
    ``logit_bias`` maps token ids to an additive bias.
    """

    max_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    """No end token, and no stop string, before the reply has so many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the reply as the model's own end token does."""
    bad_words: tuple[str, ...] = ()
    """Texts that must not be written."""


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to do with a model. Exactly one of ``prompt``, ``prompt_ids``, ``messages`` is set; ``n`` choices share it.

    ``continue_final``: the last message is the beginning of the reply, not a turn before it. ``tool_choice``: the
    model may call tools (auto), must not (none) or must call one (required; ``tool_name`` where that is set).

    Where the ``task`` is not to generate, the log has something else in the place of tokens (`penstock.core.tasks`):
    one vector for each of the ``inputs`` (embed; instead of a prompt), or the prompt's tokens (tokenize; score: with
    how likely the model finds each of them, and ``sampling.logprobs`` alternatives).
    """

    model: str
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    sampling: Sampling = Sampling()
    n: int = 1
    response_format: ResponseFormat | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    """May one reply have several calls? If not, the first one counts."""
    continue_final: bool = False
    task: Task = "generate"
    inputs: tuple[str | tuple[int, ...], ...] | None = None
    """Texts to embed, or their token ids."""
    input_type: Literal["query", "document"] | None = None
    """What the inputs are to be found by, or as; some models want to be told. None: documents."""
    dimensions: int | None = None
    """Of each vector, where the model allows to cut them."""
    add_special_tokens: bool = True
    """Of a prompt to tokenize: those that the tokenizer puts around a text."""
    reasoning_effort: str | None = None
    """How much to think before the reply, in the model's own words (low, medium, high; none: not at all)."""
    chat_template_kwargs: dict[str, Any] = {}
    """What else the chat template is told, by its variables' names (``enable_thinking``, ``documents`` …)."""

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "prompt_ids", "messages", "inputs") if getattr(self, name) is not None]
        if self.task == "embed":
            if given != ["inputs"] or not self.inputs:
                raise InvalidRequest("Give at least one 'input' to embed.", param="input")
        elif len(given) != 1 or self.inputs is not None:
            raise InvalidRequest("Give exactly one of 'prompt' and 'messages'.", param="prompt")
        if self.sampling.min_tokens > self.sampling.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.sampling.min_tokens}, more than max_tokens, which is {self.sampling.max_tokens}.",
                param="min_tokens",
            )
        form = self.response_format
        if form is not None and form.json_schema is None and self.callable_tools:
            raise InvalidRequest(
                f"A reply that has to be a {form.type} cannot call tools: leave one of them out, or use a JSON schema.",
                param="response_format",
            )

    @property
    def estimated_prompt_tokens(self) -> int:
        """A cheap guess before anything is tokenized (~4 bytes a token); corrected by the worker's count."""
        if self.inputs is not None:
            return sum(1 + len(each) // 4 if isinstance(each, str) else len(each) for each in self.inputs)
        if self.prompt_ids is not None:
            return len(self.prompt_ids)
        if self.prompt is not None:
            return 1 + len(self.prompt) // 4
        tools = len(msgspec.json.encode(self.tools)) // 4 if self.tools else 0
        return tools + sum(4 + len(message.content) // 4 for message in self.messages or ())

    def slots(self, all: int) -> int:
        """How many of an engine's slots it takes: one for each choice, but no more than *all* there are. One that is
        wider has the engine for itself."""
        return min(self.n, all)

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that the reply may call."""
        if self.tool_choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.tool_name in (None, tool.name))

    @property
    def form(self) -> ResponseFormat | None:
        """What the text of each reply has to be; None where it is free. This is all that an engine has to enforce."""
        if self.response_format is not None and self.response_format.json_schema is None:
            return self.response_format
        return None if (schema := self.guide) is None else ResponseFormat("json_schema", schema)

    @property
    def guide(self) -> dict[str, Any] | None:
        """The JSON schema that the text of each reply must obey; None where it need not be JSON.

        A response format is its schema, and a call that must be made is an object with the tool's name and arguments.
        Where the model may call a tool, or answer in a format, it is either.
        """
        tools = self.callable_tools
        form = None if self.response_format is None else self.response_format.json_schema
        if self.tool_choice != "required" and (form is None or not tools):
            return None if form is None else without_unknown_formats(form)
        parts = {tool.name: closed({"type": "object", **tool.parameters}) for tool in tools}
        options: list[dict[str, Any]] = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/{tool.name}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        if self.tool_choice != "required" and form is not None:
            parts[".answer"] = form  # no tool has such a name
            options.append({"$ref": "#/$defs/.answer"})
        guide = {"$defs": _together(parts), **(options[0] if len(options) == 1 else {"anyOf": options})}
        return without_unknown_formats(guide)


def _together(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Documents as the ``$defs`` of one: references of each into itself find it where it is now."""
    identities = [part.get("$id") for part in parts.values()]
    result = {}
    for name, part in parts.items():
        if identities.count(part.get("$id")) > 1:  # copied from each other: neither can be found under it
            part = {key: value for key, value in part.items() if key != "$id"}
        result[name] = moved(part, f"#/$defs/{name}", f"_{name}.")
    return result


class Usage(msgspec.Struct, frozen=True):
    """``reasoning_tokens`` of the completion's tokens were thoughts; ``cached_tokens`` of the prompt's need not be
    computed, since the engine still had them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted request: what was asked, by whom, and where it stands. Times are seconds since the epoch."""

    id: str
    tenant: str
    request: Request
    user: str | None = None
    priority: Priority = Priority.NORMAL
    idempotency_key: str | None = None
    fingerprint: bytes = b""
    request_id: str | None = None
    metadata: dict[str, str] = {}
    on_disconnect: OnDisconnect = "continue"
    deadline_at: float | None = None
    view: bytes = b""
    """What the route that took it needs to show it again. Opaque to everybody else."""
    retain_for: float | None = None
    """Seconds for which it stays readable after its end; None: `QueuePolicy.result_ttl`."""
    trace: str | None = None
    """The trace that it is part of, as a W3C ``traceparent``, so that what a worker does with it joins that trace."""
    created_at: float = 0.0

    status: Status = Status.QUEUED
    attempt: int = 0
    queue_position: int | None = None
    tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    finish_reasons: tuple[str, ...] = ()
    error: ErrorInfo | None = None
    retries: int = 0
    crashes: int = 0
    suspects: int = 0
    """How many jobs may run beside each other while this one is suspected of killing engines (0: not a suspect)."""
    readers: int = 0
    """Other processes that follow its log right now, where the store can have any."""

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens or 0, self.tokens, self.reasoning_tokens, self.cached_tokens)


def new_job_id() -> str:
    """Unguessable (128 random bits): an id is also the capability to read a stream within its tenant."""
    return "job_" + secrets.token_hex(16)


def fingerprint(body: Any) -> bytes:
    """What "the same body" means for idempotency: a digest of the canonical form of *body*."""
    return hashlib.sha256(msgspec.json.encode(body, order="deterministic")).digest()
