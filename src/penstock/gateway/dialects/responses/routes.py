"""OpenAI's Responses, over the same jobs: docs/responses.md. Judged by the official SDKs unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.api.errors import ErrorBody
from penstock.core.errors import (
    InvalidRequest,
    NotFound,
    PenstockError,
)
from penstock.core.events import Completion, Event
from penstock.core.job import (
    Job,
    Priority,
    Sampling,
)
from penstock.gateway.dialects.answers import ends
from penstock.gateway.dialects.fields import (
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
from penstock.gateway.dialects.responses.bodies import CountInputTokens, CreateResponse
from penstock.gateway.dialects.responses.conversation import conversation, find
from penstock.gateway.dialects.responses.items import (
    View,
    as_told,
    input_items,
    response_id,
    response_object,
    status_of,
    view_of,
)
from penstock.gateway.dialects.responses.stream import last_number, render, whole
from penstock.gateway.http import Call, Dialect, error_reply, json_reply, whole_number
from penstock.gateway.jobs import Jobs, Submission
from penstock.gateway.operation import REFERENCE_GONE, Batchable, Content, Operation, Prepared
from penstock.gateway.parameters import ID, LAST_EVENT_ID, ORDER, limit, query
from penstock.gateway.readers import Following
from penstock.gateway.sse import EventStream, stream_of

#: Seconds for which a reply that is not stored can be fetched again when its reader was cut off.
UNSTORED_RETENTION = 60.0


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
    completion = await call.jobs.fold(job, call.disconnected)
    answer = whole(job, view, completion, await _ended_at(call, job))
    await _delivered(call, job, view)
    return json_reply(answer, headers=headers)


def _refuse(request_id: str, error: PenstockError, headers: dict[str, str] | None) -> Response:
    return error_reply(error, headers, ErrorBody.of(as_told(error.info)))


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
    job, view = await find(call.jobs, call.path["id"])
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
    job, view = await find(call.jobs, call.path["id"])
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
    return json_reply(ResponseInputTokens("response.input_tokens", len(found.tokens)))


async def compact(call: Call) -> ASGIApp:
    raise NotFound("There is no compaction here: leave old items out of the input.")


async def delete(call: Call) -> ASGIApp:
    """Drop a response and its job, now; one that runs is cancelled."""
    job, _ = await find(call.jobs, call.path["id"])
    await call.jobs.forget(job.id)
    return json_reply(ResponseDeleted(response_id(job.id), "response", True))


async def list_input_items(call: Call) -> ASGIApp:
    job, view = await find(call.jobs, call.path["id"])
    order, after = call.query.get("order", "desc"), call.query.get("after")
    limit = whole_number(call.query.get("limit", "20"), digits=3)
    if order not in ("asc", "desc"):
        raise InvalidRequest("order is asc or desc.", param="order")
    if limit is None or not 1 <= limit <= 100:
        raise InvalidRequest("limit is between 1 and 100.", param="limit")
    items = input_items(job, view)
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((place for place, item in enumerate(items) if item.id == after), None)
        if place is None:
            raise InvalidRequest(f"The response has no input item {after!r}.", param="after")
        items = items[place + 1 :]
    page = items[:limit]
    views = [item.view() for item in page]
    return json_reply(InputItems("list", views, *ends(views), len(items) > len(page)))


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
    return msgspec.structs.replace(submission, retain_for=None if body.stored else UNSTORED_RETENTION)


# ---------------------------------------------------------------------------------------------- replies


async def _object(call: Call, job: Job, view: View) -> ResponseView:
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
    number = whole_number(text, digits=15)
    if number is None:
        raise InvalidRequest(
            "starting_after (or Last-Event-ID) is a sequence_number: a whole number from 0.", param="starting_after"
        )
    return number


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
        "POST",
        "/v1/responses",
        create,
        "OpenAI responses; in the background, too",
        body=CreateResponse,
        answers={200: ResponseView},
        events=_EVENTS,
        dialect=RESPONSES,
        generates=True,
        batch=Batchable(CreateResponse, _prepare, _write),
    ),
    Operation("POST", "/v1/responses/compact", compact, "Not offered", answers={404: ErrorBody}, dialect=RESPONSES),
    Operation(
        "POST",
        "/v1/responses/input_tokens",
        count_input_tokens,
        "How many tokens a response's input has",
        body=CountInputTokens,
        answers={200: ResponseInputTokens},
        dialect=RESPONSES,
    ),
    Operation(
        "GET",
        "/v1/responses/{id}",
        retrieve,
        "A response as it is, or its events; resumable",
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
        "DELETE",
        "/v1/responses/{id}",
        delete,
        "Drop a response; one that runs is cancelled",
        answers={200: ResponseDeleted},
        parameters=ID,
        dialect=RESPONSES,
    ),
    Operation(
        "POST",
        "/v1/responses/{id}/cancel",
        cancel,
        "Cancel a background response; idempotent",
        answers={200: ResponseView},
        parameters=ID,
        dialect=RESPONSES,
    ),
    Operation(
        "GET",
        "/v1/responses/{id}/input_items",
        list_input_items,
        "The items that a response answers",
        answers={200: InputItems},
        parameters=[*ID, ORDER, limit(100), *query(after="string")],
        dialect=RESPONSES,
    ),
]
