"""Penstock's own API: submit, look, follow, cancel; ``/v1/generate`` in one call; one stream for all of a user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest, LogRewound, PenstockError
from penstock.core.events import Ended, Event, Tokens
from penstock.core.job import Job, ModelName, Request, Status, ToolCall, TopLogprobs, Usage
from penstock.core.ports import Query, elapsed
from penstock.core.tasks import vectors
from penstock.core.tools import named, parse_tool_calls
from penstock.gateway.dialects.fields import ChatMessages, StructuredBody, TokenIds, plain, submission
from penstock.gateway.dialects.native.answers import (
    Deleted,
    DoneEvent,
    ErrorEvent,
    Generated,
    JobCompleteEvent,
    JobPage,
    JobView,
    Submitted,
    TokenEvent,
    UserErrorEvent,
    UserTokenEvent,
)
from penstock.gateway.feed import Cursor, Rendering
from penstock.gateway.http import Call, json_reply
from penstock.gateway.operation import Content, Operation
from penstock.gateway.parameters import ID, RESUME, RESUME_AT, Parameters, limit, query
from penstock.gateway.sse import EventStream, ascii_json, frame, json_string, stream_of


class GenerateJob(StructuredBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/jobs``: a prompt (text or token ids) or messages, and how to sample."""

    model: ModelName | None = None
    prompt: str | TokenIds | None = None
    messages: ChatMessages | None = None
    logprobs: TopLogprobs | None = None

    def request(self, call: Call) -> Request:
        ids = self.prompt if isinstance(self.prompt, list) else None
        request = Request(
            model=self.model or call.catalogue.default,
            prompt=self.prompt if isinstance(self.prompt, str) else None,
            prompt_ids=tuple(ids) if ids is not None else None,
            messages=None if self.messages is None else plain(self.messages),
            sampling=self.sampling(max_tokens=64, temperature=0.7, logprobs=self.logprobs),
            n=self.n or 1,
        )
        return self.structured(request)


class Generate(GenerateJob, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/generate``."""

    stream: bool = False


# ---------------------------------------------------------------------------------------------- routes


async def submit(call: Call) -> ASGIApp:
    body = await call.body(GenerateJob)
    wish = submission(call, body, user=body.user_id, on_disconnect="continue")
    job = await call.jobs.submit(body.request(call), wish)
    return json_reply(
        {
            "id": job.id,
            "status": job.status,
            "position_in_queue": job.queue_position,
            "links": _links(job.id),
        },
        202,
        {"location": f"/v1/jobs/{job.id}"},
    )


async def show(call: Call) -> ASGIApp:
    return json_reply(await job_view(call, await call.jobs.get(call.path["id"])))


async def cancel(call: Call) -> ASGIApp:
    return json_reply(await job_view(call, await call.jobs.cancel(call.path["id"])))


async def forget(call: Call) -> ASGIApp:
    """Drop a job and everything of it, now instead of when its retention ends; one that runs is cancelled."""
    job = await call.jobs.get(call.path["id"])
    await call.jobs.forget(job.id)
    return json_reply({"id": job.id, "deleted": True})


async def list_jobs(call: Call) -> ASGIApp:
    query = call.query
    unknown = sorted(set(query) - {"status", "model", "user", "user_id", "cursor", "limit"})
    if unknown:
        raise InvalidRequest(f"Unknown query parameter {unknown[0]!r}.", param=unknown[0])
    try:
        status = tuple(Status(name) for name in query["status"].split(",")) if "status" in query else ()
        limit = int(query.get("limit", "50"))
    except ValueError as error:
        raise InvalidRequest(f"status is one of {', '.join(Status)}; limit is a number: {error}") from error
    if not 1 <= limit <= 500:
        raise InvalidRequest("limit is between 1 and 500.", param="limit")
    page = await call.jobs.page(
        Query(
            tenant=call.identity.tenant,
            user=query.get("user_id") or query.get("user"),
            status=status,
            model=query.get("model"),
            cursor=query.get("cursor"),
            limit=limit,
        )
    )
    return json_reply({"data": [_summary(job) for job in page.jobs], "next_cursor": page.cursor})


async def events(call: Call) -> ASGIApp:
    """The job's log as SSE, from the beginning or after a position."""
    after = call.last_event_id or 0
    job = await call.jobs.get(call.path["id"])
    if job.status.terminal and after == job.tokens + 1:
        return Response(status_code=204)  # everything was delivered: tells an EventSource to stop
    if call.is_head:
        return EventStream(call.streams, stream_of(), headers={"x-penstock-job": job.id})
    following = call.jobs.follow(job, after)
    try:
        first = await following.peek(0.02 if after else 0)
        if first is None and job.status.terminal:
            first = await following.peek(5)
    except LogRewound as error:
        await following.close(complete=True)
        return EventStream(call.streams, stream_of(_error_frame(job.id, job.status, error)))
    except BaseException:
        await following.close(complete=True)
        raise
    return EventStream(
        call.streams,
        render(job, aiter(following)),
        headers={"x-penstock-job": job.id},
        on_close=following.close,
    )


async def generate(call: Call) -> ASGIApp:
    body = await call.body(Generate)
    wish = submission(call, body, user=body.user_id, on_disconnect="cancel")
    job = await call.jobs.submit(body.request(call), wish)
    if body.stream:
        return await call.jobs.stream(call.jobs.follow(job, call.last_event_id or 0), partial(render, job))
    completion = await call.jobs.fold(job, call.gone)
    assert completion.ended is not None
    return json_reply(
        {
            "job_id": job.id,
            "model": job.request.model,
            "text": completion.texts[0],
            "texts": completion.texts if job.request.n > 1 else None,
            **_tool_calls(job, completion.texts),
            "finish_reason": completion.ended.finish_reason,
            "usage": usage_view(completion.ended.usage),
        },
        headers={"x-penstock-job": job.id},
    )


async def user_events(call: Call) -> ASGIApp:
    """All of one user's jobs over one connection."""
    user = call.query.get("user_id")
    if not user:
        raise InvalidRequest("Say whose jobs: ?user_id=…", param="user_id")
    text = call.headers.get("last-event-id") or call.query.get("after")
    cursor = Cursor.parse(text) if text else None
    writing = Rendering(feed_frames, complete_frame, rewound_frame)
    return EventStream(call.streams, call.jobs.feed(user, cursor, writing))


# ---------------------------------------------------------------------------------------------- rendering


async def render(job: Job, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    """A job's events as ``token``…, then ``done`` or ``error``; the first block carries ``retry:``."""
    retry = b"retry: 1000\n"
    try:
        async for event in events:
            yield retry + (token_frames(job.id, event) if isinstance(event, Tokens) else end_frame(job.id, event))
            retry = b""
    except LogRewound as error:  # the store lost what this reader was given
        yield retry + _error_frame(job.id, job.status, error)


def token_frames(job: str, run: Tokens) -> bytes:
    """One ``token`` block per token. Written by hand: this is the hottest line of the gateway."""
    head = f'\nevent: token\ndata: {{"job_id":"{job}","token":'
    attempt = f',"attempt":{run.attempt}'
    return "".join(
        f'id: {position}{head}{json_string(text)},"token_id":{token}{attempt}{extra}}}\n\n'
        for position, (token, text, extra) in enumerate(
            zip(run.ids, run.texts, _extras(run), strict=True), run.position
        )
    ).encode()


def _numbered(run: Tokens) -> Iterator[tuple[int, int, str, str]]:
    return zip(count(run.position), run.ids, run.texts, _extras(run), strict=False)


def _extras(run: Tokens) -> list[str]:
    """What a token's data has only on request: its choice (n > 1) and its log-probability."""
    if run.choices is None and run.logprobs is None:
        return [""] * len(run.ids)
    extras = []
    for i in range(len(run.ids)):
        extra = f',"index":{run.choices[i]}' if run.choices is not None else ""
        logprob = run.logprobs[i] if run.logprobs is not None else None
        if logprob is not None:
            top = [{"token": other.text, "token_id": other.id, "logprob": other.logprob} for other in logprob.top]
            extra += f',"logprob":{logprob.logprob},"top_logprobs":{ascii_json(top)}'
        extras.append(extra)
    return extras


def end_frame(job: str, ended: Ended) -> bytes:
    if ended.error is not None:
        return frame("error", {"job_id": job, "status": ended.status, "error": ended.error.shown}, ended.position)
    return frame("done", _end_view(job, ended), ended.position)


def feed_frames(job: str, run: Tokens, cursor: Callable[[int], str]) -> bytes:
    """Of the multiplexed stream: the position is in the data, the id is the cursor."""
    head = f'\nevent: token\ndata: {{"job_id":"{job}","attempt":{run.attempt},"token":'
    return "".join(
        f'id: {cursor(position)}{head}{json_string(text)},"token_id":{token},"position":{position}{extra}}}\n\n'
        for position, token, text, extra in _numbered(run)
    ).encode()


def rewound_frame(job: str, error: PenstockError, cursor: str) -> bytes:
    return frame("error", {"job_id": job, "error": error.info}, cursor)


def complete_frame(job: str, ended: Ended, cursor: str) -> bytes:
    return frame("job_complete", {**_end_view(job, ended), "error": ended.error and ended.error.shown}, cursor)


def _error_frame(job: str, status: Status, error: PenstockError) -> bytes:
    return frame("error", {"job_id": job, "status": status, "error": error.info})


def _end_view(job: str, ended: Ended) -> dict[str, Any]:
    view: dict[str, Any] = {
        "job_id": job,
        "status": ended.status,
        "finish_reason": ended.finish_reason,
        "usage": usage_view(ended.usage),
    }
    if len(ended.finish_reasons) > 1:
        view["finish_reasons"] = ended.finish_reasons
    return view


def usage_view(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def _links(job: str) -> dict[str, str]:
    return {"self": f"/v1/jobs/{job}", "events": f"/v1/jobs/{job}/events", "cancel": f"/v1/jobs/{job}/cancel"}


def _summary(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.status,
        "model": job.request.model,
        "user_id": job.user,
        "priority": job.priority.name.lower(),
        "position_in_queue": job.queue_position,
        "attempt": job.attempt,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "deadline_at": job.deadline_at,
        "request_id": job.request_id,
        "metadata": job.metadata,
        "tokens": job.tokens,
        "finish_reason": job.finish_reasons[0] if job.finish_reasons else None,
        "error": job.error and job.error.shown,
        "links": _links(job.id),
    }


async def job_view(call: Call, job: Job) -> dict[str, Any]:
    """A job as JSON; an ended one with its result, usage and timings."""
    view = _summary(job)
    if not job.status.terminal:
        return view
    completion = await call.jobs.completion(job)
    assert completion.ended is not None
    if job.request.task == "embed":
        view["result"] = {"text": "", "embeddings": vectors(completion)}
    else:
        view["result"] = {"text": completion.texts[0], **_tool_calls(job, completion.texts)}
    if job.request.n > 1:
        view["result"]["texts"] = completion.texts
        view["finish_reasons"] = job.finish_reasons
    view["usage"] = usage_view(completion.ended.usage)
    view["timings"] = timings(job)
    return view


def _tool_calls(job: Job, texts: list[str]) -> dict[str, Any]:
    """The calls that the first choice's text has, where there were tools to call."""
    if not job.request.callable_tools:
        return {}
    _, calls = parse_tool_calls(texts[0], job.request)
    return {"tool_calls": [tool_call_view(call) for call in named(calls, job.id, 0)]}


def tool_call_view(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def timings(job: Job) -> dict[str, float | int | None]:
    """Durations in seconds, of a job that has ended."""
    assert job.ended_at is not None
    processing = elapsed(job.started_at, job.ended_at) if job.started_at is not None else None
    return {
        "queue_wait_time": elapsed(job.created_at, job.started_at or job.ended_at),
        "processing_time": processing,
        "total_time": elapsed(job.created_at, job.ended_at),
        "time_to_first_token": None if job.first_token_at is None else elapsed(job.created_at, job.first_token_at),
        "prompt_tokens": job.prompt_tokens or 0,
        "completion_tokens": job.tokens,
        "tokens_per_second": job.tokens / processing if processing else None,
    }


_STATUS = "|".join(Status)
_JOB_EVENTS: dict[str, type] = {"token": TokenEvent, "done": DoneEvent, "error": ErrorEvent}
_OF_USER: Parameters = [
    {"name": "user_id", "in": "query", "required": True, "schema": {"type": "string"}},
    *RESUME,
]


def of_user(path: str) -> Operation:
    """All jobs of a user as one stream, at *path*."""
    return Operation(
        method="GET",
        path=path,
        handler=user_events,
        summary="All jobs of a user over one SSE stream; resumable",
        events={"token": UserTokenEvent, "job_complete": JobCompleteEvent, "error": UserErrorEvent},
        parameters=_OF_USER,
    )


OPERATIONS = [
    Operation(
        method="POST",
        path="/v1/jobs",
        handler=submit,
        summary="Submit a job; never waits",
        body=GenerateJob,
        answers={202: Submitted},
    ),
    Operation(
        method="GET",
        path="/v1/jobs",
        handler=list_jobs,
        summary="List jobs, newest first",
        answers={200: JobPage},
        parameters=[
            {"name": "status", "in": "query", "schema": {"type": "string", "pattern": f"^({_STATUS})(,({_STATUS}))*$"}},
            *query(model="string", user_id="string", cursor="string"),
            limit(500),
        ],
    ),
    Operation(
        method="GET",
        path="/v1/jobs/{id}",
        handler=show,
        summary="A job, with its result once it has ended",
        answers={200: JobView},
        parameters=ID,
    ),
    Operation(
        method="DELETE",
        path="/v1/jobs/{id}",
        handler=forget,
        summary="Drop a job and its result; one that runs is cancelled",
        answers={200: Deleted},
        parameters=ID,
    ),
    Operation(
        method="GET",
        path="/v1/jobs/{id}/events",
        handler=events,
        summary="The job's log as SSE; resumable",
        answers={204: Content(description="Everything was delivered already")},
        events=_JOB_EVENTS,
        parameters=[*ID, *RESUME_AT],
    ),
    Operation(
        method="POST",
        path="/v1/jobs/{id}/cancel",
        handler=cancel,
        summary="Cancel a job; idempotent",
        answers={200: JobView},
        parameters=ID,
    ),
    of_user("/v1/events"),
    Operation(
        method="POST",
        path="/v1/generate",
        handler=generate,
        summary="Generate: one JSON reply, or a stream",
        body=Generate,
        answers={200: Generated},
        events=_JOB_EVENTS,
        generates=True,
    ),
]
