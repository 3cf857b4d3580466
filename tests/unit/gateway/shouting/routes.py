"""A dialect that shouts: what a folder needs to be one."""

from __future__ import annotations

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.api.base import WireType
from penstock.core.errors import PenstockError
from penstock.core.events import Completion
from penstock.core.job import Job, Request
from penstock.gateway.http import Call, Dialect, error_reply, json_reply
from penstock.gateway.jobs import Jobs, Submission
from penstock.gateway.operation import Batchable, Operation, Prepared


class Ask(msgspec.Struct, frozen=True):
    say: str


class Shout(WireType, frozen=True):
    shout: str


class Failure(WireType, frozen=True):
    alas: str


def _refuse(request_id: str, error: PenstockError, headers: dict[str, str] | None) -> Response:
    return error_reply(error, headers, Failure(error.message.upper()))


SHOUTING = Dialect(Failure, _refuse)


async def shout(call: Call) -> ASGIApp:
    body = await call.body(Ask)
    job = await call.jobs.submit((await _prepare(call.jobs, body)).request, Submission())
    return json_reply(_reply(call.jobs, body, job, await call.jobs.fold(job, call.disconnected)))


async def _prepare(jobs: Jobs, body: Ask) -> Prepared:
    return Prepared(Request(model=jobs.catalogue.default, prompt=body.say))


def _reply(jobs: Jobs, body: Ask, job: Job, completion: Completion) -> Shout:
    return Shout(completion.texts[0].upper())


OPERATIONS = [
    Operation(
        "POST",
        "/shout",
        shout,
        "Shout",
        body=Ask,
        answers={200: Shout},
        dialect=SHOUTING,
        batch=Batchable(Ask, _prepare, _reply),
    )
]
