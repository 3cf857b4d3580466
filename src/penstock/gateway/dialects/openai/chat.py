"""OpenAI's chat completions and completions, over the same jobs. Judged by the official SDKs unchanged."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import groupby
from typing import Any

import msgspec
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest, LogRewound, Unsupported
from penstock.core.events import Completion, Ended, Event, Logprob, TokenLogprob, Tokens
from penstock.core.job import Job, MaxTokens, ModelName, OptionalIdentifier, Priority, Request, TopLogprobs, Usage
from penstock.core.tools import CallDelta, Piece, ToolParser, call_id, named, parse_tool_calls
from penstock.gateway.dialects.fields import (
    ChatMessages,
    StructuredBody,
    plain,
    submission_of,
)
from penstock.gateway.dialects.native.answers import tool_call_view, usage_view
from penstock.gateway.dialects.openai.answers import ChatChunk, ChatReply
from penstock.gateway.dialects.responses.stream import logprob_view
from penstock.gateway.http import Call, json_reply
from penstock.gateway.jobs import Jobs
from penstock.gateway.operation import Batchable, Operation, Prepared
from penstock.gateway.sse import ascii_json, json_string


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class OpenAIBody(StructuredBody, kw_only=True, frozen=True):
    """Fields of both generation routes. What OpenAI has and this server cannot honour is refused, not dropped."""

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: OptionalIdentifier | None = None
    service_tier: str | None = None
    return_token_ids: bool = False

    def priority_class(self) -> Priority:
        return Priority.BATCH if self.service_tier == "flex" else Priority.NORMAL


class ChatCompletion(OpenAIBody, kw_only=True, frozen=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: ChatMessages
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    def request(self, default_max_tokens: int) -> Request:
        if self.functions or self.function_call not in (None, "none", "auto"):
            raise Unsupported("functions and function_call are not supported: use tools.", param="functions")
        if self.audio is not None or (self.modalities and self.modalities != ["text"]):
            raise Unsupported("Only text can be generated.", param="modalities")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        # OpenAI has deprecated max_tokens for the longer name.
        body = msgspec.structs.replace(self, max_tokens=self.max_completion_tokens or self.max_tokens)
        request = Request(
            model=self.model,
            messages=plain(self.messages),
            sampling=body.sampling(
                max_tokens=default_max_tokens,
                temperature=1.0,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            n=self.n or 1,
            continue_final=self._begins_reply(),
        )
        return self.structured(request)

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


# ---------------------------------------------------------------------------------------------- routes


async def chat_completions(call: Call) -> ASGIApp:
    body = await call.body(ChatCompletion)
    request = body.request(call.config.default_max_tokens)
    return await respond(call, body, request, _chat_dialect(request))


def _chat_dialect(request: Request) -> type[Dialect]:
    return ToolDialect if request.callable_tools else ChatDialect


async def _prepare_chat(jobs: Jobs, body: ChatCompletion) -> Prepared:
    return Prepared(body.request(jobs.config.default_max_tokens))


def _write_chat(jobs: Jobs, body: ChatCompletion, job: Job, completion: Completion) -> Any:
    dialect = _chat_dialect(job.request)
    return dialect(job, include_usage=False, token_ids=body.return_token_ids).reply(completion)


async def respond(call: Call, body: OpenAIBody, request: Request, dialect: type[Dialect]) -> ASGIApp:
    """A job of *request*, streamed or answered as *dialect* writes it."""
    submission = submission_of(
        call, body, user=body.user_id or body.user, on_disconnect="cancel", priority=body.priority_class()
    )
    job = await call.jobs.submit(request, submission)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    writer = dialect(job, include_usage=usage, token_ids=body.return_token_ids)
    if body.stream:
        after = call.last_event_id or 0
        if after and writer.looks_back:
            writer.after, writer.replay = after, partial(call.jobs.log, job.id)
            if isinstance(writer, ToolDialect) and job.status.terminal and after == job.tokens + 1:
                after -= 1  # the end once more: its position is on more than the last block
        return await call.jobs.stream(call.jobs.follow(job, after), writer.render)
    completion = await call.jobs.fold(job, call.gone)
    return json_reply(writer.reply(completion), headers={"x-penstock-job": job.id})


# ---------------------------------------------------------------------------------------------- dialects


class Dialect:
    """Writes one job as chunks or as one reply. Ready tokens of a choice go into one chunk; ``id:`` is the position."""

    object = ""
    chunk_object = ""
    prefix = ""
    looks_back = False
    """Does what a chunk says depend on the tokens before it?"""

    positions = True
    """Are there ``id:``s?"""

    def __init__(self, job: Job, *, include_usage: bool, token_ids: bool = False) -> None:
        self.job = job
        self.include_usage = include_usage
        self.token_ids = token_ids
        self.id = self.prefix + job.id.removeprefix("job_")
        self.after = 0
        """What the reader has seen; ``replay`` gives the log from its beginning, to know where that leaves off."""
        self.replay: Callable[[], AsyncIterator[Event]] | None = None
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
            async for event in events if self.replay is None else self._from_the_beginning(events, self.replay):
                if isinstance(event, Ended):
                    yield (retry + self._end(event, first)).encode()
                    return
                blocks = self._opening() if first and event.position == 1 else ""
                blocks += self.run(event)
                first = False
                if blocks:
                    yield (retry + blocks).encode()
                    retry = ""
        except LogRewound as error:  # the store lost what this reader was given
            yield f"{retry}data: {ascii_json({'error': error.info})}\n\n".encode()

    async def _from_the_beginning(
        self, events: AsyncIterator[Event], replay: Callable[[], AsyncIterator[Event]]
    ) -> AsyncIterator[Event]:
        """*events*, after everything before them has been looked at."""
        caught_up = False
        async for event in events:
            if not caught_up:
                await self._catch_up(replay())
                caught_up = True
            yield event

    async def _catch_up(self, events: AsyncIterator[Event]) -> None:
        try:
            async for event in events:
                if isinstance(event, Ended):
                    return
                for i in range(min(len(event.ids), self.after - event.position + 1)):
                    choice = event.choices[i] if event.choices is not None else 0
                    self._look_at(choice, event.ids[i], event.texts[i], _at(event.logprobs, i))
                if event.last >= self.after:
                    return
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    def _look_at(self, choice: int, token: int, text: str, logprob: Logprob | None) -> None:
        """Of a token that the reader has seen, what matters for those behind it."""

    def run(self, run: Tokens) -> str:
        """The chunks of some more tokens."""
        if run.choices is None and run.logprobs is None:
            text = "".join(run.texts)
            if not text and not self.token_ids:
                return ""
            delta = self._delta(0, text, None)
            return self._id(run.last) + self.chunk(f"[{self._with_ids(delta, run.ids)}]") if delta else ""
        # Each stretch of one choice's tokens is a chunk with the position of its last: a resume is exact anywhere.
        blocks = []
        choices = run.choices if run.choices is not None else [0] * len(run.ids)
        for choice, stretch in groupby(range(len(run.ids)), key=choices.__getitem__):
            indices = list(stretch)
            text = "".join(run.texts[i] for i in indices)
            logprobs: list[TokenLogprob] = [
                (run.ids[i], run.texts[i], logprob) for i in indices if (logprob := _at(run.logprobs, i))
            ]
            if text or logprobs or self.token_ids:
                delta = self._delta(choice, text, logprobs or None)
                if not delta:
                    continue
                chunk = self.chunk(f"[{self._with_ids(delta, [run.ids[i] for i in indices])}]")
                blocks.append(self._id(run.position + indices[-1]) + chunk)
        return "".join(blocks)

    def _end(self, ended: Ended, first: bool) -> str:
        if ended.error is not None:
            return f"id: {ended.position}\ndata: " + ascii_json({"error": ended.error.shown}) + "\n\n"
        blocks = self._opening() if first and ended.position == 1 else ""
        blocks += self.finishes(ended)
        # The end's position belongs to its last block: who saw less of it gets all of it again.
        return f"{blocks}{self.usage(ended.usage)}id: {ended.position}\ndata: [DONE]\n\n"

    def _id(self, position: int) -> str:
        return f"id: {position}\n" if self.positions else ""

    def finishes(self, ended: Ended) -> str:
        """The chunks that say how each choice ended."""
        reasons = enumerate(ended.finish_reasons)
        return "".join(self.chunk(f"[{self._with_stop(self._finish(i, why), ended.stop(i))}]") for i, why in reasons)

    def usage(self, usage: Usage) -> str:
        """The chunk that tells it, if it is wanted."""
        return self.chunk("[]", ascii_json(usage_view(usage))) if self.include_usage else ""

    def reply(self, completion: Completion) -> dict[str, Any]:
        assert completion.ended is not None
        return self.answer(self.choices(completion), completion.ended.usage)

    def answer(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": int(self.job.created_at),
            "model": self.job.request.model,
            "choices": choices,
            "usage": usage_view(usage),
        }

    def choices(self, completion: Completion) -> list[dict[str, Any]]:
        ended = completion.ended
        assert ended is not None
        return [
            self._choice(i, text, completion, reason)
            | ({"stop_reason": stop} if (stop := ended.stop(i)) is not None else {})
            | ({"token_ids": completion.ids[i]} if self.token_ids else {})
            for i, (text, reason) in enumerate(zip(completion.texts, ended.finish_reasons, strict=True))
        ]

    def _with_ids(self, choice: str, ids: list[int]) -> str:
        return f'{choice[:-1]},"token_ids":[{",".join(map(str, ids))}]}}' if self.token_ids else choice

    def _with_stop(self, choice: str, stop: str | None) -> str:
        """The choice's last entry, with the stop string that ended it (as vLLM tells it)."""
        return choice if stop is None else f'{choice[:-1]},"stop_reason":{json_string(stop)}}}'

    def _opening(self) -> str:
        return ""

    def _delta(self, index: int, text: str, logprobs: list[TokenLogprob] | None) -> str:
        """A chunk's entry for more of a choice; empty where there is nothing to say yet."""
        raise NotImplementedError

    def _finish(self, index: int, reason: str) -> str:
        raise NotImplementedError

    def _choice(self, index: int, text: str, completion: Completion, reason: str) -> dict[str, Any]:
        raise NotImplementedError


class ChatDialect(Dialect):
    empty = '""'
    """The content of a message that has not begun."""
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def _opening(self) -> str:
        return "".join(
            self.chunk(f'[{{"index":{i},"delta":{{"role":"assistant","content":{self.empty}}},"finish_reason":null}}]')
            for i in range(self.job.request.n)
        )

    def _delta(self, index: int, text: str, logprobs: list[TokenLogprob] | None) -> str:
        extra = f',"logprobs":{ascii_json(self._logprobs(logprobs))}' if logprobs else ""
        return f'{{"index":{index},"delta":{{"content":{json_string(text)}}}{extra},"finish_reason":null}}'

    def _finish(self, index: int, reason: str) -> str:
        return f'{{"index":{index},"delta":{{}},"finish_reason":{json_string(reason)}}}'

    def _choice(self, index: int, text: str, completion: Completion, reason: str) -> dict[str, Any]:
        logprobs = completion.logprobs[index]
        return {
            "index": index,
            "message": {"role": "assistant", **self._message(index, text), "refusal": None, "annotations": []},
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }

    def _message(self, index: int, text: str) -> dict[str, Any]:
        return {"content": text}

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        count = self.job.request.sampling.logprobs or 0
        found = [logprob_view(text, logprob, count) for _, text, logprob in tokens if logprob]
        return {"content": found, "refusal": None}


class ToolDialect(ChatDialect):
    """Chat with tools: what a chunk says of a reply depends on all of its text so far."""

    empty = "null"
    looks_back = True

    def __init__(self, job: Job, *, include_usage: bool, token_ids: bool = False) -> None:
        super().__init__(job, include_usage=include_usage, token_ids=token_ids)
        self._parsers = [ToolParser(job.request) for _ in range(job.request.n)]

    def _look_at(self, choice: int, token: int, text: str, logprob: Logprob | None) -> None:
        self._parsers[choice].push(text)

    def _delta(self, index: int, text: str, logprobs: list[TokenLogprob] | None) -> str:
        delta = self._parts(index, self._parsers[index].push(text))
        if not (delta or logprobs or self.token_ids):
            return ""
        extra = f',"logprobs":{ascii_json(self._logprobs(logprobs))}' if logprobs else ""
        return f'{{"index":{index},"delta":{ascii_json(delta)}{extra},"finish_reason":null}}'

    def _parts(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if text := "".join(piece for piece in pieces if isinstance(piece, str)):
            delta["content"] = text
        calls: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            if isinstance(piece, CallDelta):
                call = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
                if piece.name is not None:
                    call |= {"id": call_id(self.job.id, index, piece.index), "type": "function"}
                    call["function"]["name"] = piece.name
                call["function"]["arguments"] += piece.arguments
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def _end(self, ended: Ended, first: bool) -> str:
        rest = [self._parts(i, parser.finish()) for i, parser in enumerate(self._parsers)]
        choices = [
            f'{{"index":{i},"delta":{ascii_json(delta)},"finish_reason":null}}' for i, delta in enumerate(rest) if delta
        ]
        end = super()._end(ended, first)
        if not choices or ended.error is not None or self.after >= ended.position:
            return end
        # What was held back to the end is in one block, which has the end's position: it is never written twice, and
        # a reader who saw it and no more gets the blocks behind it again.
        return f"id: {ended.position}\n" + self.chunk(f"[{','.join(choices)}]") + end

    def _message(self, index: int, text: str) -> dict[str, Any]:
        content, calls = parse_tool_calls(text, self.job.request)
        if not calls:
            return {"content": content}
        return {"content": content, "tool_calls": [tool_call_view(call) for call in named(calls, self.job.id, index)]}


class TextDialect(Dialect):
    object = "text_completion"
    chunk_object = "text_completion"
    prefix = "cmpl-"

    first = 0
    """The index of this prompt's first choice."""

    def __init__(self, job: Job, *, include_usage: bool, token_ids: bool = False) -> None:
        super().__init__(job, include_usage=include_usage, token_ids=token_ids)
        self.looks_back = job.request.sampling.logprobs is not None
        self._places: defaultdict[int, _Places] = defaultdict(_Places)

    def opening(self, n: int, text: str, ids: list[int], logprobs: list[TokenLogprob]) -> str:
        """The chunk with which *n* choices begin that echo their prompt."""
        delta = self._with_ids
        return self.chunk("[" + ",".join(delta(self._delta(i, text, logprobs or None), ids) for i in range(n)) + "]")

    def _look_at(self, choice: int, token: int, text: str, logprob: Logprob | None) -> None:
        if logprob is not None:
            self._places[choice].next(text, logprob)

    def _delta(self, index: int, text: str, logprobs: list[TokenLogprob] | None) -> str:
        entries = _text_logprobs(logprobs, self._places[index]) if logprobs else None
        extra = f',"logprobs":{ascii_json(entries)}'
        return f'{{"index":{self.first + index},"text":{json_string(text)}{extra},"finish_reason":null}}'

    def _finish(self, index: int, reason: str) -> str:
        return f'{{"index":{self.first + index},"text":"","logprobs":null,"finish_reason":{json_string(reason)}}}'

    def _choice(self, index: int, text: str, completion: Completion, reason: str) -> dict[str, Any]:
        logprobs = completion.logprobs[index]
        return {
            "index": self.first + index,
            "text": text,
            "logprobs": _text_logprobs(logprobs, _Places()) if logprobs else None,
            "finish_reason": reason,
        }


def _at(logprobs: list[Logprob | None] | None, i: int) -> Logprob | None:
    return logprobs[i] if logprobs is not None else None


class _Places:
    """Where the tokens of a choice are in the text that they make, in characters."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def next(self, text: str, logprob: Logprob | None) -> int:
        """Where the token begins that comes next. (Its own text, or of older logs what it completed.)"""
        place = self._offset
        data = logprob.data if logprob is not None else None
        self._offset += len(self._decoder.decode(data or _own(text, logprob).encode()))
        return place


def _own(text: str, logprob: Logprob | None) -> str:
    """A token's own text, where it is known: else the one that it completed."""
    return text if logprob is None or logprob.text is None else logprob.text


def _text_logprobs(tokens: list[TokenLogprob], places: _Places) -> dict[str, Any]:
    return {
        "tokens": [_own(text, logprob) for _, text, logprob in tokens],
        "token_logprobs": [None if logprob is None else logprob.logprob for _, _, logprob in tokens],
        "top_logprobs": [None if logprob is None else _best(text, logprob) for _, text, logprob in tokens],
        "text_offset": [places.next(text, logprob) for _, text, logprob in tokens],
    }


def _best(text: str, logprob: Logprob) -> dict[str, float]:
    """The likeliest tokens by their texts, and the one that was drawn. Of several with one text it is the likeliest."""
    best: dict[str, float] = {}
    for other in sorted(logprob.top, key=lambda each: -each.logprob):
        best.setdefault(other.text, other.logprob)
    best.setdefault(_own(text, logprob), logprob.logprob)
    return best


OPERATIONS = [
    Operation(
        method="POST",
        path="/v1/chat/completions",
        handler=chat_completions,
        summary="OpenAI chat completions",
        body=ChatCompletion,
        answers={200: ChatReply},
        events={"message": ChatChunk},
        generates=True,
        batch=Batchable(ChatCompletion, _prepare_chat, _write_chat),
    )
]
