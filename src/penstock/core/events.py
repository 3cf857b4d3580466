"""What a job's log holds: runs of tokens, closed by exactly one terminal event.

A position is the 1-based index of a token in its job's log; the terminal event's position is the last
token's plus one. Runs are stored column-wise because a step appends to every running job at once and the
common case (one choice, no logprobs) then needs two short lists and nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from penstock.core.errors import ErrorInfo
from penstock.core.job import Status, Usage


class Phase(enum.IntEnum):
    """What a token is part of: the reply's text, a thought before it, or a call of a tool.

    The text of a thought is without the marks around it. That of a call is in one form, whatever the model's own is
    (`penstock.core.calls`).
    """

    TEXT = 0
    REASONING = 1
    TOOL = 2


#: The phase of a token; of one that ends a phase and begins another, each with its number of characters, in order.
TokenPhase = Phase | list[tuple[Phase, int]]


#: A stretch of a reply that is of one phase.
Span = tuple[Phase, str]


def phase_of(phase: TokenPhase) -> Phase:
    """Which one a token is counted as: the first that it belongs to."""
    return phase if isinstance(phase, Phase) else phase[0][0]


def count_reasoning(phases: Iterable[TokenPhase] | None) -> int:
    """How many tokens of these *phases* are thoughts (None: all are text)."""
    return sum(phase_of(phase) is Phase.REASONING for phase in phases or ())


def segments(text: str, phase: TokenPhase) -> Iterator[Span]:
    """A token's *text*, cut where its phase changes."""
    if isinstance(phase, Phase):
        yield phase, text
        return
    start = 0
    for part, length in phase:
        yield part, text[start : start + length]
        start += length


def joined_phases(
    first: list[TokenPhase] | None, count: int, second: list[TokenPhase] | None, more: int
) -> list[TokenPhase] | None:
    """The phases of *count* tokens and of *more* behind them; None where all are text."""
    if first is None and second is None:
        return None
    return (first or [Phase.TEXT] * count) + (second or [Phase.TEXT] * more)


def joined_spans(spans: Iterable[Span]) -> list[Span]:
    """Neighbours of one phase as one, without those that say nothing."""
    joined: list[Span] = []
    for phase, text in spans:
        if joined and joined[-1][0] is phase:
            joined[-1] = (phase, joined[-1][1] + text)
        elif text:
            joined.append((phase, text))
    return joined


def token_phase(spans: Sequence[Span], otherwise: Phase) -> TokenPhase:
    """The phase of a token that says these *spans*; of one that says nothing it is *otherwise*."""
    if not spans:
        return otherwise
    return spans[0][0] if len(spans) == 1 else [(phase, len(text)) for phase, text in spans]


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token that might have been drawn. ``data``: its bytes, if they are not text by themselves."""

    id: int
    text: str
    logprob: float
    data: bytes | None = None


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of the chosen token and of its best alternatives.

    ``text`` and ``data`` are the chosen token's own, as in `TopLogprob`. The reply's text may have less of it (half a
    character, text that may become a stop string). None in logs of older versions.
    """

    logprob: float
    top: tuple[TopLogprob, ...] = ()
    text: str | None = None
    data: bytes | None = None


#: A token of a choice: its id, the text that it added, and how likely it was, where that is known.
TokenLogprob = tuple[int, str, Logprob | None]


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """Tokens at positions ``position`` … ``position + len(ids) - 1``, all written under one attempt.

    ``texts[i]`` is the text that token ``ids[i]`` completed (possibly empty: half a UTF-8 character, text held
    back because it may become a stop string, the end-of-sequence token). ``choices`` tells which of the request's
    ``n`` choices each token belongs to (None: all to choice 0), ``phases`` what each is part of (None: all are text).
    """

    position: int
    attempt: int
    ids: list[int]
    texts: list[str]
    choices: list[int] | None = None
    logprobs: list[Logprob | None] | None = None
    phases: list[TokenPhase] | None = None

    @property
    def last(self) -> int:
        return self.position + len(self.ids) - 1

    def spans(self) -> list[Span]:
        """What the tokens say, cut where the phase changes; of a request with one choice."""
        if self.phases is None:
            return [(Phase.TEXT, "".join(self.texts))]
        return joined_spans(
            span for text, phase in zip(self.texts, self.phases, strict=True) for span in segments(text, phase)
        )

    def after(self, position: int) -> Tokens:
        """The part of this run after *position*, or the run itself if that is all of it."""
        skip = position - self.position + 1
        return self if skip <= 0 else self._part(slice(skip, None))

    def up_to(self, position: int) -> Tokens:
        """The part of this run up to and including *position*, or the run itself if that is all of it."""
        return self if position >= self.last else self._part(slice(0, position - self.position + 1))

    def _part(self, part: slice) -> Tokens:
        return Tokens(
            self.position + part.start,
            self.attempt,
            self.ids[part],
            self.texts[part],
            None if self.choices is None else self.choices[part],
            None if self.logprobs is None else self.logprobs[part],
            None if self.phases is None else self.phases[part],
        )


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """The terminal event. ``finish_reasons`` has one entry per choice when ``status`` is completed.

    So has ``stops`` if a stop string ended any of them: which one, or None.
    """

    position: int
    attempt: int
    status: Status
    finish_reasons: tuple[str, ...] = ()
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    stops: tuple[str | None, ...] = ()

    @property
    def finish_reason(self) -> str | None:
        return self.finish_reasons[0] if self.finish_reasons else None

    def stop(self, choice: int = 0) -> str | None:
        """The stop string that ended the *choice*, if one did and the engine reported it."""
        return self.stops[choice] if self.stops else None


Event = Tokens | Ended


class Completion(msgspec.Struct):
    """A folded log: of each choice the text, the thoughts, the calls (as `penstock.core.calls` writes them), the
    logprobs of its text where asked for, and how it ended."""

    texts: list[str]
    ids: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    ended: Ended | None = None
    pieces: list[list[str]] = []
    """For each choice, the text that each of its positions added."""
    reasoning: list[str] = []
    calls: list[str] = []
    tokens: list[list[tuple[str, TokenPhase, Logprob | None]]] = []
    """For each choice, its tokens in order: what each said, its phase, and how likely it was, where that is known."""

    def spans(self, choice: int = 0) -> list[Span]:
        """What the *choice* says, cut where the phase changes."""
        return joined_spans(span for text, phase, _ in self.tokens[choice] for span in segments(text, phase))


def fold(events: Iterable[Event], n: int = 1) -> Completion:
    """A JSON reply is a fold of the log: join each choice's texts in order, those of each phase by themselves."""
    parts: list[list[str]] = [[] for _ in range(n)]
    apart: dict[Phase, list[list[str]]] = {phase: [[] for _ in range(n)] for phase in (Phase.REASONING, Phase.TOOL)}
    result = Completion([""] * n, [[] for _ in range(n)], [[] for _ in range(n)], tokens=[[] for _ in range(n)])
    for event in events:
        if isinstance(event, Ended):
            result.ended = event
            continue
        for i, (token, text) in enumerate(zip(event.ids, event.texts, strict=True)):
            choice = event.choices[i] if event.choices is not None else 0
            phase = event.phases[i] if event.phases is not None else Phase.TEXT
            logprob = event.logprobs[i] if event.logprobs is not None else None
            result.tokens[choice].append((text, phase, logprob))
            if phase is not Phase.TEXT:
                written = list(segments(text, phase))
                for part, piece in written:
                    if part is not Phase.TEXT:
                        apart[part][choice].append(piece)
                text = "".join(piece for part, piece in written if part is Phase.TEXT)
            parts[choice].append(text)
            result.ids[choice].append(token)
            if logprob is not None and (phase is Phase.TEXT or text):
                result.logprobs[choice].append((token, text, logprob))
    result.texts = ["".join(part) for part in parts]
    result.pieces = parts
    result.reasoning = ["".join(part) for part in apart[Phase.REASONING]]
    result.calls = ["".join(part) for part in apart[Phase.TOOL]]
    return result


class Prefix(msgspec.Struct, array_like=True):
    """The tokens of one choice that earlier attempts logged: an engine continues from them. ``phases`` has one for
    each; None: all are text."""

    ids: list[int] = []
    texts: list[str] = []
    phases: list[TokenPhase] | None = None

    @property
    def text(self) -> str:
        """All that is logged of it, whatever its phase."""
        return "".join(self.texts)

    def text_of(self, phase: Phase) -> str:
        """What is logged of one *phase*."""
        phases = self.phases if self.phases is not None else [Phase.TEXT] * len(self.texts)
        return "".join(
            piece
            for text, each in zip(self.texts, phases, strict=True)
            for part, piece in segments(text, each)
            if part is phase
        )


def split_choices(
    ids: Sequence[int],
    texts: Sequence[str],
    choices: Sequence[int] | None,
    n: int,
    phases: Sequence[TokenPhase] | None = None,
) -> list[Prefix]:
    """A logged prefix as one `Prefix` per choice."""
    result = [Prefix([], [], None if phases is None else []) for _ in range(n)]
    for i, (token, text, choice) in enumerate(zip(ids, texts, choices or [0] * len(ids), strict=True)):
        prefix = result[choice]
        prefix.ids.append(token)
        prefix.texts.append(text)
        if phases is not None and prefix.phases is not None:
            prefix.phases.append(phases[i])
    return result
