"""Anthropic's Messages, over the same jobs. Judged by the official SDK unchanged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.core.errors import (
    STATUS_OF_CODE,
    ContextLengthExceeded,
    ErrorInfo,
    InvalidRequest,
    LogRewound,
    NotFound,
    PenstockError,
    Unsupported,
)
from penstock.core.events import Ended, Event
from penstock.core.job import (
    Identifier,
    Job,
    MaxTokens,
    Message,
    ModelName,
    Priority,
    Request,
    StopString,
    Tool,
    ToolCall,
)
from penstock.core.tools import CallDelta, Piece, ToolParser, call_id
from penstock.gateway.dialects.anthropic.answers import (
    BlockDeltaEvent,
    BlockStartEvent,
    BlockStopEvent,
    InputTokens,
    MessageDeltaEvent,
    MessageErrorBody,
    MessageModel,
    MessageModelList,
    MessageStartEvent,
    MessageStopEvent,
    MessageView,
)
from penstock.gateway.dialects.fields import MAX_TOOLS, JobBody, json_schema, not_text, stops, structured, submission_of
from penstock.gateway.http import Call, Dialect, error_reply, json_reply
from penstock.gateway.operation import Operation
from penstock.gateway.sse import frame

#: Anthropic's names of tools are longer than OpenAI's.
ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
#: Blocks of an assistant's turn that have no part in what is said.
THOUGHTS = ("thinking", "redacted_thinking")
UserId = Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
#: As ours, but that the ``user_id`` may be null.
NullableMetadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)] | None], Meta(max_length=16)
]


class Block(msgspec.Struct, frozen=True):
    """A content block: ``text``, ``tool_use`` with the call that an earlier reply made, or its ``tool_result``.

    What an earlier reply thought (``thinking``, ``redacted_thinking``) is let be. Whatever else a block may carry
    (``cache_control``, ``citations``, ``caller``) makes no difference here.
    """

    type: str
    text: str | None = None
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


class OutputFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: OutputFormat | None = None
    effort: str | None = None


class CountTokens(JobBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/messages/count_tokens``, and what it shares with that of ``POST /v1/messages``.

    What Anthropic has and this server cannot honour is refused, not dropped.
    """

    model: ModelName
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=4096)]
    system: str | list[Block] | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    context_management: dict[str, Any] | UnsetType = UNSET
    """What may be left out of a long conversation. Nothing is."""
    thread: dict[str, Any] | None = None

    def conversation(self) -> Request:
        """The conversation as a request, without how to sample."""
        if self.thread is not None:
            raise Unsupported("Threads are not kept here: leave thread out, and send all messages.", param="thread")
        if self.thinking is not None and self.thinking.get("type") not in ("disabled", "adaptive"):
            raise Unsupported("Thinking is not supported: leave it out, or disable it.", param="thinking")
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
            Request(model=self.model, messages=tuple(messages), continue_final=prefilled),
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
                    messages[-1] = Message(last.role, f"{last.content}\n\n{message.content}")
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
        if texts or calls:
            yield Message("assistant", _text(texts, where), tuple(calls))
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


# ---------------------------------------------------------------------------------------------- routes


async def messages(call: Call) -> ASGIApp:
    body = await call.body(CreateMessage)
    metadata = {name: value for name, value in (body.metadata or {}).items() if value is not None}
    user = metadata.get("user_id")
    submission = submission_of(
        call,
        msgspec.structs.replace(body, metadata=metadata),
        user=body.user_id or (_user(user) if user else None),
        on_disconnect="cancel",
    )
    job = await call.jobs.submit(body.request(), submission)
    headers = {"request-id": call.request_id}
    if body.stream:
        after = call.last_event_id or 0
        writer = MessageWriter(
            job,
            call.request_id,
            after=after,
            look=partial(call.jobs.get, job.id),
            replay=partial(call.jobs.log, job.id),
        )
        return await call.jobs.stream(call.jobs.follow(job, after), writer.render, headers)
    completion = await call.jobs.fold(job, call.gone)
    assert completion.ended is not None
    return json_reply(reply(job, completion.texts[0], completion.ended), headers={"x-penstock-job": job.id, **headers})


async def count_tokens(call: Call) -> ASGIApp:
    body = await call.body(CountTokens)
    found = await call.tokens_of(msgspec.structs.replace(body.conversation(), task="tokenize"))
    return json_reply({"input_tokens": len(found.tokens)}, headers={"request-id": call.request_id})


def _user(text: str) -> str:
    try:
        return msgspec.convert(text, UserId)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"metadata.user_id: {error}", param="metadata.user_id") from error


# ---------------------------------------------------------------------------------------------- replies


class Blocks:
    """Cuts a reply into content blocks as it comes, told as Anthropic's events: a text, a call, a text behind it, …"""

    def __init__(self, job: Job) -> None:
        self._job = job.id
        self._parser = ToolParser(job.request) if job.request.callable_tools else None
        self._index = -1
        self._open: str | int | None = None
        """What the latest block is: "text" or the number of a call; None before the first and behind the last one."""

    def push(self, text: str) -> Iterator[dict[str, Any]]:
        yield from self._take([text] if self._parser is None else self._parser.push(text))

    def finish(self) -> Iterator[dict[str, Any]]:
        """What was held back, and the end of the last block."""
        yield from self._take([] if self._parser is None else self._parser.finish())
        yield from self._close()

    def _take(self, pieces: Iterable[Piece]) -> Iterator[dict[str, Any]]:
        for piece in pieces:
            if isinstance(piece, CallDelta):
                if piece.index != self._open:
                    id = call_id(self._job, 0, piece.index).replace("call_", "toolu_")
                    caller = {"type": "direct"}
                    block = {"type": "tool_use", "id": id, "name": piece.name, "input": {}, "caller": caller}
                    yield from self._begin(piece.index, block)
                if piece.arguments:
                    yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
            elif piece:
                if self._open != "text":
                    # Anthropic's own description wants the citations, and some clients want no null there.
                    yield from self._begin("text", {"type": "text", "text": "", "citations": []})
                yield self._delta({"type": "text_delta", "text": piece})

    def _begin(self, what: str | int, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._index += 1
        self._open = what
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}


class MessageWriter:
    """Writes one job as Anthropic's stream: the last event of each run of tokens has their position as its ``id:``.

    *request_id* is told with errors. A reader who has seen all *after* gets what comes behind it.
    """

    def __init__(
        self,
        job: Job,
        request_id: str,
        *,
        after: int,
        look: Callable[[], Awaitable[Job]],
        replay: Callable[[], AsyncIterator[Event]],
    ) -> None:
        """*look* gives the job as it stands, *replay* its log from the beginning."""
        self._job = job
        self._request_id = request_id
        self._after = after
        self._look = look
        self._replay = replay
        self._blocks = Blocks(job)

    async def render(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        retry = b"retry: 1000\n"
        opening: list[dict[str, Any]] | None = None
        try:
            async for event in events:
                if opening is None:
                    opening = await self._opening(event)
                if isinstance(event, Ended):
                    yield retry + self._end(event, opening)
                    return
                run = [*opening, *self._blocks.push("".join(event.texts))]
                opening = []
                if run:
                    yield retry + _frames(run, event.last)
                    retry = b""
        except LogRewound as error:  # the store lost what this reader was given
            yield retry + frame("error", _error(error.info, error.status, self._request_id))

    async def _opening(self, first: Event) -> list[dict[str, Any]]:
        """The event before the first block. A reader who has seen it is taken to where it was instead."""
        if self._after:
            events = self._replay()
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, Ended) or event.position > self._after:
                        break
                    for _ in self._blocks.push("".join(event.texts[: self._after - event.position + 1])):
                        pass  # it was told already
                    if event.last >= self._after:
                        break
            return []
        message = _message(self._job, [], None, _usage(self._job, await self._input_tokens(first), 0))
        return [{"type": "message_start", "message": message}]

    async def _input_tokens(self, first: Event) -> int:
        """What the engine counted, as far as it is known: the end says it for certain."""
        if isinstance(first, Ended):
            return first.usage.prompt_tokens
        with contextlib.suppress(PenstockError):
            return (await self._look()).prompt_tokens or 0
        return 0

    def _end(self, ended: Ended, opening: list[dict[str, Any]]) -> bytes:
        if ended.error is not None:
            status = STATUS_OF_CODE.get(ended.error.code or "", 500)
            return frame("error", _error(ended.error, status, self._request_id), ended.position)
        usage = _usage(self._job, ended.usage.prompt_tokens, ended.usage.completion_tokens)
        told = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens",
                "output_tokens_details", "server_tool_use")  # fmt: skip
        delta = {"type": "message_delta", "delta": _stop(ended), "usage": {name: usage[name] for name in told}}
        return _frames([*opening, *self._blocks.finish(), delta, {"type": "message_stop"}], ended.position)


def _frames(events: list[dict[str, Any]], position: int) -> bytes:
    *others, last = events
    return b"".join(frame(event["type"], event) for event in others) + frame(last["type"], last, position)


def reply(job: Job, text: str, ended: Ended) -> dict[str, Any]:
    """The message in one piece: a fold of its events."""
    blocks = Blocks(job)
    content: list[dict[str, Any]] = []
    parts: list[list[str]] = []
    for event in [*blocks.push(text), *blocks.finish()]:
        if event["type"] == "content_block_start":
            content.append(event["content_block"])
            parts.append([])
        elif event["type"] == "content_block_delta":
            parts[-1].append(event["delta"].get("text") or event["delta"].get("partial_json", ""))
    for block, texts in zip(content, parts, strict=True):
        if block["type"] == "text":
            block["text"] = "".join(texts)
        else:
            block["input"] = _arguments("".join(texts))
    usage = _usage(job, ended.usage.prompt_tokens, ended.usage.completion_tokens)
    return _message(job, content, ended, usage)


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; empty if ``max_tokens`` cut them: nobody shall take a part of them for the whole."""
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(text)
        if isinstance(arguments, dict):  # half a surrogate pair, which a model may write, is no text to send
            return dict(json.loads(json.dumps(arguments, ensure_ascii=False).encode(errors="replace")))
    return {}


def _message(job: Job, content: list[dict[str, Any]], ended: Ended | None, usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "msg_" + job.id.removeprefix("job_"),
        "type": "message",
        "role": "assistant",
        "model": job.request.model,
        "content": content,
        **_stop(ended),
        "usage": usage,
    }


_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


def _stop(ended: Ended | None) -> dict[str, Any]:
    """Why the message ends (None: it has not). A call is one, however its text ends."""
    reason = stop = None
    if ended is not None:
        stop = ended.stop() if ended.finish_reason == "stop" else None
        reason = _REASONS.get(ended.finish_reason or "", "end_turn" if stop is None else "stop_sequence")
    return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None, "container": None}


def _usage(job: Job, input_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cache_creation": None,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "inference_geo": None,
        "output_tokens_details": None,
        "server_tool_use": None,
        "service_tier": "batch" if job.priority is Priority.BATCH else "standard",
    }


# ---------------------------------------------------------------------------------------------- errors

_TYPES = {404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


def _error(error: ErrorInfo, status: int, request_id: str) -> dict[str, Any]:
    """A failure as Anthropic's clients know it: ours in an envelope, its ``type`` one of theirs."""
    kind = error.type if error.type != "server_error" else "api_error"
    told: dict[str, Any] = msgspec.to_builtins(error.shown) | {"type": _TYPES.get(status, kind)}
    if error.code == ContextLengthExceeded.code:  # by these words clients know it
        counted = (
            f"{error.tokens} tokens > {error.limit - 1} maximum" if error.tokens and error.limit else error.message
        )
        told["message"] = f"prompt is too long: {counted}"
    if error.param == "thread":  # by this the SDK's tool runner knows that it has to go on without one
        told["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": told, "request_id": request_id}


def _refuse(request_id: str, error: PenstockError, headers: dict[str, str] | None = None) -> Response:
    headers = {"request-id": request_id, **(headers or {})}
    return error_reply(error, headers, _error(error.info, error.status, request_id))


ANTHROPIC = Dialect(MessageErrorBody, _refuse)


# ---------------------------------------------------------------------------------------------- what is not ours


async def batches(call: Call) -> ASGIApp:
    raise NotFound("Message Batches are not offered: POST /v1/batches runs files of OpenAI's requests.")


# ---------------------------------------------------------------------------------------------- models


async def list_models(call: Call) -> ASGIApp:
    """A page of the models, by Anthropic's parameters: ``limit``, and ``after_id`` or ``before_id``."""
    limit, after, before = call.query.get("limit", "20"), call.query.get("after_id"), call.query.get("before_id")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= 1000):
        raise InvalidRequest("limit is between 1 and 1000.", param="limit")
    if after and before:
        raise InvalidRequest("A page begins after_id or ends before_id: send one of them.", param="before_id")
    names = call.catalogue.names
    for param, id in (("after_id", after), ("before_id", before)):
        if id and id not in names:
            raise InvalidRequest(f"There is no model {id[:100]!r}.", param=param)
    if before:
        rest = names[: names.index(before)]
        page = rest[-int(limit) :]
    else:
        rest = names[names.index(after) + 1 :] if after else names
        page = rest[: int(limit)]
    return json_reply(
        {
            "data": [_message_model(call, name) for name in page],
            "has_more": len(rest) > len(page),
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        },
        headers={"request-id": call.request_id},
    )


async def show_model(call: Call) -> ASGIApp:
    name = call.path["model"]
    call.catalogue.require(name)
    return json_reply(_message_model(call, name))


def _message_model(call: Call, name: str) -> dict[str, Any]:
    info = call.catalogue.info(name)
    created = datetime.fromtimestamp(int(call.catalogue.started_at), UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": info.context_length if info is not None and info.context_length else None,
    }


OPERATIONS = [
    Operation(
        method="POST",
        path="/v1/messages",
        handler=messages,
        summary="Anthropic Messages",
        body=CreateMessage,
        answers={200: MessageView},
        events={
            "message_start": MessageStartEvent,
            "content_block_start": BlockStartEvent,
            "content_block_delta": BlockDeltaEvent,
            "content_block_stop": BlockStopEvent,
            "message_delta": MessageDeltaEvent,
            "message_stop": MessageStopEvent,
            "error": MessageErrorBody,
        },
        dialect=ANTHROPIC,
        generates=True,
    ),
    Operation(
        method="POST",
        path="/v1/messages/count_tokens",
        handler=count_tokens,
        summary="How many tokens a message's input has",
        body=CountTokens,
        answers={200: InputTokens},
        dialect=ANTHROPIC,
    ),
    Operation(method="*", path="/v1/messages/batches{rest:path}", handler=batches, dialect=ANTHROPIC),
    Operation(
        method="GET",
        path="/v1/models",
        handler=list_models,
        summary="The models served, in pages",
        answers={200: MessageModelList},
        dialect=ANTHROPIC,
        header="anthropic-version",
    ),
    Operation(
        method="GET",
        path="/v1/models/{model:path}",
        handler=show_model,
        summary="One model",
        answers={200: MessageModel},
        dialect=ANTHROPIC,
        header="anthropic-version",
    ),
]
