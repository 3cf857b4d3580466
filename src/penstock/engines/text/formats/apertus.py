"""Apertus: ``<|tools_prefix|>[{"get_weather": {"city": "Ulm"}}, …]<|tools_suffix|>``, each call an object with the
tool's name as its key. Thoughts stand between ``<|inner_prefix|>`` and ``<|inner_suffix|>``; calls end them too."""

from __future__ import annotations

from typing import ClassVar

from penstock.engines.text.formats.family import Thoughts
from penstock.engines.text.formats.json_calls import close
from penstock.engines.text.formats.source import Reading, Source

THOUGHTS = Thoughts(("<|inner_prefix|>",), ("<|inner_suffix|>",), until=("<|tools_prefix|>",))


class ApertusCalls:
    begins = ("<|tools_prefix|>",)
    openings = ""
    ends: ClassVar = ("<|tools_suffix|>",)
    marks = (*begins, *ends)

    def read(self, source: Source, mark: str) -> Reading[None]:
        yield from source.space()
        yield from source.expect("[")
        while True:
            yield from source.space()
            yield from source.expect("{")
            yield from source.space()
            name = yield from source.string()
            yield from source.space()
            yield from source.expect(":")
            yield from source.space()
            source.named(name)
            yield from source.arguments(name)
            yield from source.space()
            yield from source.expect("}")
            yield from source.space()
            if not (yield from source.peek()) or (yield from source.expect(",", "]")) == "]":
                break
        yield from close(source, self.ends)


TOOLS = ApertusCalls()
