"""What Penstock's own routes answer: jobs as the types of `penstock.api`."""

from __future__ import annotations

from typing import Literal

from penstock.api.errors import Error
from penstock.api.jobs import (
    FunctionCall,
    Generated,
    JobResult,
    JobView,
    Links,
    Timings,
    ToolCallView,
    UsageView,
)
from penstock.core.calls import named, read_calls
from penstock.core.events import Completion
from penstock.core.job import Job, Priority, ToolCall, Usage
from penstock.core.ports import elapsed
from penstock.core.tasks import vectors
from penstock.gateway.jobs import Jobs

PRIORITIES: dict[Priority, Literal["interactive", "normal", "batch"]] = {
    Priority.INTERACTIVE: "interactive",
    Priority.NORMAL: "normal",
    Priority.BATCH: "batch",
}


def usage_view(usage: Usage) -> UsageView:
    return UsageView(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        usage.reasoning_tokens or None,
        usage.cached_tokens or None,
    )


def links(job: str) -> Links:
    return Links(f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/cancel")


def job_view(job: Job, completion: Completion | None = None) -> JobView:
    """A job; one that has ended with its result (*completion*: its folded log), usage and timings."""
    ended = completion.ended if completion is not None else None
    return JobView(
        id=job.id,
        status=job.status,
        model=job.request.model,
        user_id=job.user,
        priority=PRIORITIES[job.priority],
        position_in_queue=job.queue_position,
        attempt=job.attempt,
        created_at=job.created_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        deadline_at=job.deadline_at,
        request_id=job.request_id,
        metadata=job.metadata,
        tokens=job.tokens,
        finish_reason=job.finish_reasons[0] if job.finish_reasons else None,
        error=Error.of(job.error) if job.error is not None else None,
        links=links(job.id),
        result=_result(job, completion) if completion is not None else None,
        finish_reasons=list(job.finish_reasons) if ended is not None and job.request.n > 1 else None,
        usage=usage_view(ended.usage) if ended is not None else None,
        timings=timings(job) if ended is not None else None,
    )


async def current_view(jobs: Jobs, job: Job) -> JobView:
    """A job as it stands now."""
    return job_view(job, await jobs.completion(job) if job.status.terminal else None)


def generated(job: Job, completion: Completion) -> Generated:
    assert completion.ended is not None
    return Generated(
        job_id=job.id,
        model=job.request.model,
        text=completion.texts[0],
        texts=completion.texts if job.request.n > 1 else None,
        tool_calls=_tool_calls(job, completion),
        reasoning=completion.reasoning[0] or None,
        finish_reason=completion.ended.finish_reason,
        usage=usage_view(completion.ended.usage),
    )


def _result(job: Job, completion: Completion) -> JobResult:
    if job.request.task == "embed":
        return JobResult("", embeddings=vectors(completion))
    text, *others = completion.texts
    return JobResult(
        text,
        tool_calls=_tool_calls(job, completion),
        texts=completion.texts if others else None,
        reasoning=completion.reasoning[0] or None,
    )


def _tool_calls(job: Job, completion: Completion) -> list[ToolCallView] | None:
    """The calls of the first choice, where there were tools to call."""
    if not job.request.callable_tools:
        return None
    return [tool_call_view(call) for call in named(read_calls(completion.calls[0]), job.id, 0)]


def tool_call_view(call: ToolCall) -> ToolCallView:
    return ToolCallView(call.id, "function", FunctionCall(call.name, call.arguments))


def timings(job: Job) -> Timings:
    """Of a job that has ended."""
    assert job.ended_at is not None
    processing = elapsed(job.started_at, job.ended_at) if job.started_at is not None else None
    return Timings(
        queue_wait_time=elapsed(job.created_at, job.started_at or job.ended_at),
        processing_time=processing,
        total_time=elapsed(job.created_at, job.ended_at),
        time_to_first_token=None if job.first_token_at is None else elapsed(job.created_at, job.first_token_at),
        prompt_tokens=job.prompt_tokens or 0,
        completion_tokens=job.tokens,
        tokens_per_second=job.tokens / processing if processing else None,
    )
