"""OpenAI's chat completions, over jobs like any other. Judged by the official SDKs unchanged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from penstock.core.events import Completion
from penstock.core.job import Job, Request
from penstock.gateway.dialects.fields import submission_of
from penstock.gateway.dialects.openai.answers import ChatChunk, ChatReply
from penstock.gateway.dialects.openai.bodies import ChatCompletion, OpenAIBody
from penstock.gateway.dialects.openai.stream import ChatWriter, ChunkWriter
from penstock.gateway.http import Call, json_reply
from penstock.gateway.jobs import Jobs
from penstock.gateway.operation import Batchable, Operation, Prepared


async def chat_completions(call: Call) -> ASGIApp:
    body = await call.body(ChatCompletion)
    writer = partial(ChatWriter, shows_reasoning=body.shows_reasoning)
    return await respond(call, body, body.request(call.config.default_max_tokens), writer)


async def _prepare_chat(jobs: Jobs, body: ChatCompletion) -> Prepared:
    return Prepared(body.request(jobs.config.default_max_tokens))


def _write_chat(jobs: Jobs, body: ChatCompletion, job: Job, completion: Completion) -> Any:
    writer = ChatWriter(job, include_usage=False, token_ids=body.return_token_ids, shows_reasoning=body.shows_reasoning)
    return writer.reply(completion)


async def respond(call: Call, body: OpenAIBody, request: Request, kind: Callable[..., ChunkWriter]) -> ASGIApp:
    """A job of *request*, streamed or answered as a writer of this *kind* does it."""
    submission = submission_of(
        call, body, user=body.user_id or body.user, on_disconnect="cancel", priority=body.priority_class()
    )
    job = await call.jobs.submit(request, submission)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    writer = kind(job, include_usage=usage, token_ids=body.return_token_ids)
    if body.stream:
        after = call.last_event_id or 0
        if after and writer.looks_back:
            writer.after, writer.replay = after, partial(call.jobs.log, job.id)
        return await call.jobs.stream(call.jobs.follow(job, after), writer.render)
    completion = await call.jobs.fold(job, call.disconnected)
    return json_reply(writer.reply(completion), headers={"x-penstock-job": job.id})


OPERATIONS = [
    Operation(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "OpenAI chat completions",
        body=ChatCompletion,
        answers={200: ChatReply},
        events={"message": ChatChunk},
        generates=True,
        batch=Batchable(ChatCompletion, _prepare_chat, _write_chat),
    )
]
