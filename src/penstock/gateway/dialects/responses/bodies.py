"""What OpenAI's Responses are asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from penstock.core.errors import InvalidRequest, Unsupported
from penstock.core.job import (
    Identifier,
    MaxTokens,
    ModelName,
    OptionalIdentifier,
    Request,
    ResponseFormat,
    Tool,
    TopLogprobs,
)
from penstock.gateway.dialects.fields import (
    MAX_TOOLS,
    Count,
    Effort,
    Role,
    TextPart,
    ThinkingBody,
    ToolName,
    allowed_only,
    json_schema,
    structured,
)
from penstock.gateway.dialects.responses.answers import FunctionToolView, NamespaceToolView, TextFormatView, ToolView
from penstock.gateway.dialects.responses.items import Item, View, flat, messages

LOGPROBS = "message.output_text.logprobs"


class InputItem(msgspec.Struct, frozen=True):
    """One item of the input, as a client writes it or as an earlier response gave it out. Without a type: a message."""

    type: str | None = None
    id: str | None = None
    role: Role | None = None
    content: str | list[TextPart] | None = None
    call_id: Identifier | None = None
    name: ToolName | None = None
    namespace: ToolName | UnsetType = UNSET
    arguments: str | None = None
    output: str | list[TextPart] | None = None
    summary: list[TextPart] | UnsetType = UNSET
    """Of what another server thought, where it does not tell that itself."""

    @property
    def reference(self) -> str | None:
        """The id of the item that this one stands for."""
        return self.id if self.type == "item_reference" or (self.type is None and self.role is None) else None

    def plain(self, place: int) -> Item:
        """As an item of the conversation; *place* is where it is in the input, for errors."""
        where = f"input[{place}]"
        kind = self.type or "message"
        if kind == "message":
            if self.role is None or self.content is None:
                raise InvalidRequest(f"{where}: a message has a role and a content.", param=where)
            content = (self.content,) if isinstance(self.content, str) else _texts(self.content, f"{where}.content")
            return Item("message", self.id or "", self.role, content)
        if kind == "reasoning":
            parts = self.content or self.summary or []
            texts = (parts,) if isinstance(parts, str) else tuple(part.text for part in parts)
            return Item("reasoning", self.id or "", content=texts)
        if kind == "function_call":
            if self.call_id is None or self.name is None:
                raise InvalidRequest(f"{where}: a function_call has a call_id and a name.", param=where)
            return Item(
                "function_call",
                self.id or "",
                call_id=self.call_id,
                name=self.name,
                namespace=self.namespace or "",
                arguments="{}" if self.arguments is None else self.arguments,
            )
        if kind == "function_call_output":
            if self.call_id is None or self.output is None:
                raise InvalidRequest(f"{where}: a function_call_output has a call_id and an output.", param=where)
            output = self.output if isinstance(self.output, str) else "".join(_texts(self.output, f"{where}.output"))
            return Item("function_call_output", self.id or "", call_id=self.call_id, output=output)
        raise Unsupported(
            f"Items of type {kind!r} are not supported: message, reasoning, function_call, function_call_output and "
            "item_reference are.",
            param=where,
        )


def _texts(parts: list[TextPart], where: str) -> tuple[str, ...]:
    return tuple(part.plain(f"{where}[{number}]") for number, part in enumerate(parts))


class FunctionTool(msgspec.Struct, frozen=True):
    """A function, in the flat form of this API, or (``namespace``) a list of some.

    ``strict`` makes no difference: a call's schema is always enforced.
    """

    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | UnsetType = UNSET

    def functions(self, where: str, namespace: str = "") -> Iterator[Tool]:
        """The functions that it is, by the names that models are told. *where* it stands is for errors."""
        if self.type != "function" and (self.type != "namespace" or namespace):
            hint = _OFF.get(self.type.removesuffix("_preview"), "")
            raise Unsupported(
                f"{where}: there is no tool of type {self.type!r} here, only functions and namespaces of functions. "
                f"Leave it out of the tools{hint}.",
                param=where,
            )
        if self.name is None:
            raise InvalidRequest(f"{where}: a {self.type} has a name.", param=f"{where}.name")
        if self.type == "function":
            yield Tool(flat(namespace, self.name), self.description or "", self.parameters or {})
        for number, tool in enumerate(self.tools or () if self.type == "namespace" else ()):
            yield from tool.functions(f"{where}.tools[{number}]", self.name)

    def view(self) -> ToolView:
        """As the response echoes it. Only for what `functions` took."""
        if self.type == "namespace":
            return NamespaceToolView(self.name or "", self.description, [tool.function() for tool in self.tools or ()])
        return self.function()

    def function(self) -> FunctionToolView:
        return FunctionToolView(self.name or "", self.description, self.parameters, self.strict is not False)


#: How a client that asks for it by itself is told not to, where that is known.
_OFF = {"web_search": ' (Codex: web_search = "disabled" in its config.toml)'}


class AllowedTool(msgspec.Struct, frozen=True):
    type: str
    name: ToolName | None = None
    namespace: ToolName | UnsetType = UNSET

    @property
    def flat(self) -> str:
        return flat(self.namespace or "", self.name or "")


class FunctionChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that must be called, or (``allowed_tools``) those of the tools that may be or one of which must be."""

    type: str
    name: ToolName | None = None
    namespace: ToolName | UnsetType = UNSET
    mode: Literal["auto", "required"] | None = None
    tools: list[AllowedTool] | None = None


class TextFormat(msgspec.Struct, frozen=True):
    """``strict`` makes no difference: a schema is always enforced."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None

    def form(self) -> ResponseFormat | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return ResponseFormat("json_object")
        if self.schema is None:
            raise InvalidRequest("A text.format of type json_schema needs its schema.", param="text.format.schema")
        return json_schema(self.schema, "text.format.schema")

    def view(self) -> TextFormatView:
        if self.type != "json_schema":
            return TextFormatView(type=self.type)
        return TextFormatView(
            type=self.type,
            name=self.name,
            description=self.description,
            schema=self.schema or {},
            strict=self.strict is not False,
        )


class TextConfig(msgspec.Struct, frozen=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """Thoughts are shown as they are: asking for a summary makes no difference."""

    effort: Effort | None = None
    summary: str | None = None


class CreateResponse(ThinkingBody, kw_only=True, frozen=True):
    """The body of ``POST /v1/responses``. What OpenAI has and this server cannot honour is refused, not dropped."""

    model: ModelName
    input: str | Annotated[list[InputItem], Meta(max_length=4096)] | None = None
    instructions: str | None = None
    previous_response_id: Identifier | None = None
    max_output_tokens: MaxTokens | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: TopLogprobs | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: Reasoning | None = None
    service_tier: str | None = None
    user: OptionalIdentifier | None = None
    safety_identifier: OptionalIdentifier | None = None
    prompt_cache_key: str | None = None
    max_tool_calls: Count | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: list[Any] | None = None
    moderation: Any = None
    response_format: Any = None

    @property
    def stored(self) -> bool:
        return self.store is not False

    def request(self, items: tuple[Item, ...], default_max_tokens: int) -> Request:
        """What to generate behind *items*, the whole conversation."""
        self._check()
        turns = messages(self.instructions, items)
        if not turns:
            raise InvalidRequest("Give an 'input', a 'previous_response_id' or 'instructions'.", param="input")
        wanted = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        request = Request(
            model=self.model,
            messages=turns,
            sampling=self.sampling(
                max_tokens=self.max_output_tokens or default_max_tokens,
                temperature=1.0,
                logprobs=(self.top_logprobs or 0) if wanted else None,
            ),
        )
        tools = self._functions()
        choice, name, allowed = self._choice()
        effort = self.reasoning.effort if self.reasoning is not None else None
        return structured(
            msgspec.structs.replace(self, reasoning_effort=self.reasoning_effort or effort or UNSET).told(request),
            self.constraint("text.format", self.text.format.form() if self.text and self.text.format else None),
            tools if allowed is None else allowed_only(tools, allowed),
            choice=choice,
            name=name,
            parallel=self.parallel_tool_calls is not False,
            where="tools[{}].parameters",
        )

    def view(self, items: tuple[Item, ...]) -> bytes:
        """What the response echoes of it, for `Submission.view`."""
        choice = self.tool_choice
        form = self.text.format if self.text is not None else None
        return msgspec.json.encode(
            View(
                items=items,
                instructions=self.instructions,
                previous_response_id=self.previous_response_id,
                store=self.stored,
                background=bool(self.background),
                max_output_tokens=self.max_output_tokens,
                max_tool_calls=self.max_tool_calls,
                tools=tuple(tool.view() for tool in self.tools or ()),
                tool_choice=msgspec.to_builtins(choice) if isinstance(choice, FunctionChoice) else choice or "auto",
                format=form.view() if form is not None else None,
                metadata=self.metadata or {},
                user=self.user,
                safety_identifier=self.safety_identifier,
                prompt_cache_key=self.prompt_cache_key,
            )
        )

    def _functions(self) -> tuple[Tool, ...]:
        given = enumerate(self.tools or ())
        found = tuple(function for number, tool in given for function in tool.functions(f"tools[{number}]"))
        if len(found) > MAX_TOOLS:
            raise InvalidRequest(f"There are {len(found)} functions; at most {MAX_TOOLS} are taken.", param="tools")
        return found

    def _choice(self) -> tuple[Literal["none", "auto", "required"], str | None, list[str] | None]:
        """What is to be called: how, which one, and which may be (None: any)."""
        choice = self.tool_choice
        if not isinstance(choice, FunctionChoice):
            return choice or "auto", None, None
        if choice.type == "function" and choice.name is not None:
            return "required", flat(choice.namespace or "", choice.name), None
        if choice.type == "allowed_tools" and choice.tools is not None:
            allowed = [
                name
                for tool in choice.tools
                if tool.name is not None
                for name in (self._members(tool.name) if tool.type == "namespace" else [tool.flat])
            ]
            return choice.mode or "auto", None, allowed
        raise Unsupported(
            'tool_choice is \'auto\', \'none\', \'required\', {"type": "function", "name": …} or {"type": '
            '"allowed_tools", "mode": …, "tools": […]}.',
            param="tool_choice",
        )

    def _members(self, namespace: str) -> list[str]:
        """The functions of a namespace."""
        found = [tool for tool in self.tools or () if tool.type == "namespace" and tool.name == namespace]
        return [function.name for tool in found for function in tool.functions("tools")]

    def _check(self) -> None:
        """Refuse what contradicts itself, and what would have to be ignored."""
        if self.background and not self.stored:
            raise InvalidRequest("background needs store: true.", param="background")
        if self.max_tokens is not None:
            raise Unsupported("max_tokens is called max_output_tokens here.", param="max_tokens")
        if self.response_format is not None:
            raise Unsupported("response_format is called text.format here.", param="response_format")
        if (self.n or 1) != 1:
            raise Unsupported("A response has one output: n is not supported.", param="n")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise Unsupported("text.verbosity is 'medium': models here know no other.", param="text.verbosity")
        if self.truncation == "auto":
            raise Unsupported(
                "truncation 'auto' is not supported: leave old items out of the input instead.", param="truncation"
            )
        for name in ("conversation", "prompt", "context_management", "moderation"):
            if getattr(self, name):
                hint = ": use previous_response_id" if name == "conversation" else ""
                raise Unsupported(f"{name} is not supported{hint}.", param=name)


class CountInputTokens(CreateResponse, kw_only=True, frozen=True):
    """The body of ``POST /v1/responses/input_tokens``: what makes the prompt; the rest makes no difference."""

    model: ModelName | None = None  # type: ignore[assignment]
