"""Which tokens a reply must not go on with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from penstock.core.events import Phase, Span
from penstock.engines.text.formats.family import Reader

if TYPE_CHECKING:
    from penstock.engines.text.reply import Reply


class Follows(Protocol):
    """What is asked of `penstock.engines.parts.guide.Guide`."""

    @property
    def over(self) -> bool: ...

    @property
    def error(self) -> str | None: ...

    def accept(self, token: int) -> None: ...

    def allows(self, token: int) -> bool: ...

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


class AfterThought:
    """A *guide* for a reply that may think first: it holds from the end of the thought on.

    *begins*: tokens that begin a thought; *ends*: those that end the reply, which it must not do before.
    """

    def __init__(self, guide: Follows, reader: Reader, begins: Iterable[int], ends: Iterable[int]) -> None:
        self._guide = guide
        self._reader = reader
        self._begins = sorted(begins)
        self._ends = sorted(ends)
        self._held = True
        """Did the guide see the last token?"""
        self._broken = False

    @property
    def over(self) -> bool:
        return self._guide.over

    @property
    def error(self) -> str | None:
        return "the text began in the middle of a token" if self._broken else self._guide.error

    @property
    def may_think(self) -> bool:
        """May the next token be part of a thought?"""
        return bool(self._begins) or self._reader.thinking

    def accept(self, token: int) -> None:
        self._held = not self._reader.thinking and token not in self._begins
        if self._held or self._reader.thinking:
            self._begins = []
        if self._held:
            self._guide.accept(token)

    def wrote(self, segments: Sequence[Span]) -> None:
        """What the last token gave: no text, unless the guide saw it."""
        self._broken = self._broken or (not self._held and any(phase is not Phase.REASONING for phase, _ in segments))

    def allows(self, token: int) -> bool:
        if self._reader.thinking:
            return token not in self._ends
        return token in self._begins or self._guide.allows(token)

    def mask(self, logits: Any) -> None:
        if self._reader.thinking:
            values = logits[self._ends]
            logits[self._ends] = -np.inf
            if not np.isfinite(logits).any():
                logits[self._ends] = values
            return
        values = logits[self._begins]
        self._guide.mask(logits)
        logits[self._begins] = values
