"""OpenAI's chat completions and completions, over the same jobs. Judged by the official SDKs unchanged."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import groupby
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from penstock.core.errors import InvalidRequest, LogRewound, Unsupported
from penstock.core.events import Completion, Ended, Event, Logprob, Tokens
from penstock.core.job import Identifier, Job, MaxTokens, ModelName, Priority, Request, TopLogprobs
from penstock.core.tools import CallDelta, Piece, ToolParser, call_id, named, parse_tool_calls
from penstock.gateway.http import Call, json_reply
from penstock.gateway.responses.stream import logprob_view
from penstock.gateway.routes.bodies import (
    ChatMessages,
    Operation,
    Prepared,
    StructuredBody,
    TokenId,
    plain,
    submission,
)
from penstock.gateway.routes.jobs import tool_call_view, usage_view
from penstock.gateway.service import Gateway
from penstock.gateway.sse import ascii_json, json_string


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class OpenAIBody(StructuredBody, kw_only=True, frozen=True):
    """Fields of both generation routes. What OpenAI has and this server cannot honour is refused, not dropped."""

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Identifier | None = None
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
        if self.functions or self.function_call is not None:
            raise Unsupported("functions and function_call are not supported: use tools.", param="functions")
        if self.audio is not None or (self.modalities and self.modalities != ["text"]):
            raise Unsupported("Only text can be generated.", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        request = Request(
            model=self.model,
            messages=plain(self.messages),
            sampling=self.sampling(
                max_tokens=self.max_completion_tokens or default_max_tokens,
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
        request = Request(
            model=self.model,
            prompt=texts[0] if texts else None,
            prompt_ids=None if texts else tuple(part for part in parts if isinstance(part, int)),
            sampling=self.sampling(max_tokens=16, temperature=1.0, logprobs=self.logprobs),
            n=self.n or 1,
        )
        return self.structured(request)


# ---------------------------------------------------------------------------------------------- routes


async def chat_completions(call: Call) -> ASGIApp:
    body = await call.body(ChatCompletion)
    request = body.request(call.gateway.config.default_max_tokens)
    return await _reply(call, body, request, _chat_dialect(request))


async def completions(call: Call) -> ASGIApp:
    body = await call.body(TextCompletion)
    return await _reply(call, body, body.request(), TextDialect)


def _chat_dialect(request: Request) -> type[Dialect]:
    return ToolDialect if request.callable_tools else ChatDialect


async def _prepare_chat(gateway: Gateway, tenant: str, body: ChatCompletion) -> Prepared:
    return Prepared(body.request(gateway.config.default_max_tokens))


async def _prepare_text(gateway: Gateway, tenant: str, body: TextCompletion) -> Prepared:
    return Prepared(body.request())


def _write_chat(gateway: Gateway, body: ChatCompletion, job: Job, completion: Completion) -> Any:
    dialect = _chat_dialect(job.request)
    return dialect(job, include_usage=False, token_ids=body.return_token_ids).reply(completion)


def _write_text(gateway: Gateway, body: TextCompletion, job: Job, completion: Completion) -> Any:
    return TextDialect(job, include_usage=False, token_ids=body.return_token_ids).reply(completion)


#: What a batch can be made of, of these routes.
OPERATIONS = {
    "/v1/chat/completions": Operation(ChatCompletion, _prepare_chat, _write_chat),
    "/v1/completions": Operation(TextCompletion, _prepare_text, _write_text),
}


async def _reply(call: Call, body: OpenAIBody, request: Request, dialect: type[Dialect]) -> ASGIApp:
    wish = submission(
        call, body, user=body.user_id or body.user, on_disconnect="cancel", priority=body.priority_class()
    )
    job = await call.gateway.submit(request, wish)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    writer = dialect(job, include_usage=usage, token_ids=body.return_token_ids)
    if body.stream:
        after = call.last_event_id or 0
        if after and writer.looks_back:
            writer.after, writer.replay = after, partial(call.gateway.broker.tail, job.tenant, job.id)
            if isinstance(writer, ToolDialect) and job.status.terminal and after == job.tokens + 1:
                after -= 1  # the end once more: its position is on more than the last block
        return await call.gateway.stream(call.gateway.follow(job, after), writer.render)
    completion = await call.gateway.fold(job, call.gone)
    return json_reply(writer.reply(completion), headers={"x-penstock-job": job.id})


# ---------------------------------------------------------------------------------------------- dialects


class Dialect:
    """Writes one job as chunks or as one reply. Ready tokens of a choice go into one chunk; ``id:`` is the position."""

    object = ""
    chunk_object = ""
    prefix = ""
    looks_back = False
    """Does what a chunk says depend on the tokens before it?"""

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
                blocks += self._run(event)
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

    def _run(self, run: Tokens) -> str:
        if run.choices is None and run.logprobs is None:
            text = "".join(run.texts)
            if not text and not self.token_ids:
                return ""
            delta = self._delta(0, text, None)
            return f"id: {run.last}\n" + self.chunk(f"[{self._with_ids(delta, run.ids)}]") if delta else ""
        # Each stretch of one choice's tokens is a chunk with the position of its last: a resume is exact anywhere.
        blocks = []
        choices = run.choices if run.choices is not None else [0] * len(run.ids)
        for choice, stretch in groupby(range(len(run.ids)), key=choices.__getitem__):
            indices = list(stretch)
            text = "".join(run.texts[i] for i in indices)
            logprobs = [(run.ids[i], run.texts[i], logprob) for i in indices if (logprob := _at(run.logprobs, i))]
            if text or logprobs or self.token_ids:
                delta = self._delta(choice, text, logprobs or None)
                if not delta:
                    continue
                chunk = self.chunk(f"[{self._with_ids(delta, [run.ids[i] for i in indices])}]")
                blocks.append(f"id: {run.position + indices[-1]}\n{chunk}")
        return "".join(blocks)

    def _end(self, ended: Ended, first: bool) -> str:
        if ended.error is not None:
            return f"id: {ended.position}\ndata: " + ascii_json({"error": ended.error}) + "\n\n"
        blocks = self._opening() if first and ended.position == 1 else ""
        for i, reason in enumerate(ended.finish_reasons):
            blocks += self.chunk(f"[{self._with_stop(self._finish(i, reason), ended.stop(i))}]")
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
                self._choice(i, text, completion, reason)
                | ({"stop_reason": stop} if (stop := completion.ended.stop(i)) is not None else {})
                | ({"token_ids": completion.ids[i]} if self.token_ids else {})
                for i, (text, reason) in enumerate(zip(completion.texts, completion.ended.finish_reasons, strict=True))
            ],
            "usage": usage_view(completion.ended),
        }

    def _with_ids(self, choice: str, ids: list[int]) -> str:
        return f'{choice[:-1]},"token_ids":[{",".join(map(str, ids))}]}}' if self.token_ids else choice

    def _with_stop(self, choice: str, stop: str | None) -> str:
        """The choice's last entry, with the stop string that ended it (as vLLM tells it)."""
        return choice if stop is None else f'{choice[:-1]},"stop_reason":{json_string(stop)}}}'

    def _opening(self) -> str:
        return ""

    def _delta(self, index: int, text: str, logprobs: list[tuple[int, str, Logprob]] | None) -> str:
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

    def _delta(self, index: int, text: str, logprobs: list[tuple[int, str, Logprob]] | None) -> str:
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

    def _logprobs(self, tokens: list[tuple[int, str, Logprob]]) -> dict[str, Any]:
        count = self.job.request.sampling.logprobs or 0
        return {"content": [logprob_view(text, logprob, count) for _, text, logprob in tokens]}


class ToolDialect(ChatDialect):
    """Chat with tools: what a chunk says of a reply depends on all of its text so far."""

    empty = "null"
    looks_back = True

    def __init__(self, job: Job, *, include_usage: bool, token_ids: bool = False) -> None:
        super().__init__(job, include_usage=include_usage, token_ids=token_ids)
        self._parsers = [ToolParser(job.request) for _ in range(job.request.n)]

    def _look_at(self, choice: int, token: int, text: str, logprob: Logprob | None) -> None:
        self._parsers[choice].push(text)

    def _delta(self, index: int, text: str, logprobs: list[tuple[int, str, Logprob]] | None) -> str:
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

    def __init__(self, job: Job, *, include_usage: bool, token_ids: bool = False) -> None:
        super().__init__(job, include_usage=include_usage, token_ids=token_ids)
        self.looks_back = job.request.sampling.logprobs is not None
        self._places = [_Places() for _ in range(job.request.n)]

    def _look_at(self, choice: int, token: int, text: str, logprob: Logprob | None) -> None:
        if logprob is not None:
            self._places[choice].next(text, logprob)

    def _delta(self, index: int, text: str, logprobs: list[tuple[int, str, Logprob]] | None) -> str:
        entries = _text_logprobs(logprobs, self._places[index]) if logprobs else None
        extra = f',"logprobs":{ascii_json(entries)}'
        return f'{{"index":{index},"text":{json_string(text)}{extra},"finish_reason":null}}'

    def _finish(self, index: int, reason: str) -> str:
        return f'{{"index":{index},"text":"","logprobs":null,"finish_reason":{json_string(reason)}}}'

    def _choice(self, index: int, text: str, completion: Completion, reason: str) -> dict[str, Any]:
        logprobs = completion.logprobs[index]
        return {
            "index": index,
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

    def next(self, text: str, logprob: Logprob) -> int:
        """Where the token begins that comes next. (Its own text, or of older logs what it completed.)"""
        place = self._offset
        data = logprob.data or (text if logprob.text is None else logprob.text).encode()
        self._offset += len(self._decoder.decode(data))
        return place


def _text_logprobs(tokens: list[tuple[int, str, Logprob]], places: _Places) -> dict[str, Any]:
    texts, tops = [], []
    for _, text, logprob in tokens:
        own = text if logprob.text is None else logprob.text
        texts.append(own)
        top: dict[str, float] = {}
        for other in sorted(logprob.top, key=lambda each: -each.logprob):
            top.setdefault(other.text, other.logprob)  # of several tokens with one text the likeliest
        top.setdefault(own, logprob.logprob)
        tops.append(top)
    return {
        "tokens": texts,
        "token_logprobs": [logprob.logprob for _, _, logprob in tokens],
        "top_logprobs": tops,
        "text_offset": [places.next(text, logprob) for _, text, logprob in tokens],
    }
