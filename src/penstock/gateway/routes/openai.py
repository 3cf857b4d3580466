"""OpenAI's chat completions and completions, over the same jobs. Judged by the official SDKs unchanged."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import groupby
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest, LogRewound, Unsupported
from penstock.core.events import Completion, Ended, Event, Logprob, Tokens
from penstock.core.job import Identifier, Job, MaxTokens, ModelName, Priority, Request, TopLogprobs
from penstock.gateway.http import Call, json_reply
from penstock.gateway.routes.bodies import ChatMessages, JobBody, TokenId, submission
from penstock.gateway.routes.jobs import usage_view
from penstock.gateway.sse import ascii_json, json_string


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class OpenAIBody(JobBody, kw_only=True, frozen=True):
    """Fields of both generation routes. What OpenAI has and this server cannot honour is refused, not dropped."""

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Identifier | None = None
    service_tier: str | None = None
    return_token_ids: bool = False

    def priority_class(self) -> Priority:
        return Priority.BATCH if self.service_tier == "flex" else Priority.NORMAL


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str = "text"


class ChatCompletion(OpenAIBody, kw_only=True, frozen=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: ChatMessages
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    def request(self, default_max_tokens: int) -> Request:
        if self.tools or self.functions:
            raise Unsupported("Tools are not supported by this server yet.", param="tools")
        if self.response_format is not None and self.response_format.type != "text":
            kind = self.response_format.type
            raise Unsupported(f"response_format {kind!r} is not supported by this server yet.", param="response_format")
        if self.audio is not None or (self.modalities and self.modalities != ["text"]):
            raise Unsupported("Only text can be generated.", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        return Request(
            model=self.model,
            messages=tuple(message.plain() for message in self.messages),
            sampling=self.sampling(
                max_tokens=self.max_completion_tokens or default_max_tokens,
                temperature=1.0,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            n=self.n or 1,
            continue_final=self._begins_reply(),
        )

    def _begins_reply(self) -> bool:
        """Is the last message the beginning of the reply? (vLLM's fields, less the one that would contradict.)"""
        if not self.continue_final_message:
            if self.add_generation_prompt is False:
                raise Unsupported(
                    "add_generation_prompt: false is supported with continue_final_message: true only.",
                    param="add_generation_prompt",
                )
            return False
        if self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message goes on with the last message; add_generation_prompt would begin another.",
                param="add_generation_prompt",
            )
        if self.messages[-1].role != "assistant":
            raise InvalidRequest(
                "continue_final_message needs an assistant's message at the end: the beginning of the reply.",
                param="continue_final_message",
            )
        return True


class TextCompletion(OpenAIBody, kw_only=True, frozen=True):
    """The body of ``POST /v1/completions``. One prompt a request: a text (or a list with one), or token ids."""

    prompt: str | Annotated[list[TokenId | str], Meta(min_length=1)]
    logprobs: TopLogprobs | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def request(self) -> Request:
        if self.echo or self.suffix:
            raise Unsupported("echo and suffix are not supported.", param="echo" if self.echo else "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Unsupported("best_of is not supported beyond n.", param="best_of")
        parts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        texts = [part for part in parts if isinstance(part, str)]
        if texts and len(parts) > 1:
            raise Unsupported("Send one prompt a request.", param="prompt")
        return Request(
            model=self.model,
            prompt=texts[0] if texts else None,
            prompt_ids=None if texts else tuple(part for part in parts if isinstance(part, int)),
            sampling=self.sampling(max_tokens=16, temperature=1.0, logprobs=self.logprobs),
            n=self.n or 1,
        )


# ---------------------------------------------------------------------------------------------- routes


async def chat_completions(call: Call) -> ASGIApp:
    body = await call.body(ChatCompletion)
    return await _reply(call, body, body.request(call.gateway.config.default_max_tokens), ChatDialect)


async def completions(call: Call) -> ASGIApp:
    body = await call.body(TextCompletion)
    return await _reply(call, body, body.request(), TextDialect)


async def _reply(call: Call, body: OpenAIBody, request: Request, dialect: type[Dialect]) -> ASGIApp:
    wish = submission(
        call, body, user=body.user_id or body.user, on_disconnect="cancel", priority=body.priority_class()
    )
    job = await call.gateway.submit(request, wish)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    writer = dialect(job, include_usage=usage, token_ids=body.return_token_ids)
    if body.stream:
        return await call.gateway.stream(call.gateway.follow(job, call.last_event_id or 0), writer.render)
    completion = await call.gateway.fold(job, call.gone)
    return json_reply(writer.reply(completion), headers={"x-penstock-job": job.id})


# ---------------------------------------------------------------------------------------------- dialects


class Dialect:
    """Writes one job as chunks or as one reply. Ready tokens of a choice go into one chunk; ``id:`` is the position."""

    object = ""
    chunk_object = ""
    prefix = ""

    def __init__(self, job: Job, *, include_usage: bool, token_ids: bool = False) -> None:
        self.job = job
        self.include_usage = include_usage
        self.token_ids = token_ids
        self.id = self.prefix + job.id.removeprefix("job_")
        model = json_string(job.request.model)
        created = int(job.created_at)
        self._head = f'{{"id":"{self.id}","object":"{self.chunk_object}","created":{created},"model":{model},'
        self._tail = ',"usage":null}' if include_usage else "}"

    def chunk(self, choices: str, usage: str | None = None) -> str:
        tail = self._tail if usage is None else f',"usage":{usage}}}'
        return f'data: {self._head}"choices":{choices}{tail}\n\n'

    async def render(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        retry = "retry: 1000\n"
        first = True
        try:
            async for event in events:
                if isinstance(event, Ended):
                    yield (retry + self._end(event, first)).encode()
                    return
                blocks = self._opening() if first and event.position == 1 else ""
                blocks += self._run(event)
                first = False
                if blocks:
                    yield (retry + blocks).encode()
                    retry = ""
        except LogRewound as error:  # the store lost what this reader was given
            yield f"{retry}data: {ascii_json({'error': error.info})}\n\n".encode()

    def _run(self, run: Tokens) -> str:
        if run.choices is None and run.logprobs is None:
            text = "".join(run.texts)
            if not text and not self.token_ids:
                return ""
            return f"id: {run.last}\n" + self.chunk(f"[{self._with_ids(self._delta(0, text, None), run.ids)}]")
        # Each stretch of one choice's tokens is a chunk with the position of its last: a resume is exact anywhere.
        blocks = []
        choices = run.choices if run.choices is not None else [0] * len(run.ids)
        for choice, stretch in groupby(range(len(run.ids)), key=choices.__getitem__):
            indices = list(stretch)
            text = "".join(run.texts[i] for i in indices)
            logprobs = [(run.ids[i], run.texts[i], logprob) for i in indices if (logprob := _at(run.logprobs, i))]
            if text or logprobs or self.token_ids:
                delta = self._delta(choice, text, logprobs or None)
                chunk = self.chunk(f"[{self._with_ids(delta, [run.ids[i] for i in indices])}]")
                blocks.append(f"id: {run.position + indices[-1]}\n{chunk}")
        return "".join(blocks)

    def _end(self, ended: Ended, first: bool) -> str:
        if ended.error is not None:
            return f"id: {ended.position}\ndata: " + ascii_json({"error": ended.error}) + "\n\n"
        blocks = self._opening() if first and ended.position == 1 else ""
        for i, reason in enumerate(ended.finish_reasons):
            blocks += self.chunk(f"[{self._finish(i, reason)}]")
        if self.include_usage:
            blocks += self.chunk("[]", ascii_json(usage_view(ended)))
        # The end's position belongs to its last block: who saw less of it gets all of it again.
        return f"{blocks}id: {ended.position}\ndata: [DONE]\n\n"

    def reply(self, completion: Completion) -> dict[str, Any]:
        assert completion.ended is not None
        return {
            "id": self.id,
            "object": self.object,
            "created": int(self.job.created_at),
            "model": self.job.request.model,
            "choices": [
                self._choice(i, text, completion, reason) | ({"token_ids": completion.ids[i]} if self.token_ids else {})
                for i, (text, reason) in enumerate(zip(completion.texts, completion.ended.finish_reasons, strict=True))
            ],
            "usage": usage_view(completion.ended),
        }

    def _with_ids(self, choice: str, ids: list[int]) -> str:
        return f'{choice[:-1]},"token_ids":[{",".join(map(str, ids))}]}}' if self.token_ids else choice

    def _opening(self) -> str:
        return ""

    def _delta(self, index: int, text: str, logprobs: list[tuple[int, str, Logprob]] | None) -> str:
        raise NotImplementedError

    def _finish(self, index: int, reason: str) -> str:
        raise NotImplementedError

    def _choice(self, index: int, text: str, completion: Completion, reason: str) -> dict[str, Any]:
        raise NotImplementedError


class ChatDialect(Dialect):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def _opening(self) -> str:
        return "".join(
            self.chunk(f'[{{"index":{i},"delta":{{"role":"assistant","content":""}},"finish_reason":null}}]')
            for i in range(self.job.request.n)
        )

    def _delta(self, index: int, text: str, logprobs: list[tuple[int, str, Logprob]] | None) -> str:
        extra = f',"logprobs":{ascii_json(_chat_logprobs(logprobs))}' if logprobs else ""
        return f'{{"index":{index},"delta":{{"content":{json_string(text)}}}{extra},"finish_reason":null}}'

    def _finish(self, index: int, reason: str) -> str:
        return f'{{"index":{index},"delta":{{}},"finish_reason":{json_string(reason)}}}'

    def _choice(self, index: int, text: str, completion: Completion, reason: str) -> dict[str, Any]:
        logprobs = completion.logprobs[index]
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }


class TextDialect(Dialect):
    object = "text_completion"
    chunk_object = "text_completion"
    prefix = "cmpl-"

    def _delta(self, index: int, text: str, logprobs: list[tuple[int, str, Logprob]] | None) -> str:
        extra = f',"logprobs":{ascii_json(_text_logprobs(logprobs))}' if logprobs else ',"logprobs":null'
        return f'{{"index":{index},"text":{json_string(text)}{extra},"finish_reason":null}}'

    def _finish(self, index: int, reason: str) -> str:
        return f'{{"index":{index},"text":"","logprobs":null,"finish_reason":{json_string(reason)}}}'

    def _choice(self, index: int, text: str, completion: Completion, reason: str) -> dict[str, Any]:
        logprobs = completion.logprobs[index]
        return {
            "index": index,
            "text": text,
            "logprobs": _text_logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }


def _at(logprobs: list[Logprob | None] | None, i: int) -> Logprob | None:
    return logprobs[i] if logprobs is not None else None


def _chat_logprobs(tokens: list[tuple[int, str, Logprob]]) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(text, logprob.logprob), "top_logprobs": [entry(top.text, top.logprob) for top in logprob.top]}
            for _, text, logprob in tokens
        ]
    }


def _text_logprobs(tokens: list[tuple[int, str, Logprob]]) -> dict[str, Any]:
    offsets, offset = [], 0
    for _, text, _logprob in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": [text for _, text, _ in tokens],
        "token_logprobs": [logprob.logprob for _, _, logprob in tokens],
        "top_logprobs": [{top.text: top.logprob for top in logprob.top} for _, _, logprob in tokens],
        "text_offset": offsets,
    }
