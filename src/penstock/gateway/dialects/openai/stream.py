"""One job as OpenAI's chunks, or as one reply. Ready tokens of a choice go into one chunk, with their position as its
``id:``."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from itertools import groupby
from typing import Any, cast

import msgspec
from msgspec import UNSET

from penstock.api.errors import ErrorBody
from penstock.api.jobs import UsageView
from penstock.core.errors import LogRewound
from penstock.core.events import Completion, Ended, Event, Logprob, TokenLogprob, Tokens
from penstock.core.job import FinishReason, Job, Usage
from penstock.core.tools import CallDelta, Piece, ToolParser, call_id, named, parse_tool_calls
from penstock.gateway.dialects.answers import logprob_view
from penstock.gateway.dialects.native.answers import tool_call_view, usage_view
from penstock.gateway.dialects.openai.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    FunctionCallDelta,
    TextChoice,
    TextChunkChoice,
    TextLogprobs,
    TextReply,
    ToolCallDelta,
)
from penstock.gateway.sse import ascii_json, json_string

ChunkChoice = ChatChunkChoice | TextChunkChoice
Logprobs = list[TokenLogprob]


class ChunkWriter:
    """What both routes' writers share.

    *include_usage*: a chunk with it stands before the end. *token_ids*: chunks have those of their tokens. *first*:
    the index of the job's first choice. *positions*: are there ``id:``s?
    """

    chunk_object = ""
    prefix = ""
    looks_back = False
    """Does what a chunk says depend on the tokens before it?"""

    def __init__(
        self, job: Job, *, include_usage: bool, token_ids: bool = False, first: int = 0, positions: bool = True
    ) -> None:
        self.job = job
        self.include_usage = include_usage
        self.token_ids = token_ids
        self.first = first
        self.positions = positions
        self.id = self.prefix + job.id.removeprefix("job_")
        self.created = int(job.created_at)
        self.after = 0
        """What the reader has seen; ``replay`` gives the log from its beginning, to know where that leaves off."""
        self.replay: Callable[[], AsyncGenerator[Event]] | None = None
        model = json_string(job.request.model)
        self._head = f'{{"id":"{self.id}","object":"{self.chunk_object}","created":{self.created},"model":{model},'
        self._tail = ',"usage":null}' if include_usage else "}"

    # ------------------------------------------------------------------------------------ as chunks

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
            yield f"{retry}data: {ascii_json(ErrorBody.of(error.info))}\n\n".encode()

    async def _from_the_beginning(
        self, events: AsyncIterator[Event], replay: Callable[[], AsyncGenerator[Event]]
    ) -> AsyncIterator[Event]:
        """*events*, after everything before them has been looked at."""
        caught_up = False
        async for event in events:
            if not caught_up:
                await self._catch_up(replay())
                caught_up = True
            yield event

    async def _catch_up(self, events: AsyncGenerator[Event]) -> None:
        try:
            async for event in events:
                if isinstance(event, Ended):
                    return
                for i in range(min(len(event.ids), self.after - event.position + 1)):
                    choice = event.choices[i] if event.choices is not None else 0
                    self._look_at(choice, event.texts[i], _at(event.logprobs, i))
                if event.last >= self.after:
                    return
        finally:
            await events.aclose()

    def run(self, run: Tokens) -> str:
        """The chunks of some more tokens."""
        if run.choices is None and run.logprobs is None and not self.token_ids:
            choice = self._plain("".join(run.texts))
            return self._id(run.last) + self._chunk(f"[{choice}]") if choice else ""
        # Each stretch of one choice's tokens is a chunk with the position of its last: a resume is exact anywhere.
        blocks = []
        choices = run.choices if run.choices is not None else [0] * len(run.ids)
        for index, stretch in groupby(range(len(run.ids)), key=choices.__getitem__):
            places = list(stretch)
            text = "".join(run.texts[i] for i in places)
            logprobs: list[TokenLogprob] = [
                (run.ids[i], run.texts[i], logprob) for i in places if (logprob := _at(run.logprobs, i))
            ]
            ids = [run.ids[i] for i in places] if self.token_ids else None
            if (text or logprobs or ids) and (delta := self._delta(index, text, logprobs, ids)) is not None:
                blocks.append(self._id(run.position + places[-1]) + self.chunk([delta]))
        return "".join(blocks)

    def chunk(self, choices: Sequence[ChunkChoice], usage: UsageView | None = None) -> str:
        return self._chunk(ascii_json(choices), usage)

    def _chunk(self, choices: str, usage: UsageView | None = None) -> str:
        tail = self._tail if usage is None else f',"usage":{ascii_json(usage)}}}'
        return f'data: {self._head}"choices":{choices}{tail}\n\n'

    def _end(self, ended: Ended, first: bool) -> str:
        if ended.error is not None:
            return f"id: {ended.position}\ndata: {ascii_json(ErrorBody.of(ended.error))}\n\n"
        blocks = self._opening() if first and ended.position == 1 else ""
        blocks += self.finishes(ended)
        # The end's position belongs to its last block: who saw less of it gets all of it again.
        return f"{blocks}{self.usage(ended.usage)}id: {ended.position}\ndata: [DONE]\n\n"

    def _id(self, position: int) -> str:
        return f"id: {position}\n" if self.positions else ""

    def finishes(self, ended: Ended) -> str:
        """The chunks that say how each choice ended, and at which stop string (as vLLM tells it)."""
        return "".join(
            self.chunk([self._finish(i, cast("FinishReason", reason), ended.stop(i))])
            for i, reason in enumerate(ended.finish_reasons)
        )

    def usage(self, usage: Usage) -> str:
        """The chunk that tells it, if it is wanted."""
        return self.chunk([], usage_view(usage)) if self.include_usage else ""

    def _opening(self) -> str:
        return ""

    def _look_at(self, choice: int, text: str, logprob: Logprob | None) -> None:
        """Of a token that the reader has seen, what matters for those behind it."""

    def _plain(self, text: str) -> str:
        """The entry of more *text* of the only choice, as JSON; empty where there is nothing to say yet."""
        raise NotImplementedError

    def _delta(self, index: int, text: str, logprobs: Logprobs, ids: list[int] | None) -> ChunkChoice | None:
        """The entry of more of a choice; None where there is nothing to say yet."""
        raise NotImplementedError

    def _finish(self, index: int, reason: FinishReason, stop: str | None) -> ChunkChoice:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------ as one reply

    def reply(self, completion: Completion) -> ChatReply | TextReply:
        assert completion.ended is not None
        return self.answer(self.choices(completion), completion.ended.usage)

    def answer(self, choices: list[Any], usage: Usage) -> ChatReply | TextReply:
        """The reply of some *choices*, which `choices` has made."""
        raise NotImplementedError

    def choices(self, completion: Completion) -> list[Any]:
        assert completion.ended is not None
        reasons = completion.ended.finish_reasons
        return [self._choice(i, completion, cast("FinishReason", reason)) for i, reason in enumerate(reasons)]

    def _choice(self, index: int, completion: Completion, reason: FinishReason) -> ChatChoice | TextChoice:
        raise NotImplementedError


class ChatWriter(ChunkWriter):
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl-"
    empty: str | None = ""
    """The content of a message that has not begun."""

    def _opening(self) -> str:
        delta = ChatDelta("assistant", self.empty)
        return "".join(
            self.chunk([ChatChunkChoice(index=i, delta=delta, finish_reason=None)]) for i in range(self.job.request.n)
        )

    def _plain(self, text: str) -> str:
        # Written by hand: a run of four tokens takes 0.6 µs so, and 5.7 µs as a `ChatChunkChoice`.
        return f'{{"index":0,"delta":{{"content":{json_string(text)}}},"finish_reason":null}}' if text else ""

    def _delta(self, index: int, text: str, logprobs: Logprobs, ids: list[int] | None) -> ChunkChoice | None:
        return self._entry(index, ChatDelta(content=text), logprobs, ids)

    def _entry(
        self, index: int, delta: ChatDelta, logprobs: list[TokenLogprob], ids: list[int] | None
    ) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(logprobs) if logprobs else UNSET,
            finish_reason=None,
            token_ids=UNSET if ids is None else ids,
        )

    def _finish(self, index: int, reason: FinishReason, stop: str | None) -> ChunkChoice:
        return ChatChunkChoice(
            index=index, delta=ChatDelta(), finish_reason=reason, stop_reason=UNSET if stop is None else stop
        )

    def answer(self, choices: list[Any], usage: Usage) -> ChatReply:
        return ChatReply(self.id, "chat.completion", self.created, self.job.request.model, choices, usage_view(usage))

    def _choice(self, index: int, completion: Completion, reason: FinishReason) -> ChatChoice:
        assert completion.ended is not None
        logprobs, stop = completion.logprobs[index], completion.ended.stop(index)
        return ChatChoice(
            index=index,
            message=self._message(index, completion.texts[index]),
            logprobs=self._logprobs(logprobs) if logprobs else None,
            finish_reason=reason,
            stop_reason=UNSET if stop is None else stop,
            token_ids=completion.ids[index] if self.token_ids else UNSET,
        )

    def _message(self, index: int, text: str) -> AssistantMessage:
        return AssistantMessage(role="assistant", content=text, refusal=None, annotations=[])

    def _logprobs(self, tokens: list[TokenLogprob]) -> ChatLogprobs:
        count = self.job.request.sampling.logprobs or 0
        return ChatLogprobs([logprob_view(text, logprob, count) for _, text, logprob in tokens if logprob], None)


class ToolWriter(ChatWriter):
    """Chat with tools: what a chunk says of a reply depends on all of its text so far."""

    empty = None
    looks_back = True

    def __init__(self, job: Job, *, include_usage: bool, token_ids: bool = False) -> None:
        super().__init__(job, include_usage=include_usage, token_ids=token_ids)
        self._parsers = [ToolParser(job.request) for _ in range(job.request.n)]

    def _look_at(self, choice: int, text: str, logprob: Logprob | None) -> None:
        self._parsers[choice].push(text)

    def _plain(self, text: str) -> str:
        choice = self._delta(0, text, [], None) if text else None
        return "" if choice is None else ascii_json(choice)

    def _delta(self, index: int, text: str, logprobs: Logprobs, ids: list[int] | None) -> ChunkChoice | None:
        delta = self._parts(index, self._parsers[index].push(text))
        return self._entry(index, delta or ChatDelta(), logprobs, ids) if delta or logprobs or ids else None

    def _parts(self, index: int, pieces: list[Piece]) -> ChatDelta | None:
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        calls: dict[int, ToolCallDelta] = {}
        for piece in pieces:
            if isinstance(piece, CallDelta):
                call = calls.get(
                    piece.index, ToolCallDelta(index=piece.index, function=FunctionCallDelta(arguments=""))
                )
                calls[piece.index] = self._more(call, piece, index)
        if not (text or calls):
            return None
        return ChatDelta(content=text or UNSET, tool_calls=list(calls.values()) or UNSET)

    def _more(self, call: ToolCallDelta, piece: CallDelta, index: int) -> ToolCallDelta:
        """*call* with one more *piece* of it; only its first one has a name."""
        function = FunctionCallDelta(
            name=call.function.name if piece.name is None else piece.name,
            arguments=call.function.arguments + piece.arguments,
        )
        if piece.name is None:
            return msgspec.structs.replace(call, function=function)
        return ToolCallDelta(
            index=piece.index, id=call_id(self.job.id, index, piece.index), type="function", function=function
        )

    def _end(self, ended: Ended, first: bool) -> str:
        rest = [self._parts(i, parser.finish()) for i, parser in enumerate(self._parsers)]
        choices = [self._entry(i, delta, [], None) for i, delta in enumerate(rest) if delta is not None]
        end = super()._end(ended, first)
        if not choices or ended.error is not None or self.after >= ended.position:
            return end
        # What was held back to the end is in one block, which has the end's position: it is never written twice, and
        # a reader who saw it and no more gets the blocks behind it again.
        return f"id: {ended.position}\n" + self.chunk(choices) + end

    def _message(self, index: int, text: str) -> AssistantMessage:
        content, calls = parse_tool_calls(text, self.job.request)
        views = [tool_call_view(call) for call in named(calls, self.job.id, index)] if calls else UNSET
        return AssistantMessage(role="assistant", content=content, tool_calls=views, refusal=None, annotations=[])


class TextWriter(ChunkWriter):
    chunk_object = "text_completion"
    prefix = "cmpl-"

    def __init__(
        self, job: Job, *, include_usage: bool, token_ids: bool = False, first: int = 0, positions: bool = True
    ) -> None:
        super().__init__(job, include_usage=include_usage, token_ids=token_ids, first=first, positions=positions)
        self.looks_back = job.request.sampling.logprobs is not None
        self._places: defaultdict[int, _Places] = defaultdict(_Places)

    def opening(self, n: int, text: str, ids: list[int], logprobs: list[TokenLogprob]) -> str:
        """The chunk with which *n* choices begin that echo their prompt."""
        return self.chunk([self._delta(i, text, logprobs, ids if self.token_ids else None) for i in range(n)])

    def _look_at(self, choice: int, text: str, logprob: Logprob | None) -> None:
        if logprob is not None:
            self._places[choice].next(text, logprob)

    def _plain(self, text: str) -> str:
        # Written by hand, as in `ChatWriter`.
        index = self.first
        return f'{{"index":{index},"text":{json_string(text)},"logprobs":null,"finish_reason":null}}' if text else ""

    def _delta(self, index: int, text: str, logprobs: Logprobs, ids: list[int] | None) -> TextChunkChoice:
        return TextChunkChoice(
            index=self.first + index,
            text=text,
            logprobs=_text_logprobs(logprobs, self._places[index]) if logprobs else None,
            finish_reason=None,
            token_ids=UNSET if ids is None else ids,
        )

    def _finish(self, index: int, reason: FinishReason, stop: str | None) -> ChunkChoice:
        return TextChunkChoice(self.first + index, "", None, reason, UNSET if stop is None else stop)

    def answer(self, choices: list[Any], usage: Usage) -> TextReply:
        return TextReply(self.id, "text_completion", self.created, self.job.request.model, choices, usage_view(usage))

    def _choice(self, index: int, completion: Completion, reason: FinishReason) -> TextChoice:
        assert completion.ended is not None
        logprobs, stop = completion.logprobs[index], completion.ended.stop(index)
        return TextChoice(
            index=self.first + index,
            text=completion.texts[index],
            logprobs=_text_logprobs(logprobs, _Places()) if logprobs else None,
            finish_reason=reason,
            stop_reason=UNSET if stop is None else stop,
            token_ids=completion.ids[index] if self.token_ids else UNSET,
        )


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


def _text_logprobs(tokens: list[TokenLogprob], places: _Places) -> TextLogprobs:
    return TextLogprobs(
        tokens=[_own(text, logprob) for _, text, logprob in tokens],
        token_logprobs=[None if logprob is None else logprob.logprob for _, _, logprob in tokens],
        top_logprobs=[None if logprob is None else _best(text, logprob) for _, text, logprob in tokens],
        text_offset=[places.next(text, logprob) for _, text, logprob in tokens],
    )


def _best(text: str, logprob: Logprob) -> dict[str, float]:
    """The likeliest tokens by their texts, and the one that was drawn. Of several with one text it is the likeliest."""
    best: dict[str, float] = {}
    for other in sorted(logprob.top, key=lambda each: -each.logprob):
        best.setdefault(other.text, other.logprob)
    best.setdefault(_own(text, logprob), logprob.logprob)
    return best
