"""OpenAI's completions, over jobs like any other: one for each prompt, and one more for each that is echoed. Judged by
the official SDKs unchanged, and by lm-evaluation-harness, whose log-likelihoods are those of echoed prompts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from itertools import chain
from typing import Any

import msgspec
from starlette.types import ASGIApp

from penstock.api.errors import ErrorBody
from penstock.core.aio import merge
from penstock.core.errors import PenstockError, Unsupported, error_from_info
from penstock.core.events import Completion, Ended, TokenLogprob, fold
from penstock.core.job import Job, Usage
from penstock.core.tasks import Tokenized
from penstock.gateway.dialects.fields import submission_of
from penstock.gateway.dialects.openai.answers import TextChunk, TextReply
from penstock.gateway.dialects.openai.bodies import Prompt, TextCompletion
from penstock.gateway.dialects.openai.chat import respond
from penstock.gateway.dialects.openai.stream import TextWriter
from penstock.gateway.http import Call, json_reply
from penstock.gateway.jobs import Jobs
from penstock.gateway.operation import Batchable, Operation, Prepared
from penstock.gateway.readers import Following
from penstock.gateway.sse import ascii_json


async def completions(call: Call) -> ASGIApp:
    body = await call.body(TextCompletion)
    prompts = body.prompts
    if len(prompts) == 1 and not body.echo:
        return await respond(call, body, body.request(prompts[0]), TextWriter)
    parts = await _submit(call, body, prompts)
    headers = {"x-penstock-job": ", ".join(part.job.id for part in parts)}
    if body.stream:
        followings = [[call.jobs.follow(job) for job in part.jobs] for part in parts]
        return await call.jobs.stream_all([*chain(*followings)], _stream(parts, followings), headers)
    found = await _fold(call, parts)
    choices = [choice for part, reply in zip(parts, found, strict=True) for choice in part.writer.choices(reply)]
    usage = _total(reply.ended for reply in found)
    return json_reply(parts[0].writer.answer(choices, usage), headers=headers)


async def _submit(call: Call, body: TextCompletion, prompts: Sequence[Prompt]) -> list[_Part]:
    """The jobs of all prompts, or of none."""
    info = call.catalogue.info(body.model)
    if body.echo and body.logprobs is not None and info is not None and not info.may("score"):
        raise Unsupported(
            f"The {info.engine} engine of {info.name} does not tell log-probabilities of a prompt: leave out echo, or "
            "logprobs.",
            param="echo",
        )
    requests = [request for prompt in prompts for request in body.requests(prompt)]
    submission = submission_of(
        call, body, user=body.user_id or body.user, on_disconnect="cancel", priority=body.priority_class()
    )
    jobs = await call.jobs.submit_all(requests, submission)
    each = len(jobs) // len(prompts)
    return [
        _Part(body, number, prompt, jobs[number * each : (number + 1) * each], jobs[0])
        for number, prompt in enumerate(prompts)
    ]


async def _fold(call: Call, parts: Sequence[_Part]) -> list[Completion]:
    """What came of each prompt. Raises the first one's failure, once all have ended."""
    done: list[Completion] = []
    for found in await call.jobs.fold_all([job for part in parts for job in part.jobs], call.disconnected):
        if isinstance(found, PenstockError):
            raise found
        done.append(found)
    each = len(done) // len(parts)
    return [part.joined(done[i * each : (i + 1) * each]) for i, part in enumerate(parts)]


# ---------------------------------------------------------------------------------------------- one prompt


class _Part:
    """One prompt of a call: its jobs (the echo's first), and who writes its choices."""

    def __init__(self, body: TextCompletion, number: int, prompt: Prompt, jobs: Sequence[Job], first: Job) -> None:
        self.jobs = jobs
        self.job = jobs[-1]
        self.n = body.n or 1
        self.echoed = body.echo
        self.replied = body.max_tokens != 0
        self._body = body
        self._prompt = prompt
        usage = bool(body.stream_options and body.stream_options.include_usage)
        # All choices of an answer have the id of its first job.
        self.writer = TextWriter(
            first, include_usage=usage, token_ids=body.return_token_ids, first=number * self.n, positions=False
        )

    def joined(self, found: Sequence[Completion]) -> Completion:
        """The reply, behind the prompt where that is echoed."""
        reply = found[-1] if self.replied else self._nothing(found[0])
        if not self.echoed:
            return reply
        text, tokens, logprobs = self._echo(found[0])
        return Completion(
            [text + each for each in reply.texts],
            [tokens + each for each in reply.ids],
            [logprobs + each for each in reply.logprobs],
            reply.ended,
        )

    def _echo(self, found: Completion) -> tuple[str, list[int], list[TokenLogprob]]:
        """Text, token ids and their log-probabilities, by the job that was made for that."""
        logprobs: list[TokenLogprob] = []
        if self._body.logprobs is None:
            tokenized = Tokenized.of(found)
            ids, text = tokenized.tokens, tokenized.text
        else:
            (ids,), (text,), (pieces,) = found.ids, found.texts, found.pieces
            logprobs = [(ids[0], pieces[0], None), *found.logprobs[0]]
        return self._prompt if isinstance(self._prompt, str) else text, ids, logprobs

    def _nothing(self, echo: Completion) -> Completion:
        """The reply where none is wanted."""
        assert echo.ended is not None
        usage = Usage(echo.ended.usage.prompt_tokens)
        ended = msgspec.structs.replace(echo.ended, finish_reasons=("length",) * self.n, usage=usage)
        return Completion([""] * self.n, [[] for _ in range(self.n)], [[] for _ in range(self.n)], ended)

    async def chunks(self, followings: Sequence[Following]) -> AsyncGenerator[tuple[str, Ended | None]]:
        """The chunks of its choices, with how it ended behind the last one. Raises what its jobs failed with."""
        ended: Ended | None = None
        if self.echoed:
            found = fold([event async for event in followings[0]])
            _check(found.ended)
            yield self.writer.opening(self.n, *self._echo(found)), None
            ended = self._nothing(found).ended
        if self.replied:
            async for event in followings[-1]:
                if isinstance(event, Ended):
                    _check(event)
                    ended = event
                else:
                    yield self.writer.run(event), None
        assert ended is not None
        yield self.writer.finishes(ended), ended


def _check(ended: Ended | None) -> None:
    if ended is not None and ended.error is not None:
        raise error_from_info(ended.error)


def _total(ends: Iterable[Ended | None]) -> Usage:
    usages = [ended.usage for ended in ends if ended is not None]
    return Usage(sum(each.prompt_tokens for each in usages), sum(each.completion_tokens for each in usages))


async def _stream(parts: Sequence[_Part], followings: Sequence[Sequence[Following]]) -> AsyncIterator[bytes]:
    """Chunks of several prompts' choices as they come. They have no positions: each job's own stream has them."""
    retry = "retry: 1000\n"
    ends: list[Ended | None] = []
    chunks = [part.chunks(each) for part, each in zip(parts, followings, strict=True)]
    try:
        async with contextlib.aclosing(merge(chunks)) as merged:
            async for block, ended in merged:
                ends.append(ended)
                if block:
                    yield (retry + block).encode()
                    retry = ""
    except PenstockError as error:
        yield f"{retry}data: {ascii_json(ErrorBody.of(error.info))}\n\n".encode()
        return
    yield f"{parts[0].writer.usage(_total(ends))}data: [DONE]\n\n".encode()


# ---------------------------------------------------------------------------------------------- batches


async def _prepare(jobs: Jobs, body: TextCompletion) -> Prepared:
    if len(body.prompts) > 1 or body.echo:
        raise Unsupported("A line of a batch has one prompt, and no echo.", param="echo" if body.echo else "prompt")
    return Prepared(body.request(body.prompts[0]))


def _write(jobs: Jobs, body: TextCompletion, job: Job, completion: Completion) -> Any:
    return TextWriter(job, include_usage=False, token_ids=body.return_token_ids).reply(completion)


OPERATIONS = [
    Operation(
        "POST",
        "/v1/completions",
        completions,
        "OpenAI completions",
        body=TextCompletion,
        answers={200: TextReply},
        events={"message": TextChunk},
        generates=True,
        batch=Batchable(TextCompletion, _prepare, _write),
    )
]
