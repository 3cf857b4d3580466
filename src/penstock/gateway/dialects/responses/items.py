"""What a response is made of: the items of its conversation, what is kept of its request, and the object clients see.

Everything here is a function of the job and its log. The id of a response is that of its job, in other letters; ids of
items are the response's and a number, so that any gateway gives the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from penstock.core.errors import ContextLengthExceeded, ErrorInfo, InvalidRequest
from penstock.core.events import Ended
from penstock.core.job import Job, Message, Priority, Status, ToolCall, Usage
from penstock.gateway.dialects.answers import ChatTokenLogprob, ReasoningTokens
from penstock.gateway.dialects.responses.answers import (
    FunctionCallItem,
    FunctionCallOutputItem,
    IncompleteDetails,
    InputItemView,
    InputText,
    InputTokensDetails,
    ItemStatus,
    MessageItem,
    NamespaceToolView,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ReasoningView,
    ResponseFailure,
    ResponseStatus,
    ResponseUsage,
    ResponseView,
    TextFormatView,
    TextView,
    ToolView,
)

PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc", "function_call_output": "fco"}
_ITEM_ID = re.compile(r"^(?:rs|msg|fc|fco)_([0-9a-f]{32})_(?:in)?\d+$")
_RESPONSE_ID = re.compile(r"^resp_([0-9a-f]{32})$")


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """One item of a conversation. ``content`` are the texts of a message's parts, or of a thought; ``id`` is empty
    until it has one."""

    type: Literal["reasoning", "message", "function_call", "function_call_output"]
    id: str = ""
    role: str = ""
    content: tuple[str, ...] = ()
    call_id: str = ""
    name: str = ""
    namespace: str = ""
    arguments: str = ""
    output: str = ""

    def view(self) -> InputItemView:
        """As clients see it among the input items of a response."""
        if self.type == "reasoning":
            return ReasoningItem(self.id, "completed", [], [ReasoningText(text) for text in self.content])
        if self.type == "message":
            own = self.role == "assistant"
            parts = [text_part(text) if own else InputText(text) for text in self.content]
            return MessageItem(self.id, "completed", parts, self.role)
        if self.type == "function_call":
            return call_item(self.id, self.call_id, self.name, self.arguments, namespace=self.namespace)
        return FunctionCallOutputItem(self.id, "completed", self.call_id, self.output)


class View(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="object", tag="response"):
    """What a response echoes of its request and its job does not know otherwise: the ``view`` of the job."""

    items: tuple[Item, ...] = ()
    """The whole input, that of earlier responses included."""
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    background: bool = False
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    tools: tuple[ToolView, ...] = ()
    tool_choice: str | dict[str, Any] = "auto"
    format: TextFormatView | None = None
    """What the text has to be, where that is not just text."""
    metadata: dict[str, str] = {}
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def view_of(job: Job) -> View | None:
    """What was kept with *job*; None if no response is made of it."""
    if not job.view.startswith(b'{"object":"response"'):
        return None  # another route's
    return msgspec.json.decode(job.view, type=View)


def response_id(job: str) -> str:
    return "resp_" + job.removeprefix("job_")


def job_id(response: str) -> str | None:
    """The job of a response; None for what is no response's id."""
    found = _RESPONSE_ID.match(response)
    return f"job_{found[1]}" if found else None


def owner(item: str) -> str | None:
    """The job whose response an item belongs to; None for what is no item's id of ours."""
    found = _ITEM_ID.match(item)
    return f"job_{found[1]}" if found else None


def item_id(job: str, kind: str, index: int, *, given: bool = False) -> str:
    """The id of a response's item number *index*: of its output, or of its input (*given*)."""
    return f"{PREFIXES[kind]}_{job.removeprefix('job_')}_{'in' if given else ''}{index}"


def input_items(job: Job, view: View) -> list[Item]:
    """The input of a response, every item with an id."""
    return [
        item if item.id else msgspec.structs.replace(item, id=item_id(job.id, item.type, index, given=True))
        for index, item in enumerate(view.items)
    ]


def output_items(output: Iterable[OutputItem]) -> list[Item]:
    """A response's *output* as items of the conversation that goes on."""
    return [_again(item) for item in output]


def _again(item: OutputItem) -> Item:
    match item:
        case ReasoningItem():
            return Item("reasoning", item.id, content=tuple(part.text for part in item.content))
        case MessageItem():
            return Item("message", item.id, "assistant", tuple(part.text for part in item.content))
        case FunctionCallItem():
            return Item(
                "function_call",
                item.id,
                call_id=item.call_id,
                name=item.name,
                namespace=item.namespace or "",
                arguments=item.arguments,
            )


# ---------------------------------------------------------------------------------------------- for the model


def flat(namespace: str, name: str) -> str:
    """What a model knows a function by: models know of no namespaces."""
    return namespace + name if not namespace or namespace.endswith("__") else f"{namespace}__{name}"


def named(view: View) -> dict[str, tuple[str, str]]:
    """The namespace and name of each function that has one, by what the model knows it by."""
    return {
        flat(tool.name, function.name): (tool.name, function.name)
        for tool in view.tools
        if isinstance(tool, NamespaceToolView)
        for function in tool.tools
    }


def messages(instructions: str | None, items: Sequence[Item]) -> tuple[Message, ...]:
    """A conversation as chat templates know it.

    System messages that follow each other are one, and so are the parts of a reply, its thoughts and its calls. Raises
    `InvalidRequest` for a call without an output, and the other way round.
    """
    turns: list[Message] = []
    if instructions:
        turns.append(Message("system", instructions))
    waiting: dict[str, None] = {}  # calls without an output so far
    thought = ""  # of the reply that follows
    for item in items:
        last = turns[-1] if turns else None
        if item.type == "reasoning":
            thought = "\n\n".join(filter(None, (thought, *item.content)))
            continue
        assistants = item.type == "function_call" or item.role == "assistant"
        if thought and assistants and (last is None or last.role != "assistant"):
            turns.append(last := Message("assistant", "", reasoning=thought))
        elif thought and assistants and last is not None:
            reasoning = "\n\n".join(filter(None, (last.reasoning, thought)))
            turns[-1] = last = msgspec.structs.replace(last, reasoning=reasoning)
        thought = ""
        if item.type == "function_call_output":
            if item.call_id not in waiting:
                raise InvalidRequest(
                    f"No tool call found for function call output with call_id {item.call_id}.", param="input"
                )
            del waiting[item.call_id]
            turns.append(Message("tool", item.output, tool_call_id=item.call_id))
        elif item.type == "function_call":
            waiting[item.call_id] = None
            call = ToolCall(item.call_id, flat(item.namespace, item.name), item.arguments)
            if last is not None and last.role == "assistant":
                turns[-1] = msgspec.structs.replace(last, tool_calls=(*last.tool_calls, call))
            else:
                turns.append(Message("assistant", "", (call,)))
        else:
            role = "system" if item.role == "developer" else item.role
            content = "".join(item.content)
            if last is not None and role == last.role != "user":
                joined = "\n\n".join(filter(None, (last.content, content)))
                turns[-1] = msgspec.structs.replace(last, content=joined)
            else:
                turns.append(Message(role, content))
    if waiting:
        raise InvalidRequest(f"No tool output found for function call {next(iter(waiting))}.", param="input")
    return tuple(turns)


# ---------------------------------------------------------------------------------------------- for clients


def text_part(text: str, logprobs: Sequence[ChatTokenLogprob] = ()) -> OutputText:
    return OutputText([], list(logprobs), text)


def call_item(
    id: str, call_id: str, name: str, arguments: str, status: ItemStatus = "completed", *, namespace: str = ""
) -> FunctionCallItem:
    return FunctionCallItem(
        id=id, status=status, call_id=call_id, name=name, namespace=namespace or UNSET, arguments=arguments
    )


def status_of(job: Job) -> ResponseStatus:
    """How far a response is whose end is not known yet. One that begins again after a crash has begun."""
    return "queued" if job.status is Status.QUEUED and job.attempt == 0 else "in_progress"


#: Ends that leave a response incomplete, as they are called there.
_INCOMPLETE: dict[str | None, Literal["max_output_tokens", "content_filter"]] = {
    "length": "max_output_tokens",
    "content_filter": "content_filter",
}


def ended_status(ended: Ended) -> Literal["completed", "incomplete", "cancelled", "failed"]:
    if ended.status is Status.COMPLETED:
        return "incomplete" if ended.finish_reason in _INCOMPLETE else "completed"
    return "cancelled" if ended.status is Status.CANCELLED else "failed"


def response_object(
    job: Job,
    view: View,
    status: ResponseStatus,
    output: Sequence[OutputItem] = (),
    ended: Ended | None = None,
    ended_at: float | None = None,
) -> ResponseView:
    """A response as clients see it; *ended_at* (seconds since the epoch) is when it ended."""
    sampling = job.request.sampling
    failure = ended.error if ended is not None and status == "failed" else None
    reason = _INCOMPLETE.get(ended.finish_reason, "max_output_tokens") if ended is not None else "max_output_tokens"
    return ResponseView(
        id=response_id(job.id),
        object="response",
        created_at=int(job.created_at),
        status=status,
        background=view.background,
        completed_at=int(ended_at) if status == "completed" and ended_at is not None else None,
        error=_failure(failure) if failure is not None else None,
        incomplete_details=IncompleteDetails(reason) if status == "incomplete" else None,
        instructions=view.instructions,
        max_output_tokens=view.max_output_tokens,
        max_tool_calls=view.max_tool_calls,
        model=job.request.model,
        output=list(output),
        parallel_tool_calls=job.request.parallel_tool_calls,
        previous_response_id=view.previous_response_id,
        prompt_cache_key=view.prompt_cache_key,
        reasoning=ReasoningView(job.request.reasoning_effort, None),
        safety_identifier=view.safety_identifier,
        service_tier="flex" if job.priority is Priority.BATCH else "default",
        store=view.store,
        temperature=sampling.temperature,
        text=TextView(view.format or TextFormatView(type="text"), "medium"),
        tool_choice=view.tool_choice,
        tools=list(view.tools),
        top_logprobs=sampling.logprobs or 0,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        truncation="disabled",
        usage=_usage(ended.usage) if ended is not None else None,
        user=view.user,
        metadata=view.metadata,
    )


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(usage.cached_tokens, 0),
        usage.completion_tokens,
        ReasoningTokens(usage.reasoning_tokens),
        usage.total_tokens,
    )


def as_told(error: ErrorInfo) -> ErrorInfo:
    """An error by the name that this API has for a conversation."""
    return msgspec.structs.replace(error, param="input") if error.param == "messages" else error


def _failure(error: ErrorInfo) -> ResponseFailure:
    """OpenAI's codes are a closed list; what we know besides is in the message, the type and the job."""
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt", "context_length_exceeded"]
    if error.code == ContextLengthExceeded.code:
        code = "context_length_exceeded"  # it is none of the list, but what OpenAI sends and clients look for
    elif error.type == "invalid_request_error":
        code = "invalid_prompt"
    elif error.type == "rate_limit_error":
        code = "rate_limit_exceeded"
    else:
        code = "server_error"
    return ResponseFailure(code, error.message, error.type, as_told(error).param)
