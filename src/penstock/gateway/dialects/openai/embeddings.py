"""OpenAI's embeddings, over jobs like any other. Judged by the official SDKs unchanged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta
from starlette.types import ASGIApp

from penstock.core.events import Completion
from penstock.core.job import Job, ModelName, OptionalIdentifier, Request
from penstock.core.tasks import vector_values, vectors
from penstock.gateway.dialects.fields import JobBody, TokenId, TokenIds, several, submission_of
from penstock.gateway.dialects.openai.answers import Embedding, Embeddings, EmbeddingsUsage
from penstock.gateway.http import Call, json_reply
from penstock.gateway.jobs import Jobs
from penstock.gateway.operation import Batchable, Operation, Prepared

#: Inputs that one call may bring; OpenAI has the same.
MAX_INPUTS = 2048

Text = Annotated[str, Meta(min_length=1)]


class CreateEmbeddings(JobBody, kw_only=True, frozen=True):
    """The body of ``POST /v1/embeddings``: a text, several, or the token ids of one or of several."""

    model: ModelName
    input: Text | Annotated[list[Text | TokenId | TokenIds], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    input_type: Literal["query", "document", "passage"] | None = None
    user: OptionalIdentifier | None = None

    def request(self) -> Request:
        return Request(
            model=self.model,
            task="embed",
            inputs=several(self.input, MAX_INPUTS, "input"),
            input_type="document" if self.input_type == "passage" else self.input_type,
            dimensions=self.dimensions,
        )

    def reply(self, job: Job, completion: Completion) -> Embeddings:
        """What the folded log of *job* is."""
        assert completion.ended is not None
        tokens = completion.ended.usage.prompt_tokens
        found, raw = vectors(completion), self.encoding_format == "base64"
        return Embeddings(
            object="list",
            data=[Embedding("embedding", i, each if raw else vector_values(each)) for i, each in enumerate(found)],
            model=job.request.model,
            usage=EmbeddingsUsage(tokens, tokens),
        )


async def embeddings(call: Call) -> ASGIApp:
    body = await call.body(CreateEmbeddings)
    submission = submission_of(call, body, user=body.user_id or body.user, on_disconnect="cancel")
    if submission.idempotency_key is None:  # nobody can ask for it again: many vectors need not lie about for an hour
        job, completion = await call.jobs.run_once(body.request(), submission, call.disconnected)
        return json_reply(body.reply(job, completion))
    job = await call.jobs.submit(body.request(), submission)
    completion = await call.jobs.fold(job, call.disconnected)
    return json_reply(body.reply(job, completion), headers={"x-penstock-job": job.id})


async def _prepare(jobs: Jobs, body: CreateEmbeddings) -> Prepared:
    return Prepared(body.request())


def _write(jobs: Jobs, body: CreateEmbeddings, job: Job, completion: Completion) -> Any:
    return body.reply(job, completion)


OPERATIONS = [
    Operation(
        "POST",
        "/v1/embeddings",
        embeddings,
        "OpenAI embeddings",
        body=CreateEmbeddings,
        answers={200: Embeddings},
        generates=True,
        batch=Batchable(CreateEmbeddings, _prepare, _write),
    )
]
