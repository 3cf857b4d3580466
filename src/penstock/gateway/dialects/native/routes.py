"""Penstock's own API: submit, look, follow, cancel; ``/v1/generate`` in one call; one stream for all of a user."""

from __future__ import annotations

from functools import partial

from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.api.events import (
    DoneEvent,
    ErrorEvent,
    JobCompleteEvent,
    TokenEvent,
    UserErrorEvent,
    UserTokenEvent,
)
from penstock.api.jobs import Deleted, Generated, JobPage, JobView, Submitted
from penstock.core.errors import InvalidRequest, LogRewound
from penstock.core.job import Status
from penstock.core.ports import Query
from penstock.gateway.dialects.fields import submission_of
from penstock.gateway.dialects.native.answers import current_view, generated, job_view, links
from penstock.gateway.dialects.native.bodies import Generate, GenerateJob
from penstock.gateway.dialects.native.stream import complete_frame, feed_frames, refused_frame, render, rewound_frame
from penstock.gateway.feed import Cursor, Rendering
from penstock.gateway.http import Call, json_reply
from penstock.gateway.operation import Content, Operation
from penstock.gateway.parameters import ID, RESUME, RESUME_AT, Parameters, limit, query
from penstock.gateway.sse import EventStream, stream_of


async def submit(call: Call) -> ASGIApp:
    body = await call.body(GenerateJob)
    submission = submission_of(call, body, user=body.user_id, on_disconnect="continue")
    job = await call.jobs.submit(body.request(call), submission)
    answer = Submitted(job.id, job.status, job.queue_position, links(job.id))
    return json_reply(answer, 202, {"location": f"/v1/jobs/{job.id}"})


async def show(call: Call) -> ASGIApp:
    return json_reply(await current_view(call.jobs, await call.jobs.get(call.path["id"])))


async def cancel(call: Call) -> ASGIApp:
    return json_reply(await current_view(call.jobs, await call.jobs.cancel(call.path["id"])))


async def forget(call: Call) -> ASGIApp:
    """Drop a job and everything of it, now instead of when its retention ends; one that runs is cancelled."""
    job = await call.jobs.get(call.path["id"])
    await call.jobs.forget(job.id)
    return json_reply(Deleted(job.id, True))


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
    return json_reply(JobPage([job_view(job) for job in page.jobs], page.cursor))


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
        first = await following.first_event(0.02 if after else 0)
        if first is None and job.status.terminal:
            first = await following.first_event(5)
    except LogRewound as error:
        await following.close(complete=True)
        return EventStream(call.streams, stream_of(refused_frame(job, error)))
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
    submission = submission_of(call, body, user=body.user_id, on_disconnect="cancel")
    job = await call.jobs.submit(body.request(call), submission)
    if body.stream:
        return await call.jobs.stream(call.jobs.follow(job, call.last_event_id or 0), partial(render, job))
    completion = await call.jobs.fold(job, call.disconnected)
    return json_reply(generated(job, completion), headers={"x-penstock-job": job.id})


async def user_events(call: Call) -> ASGIApp:
    """All of one user's jobs over one connection."""
    user = call.query.get("user_id")
    if not user:
        raise InvalidRequest("Say whose jobs: ?user_id=…", param="user_id")
    text = call.headers.get("last-event-id") or call.query.get("after")
    cursor = Cursor.parse(text) if text else None
    writing = Rendering(feed_frames, complete_frame, rewound_frame)
    return EventStream(call.streams, call.jobs.feed(user, cursor, writing))


# ---------------------------------------------------------------------------------------------- the routes

_STATUS = "|".join(Status)
JOB_EVENTS: dict[str, type] = {"token": TokenEvent, "done": DoneEvent, "error": ErrorEvent}
_OF_USER: Parameters = [
    {"name": "user_id", "in": "query", "required": True, "schema": {"type": "string"}},
    *RESUME,
]


def of_user(path: str) -> Operation:
    """All jobs of a user as one stream, at *path*."""
    return Operation(
        "GET",
        path,
        user_events,
        "All jobs of a user over one SSE stream; resumable",
        events={"token": UserTokenEvent, "job_complete": JobCompleteEvent, "error": UserErrorEvent},
        parameters=_OF_USER,
    )


OPERATIONS = [
    Operation("POST", "/v1/jobs", submit, "Submit a job; never waits", body=GenerateJob, answers={202: Submitted}),
    Operation(
        "GET",
        "/v1/jobs",
        list_jobs,
        "List jobs, newest first",
        answers={200: JobPage},
        parameters=[
            {"name": "status", "in": "query", "schema": {"type": "string", "pattern": f"^({_STATUS})(,({_STATUS}))*$"}},
            *query(model="string", user_id="string", cursor="string"),
            limit(500),
        ],
    ),
    Operation(
        "GET", "/v1/jobs/{id}", show, "A job, with its result once it has ended", answers={200: JobView}, parameters=ID
    ),
    Operation(
        "DELETE",
        "/v1/jobs/{id}",
        forget,
        "Drop a job and its result; one that runs is cancelled",
        answers={200: Deleted},
        parameters=ID,
    ),
    Operation(
        "GET",
        "/v1/jobs/{id}/events",
        events,
        "The job's log as SSE; resumable",
        answers={204: Content(description="Everything was delivered already")},
        events=JOB_EVENTS,
        parameters=[*ID, *RESUME_AT],
    ),
    Operation(
        "POST", "/v1/jobs/{id}/cancel", cancel, "Cancel a job; idempotent", answers={200: JobView}, parameters=ID
    ),
    of_user("/v1/events"),
    Operation(
        "POST",
        "/v1/generate",
        generate,
        "Generate: one JSON reply, or a stream",
        body=Generate,
        answers={200: Generated},
        events=JOB_EVENTS,
        generates=True,
    ),
]
