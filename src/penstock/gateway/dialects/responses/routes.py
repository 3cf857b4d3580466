"""OpenAI's Responses, over the same jobs: docs/responses.md. Judged by the official SDKs unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.api.errors import Error, ErrorBody
from penstock.core.errors import (
    ExpiredResult,
    InvalidRequest,
    NotFound,
    PenstockError,
    PreviousResponseNotFound,
    RequestTooLarge,
    Unsupported,
)
from penstock.core.events import Completion, Event
from penstock.core.job import (
    Identifier,
    Job,
    MaxTokens,
    ModelName,
    OptionalIdentifier,
    Priority,
    Request,
    ResponseFormat,
    Sampling,
    Tool,
    TopLogprobs,
)
from penstock.gateway.dialects.fields import (
    MAX_TOOLS,
    ConstrainedBody,
    Count,
    Role,
    TextPart,
    ToolName,
    allowed_only,
    json_schema,
    structured,
    submission_of,
)
from penstock.gateway.dialects.responses.answers import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ContentPartEvent,
    InputItems,
    OutputItemEvent,
    ResponseDeleted,
    ResponseErrorEvent,
    ResponseEvent,
    ResponseInputTokens,
    ResponseView,
    TextDeltaEvent,
    TextDoneEvent,
)
from penstock.gateway.dialects.responses.items import (
    Item,
    View,
    as_told,
    ended_status,
    flat,
    input_items,
    job_id,
    messages,
    output_items,
    owner,
    response_id,
    response_object,
    status_of,
    view_of,
)
from penstock.gateway.dialects.responses.stream import last_number, render, whole
from penstock.gateway.http import Call, Dialect, error_reply, json_reply
from penstock.gateway.jobs import Jobs, Submission
from penstock.gateway.operation import REFERENCE_GONE, Batchable, Content, Operation, Prepared
from penstock.gateway.parameters import ID, LAST_EVENT_ID, ORDER, limit, query
from penstock.gateway.readers import Following
from penstock.gateway.sse import EventStream, stream_of

LOGPROBS = "message.output_text.logprobs"
#: Seconds for which a reply that is not stored can be fetched again when its reader was cut off.
UNSTORED_KEEP = 60.0


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
            f"Items of type {kind!r} are not supported: message, function_call, function_call_output and "
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

    def view(self) -> dict[str, Any]:
        if self.type == "namespace":
            inner = [tool.view() for tool in self.tools or ()]
            return {"type": "namespace", "name": self.name, "description": self.description, "tools": inner}
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict is not False,
        }


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

    def view(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "schema": self.schema,
            "strict": self.strict is not False,
        }


class TextConfig(msgspec.Struct, frozen=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None


class CreateResponse(ConstrainedBody, kw_only=True, frozen=True):
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
        return structured(
            request,
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
                format=form.view() if form is not None else {},
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
        if self.reasoning is not None and self.reasoning.effort not in (None, "none"):
            raise Unsupported("reasoning.effort is not supported: leave it out.", param="reasoning.effort")
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


# ---------------------------------------------------------------------------------------------- routes


async def create(call: Call) -> ASGIApp:
    body = await call.body(CreateResponse)
    job = await _submit(call, body)
    view = _view(job)
    after = _after(call)
    if body.stream:
        if after >= 0:
            job = await call.jobs.get(job.id)  # it may be another's: how far is it?
        following = call.jobs.follow(job)
        if view.background or after >= 0:
            return _stream(call, following, view, after)
        return await call.jobs.stream(following, lambda events: _blocks(call, job, view, events, after))
    headers = {"x-penstock-job": job.id}
    if view.background:
        return json_reply(await _object(call, job, view), headers=headers)
    completion = await call.jobs.fold(job, call.gone)
    answer = whole(job, view, completion, await _ended_at(call, job))
    await _delivered(call, job, view)
    return json_reply(answer, headers=headers)


def _refuse(request_id: str, error: PenstockError, headers: dict[str, str] | None) -> Response:
    return error_reply(error, headers, ErrorBody(Error.of(as_told(error.info))))


RESPONSES = Dialect(ErrorBody, _refuse)


async def _submit(call: Call, body: CreateResponse) -> Job:
    """The job of a request; of a repeated one the first's, though what it refers to may be gone by now."""
    submission = _submission(call, body)
    try:
        items = await conversation(call.jobs, body)
    except REFERENCE_GONE:
        if (known := await call.jobs.repeated(submission)) is None:
            raise
        return known
    request = body.request(items, call.config.default_max_tokens)
    return await call.jobs.submit(request, msgspec.structs.replace(submission, view=body.view(items)))


async def retrieve(call: Call) -> ASGIApp:
    """The response as it is, or (``?stream=true``) its events, from the first or beyond ``starting_after``."""
    job, view = await _find(call.jobs, call.path["id"])
    stream = call.query.get("stream", "false")
    if stream not in ("true", "false"):
        raise InvalidRequest("stream is true or false.", param="stream")
    if stream == "false":
        return json_reply(await _object(call, job, view), headers={"x-penstock-job": job.id})
    after = _after(call)
    if job.status.terminal and "last-event-id" in call.headers:
        events = call.jobs.log(job.id)
        if after == await last_number(job, view, events):
            return Response(status_code=204)  # everything was delivered: tells an EventSource to stop
    if call.is_head:
        return EventStream(call.streams, stream_of(), headers={"x-penstock-job": job.id})
    return _stream(call, call.jobs.follow(job), view, after)


async def cancel(call: Call) -> ASGIApp:
    job, view = await _find(call.jobs, call.path["id"])
    if not view.background:
        raise InvalidRequest("Cannot cancel a synchronous response: close its connection.", param="response_id")
    if not job.status.terminal:
        job = await call.jobs.cancel(job.id)
    return json_reply(await _object(call, job, view), headers={"x-penstock-job": job.id})


async def count_input_tokens(call: Call) -> ASGIApp:
    body = await call.body(CountInputTokens)
    model = body.model or call.catalogue.default_for("tokenize")
    items = await conversation(call.jobs, body)
    request = msgspec.structs.replace(body, model=model).request(items, call.config.default_max_tokens)
    found = await call.tokens_of(msgspec.structs.replace(request, task="tokenize", sampling=Sampling()))
    return json_reply({"object": "response.input_tokens", "input_tokens": len(found.tokens)})


async def compact(call: Call) -> ASGIApp:
    raise NotFound("There is no compaction here: leave old items out of the input.")


async def delete(call: Call) -> ASGIApp:
    """Drop a response and its job, now; one that runs is cancelled."""
    job, _ = await _find(call.jobs, call.path["id"])
    await call.jobs.forget(job.id)
    return json_reply({"id": response_id(job.id), "object": "response", "deleted": True})


async def list_input_items(call: Call) -> ASGIApp:
    job, view = await _find(call.jobs, call.path["id"])
    order, limit, after = call.query.get("order", "desc"), call.query.get("limit", "20"), call.query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order is asc or desc.", param="order")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= 100):
        raise InvalidRequest("limit is between 1 and 100.", param="limit")
    items = input_items(job, view)
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((place for place, item in enumerate(items) if item.id == after), None)
        if place is None:
            raise InvalidRequest(f"The response has no input item {after!r}.", param="after")
        items = items[place + 1 :]
    page = items[: int(limit)]
    return json_reply(
        {
            "object": "list",
            "data": [item.view() for item in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(items) > len(page),
        }
    )


# ---------------------------------------------------------------------------------------------- requests


async def _prepare(jobs: Jobs, body: CreateResponse) -> Prepared:
    if body.background:
        raise InvalidRequest("A line of a batch runs in the background anyway.", param="background")
    items = await conversation(jobs, body)
    return Prepared(
        body.request(items, jobs.config.default_max_tokens),
        msgspec.structs.replace(body, store=False).view(items),  # results are in the batch's files only
    )


def _write(jobs: Jobs, body: CreateResponse, job: Job, completion: Completion) -> Any:
    return whole(job, _view(job), completion, job.ended_at or jobs.catalogue.now())


def _submission(call: Call, body: CreateResponse) -> Submission:
    """Everything of a response's job but the request itself and its view."""
    submission = submission_of(
        call,
        body,
        user=body.user_id or body.user or body.safety_identifier,
        on_disconnect="continue" if body.background else "cancel",
        priority=Priority.BATCH if body.service_tier == "flex" else Priority.NORMAL,
    )
    keep = None if body.stored else UNSTORED_KEEP
    return msgspec.structs.replace(submission, keep=keep)


async def conversation(jobs: Jobs, body: CreateResponse) -> tuple[Item, ...]:
    """The whole input of a request: that of the response before it, its output, and what is new.

    Raises `RequestTooLarge` where that, written out, would be no body that is taken: a few bytes can refer to much.
    """
    room = jobs.config.max_body
    items: list[Item] = []
    if body.previous_response_id is not None:
        items = await _before(jobs, body.previous_response_id)
    given = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input or []
    references = [item.reference for item in given if item.reference is not None]
    referenced = await _referenced(jobs, references, room)
    items += [
        item.plain(place) if item.reference is None else referenced[item.reference] for place, item in enumerate(given)
    ]
    known: set[str] = set()
    for item in items:
        if item.id and item.id in known:  # nor could a list of them be paged
            raise InvalidRequest(f"There are two items with the id {item.id[:100]!r}: leave one out.", param="input")
        known.add(item.id)
    if (body.previous_response_id is not None or references) and _size(items) > room:
        raise _too_large(room)
    return tuple(items)


def _size(items: Iterable[Item]) -> int:
    return sum(len(msgspec.json.encode(item)) for item in items)


def _too_large(room: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"The conversation is larger than {room} bytes with all that it refers to: leave old items out of it.",
        param="input",
    )


async def _before(jobs: Jobs, previous: str) -> list[Item]:
    """The conversation up to the end of an earlier response."""
    try:
        job, view = await _find(jobs, previous)
    except NotFound as error:
        gone = " Its retention is over." if isinstance(error, ExpiredResult) else ""
        raise PreviousResponseNotFound(
            f"Previous response with id {previous!r} not found.{gone}", param="previous_response_id"
        ) from error
    completion = await jobs.completion(job) if job.status.terminal else None
    status = ended_status(completion.ended) if completion is not None and completion.ended is not None else None
    if completion is None or status not in ("completed", "incomplete"):
        raise InvalidRequest(
            f"Previous response with id {previous!r} is {status or 'not completed yet'}: only one that has an output "
            "can be continued.",
            param="previous_response_id",
        )
    return [*input_items(job, view), *output_items(whole(job, view, completion, None)["output"])]


async def _referenced(jobs: Jobs, references: Iterable[str], room: int) -> dict[str, Item]:
    """Items by their ids, of *room* bytes together at most; each response that has some of them is read once."""
    wanted: dict[str | None, dict[str, None]] = {}
    for reference in references:
        wanted.setdefault(owner(reference), {})[reference] = None
    found: dict[str, Item] = {}
    size = 0
    for job, ids in wanted.items():
        items = await _items(jobs, job) if job is not None else {}
        if (missing := next((id for id in ids if id not in items), None)) is not None:
            raise NotFound(
                f"Item with id {missing!r} not found. Items are kept with responses that are stored: send the item "
                "itself.",
                param="input",
            )
        found |= {id: items[id] for id in ids}
        if (size := size + _size(items[id] for id in ids)) > room:
            raise _too_large(room)
    return found


async def _items(jobs: Jobs, job: str) -> dict[str, Item]:
    """What a stored response has of items, by their ids; nothing if there is none."""
    try:
        found, view = await _find(jobs, response_id(job))
        items = input_items(found, view)
        if found.status.terminal:
            items += output_items(whole(found, view, await jobs.completion(found), None)["output"])
    except NotFound:
        return {}
    return {item.id: item for item in items}


# ---------------------------------------------------------------------------------------------- replies


async def _find(jobs: Jobs, response: str) -> tuple[Job, View]:
    """A stored response's job and view. Raises `NotFound`, `ExpiredResult`."""
    missing = NotFound(f"Response with id {response!r} not found.", param="response_id")
    if (job := job_id(response)) is None:
        raise missing
    try:
        found = await jobs.get(job)
    except ExpiredResult:
        raise ExpiredResult(f"Response with id {response!r}: its retention is over.", param="response_id") from None
    except NotFound:
        raise missing from None
    view = view_of(found)
    if view is None or not view.store:
        raise missing
    return found, view


async def _object(call: Call, job: Job, view: View) -> dict[str, Any]:
    """A response as it is now."""
    if not job.status.terminal:
        return response_object(job, view, status_of(job))
    return whole(job, view, await call.jobs.completion(job), job.ended_at)


def _view(job: Job) -> View:
    view = view_of(job)
    assert view is not None
    return view


async def _ended_at(call: Call, job: Job) -> float | None:
    """When *job* ended, which its log does not say."""
    try:
        return (await call.jobs.get(job.id)).ended_at
    except PenstockError:  # it has gone, or the store has: nobody can ask again
        return call.catalogue.now()


async def _delivered(call: Call, job: Job, view: View) -> None:
    """Forget what was not to be stored."""
    if not view.store:
        with contextlib.suppress(PenstockError):  # its retention does it in a moment
            await call.jobs.forget(job.id)


def _stream(call: Call, following: Following, view: View, after: int) -> EventStream:
    """The events of a response as they are, whatever becomes of it."""
    return EventStream(
        call.streams,
        _blocks(call, following.job, view, aiter(following), after),
        headers={"x-penstock-job": following.job.id},
        on_close=following.close,
    )


async def _blocks(call: Call, job: Job, view: View, events: AsyncIterator[Event], after: int) -> AsyncIterator[bytes]:
    async for block in render(job, view, events, lambda: _ended_at(call, job), after):
        yield block
    await _delivered(call, job, view)  # whoever asks for more has been given everything


def _after(call: Call) -> int:
    """The number of the last event that was seen; -1 if none was: ``Last-Event-ID``, or ``?starting_after=``."""
    text = call.headers.get("last-event-id") or call.query.get("starting_after") or ""
    if text == "":
        return -1
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise InvalidRequest(
            "starting_after (or Last-Event-ID) is a sequence_number: a whole number from 0.", param="starting_after"
        )
    return int(text)


_EVENTS: dict[str, type] = {
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

OPERATIONS = [
    Operation(
        method="POST",
        path="/v1/responses",
        handler=create,
        summary="OpenAI responses; in the background, too",
        body=CreateResponse,
        answers={200: ResponseView},
        events=_EVENTS,
        dialect=RESPONSES,
        generates=True,
        batch=Batchable(CreateResponse, _prepare, _write),
    ),
    Operation(
        method="POST",
        path="/v1/responses/compact",
        handler=compact,
        summary="Not offered",
        answers={404: ErrorBody},
        dialect=RESPONSES,
    ),
    Operation(
        method="POST",
        path="/v1/responses/input_tokens",
        handler=count_input_tokens,
        summary="How many tokens a response's input has",
        body=CountInputTokens,
        answers={200: ResponseInputTokens},
        dialect=RESPONSES,
    ),
    Operation(
        method="GET",
        path="/v1/responses/{id}",
        handler=retrieve,
        summary="A response as it is, or its events; resumable",
        answers={200: ResponseView, 204: Content(description="Everything was delivered already")},
        events=_EVENTS,
        parameters=[
            *ID,
            {"name": "stream", "in": "query", "schema": {"type": "string", "enum": ["true", "false"]}},
            *query(starting_after="integer"),
            LAST_EVENT_ID,
        ],
        dialect=RESPONSES,
    ),
    Operation(
        method="DELETE",
        path="/v1/responses/{id}",
        handler=delete,
        summary="Drop a response; one that runs is cancelled",
        answers={200: ResponseDeleted},
        parameters=ID,
        dialect=RESPONSES,
    ),
    Operation(
        method="POST",
        path="/v1/responses/{id}/cancel",
        handler=cancel,
        summary="Cancel a background response; idempotent",
        answers={200: ResponseView},
        parameters=ID,
        dialect=RESPONSES,
    ),
    Operation(
        method="GET",
        path="/v1/responses/{id}/input_items",
        handler=list_input_items,
        summary="The items that a response answers",
        answers={200: InputItems},
        parameters=[*ID, ORDER, limit(100), *query(after="string")],
        dialect=RESPONSES,
    ),
]
