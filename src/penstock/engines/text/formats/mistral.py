"""Mistral. A list of calls (v3), or a name and its arguments behind each mark (v11 and later: Small 3.2, Devstral,
Ministral)::

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Ulm"}, "id": "…"}]
    [TOOL_CALLS]get_weather[CALL_ID]…[ARGS]{"city": "Ulm"}

Magistral thinks between ``[THINK]`` and ``[/THINK]``.
"""

from __future__ import annotations

from penstock.engines.text.formats.family import Thoughts
from penstock.engines.text.formats.json_calls import read_bare, read_marked
from penstock.engines.text.formats.source import Reading, Source

BEGIN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

THOUGHTS = Thoughts(("[THINK]", "<think>"), ("[/THINK]", "</think>"))


class MistralCalls:
    begins = (BEGIN,)
    openings = "{["
    marks = (BEGIN, ID, ARGUMENTS)

    def read(self, source: Source, mark: str) -> Reading[None]:
        if mark != BEGIN:
            yield from read_bare(source)
            return
        yield from source.space()
        if (yield from source.peek()) in ("[", "{"):
            yield from read_marked(source, ())
            return
        name = yield from source.word()
        source.named(name)
        yield from source.space()
        if (yield from source.take(ID)):
            yield from source.word()
        yield from source.take(ARGUMENTS)
        yield from source.space()
        yield from source.arguments(name)


TOOLS = MistralCalls()
