"""Routes that the designs behind Penstock had, each a few lines over the same functions (SPEC section 4).

A task is a job: ``task_id`` is its id, and all that ``/v1/jobs/{id}`` offers works on it.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import msgspec
from msgspec import UNSET
from starlette.types import ASGIApp

from penstock.api.errors import Error
from penstock.core.errors import InvalidRequest, NoVLLMWorker, PenstockError
from penstock.core.events import Completion
from penstock.core.job import Identifier, Job, OnDisconnect, Request
from penstock.gateway.dialects.compat.answers import (
    BasicResult,
    EndedStatus,
    PromptResult,
    PromptResults,
    Received,
    Task,
    TaskPending,
    TaskResult,
    TaskStatus,
)
from penstock.gateway.dialects.compat.bodies import CompatBody, GenerateVLLM, Prompt, PromptBody, Prompts, PromptsBody
from penstock.gateway.dialects.fields import submission_of
from penstock.gateway.dialects.native.answers import timings, usage_view
from penstock.gateway.dialects.native.routes import JOB_EVENTS, of_user
from penstock.gateway.dialects.native.stream import render
from penstock.gateway.http import Call, json_reply
from penstock.gateway.jobs import Submission
from penstock.gateway.operation import Operation
from penstock.gateway.parameters import ID, query


async def submit_job(call: Call) -> ASGIApp:
    """Queue a prompt for a user, whose jobs are all at ``GET /events?user_id=``."""
    body = await call.body(PromptBody)
    user = call.query.get("user_id") or body.user_id
    if not user:
        raise InvalidRequest("Say whose job it is: ?user_id=…", param="user_id")
    if body.user_id and body.user_id != user:
        raise InvalidRequest(f"The address says user {user!r}, the body {body.user_id!r}.", param="user_id")
    try:
        body = msgspec.structs.replace(body, user_id=msgspec.convert(user, Identifier))
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"user_id: {error}", param="user_id") from error
    job = await call.jobs.submit(_request(call, body, body.prompt), _submission(call, body, "continue"))
    return json_reply(Received(job.id, body.prompt))


async def generate(call: Call) -> ASGIApp:
    """One prompt: a task to ask for later. Several: all their results, in order."""
    body = await call.body(PromptsBody)
    if body.prompts is not None:
        return await _all(call, body, body.prompts)
    job = await call.jobs.submit(_request(call, body, body.one), _submission(call, body, "continue"))
    return json_reply(Task(job.id), 202, {"location": f"/result/{job.id}"})


async def result(call: Call) -> ASGIApp:
    """What became of a task; 202 while it has not ended: clients ask again as long as they read ``processing``."""
    job = await call.jobs.get(call.path["id"])
    if not job.status.terminal:
        return json_reply(TaskPending("processing", job.id), 202)
    if job.error is not None:
        return json_reply(TaskResult(_ended(job), job.id, error_message=job.error.message))
    text = (await call.jobs.completion(job)).texts[0]
    return json_reply(TaskResult(_ended(job), job.id, result=text, metrics=timings(job)))


def _ended(job: Job) -> EndedStatus:
    return cast("EndedStatus", job.status.value)


async def status(call: Call) -> ASGIApp:
    """A task's state, and its place in the queue while it waits there."""
    job = await call.jobs.get(call.path["id"])
    return json_reply(TaskStatus(job.id, job.status, job.queue_position))


async def basic_generate(call: Call) -> ASGIApp:
    """One prompt or several, answered when done."""
    body = await call.body(PromptsBody)
    if body.prompts is not None:
        return await _all(call, body, body.prompts)
    job = await call.jobs.submit(_request(call, body, body.one), _submission(call, body, "cancel"))
    found = _answer(job, await call.jobs.fold(job, call.disconnected))
    answer = BasicResult(
        model=job.request.model,
        job_id=job.id,
        text=found.text,
        texts=found.texts,
        finish_reason=found.finish_reason,
        usage=found.usage,
    )
    return json_reply(answer, headers={"x-penstock-job": job.id})


async def generate_stream(call: Call) -> ASGIApp:
    """One prompt as one open response: pings while it waits, its tokens as they come."""
    body = await call.body(PromptBody)
    job = await call.jobs.submit(_request(call, body, body.prompt), _submission(call, body, "cancel"))
    return await call.jobs.stream(call.jobs.follow(job, call.last_event_id or 0), partial(render, job))


async def generate_vllm(call: Call) -> ASGIApp:
    """Several prompts on a model that vLLM runs; answered when all are done, in order."""
    body = await call.body(GenerateVLLM)
    return await _all(call, body, body.prompts, await _vllm_model(call, body.model))


# ---------------------------------------------------------------------------------------------- what they share


def _submission(call: Call, body: CompatBody, on_disconnect: OnDisconnect) -> Submission:
    return submission_of(call, body, user=body.user_id, on_disconnect=on_disconnect)


def _request(call: Call, body: CompatBody, prompt: Prompt, model: str | None = None) -> Request:
    return Request(
        model=model or body.model or call.catalogue.default,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_ids=None if isinstance(prompt, str) else tuple(prompt),
        sampling=body.sampling(max_tokens=64, temperature=0.7, logprobs=None),
        n=body.n or 1,
    )


async def _all(call: Call, body: CompatBody, prompts: Prompts, model: str | None = None) -> ASGIApp:
    """A job for each of *prompts*, all of them or none; answered with their results, in order, when all have ended."""
    requests = [_request(call, body, prompt, model) for prompt in prompts]
    jobs = await call.jobs.submit_all(requests, _submission(call, body, "cancel"))
    found = await call.jobs.fold_all(jobs, call.disconnected)
    results = [_result(job, each) for job, each in zip(jobs, found, strict=True)]
    return json_reply(PromptResults(jobs[0].request.model, results))


def _result(job: Job, found: Completion | PenstockError) -> PromptResult:
    """What became of one prompt; one that failed does not take the others' results away."""
    if isinstance(found, PenstockError):
        return PromptResult(job.id, error=Error.of(found.info))
    return _answer(job, found)


def _answer(job: Job, completion: Completion) -> PromptResult:
    ended = completion.ended
    assert ended is not None
    return PromptResult(
        job.id,
        text=completion.texts[0],
        texts=completion.texts if job.request.n > 1 else UNSET,
        finish_reason=ended.finish_reason or UNSET,
        usage=usage_view(ended.usage),
    )


async def _vllm_model(call: Call, wanted: str | None) -> str:
    """The model to use: *wanted*, or the first that a vLLM worker serves. Raises `NoVLLMWorker`."""
    catalogue = call.catalogue
    if not catalogue.served_by("vllm"):
        await catalogue.refresh()
    served = catalogue.served_by("vllm")
    if not served:
        raise NoVLLMWorker(
            "No vLLM worker is up. Start one with --engine vllm, or send the prompts to /v1/generate.", retry_after=2.0
        )
    if wanted is not None and wanted not in served:
        raise InvalidRequest(f"vLLM serves {', '.join(served)} here, not {wanted!r}.", param="model")
    return wanted or served[0]


OPERATIONS = [
    Operation(
        "POST",
        "/submit_job",
        submit_job,
        "Queue a prompt for a user",
        body=PromptBody,
        answers={200: Received},
        parameters=query(user_id="string"),
    ),
    of_user("/events"),
    Operation(
        "POST",
        "/generate",
        generate,
        "One prompt: a task to ask for later (202). Several: all their results",
        body=PromptsBody,
        answers={200: PromptResults, 202: Task},
        generates=True,
    ),
    Operation(
        "GET",
        "/result/{id}",
        result,
        "What became of a task; 202 while it has not ended",
        answers={200: TaskResult, 202: TaskPending},
        parameters=ID,
    ),
    Operation(
        "GET",
        "/status/{id}",
        status,
        "A task's state and its place in the queue",
        answers={200: TaskStatus},
        parameters=ID,
    ),
    Operation(
        "POST",
        "/basic_generate",
        basic_generate,
        "One prompt or several, answered when done",
        body=PromptsBody,
        answers={200: BasicResult},
        generates=True,
    ),
    Operation(
        "POST",
        "/generate_stream",
        generate_stream,
        "One prompt as SSE",
        body=PromptBody,
        events=JOB_EVENTS,
        generates=True,
    ),
    Operation(
        "POST",
        "/api/v1/req",
        generate_stream,
        "One prompt as SSE: pings while it waits, then its tokens",
        body=PromptBody,
        events=JOB_EVENTS,
        generates=True,
    ),
    Operation(
        "POST",
        "/generate_vllm",
        generate_vllm,
        "Several prompts on a model that vLLM runs",
        body=GenerateVLLM,
        answers={200: PromptResults},
        generates=True,
    ),
]
