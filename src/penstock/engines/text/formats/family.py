"""What a family says of how it writes, and the reader made of that."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar, Protocol

import msgspec

from penstock.core.events import Phase, Span
from penstock.core.job import Request
from penstock.engines.text.formats.source import Marks, Reading, Source, marks_of


class Thoughts(msgspec.Struct, frozen=True):
    """Thoughts stand between two marks, at the beginning of the reply or of a line.

    ``until``: what ends a thought too, and is what comes behind it (a call). ``silent``: marks around the text that
    say nothing.
    """

    begins: tuple[str, ...]
    ends: tuple[str, ...]
    until: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.begins, *self.ends, *self.until, *self.silent)


class Tools(Protocol):
    """A way to write calls."""

    @property
    def begins(self) -> tuple[str, ...]:
        """What a call, or a block of them, begins with."""

    @property
    def openings(self) -> str:
        """Characters that a reply may begin with that has nothing but calls."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All words that may be special tokens."""

    def read(self, source: Source, mark: str) -> Reading[None]:
        """Consume what follows *mark*, and give out the calls in it. Behind one of the ``openings``, which is not
        consumed, that is all of the reply. Raises `NotACall`."""


class Reader:
    """Splits a reply into thoughts, text and calls, as it comes.

    After each push it has given out everything that does not depend on what follows. *opened*: the prompt has begun a
    thought. `phase` is that of what is being read; `thinking`, whether a form that the reply must have does not hold
    yet.
    """

    WORDS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, request: Request, thoughts: Thoughts | None, tools: Tools | None, *, opened: bool = False):
        self.words = frozenset((*(thoughts.marks if thoughts else ()), *(tools.marks if tools else ()), *self.WORDS))
        """All marks that are looked for."""
        self._source = Source(request)
        self._steps = self._read(thoughts, tools, opened)
        self.thinking = opened
        next(self._steps)

    @property
    def phase(self) -> Phase:
        return self._source.phase

    @property
    def calls(self) -> int:
        return self._source.calls

    def push(self, text: str) -> list[Span]:
        source = self._source
        source.text += text
        next(self._steps, None)
        segments, source.out = source.out, []
        return segments

    def finish(self) -> list[Span]:
        """The rest of the reply, which was held back: nothing follows."""
        self._source.over = True
        return self.push("")

    def _read(self, thoughts: Thoughts | None, tools: Tools | None, opened: bool) -> Generator[None, None, None]:
        source = self._source
        begins = frozenset(thoughts.begins if thoughts else ())
        silent = thoughts.silent if thoughts else ()
        marks = marks_of((*begins, *silent, *(tools.begins if tools else ())))
        if opened and thoughts is not None:
            yield from self._thought(thoughts)
        yield from self._opening(tools, marks)
        while mark := (yield from source.find(marks, lines=begins)):
            if mark in begins and thoughts is not None:
                yield from self._thought(thoughts)
                yield from self._opening(tools, marks)
            elif mark in silent:
                yield from source.space()
                source.drop()
            elif tools is not None:
                yield from source.attempt(tools.read(source, mark))

    def _thought(self, thoughts: Thoughts) -> Reading[None]:
        source = self._source
        source.phase, self.thinking = Phase.REASONING, True
        yield from source.space()
        source.drop()
        mark = yield from source.find(marks_of((*thoughts.ends, *thoughts.until)), Phase.REASONING)
        source.at = 0 if mark in thoughts.until else source.at
        source.drop()
        source.phase, self.thinking = Phase.TEXT, False
        source.quiet()
        yield from source.space()
        source.drop()

    def _opening(self, tools: Tools | None, marks: Marks) -> Reading[None]:
        """A reply that is nothing but calls, without any mark around them."""
        if tools is None or not tools.openings:
            return
        source = self._source
        yield from source.space()
        if not (yield from source.take(*marks.words)) and (char := (yield from source.peek())) in tuple(tools.openings):
            yield from source.attempt(tools.read(source, char))
        else:
            source.at = 0
