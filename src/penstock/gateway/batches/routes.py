"""OpenAI's batches: a file of requests, run at batch priority; results are files again."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest, Unsupported
from penstock.core.job import Metadata
from penstock.gateway.batches.runner import BatchRunner
from penstock.gateway.batches.store import Batch
from penstock.gateway.dialects.fields import Operation
from penstock.gateway.dialects.openai import chat as openai
from penstock.gateway.dialects.openai import completions, embeddings
from penstock.gateway.dialects.responses import routes as responses
from penstock.gateway.files.routes import TTL, expiry, list_view, paging
from penstock.gateway.http import Call, json_reply

#: What a batch can be made of.
OPERATIONS: dict[str, Operation] = {
    **embeddings.OPERATIONS,
    **openai.OPERATIONS,
    **completions.OPERATIONS,
    **responses.OPERATIONS,
}

_MOMENTS = (
    "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
)  # fmt: skip


class ExpiresAfter(msgspec.Struct, frozen=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=TTL[0], le=TTL[1])]


class CreateBatch(msgspec.Struct, kw_only=True, frozen=True):
    """The body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: Annotated[str, Meta(extra_json_schema={"enum": [*OPERATIONS]})]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


async def create(call: Call) -> ASGIApp:
    batches = runner(call)
    body = await call.body(CreateBatch)
    if body.endpoint not in batches.operations:
        known = ", ".join(batches.operations)
        raise Unsupported(f"A batch cannot be made for {body.endpoint[:64]!r}: it can for {known}.", param="endpoint")
    kept = body.output_expires_after
    ttl = expiry(kept.anchor, kept.seconds, "output_expires_after") if kept is not None else None
    file = await asyncio.to_thread(batches.store.files.get, call.tenant, body.input_file_id)
    if file.purpose != "batch":
        raise InvalidRequest(f"The file's purpose is {file.purpose!r}, not 'batch'.", param="input_file_id")
    batch = await asyncio.to_thread(
        batches.store.create, call.tenant, body.endpoint, file, metadata=body.metadata, output_ttl=ttl
    )
    batches.nudge()
    return json_reply(view(batch))


async def list_batches(call: Call) -> ASGIApp:
    batches = runner(call)
    after, limit = paging(call, default=20, most=100)
    found, more = await asyncio.to_thread(batches.store.list, call.tenant, after=after, limit=limit)
    return json_reply(list_view([view(batch) for batch in found], more))


async def show(call: Call) -> ASGIApp:
    return json_reply(view(await asyncio.to_thread(runner(call).store.get, call.tenant, call.path["id"])))


async def cancel(call: Call) -> ASGIApp:
    batches = runner(call)
    batch = await asyncio.to_thread(batches.store.cancel, call.tenant, call.path["id"])
    batches.nudge()
    return json_reply(view(batch))


def runner(call: Call) -> BatchRunner:
    if call.gateway.batches is None:
        error = Unsupported("This server keeps no files, and runs no batches.")
        error.status = 501
        raise error
    return call.gateway.batches


def view(batch: Batch) -> dict[str, Any]:
    moments = {f"{name}_at": _seconds(batch.moments.get(name)) for name in _MOMENTS}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id if batch.ended else None,
        "error_file_id": batch.error_file_id if batch.ended else None,
        "created_at": int(batch.created_at),
        "expires_at": int(batch.expires_at),
        **moments,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": batch.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": batch.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.prompt_tokens + batch.completion_tokens,
        },
        "metadata": batch.metadata,
    }


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
