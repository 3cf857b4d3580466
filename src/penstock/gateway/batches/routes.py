"""OpenAI's batches: a file of requests, run at batch priority; results are files again."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest, Unsupported
from penstock.core.job import Metadata
from penstock.gateway.batches.answers import BatchCounts, BatchErrors, BatchErrorView, BatchList, BatchUsage, BatchView
from penstock.gateway.batches.runner import BatchRunner
from penstock.gateway.batches.store import Batch
from penstock.gateway.dialects.answers import CachedTokens, ReasoningTokens, ends
from penstock.gateway.dialects.registry import BATCHABLE
from penstock.gateway.files.routes import TTL, expiry, paging
from penstock.gateway.http import Call, Resource, json_reply
from penstock.gateway.operation import Operation
from penstock.gateway.parameters import ID, limit, query

_MOMENTS = (
    "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
)  # fmt: skip


#: Who runs this server's batches.
BATCHES: Resource[BatchRunner] = Resource("This server keeps no files, and runs no batches.")


class ExpiresAfter(msgspec.Struct, frozen=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=TTL[0], le=TTL[1])]


class CreateBatch(msgspec.Struct, kw_only=True, frozen=True):
    """The body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: Annotated[str, Meta(extra_json_schema={"enum": [*BATCHABLE]})]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


async def create(call: Call) -> ASGIApp:
    batches = call.use(BATCHES)
    body = await call.body(CreateBatch)
    if body.endpoint not in batches.operations:
        known = ", ".join(batches.operations)
        raise Unsupported(f"A batch cannot be made for {body.endpoint[:64]!r}: it can for {known}.", param="endpoint")
    kept = body.output_expires_after
    ttl = expiry(kept.anchor, kept.seconds, "output_expires_after") if kept is not None else None
    file = await asyncio.to_thread(batches.store.files.get, call.identity.tenant, body.input_file_id)
    if file.purpose != "batch":
        raise InvalidRequest(f"The file's purpose is {file.purpose!r}, not 'batch'.", param="input_file_id")
    batch = await asyncio.to_thread(
        batches.store.create, call.identity.tenant, body.endpoint, file, metadata=body.metadata, output_ttl=ttl
    )
    batches.notify()
    return json_reply(view(batch))


async def list_batches(call: Call) -> ASGIApp:
    batches = call.use(BATCHES)
    after, limit = paging(call, default=20, most=100)
    found, more = await asyncio.to_thread(batches.store.list, call.identity.tenant, after=after, limit=limit)
    views = [view(batch) for batch in found]
    return json_reply(BatchList("list", views, *ends(views), more))


async def show(call: Call) -> ASGIApp:
    return json_reply(view(await asyncio.to_thread(call.use(BATCHES).store.get, call.identity.tenant, call.path["id"])))


async def cancel(call: Call) -> ASGIApp:
    batches = call.use(BATCHES)
    batch = await asyncio.to_thread(batches.store.cancel, call.identity.tenant, call.path["id"])
    batches.notify()
    return json_reply(view(batch))


def view(batch: Batch) -> BatchView:
    errors = [BatchErrorView(each.code, each.message, each.param, each.line) for each in batch.errors]
    moments = {f"{name}_at": _seconds(batch.moments.get(name)) for name in _MOMENTS}
    return BatchView(
        id=batch.id,
        object="batch",
        endpoint=batch.endpoint,
        model=batch.model,
        errors=BatchErrors("list", errors) if errors else None,
        input_file_id=batch.input_file_id,
        completion_window="24h",
        status=batch.status,
        output_file_id=batch.output_file_id if batch.ended else None,
        error_file_id=batch.error_file_id if batch.ended else None,
        created_at=int(batch.created_at),
        expires_at=int(batch.expires_at),
        **moments,
        request_counts=BatchCounts(batch.total, batch.completed, batch.failed),
        usage=BatchUsage(
            batch.prompt_tokens,
            CachedTokens(0),
            batch.completion_tokens,
            ReasoningTokens(0),
            batch.prompt_tokens + batch.completion_tokens,
        ),
        metadata=batch.metadata,
    )


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


OPERATIONS = [
    Operation(
        "POST",
        "/v1/batches",
        create,
        "Run the requests of a file at batch priority",
        body=CreateBatch,
        answers={200: BatchView},
    ),
    Operation(
        "GET",
        "/v1/batches",
        list_batches,
        "List batches, newest first",
        answers={200: BatchList},
        parameters=[*query(after="string"), limit(100)],
    ),
    Operation(
        "GET",
        "/v1/batches/{id}",
        show,
        "A batch: how far it is, and where its results are",
        answers={200: BatchView},
        parameters=ID,
    ),
    Operation(
        "POST", "/v1/batches/{id}/cancel", cancel, "Cancel a batch; idempotent", answers={200: BatchView}, parameters=ID
    ),
]
