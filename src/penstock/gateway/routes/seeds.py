"""Routes that the designs behind Penstock had, each a few lines over the same functions (SPEC section 4)."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from penstock.core.errors import BrokerUnavailable, InvalidRequest, NoVLLMWorker, PenstockError
from penstock.core.job import Job, ModelName, Request
from penstock.gateway.http import Call, json_reply
from penstock.gateway.routes.bodies import JobBody, TokenIds, submission
from penstock.gateway.routes.jobs import usage_view

#: Prompts that one call may bring.
MAX_PROMPTS = 256


class GenerateVLLM(JobBody, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /generate_vllm``: prompts (texts or token ids), sampled alike."""

    prompts: Annotated[list[str | TokenIds], Meta(min_length=1, max_length=MAX_PROMPTS)]
    model: ModelName | None = None


async def generate_vllm(call: Call) -> ASGIApp:
    """Several prompts on a model that vLLM runs; answered when all are done, in order."""
    body = await call.body(GenerateVLLM)
    name = await _vllm_model(call, body.model)
    wish = submission(call, body, user=body.user_id, on_disconnect="cancel")
    sampling = body.sampling(max_tokens=64, temperature=0.7, logprobs=None)
    jobs: list[Job] = []
    try:
        for number, prompt in enumerate(body.prompts):
            request = Request(
                model=name,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_ids=None if isinstance(prompt, str) else tuple(prompt),
                sampling=sampling,
                n=body.n or 1,
            )
            key = wish.idempotency_key and f"{wish.idempotency_key}/{number}"
            jobs.append(await call.gateway.submit(request, msgspec.structs.replace(wish, idempotency_key=key)))
    except PenstockError:
        for job in jobs:  # all or none
            await call.gateway.broker.cancel(job.tenant, job.id)
        raise
    leaving = asyncio.ensure_future(call.gone())
    try:
        results = await asyncio.gather(*(_result(call, job, leaving) for job in jobs))
    finally:
        leaving.cancel()
    return json_reply({"model": name, "results": results})


async def _vllm_model(call: Call, wanted: str | None) -> str:
    """The model to use: *wanted*, or the first that a vLLM worker serves. Raises `NoVLLMWorker`."""
    catalogue = call.gateway.catalogue
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


async def _result(call: Call, job: Job, leaving: asyncio.Future[None]) -> dict[str, Any]:
    """What became of one prompt; one that failed does not take the others' results away."""
    try:
        completion = await call.gateway.fold(job, lambda: asyncio.shield(leaving))
    except BrokerUnavailable:  # it is the server that ends, not the job
        raise
    except PenstockError as error:
        return {"job_id": job.id, "error": error.info}
    ended = completion.ended
    assert ended is not None
    return {
        "job_id": job.id,
        "text": completion.texts[0],
        **({"texts": completion.texts} if job.request.n > 1 else {}),
        "finish_reason": ended.finish_reason,
        "usage": usage_view(ended),
    }
