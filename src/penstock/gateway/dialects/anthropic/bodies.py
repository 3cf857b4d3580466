"""What Anthropic's routes are asked, and their conversations as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from penstock.core.errors import InvalidRequest, Unsupported
from penstock.core.job import Identifier, MaxTokens, Message, ModelName, Request, StopString, Tool, ToolCall
from penstock.gateway.dialects.fields import MAX_TOOLS, Count, Effort, JobBody, json_schema, not_text, stops, structured

#: Anthropic's names of tools are longer than OpenAI's.
ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
#: What an assistant's turn thought. What is redacted cannot be read here.
THOUGHTS = ("thinking", "redacted_thinking")
UserId = Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
#: As ours, but that the ``user_id`` may be null.
NullableMetadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)] | None], Meta(max_length=16)
]


class Block(msgspec.Struct, frozen=True):
    """A content block: ``text``, ``tool_use`` with the call that an earlier reply made, or its ``tool_result``.

    What an earlier reply thought (``thinking``) is shown by templates that do so; ``redacted_thinking`` is let be.
    Whatever else a block may carry (``cache_control``, ``citations``, ``caller``) makes no difference here.
    """

    type: str
    text: str | None = None
    thinking: str | UnsetType = UNSET
    id: Identifier | None = None
    name: ToolName | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Identifier | None = None
    content: str | list[Block] | None = None
    is_error: bool = False


class Turn(msgspec.Struct, frozen=True):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Meta(min_length=1)]


class ToolParam(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool of the client's. ``strict`` and ``eager_input_streaming`` make no difference: see docs/api.md."""

    name: ToolName
    input_schema: dict[str, Any] | None = None
    description: str = ""
    type: str | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    cache_control: Any = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None

    def tool(self) -> Tool:
        if self.type not in (None, "custom") or self.input_schema is None:
            raise Unsupported(
                f"The tool {self.name!r} is not the client's: only tools with an input_schema can be used.",
                param="tools",
            )
        if self.defer_loading or self.input_examples or "direct" not in (self.allowed_callers or ["direct"]):
            raise Unsupported(
                f"The tool {self.name!r}: defer_loading, input_examples and allowed_callers are not supported.",
                param="tools",
            )
        return Tool(self.name, self.description, self.input_schema)


class ToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False


class Thinking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``budget_tokens`` is not enforced. ``display``: omitted, or summarized, which is all of it here."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | UnsetType = UNSET
    display: Literal["summarized", "omitted"] | UnsetType = UNSET


class OutputFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: OutputFormat | None = None
    effort: Effort | None = None


class CountTokens(JobBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/messages/count_tokens``, and what it shares with that of ``POST /v1/messages``.

    What Anthropic has and this server cannot honour is refused, not dropped.
    """

    model: ModelName
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=4096)]
    system: str | list[Block] | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    context_management: dict[str, Any] | UnsetType = UNSET
    """What may be left out of a long conversation. Nothing is."""
    thread: dict[str, Any] | None = None

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

    def conversation(self) -> Request:
        """The conversation as a request, without how to sample."""
        if self.thread is not None:
            raise Unsupported("Threads are not kept here: leave thread out, and send all messages.", param="thread")
        thinks = self.thinking.type if self.thinking is not None else "adaptive"
        config = self.output_config or OutputConfig()
        form = None
        if config.format is not None:
            form = json_schema(config.format.schema, "output_config.format.schema")
        tools = tuple(tool.tool() for tool in self.tools or ())
        messages = self._messages()
        prefilled = messages[-1].role == "assistant"
        if prefilled and (tools or form is not None):
            raise Unsupported(
                "A reply that the last message begins cannot have tools or a format: end with a user's message.",
                param="messages",
            )
        choice = self.tool_choice or ToolChoice("auto")
        if (choice.type == "tool") != (choice.name is not None):
            raise InvalidRequest("tool_choice has a name if its type is 'tool', and only then.", param="tool_choice")
        return structured(
            Request(
                model=self.model,
                messages=tuple(messages),
                continue_final=prefilled,
                reasoning_effort=config.effort,
                chat_template_kwargs={} if thinks == "adaptive" else {"enable_thinking": thinks == "enabled"},
            ),
            form,
            tools,
            choice="required" if choice.type == "any" or choice.type == "tool" else choice.type,
            name=choice.name,
            parallel=not choice.disable_parallel_tool_use,
            where="tools[{}].input_schema",
        )

    def _messages(self) -> list[Message]:
        messages = [Message("system", _text(self.system, "system"))] if self.system else []
        for i, turn in enumerate(self.messages):
            for message in _plain(turn, f"messages[{i}]"):
                last = messages[-1] if messages else None
                if last is not None and _mergeable(last) and _mergeable(message) and last.role == message.role:
                    thoughts = "\n\n".join(filter(None, (last.reasoning, message.reasoning)))
                    text = f"{last.content}\n\n{message.content}"
                    messages[-1] = Message(last.role, text, reasoning=thoughts)
                else:
                    messages.append(message)
        if not messages:
            raise InvalidRequest("The messages have no text: add a message to answer.", param="messages")
        if messages[-1].tool_calls:
            raise InvalidRequest(
                "The last message calls tools: add a message with their tool_result.", param="messages"
            )
        return messages


class CreateMessage(CountTokens, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/messages``."""

    max_tokens: MaxTokens
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=16)] | None = None
    stream: bool = False
    metadata: NullableMetadata | None = None  # type: ignore[assignment]
    service_tier: str | None = None

    def request(self) -> Request:
        if stops(self.stop):
            raise InvalidRequest("stop is called stop_sequences here.", param="stop")
        if self.n not in (None, 1):
            raise Unsupported("A message has one reply: n is 1.", param="n")
        sampling = self.sampling(max_tokens=self.max_tokens, temperature=1.0, logprobs=None)
        sampling = msgspec.structs.replace(sampling, stop=stops(self.stop_sequences))
        return msgspec.structs.replace(self.conversation(), sampling=sampling)


def _plain(turn: Turn, where: str) -> Iterator[Message]:
    """A turn as messages of ours: each tool's result is one of its own, before or between the texts."""
    if isinstance(turn.content, str):
        yield Message(turn.role, turn.content)
        return
    if turn.role == "assistant":
        calls = [_call(block, where) for block in turn.content if block.type == "tool_use"]
        texts = [block for block in turn.content if block.type not in ("tool_use", *THOUGHTS)]
        thoughts = "".join(block.thinking or "" for block in turn.content if block.type == "thinking")
        if texts or calls:
            yield Message("assistant", _text(texts, where), tuple(calls), reasoning=thoughts)
        return
    texts = []
    for block in turn.content:
        if block.type != "tool_result" or turn.role == "system":
            texts.append(block)
            continue
        if texts:
            yield Message(turn.role, _text(texts, where))
            texts = []
        if block.tool_use_id is None:
            raise InvalidRequest(f"{where}: a tool_result needs the tool_use_id that it answers.", param=where)
        result = _text(block.content or "", where)
        yield Message("tool", f"Error: {result}" if block.is_error else result, tool_call_id=block.tool_use_id)
    if texts:
        yield Message(turn.role, _text(texts, where))


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            raise not_text(where, block.type)
        if block.text is None:
            raise InvalidRequest(f"{where}: a text block needs its text.", param=where)
    return "".join(block.text or "" for block in content)


def _call(block: Block, where: str) -> ToolCall:
    if block.id is None or block.name is None or block.input is None:
        raise InvalidRequest(f"{where}: a tool_use needs its id, name and input.", param=where)
    return ToolCall(block.id, block.name, json.dumps(block.input))


def _mergeable(message: Message) -> bool:
    """Turns of one role that follow each other are one turn, as Anthropic has it and chat templates want it."""
    return message.role in ("user", "assistant") and not message.tool_calls
