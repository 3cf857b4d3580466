"""gpt-oss (harmony): messages in channels. Thoughts are ``analysis``, calls have a recipient, the rest is text::

<|channel|>analysis<|message|>…<|end|>
<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Ulm"}<|call|>
<|start|>assistant<|channel|>final<|message|>…<|return|>
"""

from __future__ import annotations

import re
from collections.abc import Generator

from penstock.core.events import Phase
from penstock.engines.text.formats.family import Reader, Thoughts, Tools
from penstock.engines.text.formats.json_calls import close
from penstock.engines.text.formats.source import NotACall, Reading, marks_of

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|return|>", "<|call|>", "<|end|>")
MARKS = (START, CHANNEL, MESSAGE, "<|constrain|>", *ENDS)

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyReader(Reader):
    """See `Reader`. Its own marks say all: of the family's *tools*, only those that a guide forces are read."""

    WORDS = MARKS

    def _read(self, thoughts: Thoughts | None, tools: Tools | None, opened: bool) -> Generator[None, None, None]:
        source, heads, ends = self._source, marks_of((START, CHANNEL, MESSAGE, *ENDS)), marks_of(ENDS)
        self.thinking = True
        self._written: set[Phase] = set()
        head = yield from source.take(" to=", "to=")
        while True:
            mark = head or (yield from source.find(heads))
            if not mark:
                return
            if mark in ENDS:
                source.drop()
                continue
            header, head = "", ""
            if mark != MESSAGE:
                try:
                    yield from source.until(MESSAGE)
                    header = source.text[: source.at]
                except NotACall:  # cut off
                    source.at = len(source.text)
                    source.drop()
                    return
            to, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
            if channel is not None and channel[1] == "analysis":
                yield from self._part(Phase.REASONING)
                mark = yield from source.find(ends, Phase.REASONING)
                source.phase = Phase.TEXT
                source.drop()
                source.quiet()
                continue
            self.thinking = False
            if to is not None and to[1] in source.tools:
                yield from source.attempt(self._call(to[1]))
            else:
                if to is None:
                    yield from self._part(Phase.TEXT)
                    yield from self._opening(tools, ends)
                yield from source.find(ends)
                source.drop()
            self.thinking = True

    def _part(self, phase: Phase) -> Reading[None]:
        """Begin the body of a message; those of one phase stand in lines of their own."""
        source = self._source
        source.phase = phase
        yield from source.space()
        source.drop()
        if phase in self._written:
            source.give(phase, "\n")
        self._written.add(phase)

    def _call(self, name: str) -> Reading[None]:
        source = self._source
        source.named(name)
        yield from source.space()
        if (yield from source.peek()) in ("", "<"):
            source.call(name, "{}")
        else:
            yield from source.arguments(name)
        yield from close(source, ENDS)
