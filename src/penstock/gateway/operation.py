"""A route is one record. The router's table, ``/openapi.json``, what a batch can be made of, who may call it and how it
fails are all read from it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from penstock.core.errors import BrokerUnavailable, NotFound, PenstockError, PreviousResponseNotFound
from penstock.core.events import Completion
from penstock.core.job import Job, Request
from penstock.gateway.http import NATIVE, Call, Dialect, Handler, Resources, refuse
from penstock.gateway.identity import Identity, Right, identify
from penstock.gateway.jobs import Jobs

log = structlog.get_logger("penstock.gateway")

#: What a body may meet that refers to what is kept for a time only. A repeated one may have been answered before.
REFERENCE_GONE = (PreviousResponseNotFound, NotFound)


class Content(msgspec.Struct, frozen=True):
    """An answer that is no JSON: its media types (none: it has no body), and what it means."""

    media: tuple[str, ...] = ()
    description: str = ""


class Prepared(msgspec.Struct, frozen=True):
    """A body's job: what to run, and what the route needs to show it again."""

    request: Request
    view: bytes = b""


class Batchable(msgspec.Struct, frozen=True):
    """A POST route without its HTTP, as a line of a batch has it.

    ``prepare(jobs, body)`` raises `PenstockError` for what cannot be run, one of `REFERENCE_GONE` for what perhaps
    could once. ``reply(jobs, body, job, completion)`` is what came of it, to be written as JSON.
    """

    body: type
    prepare: Callable[[Jobs, Any], Awaitable[Prepared]]
    reply: Callable[[Jobs, Any, Job, Completion], Any]


class Operation(msgspec.Struct, frozen=True):
    """One route: a method and a path, who answers, and what can be said of it."""

    method: str
    """``*``: any."""
    path: str
    handler: Handler
    summary: str = ""
    """One line for people. What has none is not described."""
    body: type | None = None
    body_media: str = "application/json"
    body_required: bool = True
    answers: dict[int, type | Content] = {}
    """What comes by status. Failures have the dialect's shape."""
    events: dict[str, type] = {}
    """What comes as a stream instead: the data of each event by its name ("message" for one without, as in
    browsers)."""
    parameters: list[dict[str, Any]] = []
    """Of path, query and headers, as OpenAPI has them."""
    scope: Right = "tenant"
    """What a caller needs; without it the handler is not reached."""
    dialect: Dialect = NATIVE
    """How it fails, also before its handler is reached."""
    header: str = ""
    """Only who sends this header (in lower case) means it; others mean the operation beside it that has none."""
    generates: bool = False
    """Does its answer take as long as a model does? Its latency is measured then."""
    batch: Batchable | None = None


class Endpoint:
    """An operation as an ASGI app: who asks → may they → handler → answer; a failure in the dialect's words."""

    def __init__(self, operation: Operation, jobs: Jobs, resources: Resources, default: Identity) -> None:
        self.operation = operation
        self._jobs = jobs
        self._resources = resources
        self._default = default

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            identity = identify(scope, self._default)
            identity.require(self.operation.scope)
            response = await self.operation.handler(Call(self._jobs.of(identity), self._resources, scope, receive))
        except PenstockError as error:
            await refuse(error, scope, receive, send)
        except asyncio.CancelledError:
            # The HTTP server's, when a drain has lasted long enough: this one still waits for a broker that is away.
            if not self._jobs.streams.closing or (task := asyncio.current_task()) is None:
                raise
            task.uncancel()
            unavailable = BrokerUnavailable("The server is shutting down. Try again in a moment.", retry_after=2.0)
            await refuse(unavailable, scope, receive, send)
        except Exception:
            # A bug is a 500 in the one error shape and a traceback in the log, never a torn connection.
            log.exception("request_failed", path=scope["path"], request_id=scope.get("penstock.request_id"))
            broken = PenstockError("Something broke inside the server; its log has the details.")
            await refuse(broken, scope, receive, send)
        else:
            await response(scope, receive, send)
