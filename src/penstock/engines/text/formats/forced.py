"""Calls that a guide makes the model write: in the log's own form, whatever the family's is."""

from __future__ import annotations

import msgspec

from penstock.engines.text.formats.json_calls import read_call
from penstock.engines.text.formats.source import NotACall, Reading, Source, dumps


class Forced(msgspec.Struct, frozen=True):
    """A reply that is one call, or that may be one and otherwise is an answer in a form of its own."""

    begins: tuple[str, ...] = ()
    openings: str = "{"
    marks: tuple[str, ...] = ()

    def read(self, source: Source, mark: str) -> Reading[None]:
        for word in ("{", '"name"', ":"):
            yield from source.expect(word)
            yield from source.space()
        yield from source.expect('"')
        names = sorted((dumps(name)[1:] for name in source.tools), key=len, reverse=True)
        yield from source.expect(*names)
        yield from source.space()
        for word in (",", '"arguments"', ":"):
            yield from source.expect(word)
            yield from source.space()
        if (yield from source.peek()) != "{":
            raise NotACall
        source.at = 0
        yield from source.space()
        yield from read_call(source)
