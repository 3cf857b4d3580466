"""A reply as Anthropic's events, and as one message: the same content blocks."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any

import msgspec

from penstock.core.calls import CallReader, call_id
from penstock.core.errors import STATUS_OF_CODE, LogRewound, PenstockError
from penstock.core.events import Completion, Ended, Event, Phase, Span
from penstock.core.job import Job, Priority, Usage
from penstock.gateway.dialects.anthropic.answers import (
    BlockDelta,
    BlockDeltaEvent,
    BlockEvent,
    BlockStartEvent,
    BlockStopEvent,
    ContentBlock,
    DirectCaller,
    InputJsonDelta,
    MessageDeltaEvent,
    MessageEvent,
    MessageStartEvent,
    MessageStop,
    MessageStopEvent,
    MessageUsage,
    MessageView,
    OutputTokensDetails,
    SignatureDelta,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
    WholeMessageUsage,
)
from penstock.gateway.dialects.anthropic.errors import failure
from penstock.gateway.sse import frame


class Blocks:
    """Cuts a reply into content blocks as it comes, told as Anthropic's events: a thought, a text, a call, a text
    behind it, … *shows_thinking*: else the blocks of thoughts are empty, as Anthropic has it."""

    def __init__(self, job: Job, *, shows_thinking: bool = True) -> None:
        self._job = job.id
        self._calls = CallReader()
        self._shows_thinking = shows_thinking
        self._index = -1
        self._open: Phase | int | None = None
        """What the latest block is: a phase, or the number of a call; None before the first and behind the last one."""

    def push(self, spans: Iterable[Span]) -> Iterator[BlockEvent]:
        for phase, text in spans:
            if phase is Phase.TOOL:
                yield from self._more_calls(text)
            elif not text:
                continue
            elif phase is Phase.REASONING:
                if self._open is not phase:
                    yield from self._begin(phase, ThinkingBlock("", ""))
                if self._shows_thinking:
                    yield self._delta(ThinkingDelta(text))
            else:
                if self._open is not phase:
                    # Anthropic's own description wants the citations, and some clients want no null there.
                    yield from self._begin(phase, TextBlock("", []))
                yield self._delta(TextDelta(text))

    def _more_calls(self, text: str) -> Iterator[BlockEvent]:
        for piece in self._calls.push(text):
            if isinstance(self._open, Phase) or piece.index != self._open:
                id = call_id(self._job, 0, piece.index).replace("call_", "toolu_")
                yield from self._begin(piece.index, ToolUseBlock(id, piece.name or "", {}, DirectCaller("direct")))
            if piece.arguments:
                yield self._delta(InputJsonDelta(piece.arguments))

    def finish(self) -> Iterator[BlockEvent]:
        """The end of the last block."""
        if self._open is not None:
            if self._open is Phase.REASONING:
                yield self._delta(SignatureDelta(self._signature()))
            self._open = None
            yield BlockStopEvent("content_block_stop", self._index)

    def _begin(self, what: Phase | int, block: ContentBlock) -> Iterator[BlockEvent]:
        yield from self.finish()
        self._index += 1
        self._open = what
        yield BlockStartEvent("content_block_start", self._index, block)

    def _delta(self, delta: BlockDelta) -> BlockDeltaEvent:
        return BlockDeltaEvent("content_block_delta", self._index, delta)

    def _signature(self) -> str:
        return hashlib.sha256(f"{self._job}/{self._index}".encode()).hexdigest()


class MessageWriter:
    """Writes one job as Anthropic's stream: the last event of each run of tokens has their position as its ``id:``.

    *request_id* is told with errors. A reader who has seen all *after* gets what comes behind it.
    """

    def __init__(
        self,
        job: Job,
        request_id: str,
        *,
        after: int,
        look: Callable[[], Awaitable[Job]],
        replay: Callable[[], AsyncGenerator[Event]],
        shows_thinking: bool = True,
    ) -> None:
        """*look* gives the job as it stands, *replay* its log from the beginning."""
        self._job = job
        self._request_id = request_id
        self._after = after
        self._look = look
        self._replay = replay
        self._blocks = Blocks(job, shows_thinking=shows_thinking)

    async def render(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        retry = b"retry: 1000\n"
        opening: list[MessageEvent] | None = None
        try:
            async for event in events:
                if opening is None:
                    opening = await self._opening(event)
                if isinstance(event, Ended):
                    yield retry + self._end(event, opening)
                    return
                run = [*opening, *self._blocks.push(event.spans())]
                opening = []
                if run:
                    yield retry + _frames(run, event.last)
                    retry = b""
        except LogRewound as error:  # the store lost what this reader was given
            yield retry + frame("error", failure(error.info, error.status, self._request_id))

    async def _opening(self, first: Event) -> list[MessageEvent]:
        """The event before the first block. A reader who has seen it is taken to where it was instead."""
        if self._after:
            events = self._replay()
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, Ended) or event.position > self._after:
                        break
                    for _ in self._blocks.push(event.up_to(self._after).spans()):
                        pass  # it was told already
                    if event.last >= self._after:
                        break
            return []
        message = _message(self._job, [], None, await self._usage(first))
        return [MessageStartEvent("message_start", message)]

    async def _usage(self, first: Event) -> Usage:
        """What the engine counted of the prompt, as far as it is known: the end says it for certain."""
        if isinstance(first, Ended):
            return Usage(first.usage.prompt_tokens, cached_tokens=first.usage.cached_tokens)
        with contextlib.suppress(PenstockError):
            job = await self._look()
            return Usage(job.prompt_tokens or 0, cached_tokens=job.cached_tokens)
        return Usage()

    def _end(self, ended: Ended, opening: list[MessageEvent]) -> bytes:
        if ended.error is not None:
            status = STATUS_OF_CODE.get(ended.error.code or "", 500)
            return frame("error", failure(ended.error, status, self._request_id), ended.position)
        told = ended.usage
        usage = MessageUsage(
            input_tokens=told.prompt_tokens - told.cached_tokens,
            output_tokens=told.completion_tokens,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=told.cached_tokens,
            output_tokens_details=OutputTokensDetails(told.reasoning_tokens),
            server_tool_use=None,
        )
        delta = MessageDeltaEvent("message_delta", MessageStop(*_stop(ended), None, None), usage)
        events = [*opening, *self._blocks.finish(), delta, MessageStopEvent("message_stop")]
        return _frames(events, ended.position)


def _frames(events: list[MessageEvent], position: int) -> bytes:
    *others, last = events
    return b"".join(frame(event.type, event) for event in others) + frame(last.type, last, position)


def reply(job: Job, completion: Completion, *, shows_thinking: bool = True) -> MessageView:
    """The message in one piece: a fold of its events."""
    assert completion.ended is not None
    blocks = Blocks(job, shows_thinking=shows_thinking)
    begun: list[tuple[ContentBlock, list[str]]] = []
    for event in [*blocks.push(completion.spans()), *blocks.finish()]:
        match event:
            case BlockStartEvent(content_block=block):
                begun.append((block, []))
            case BlockDeltaEvent(delta=SignatureDelta(signature=signature)):
                block, parts = begun[-1]
                begun[-1] = (msgspec.structs.replace(block, signature=signature), parts)
            case (
                BlockDeltaEvent(delta=TextDelta(text=part))
                | BlockDeltaEvent(delta=ThinkingDelta(thinking=part))
                | BlockDeltaEvent(delta=InputJsonDelta(partial_json=part))
            ):
                begun[-1][1].append(part)
    content = [_whole(block, "".join(parts)) for block, parts in begun]
    return _message(job, content, completion.ended, completion.ended.usage)


def _whole(block: ContentBlock, text: str) -> ContentBlock:
    match block:
        case TextBlock():
            return TextBlock(text, block.citations)
        case ThinkingBlock():
            return ThinkingBlock(text, block.signature)
        case ToolUseBlock():
            return msgspec.structs.replace(block, input=_arguments(text))


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; empty if ``max_tokens`` cut them: nobody shall take a part of them for the whole."""
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(text)
        if isinstance(arguments, dict):  # half a surrogate pair, which a model may write, is no text to send
            return dict(json.loads(json.dumps(arguments, ensure_ascii=False).encode(errors="replace")))
    return {}


def _message(job: Job, content: list[ContentBlock], ended: Ended | None, told: Usage) -> MessageView:
    reason, sequence = _stop(ended)
    usage = WholeMessageUsage(
        input_tokens=told.prompt_tokens - told.cached_tokens,
        output_tokens=told.completion_tokens,
        cache_creation=None,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=told.cached_tokens,
        inference_geo=None,
        output_tokens_details=OutputTokensDetails(told.reasoning_tokens),
        server_tool_use=None,
        service_tier="batch" if job.priority is Priority.BATCH else "standard",
    )
    return MessageView(
        id="msg_" + job.id.removeprefix("job_"),
        type="message",
        role="assistant",
        model=job.request.model,
        content=content,
        stop_reason=reason,
        stop_sequence=sequence,
        stop_details=None,
        container=None,
        usage=usage,
    )


_REASONS: dict[str | None, StopReason] = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


def _stop(ended: Ended | None) -> tuple[StopReason | None, str | None]:
    """Why the message ends (None: it has not), and at which of its stop sequences. A call is a reason, however its
    text ends."""
    if ended is None:
        return None, None
    sequence = ended.stop() if ended.finish_reason == "stop" else None
    return _REASONS.get(ended.finish_reason, "end_turn" if sequence is None else "stop_sequence"), sequence
