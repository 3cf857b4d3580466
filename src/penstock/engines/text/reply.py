"""One choice of a request, as its tokens come: its text, its stop strings, its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from penstock.core.job import Request, Sampling
from penstock.core.tools import finish_reason
from penstock.engines.text.detokenize import Detokenizer


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


class Follows(Protocol):
    """What is asked of `penstock.engines.parts.guide.Guide`."""

    over: bool

    @property
    def error(self) -> str | None: ...

    def accept(self, token: int) -> None: ...

    def mask(self, logits: Any) -> None: ...


class Bans:
    """Tokens that a reply must not go on with: its ends before it has ``min_tokens``, and the last token of a text that
    it must not have. Never all that its guide leaves: the guide comes first."""

    def __init__(self, reply: Reply, least: int, ends: Iterable[int], spellings: Iterable[Sequence[int]]) -> None:
        """*spellings*: the forbidden texts in tokens."""
        self._reply = reply
        self._least = least
        self._ends = sorted(ends)
        self._spellings = [(list(spelling[:-1]), spelling[-1]) for spelling in spellings]

    def mask(self, logits: Any) -> None:
        if self._reply.guide is not None:
            self._reply.guide.mask(logits)
        ids = self._reply.ids
        banned = [last for before, last in self._spellings if not before or ids[-len(before) :] == before]
        if len(ids) < self._least:
            banned += self._ends
        values = logits[banned]
        logits[banned] = -np.inf
        if not np.isfinite(logits).any():
            logits[banned] = values


class Reply:
    """One choice of one request, as its tokens come.

    ``finish`` is None until the reply has ended. *limit* is the number of tokens it may have, counted from its start.
    Construct it with the logged *prefix* of an earlier attempt to continue that attempt's reply. A *request* with tools
    ends with ``tool_calls`` when the reply has calls. A *guide* is told of every token, and ends the reply once nothing
    more can follow. *bad_words* are the sampling's in tokens.
    """

    __slots__ = (
        "_detokenizer",
        "_ends",
        "_least",
        "_limit",
        "_request",
        "_stops",
        "_texts",
        "finish",
        "guide",
        "ids",
        "mask",
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
        request: Request | None = None,
        guide: Follows | None = None,
        bad_words: Iterable[Sequence[int]] = (),
    ) -> None:
        self._detokenizer = detokenizer
        self.push_text = detokenizer.push
        self._request = request if request is not None and request.callable_tools else None
        self._texts: list[str] = []
        self.guide = guide
        ends: frozenset[int] = frozenset() if sampling.ignore_eos and guide is None else eos_ids
        self._ends = ends.union(sampling.stop_token_ids)
        self._least = sampling.min_tokens
        self._stops = StopStrings(sampling.stop) if sampling.stop else None
        self._limit = limit
        self.ids: list[int] = []
        self.finish: str | None = None
        """None, or a reason as `penstock.core.job.FinishReason` has them."""
        self.mask: Follows | Bans | None = guide
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
    def stop(self) -> str | None:
        """The stop string that ended it, if one did."""
        return None if self._stops is None else self._stops.met

    def push(self, token: int) -> str:
        """The text that *token* completed (perhaps none); sets ``finish`` when the reply ends with it.

        The end token itself and the tokens of a stop string give no text of their own.
        """
        text = self._next(token)
        if self._request is not None:
            self._texts.append(text)
            if self.finish is not None:
                self.end(self.finish)
        return text

    def end(self, reason: str) -> None:
        """The engine ended it for a *reason* of its own."""
        self.finish = reason
        if self._request is not None:
            self.finish = finish_reason(self._request, reason, "".join(self._texts))

    def _next(self, token: int) -> str:
        ids = self.ids
        ids.append(token)
        if self.guide is not None:
            self.guide.accept(token)
        if token in self._ends:
            self.finish = "stop"
            return self._rest("")
        text = self.push_text(token)
        if self._stops is not None and len(ids) > self._least:
            text, stopped = self._stops.push(text)
            if stopped:
                self.finish = "stop"
                return text
        if self.guide is not None and self.guide.over:
            self.finish = "stop"
            return self._rest(text)
        if len(ids) >= self._limit:
            self.finish = "length"
            return self._rest(text)
        return text

    def _rest(self, text: str) -> str:
        """*text* and whatever is held back, once it is known that nothing follows."""
        last = self._detokenizer.flush()
        if self._stops is None:
            return text + last
        more, stopped = self._stops.push(last)
        if stopped:
            self.finish = "stop"
            return text + more
        return text + more + self._stops.flush()
