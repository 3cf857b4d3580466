"""Pure checks of a log or of the streams that readers saw.

The input is a list of core events (`Tokens`, `Ended`) or of parsed SSE events of a job's stream (any object with
``id``, ``event`` and ``data``, the data as JSON text or already decoded). Nothing here does I/O, so that contract
tests, chaos tests and a user's own checks share one judge:

- positions are 1..n, without a gap and without a duplicate;
- attempts never decrease along a log (lost = 0 and duplicated = 0 are not enough: a zombie and its successor can
  interleave with both at 0);
- there is exactly one terminal event, it is the last one, and its position is n + 1;
- no token belongs to another job;
- where a token has segments of several phases, they make its text;
- the calls of a choice are whole, unless it was cut off (`penstock.core.calls`);
- the views of several readers agree wherever they overlap.

`problems` and `view_problems` return what they found in words; `check_log` and `check_views` raise `OracleError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from penstock.core.events import Ended, Event, Phase, TokenPhase, Tokens, phase_of, segments

TERMINAL_NAMES = frozenset({"done", "error"})


class OracleError(AssertionError):
    """A log or a stream broke a promise; the message lists every problem found."""


@runtime_checkable
class ServerSentEvent(Protocol):
    """A parsed SSE event, whatever library parsed it."""

    @property
    def id(self) -> str | None: ...

    @property
    def event(self) -> str | None: ...

    @property
    def data(self) -> Any: ...


class Token(msgspec.Struct, frozen=True):
    """One token as a reader saw it. ``job``, ``attempt`` and ``phase`` are None where the source does not tell."""

    position: int
    id: int
    text: str
    attempt: int | None = None
    choice: int | None = None
    job: str | None = None
    phase: TokenPhase | None = None

    @property
    def said(self) -> str:
        """What it adds to the reply's text, which has no thoughts and no calls."""
        return self.text_of(Phase.TEXT)

    def text_of(self, phase: Phase) -> str:
        parts = segments(self.text, Phase.TEXT if self.phase is None else self.phase)
        return "".join(text for part, text in parts if part is phase)


class End(msgspec.Struct, frozen=True):
    """The terminal event as a reader saw it."""

    position: int | None
    status: str
    attempt: int | None = None
    completion_tokens: int | None = None
    job: str | None = None
    reasoning_tokens: int | None = None
    finish_reasons: tuple[str, ...] | None = None


Seen = Token | End


def flatten(events: Iterable[Event | ServerSentEvent | Seen]) -> list[Seen]:
    """Every token on its own, in the order in which it was seen. Heartbeats and foreign event names are dropped."""
    return [item for event in events for item in _flatten_one(event)]


def _flatten_one(event: Event | ServerSentEvent | Seen) -> Iterator[Seen]:
    if isinstance(event, Token | End):
        yield event
    elif isinstance(event, Tokens):
        for i, (token, text) in enumerate(zip(event.ids, event.texts, strict=True)):
            choice = None if event.choices is None else event.choices[i]
            phase = Phase.TEXT if event.phases is None else event.phases[i]
            yield Token(event.position + i, token, text, event.attempt, choice, phase=phase)
    elif isinstance(event, Ended):
        usage = event.usage
        yield End(
            event.position,
            event.status.value,
            event.attempt,
            usage.completion_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            finish_reasons=event.finish_reasons or None,
        )
    else:
        yield from _flatten_sse(event)


def _flatten_sse(event: ServerSentEvent) -> Iterator[Seen]:
    if event.event != "token" and event.event not in TERMINAL_NAMES:
        return
    data = event.data
    if isinstance(data, str | bytes | bytearray):
        data = msgspec.json.decode(data)
    if not isinstance(data, Mapping):
        raise OracleError(f"the data of an SSE {event.event!r} event is not an object: {data!r}")
    position = int(event.id) if event.id else None
    job = data.get("job_id")
    if event.event == "token":
        if position is None:
            raise OracleError(f"a token event has no id: {data!r}")
        yield Token(
            position,
            data.get("token_id", -1),
            data.get("token", ""),
            data.get("attempt"),
            data.get("index"),
            job,
            _read_phase(data.get("phase")),
        )
    else:
        usage = data.get("usage") or {}
        yield End(
            position,
            str(data.get("status")),
            data.get("attempt"),
            usage.get("completion_tokens"),
            job,
            usage.get("reasoning_tokens", 0) if usage else None,
            tuple(data.get("finish_reasons") or filter(None, [data.get("finish_reason")])) or None,
        )


def _read_phase(phase: Any) -> TokenPhase:
    """The phase of a token in the data of an SSE event: a name, or (name, characters) of each segment; None: text."""
    if isinstance(phase, list):
        return [(Phase[name.upper()], length) for name, length in phase]
    return Phase.TEXT if phase is None else Phase[phase.upper()]


def tokens_of(events: Iterable[Event | ServerSentEvent | Seen]) -> list[Token]:
    return [item for item in flatten(events) if isinstance(item, Token)]


def problems(
    events: Iterable[Event | ServerSentEvent | Seen],
    *,
    after: int = 0,
    complete: bool = True,
    job: str | None = None,
) -> list[str]:
    """What is wrong with one log, or with one reader's view of it (resumed parts simply concatenated).

    *after* is the position after which the view began; ``complete=False`` allows a log that has not ended yet; with
    *job*, an event that names another job is a foreign one.
    """
    found: list[str] = []
    expected = after + 1
    attempt = -1
    end: End | None = None
    tokens: list[Token] = []
    for seen in flatten(events):
        if job is not None and seen.job is not None and seen.job != job:
            found.append(f"foreign event of job {seen.job} in the stream of {job}")
        if end is not None:
            what = "a second terminal event" if isinstance(seen, End) else f"a token at position {seen.position}"
            found.append(f"{what} after the terminal event")
        if seen.attempt is not None:
            if seen.attempt < attempt:
                found.append(f"attempt fell from {attempt} to {seen.attempt} at position {seen.position}")
            attempt = max(attempt, seen.attempt)
        if isinstance(seen, End):
            found += _end_problems(seen, expected)
            end = seen
        else:
            found += _position_problems(seen.position, expected)
            expected = max(expected, seen.position + 1)
            tokens.append(seen)
    if complete and end is None:
        found.append(f"no terminal event (last position {expected - 1})")
    found += _segment_problems(tokens)
    if end is not None and after == 0:
        found += _phase_problems(tokens, end)
    return found


def _position_problems(position: int, expected: int) -> list[str]:
    if position == expected:
        return []
    if position > expected:
        return [f"gap: expected position {expected}, saw {position}"]
    return [f"position {position} seen again or out of order (expected {expected})"]


def _end_problems(end: End, expected: int) -> list[str]:
    found = []
    if end.position is not None and end.position != expected:
        found.append(f"the terminal event is at position {end.position}, not at {expected}")
    if end.status not in {"completed", "failed", "cancelled", "expired"}:
        found.append(f"the terminal event has status {end.status!r}")
    if end.status == "completed" and end.completion_tokens not in (None, expected - 1):
        found.append(f"usage counts {end.completion_tokens} tokens, the log holds {expected - 1}")
    return found


def _segment_problems(tokens: Iterable[Token]) -> list[str]:
    return [
        f"the segments of position {token.position} are not its text: {token.phase} of {token.text!r}"
        for token in tokens
        if isinstance(token.phase, list) and sum(length for _, length in token.phase) != len(token.text)
    ]


def _phase_problems(tokens: Sequence[Token], end: End) -> list[str]:
    """Of a whole log: are its thoughts counted, and are its calls whole?"""
    found = []
    phases = [token.phase for token in tokens if token.phase is not None]
    thoughts = sum(phase_of(phase) is Phase.REASONING for phase in phases)
    if len(phases) == len(tokens) and end.reasoning_tokens not in (None, thoughts):
        found.append(f"usage counts {end.reasoning_tokens} tokens of thoughts, the log holds {thoughts}")
    for choice, reason in enumerate(end.finish_reasons or ()):
        calls = "".join(
            text
            for token in tokens
            if token.phase is not None and (token.choice or 0) == choice
            for phase, text in segments(token.text, token.phase)
            if phase is Phase.TOOL
        )
        if (rest := _behind_calls(calls)) and reason != "length":
            found.append(f"the calls of choice {choice} are not whole: {rest[:100]!r}")
        if reason == "tool_calls" and phases and not calls:
            found.append(f"choice {choice} ended with tool_calls, but has none")
    return found


def _behind_calls(text: str) -> str:
    """What of the *text* of calls is no call."""
    decoder = json.JSONDecoder(strict=False)
    while text := text.strip():
        try:
            call, end = decoder.raw_decode(text)
        except ValueError:
            return text
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return text
        text = text[end:]
    return ""


def check_log(
    events: Iterable[Event | ServerSentEvent | Seen],
    *,
    after: int = 0,
    complete: bool = True,
    job: str | None = None,
) -> list[Token]:
    """Raise `OracleError` if the log is broken; else its tokens one by one."""
    seen = flatten(events)
    _raise(problems(seen, after=after, complete=complete, job=job))
    return tokens_of(seen)


def view_problems(views: Sequence[Sequence[Event | ServerSentEvent | Seen]]) -> list[str]:
    """Where the views of several readers of one job (and its log, as one more view) contradict each other.

    Views may start and stop anywhere: they are compared position by position, so a reader that saw less is not wrong.
    What only one side tells (the event of an only choice says no index, say) is not compared.
    """
    found: list[str] = []
    tokens: dict[int, tuple[int, Token]] = {}
    ends: list[tuple[int, End]] = []
    for reader, view in enumerate(views):
        for seen in flatten(view):
            if isinstance(seen, End):
                ends.append((reader, seen))
                continue
            first, token = tokens.setdefault(seen.position, (reader, seen))
            if not _agree(token, seen):
                found.append(f"readers {first} and {reader} differ at position {seen.position}: {token} and {seen}")
    for reader, end in ends[1:]:
        if not _agree(ends[0][1], end):
            found.append(f"readers {ends[0][0]} and {reader} saw different ends: {ends[0][1]} and {end}")
    if ends and tokens:
        last = max(tokens)
        for reader, end in ends:
            if end.position is not None and end.position <= last:
                found.append(f"reader {reader} saw the end at {end.position}, another a token at {last}")
    return found


def _agree(a: Seen, b: Seen) -> bool:
    one, two = msgspec.structs.asdict(a), msgspec.structs.asdict(b)
    return all(one[name] == two[name] for name in one if one[name] is not None and two[name] is not None)


def check_views(views: Sequence[Sequence[Event | ServerSentEvent | Seen]]) -> None:
    """Raise `OracleError` where two views of one job disagree."""
    _raise(view_problems(views))


def _raise(found: list[str]) -> None:
    if found:
        more = [f"… and {len(found) - 20} more"] if len(found) > 20 else []
        raise OracleError("\n".join([*found[:20], *more]))
