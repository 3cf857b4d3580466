"""One choice of a request, as its tokens come: its text, thoughts and calls, its stop strings, its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from penstock.core.events import Phase, Span, TokenPhase, joined_spans, token_phase
from penstock.core.job import Sampling
from penstock.engines.text.detokenize import Detokenizer
from penstock.engines.text.formats.family import Reader
from penstock.engines.text.masks import AfterThought, Bans, Follows


class StopStrings:
    """Finds stop strings across token borders, holding back only what may still become one."""

    __slots__ = ("_firsts", "_held", "_longest", "_stops", "met")

    def __init__(self, stops: Sequence[str]) -> None:
        self.met: str | None = None
        """The one that was met."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops))
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be given out now, and whether a stop string was met (the text ends before it).

        Of several stop strings the one that is complete first wins, whatever the tokens' borders are.
        """
        held = self._held + text
        first: tuple[int, int] | None = None
        for stop in self._stops:
            start = held.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first, self.met = (start + len(stop), start), stop
        if first is not None:
            self._held = ""
            return held[: first[1]], True
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            if held[start] in self._firsts and any(stop.startswith(held[start:]) for stop in self._stops):
                self._held = held[start:]
                return held[:start], False
        self._held = ""
        return held, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class Reply:
    """One choice of one request, as its tokens come.

    ``finish`` is None until the reply has ended. *limit* is the number of tokens it may have, counted from its start.
    Construct it with the logged *prefix* of an earlier attempt to continue that attempt's reply.

    Its text goes from the *detokenizer* through the *reader*, which splits it into thoughts, text and calls (None: all
    is text), and what is text through the stop strings. *marks*: the text of special tokens that the reader looks for,
    by id. A *guide* is told of every token behind a thought, and ends the reply once nothing more can follow; *thinks*
    are the tokens that begin a thought. *bad_words* are the sampling's in tokens.
    """

    __slots__ = (
        "_detokenizer",
        "_ends",
        "_least",
        "_limit",
        "_marks",
        "_plain",
        "_reader",
        "_stops",
        "finish",
        "guide",
        "ids",
        "mask",
        "phase",
        "push_text",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        sampling: Sampling,
        eos_ids: frozenset[int],
        limit: int,
        prefix: Iterable[int] = (),
        *,
        reader: Reader | None = None,
        marks: Mapping[int, str] | None = None,
        guide: Follows | None = None,
        thinks: Iterable[int] = (),
        bad_words: Iterable[Sequence[int]] = (),
    ) -> None:
        self._detokenizer = detokenizer
        self.push_text = detokenizer.push
        self._reader = reader
        self._marks = marks or {}
        ends: frozenset[int] = frozenset() if sampling.ignore_eos and guide is None else eos_ids
        self._ends = ends.union(sampling.stop_token_ids)
        self.guide = guide
        if guide is not None and reader is not None:
            self.guide = AfterThought(guide, reader, thinks, self._ends)
        self._least = sampling.min_tokens
        self._stops = StopStrings(sampling.stop) if sampling.stop else None
        self._limit = limit
        self._plain = reader is None and guide is None and self._stops is None
        self.ids: list[int] = []
        self.finish: str | None = None
        """None, or a reason as `penstock.core.job.FinishReason` has them."""
        self.phase: TokenPhase = Phase.TEXT
        """Of the last token."""
        self.mask: Follows | Bans | None = self.guide
        """Takes out of one row of logits what must not come next; None where everything may."""
        if sampling.min_tokens or sampling.bad_words:
            self.mask = Bans(self, sampling.min_tokens, self._ends, bad_words)
        for token in prefix:
            if self.finish is None:
                self.push(token)

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self._limit - len(self.ids)

    @property
    def phases(self) -> list[TokenPhase] | None:
        """The phase of the last token, as outputs have it: None for text."""
        return None if self.phase is Phase.TEXT else [self.phase]

    @property
    def may_think(self) -> bool:
        """May the next token be one that the guide does not hold?"""
        return isinstance(self.guide, AfterThought) and self.guide.may_think

    @property
    def stop(self) -> str | None:
        """The stop string that ended it, if one did."""
        return None if self._stops is None else self._stops.met

    def push(self, token: int) -> str:
        """The text that *token* completed (perhaps none); sets ``finish`` when the reply ends with it, and ``phase``.

        The end token itself and the tokens of a stop string give no text of their own.
        """
        ids, guide = self.ids, self.guide
        ids.append(token)
        if self._plain and token not in self._ends and len(ids) < self._limit:
            return self.push_text(token)
        if guide is not None:
            guide.accept(token)
        if token in self._ends:
            return self._take("", "stop")
        text = self.push_text(token)
        if token in self._marks:
            text += self._detokenizer.flush() + self._marks[token]
        if guide is not None and guide.over:
            return self._take(text, "stop")
        if len(ids) >= self._limit:
            return self._take(text, "length")
        return self._take(text, None)

    def end(self, reason: str) -> None:
        """The engine ended it for a *reason* of its own."""
        self.finish = "tool_calls" if reason == "stop" and self._reader is not None and self._reader.calls else reason

    def _take(self, text: str, reason: str | None) -> str:
        """What is given out of the new *text*; and of all that was held back, where it is the last, for a *reason*."""
        if reason is not None:
            text += self._detokenizer.flush()
        if self._reader is None:
            text, met = self._visible(text, last=reason is not None)
        else:
            text, met = self._split(self._reader, text, last=reason is not None)
        if met or reason is not None:
            self.end("stop" if met else reason or "stop")
        return text

    def _visible(self, text: str, *, last: bool) -> tuple[str, bool]:
        """As much of *text* as no stop string can begin in, and whether one was met."""
        stops, met = self._stops, False
        if stops is None:
            return text, False
        if len(self.ids) > self._least:
            text, met = stops.push(text)
        return (text + stops.flush() if last and not met else text), met

    def _split(self, reader: Reader, text: str, *, last: bool) -> tuple[str, bool]:
        before = reader.phase
        segments = reader.push(text)
        if isinstance(self.guide, AfterThought):
            self.guide.wrote(segments)
        if last:
            segments += reader.finish()
        written: list[Span] = []
        met = False
        for phase, part in [*segments, (Phase.TEXT, "")] if last else segments:
            if phase is Phase.TEXT:
                part, met = self._visible(part, last=last)
            elif self._stops is not None:
                written.append((Phase.TEXT, self._stops.flush()))
            written.append((phase, part))
            if met:
                break
        self.phase = _phase(before, reader.phase, written)
        return "".join(part for _, part in written), met


def told(phases: list[TokenPhase]) -> list[TokenPhase] | None:
    """*phases* as outputs have them: None where all are text."""
    return phases if any(phase is not Phase.TEXT for phase in phases) else None


def _phase(before: Phase, now: Phase, written: list[Span]) -> TokenPhase:
    """The phase of a token that gave the segments *written*; where it gave no text, of what it was a mark of."""
    return token_phase(joined_spans(written), now if before is Phase.TEXT else before)
