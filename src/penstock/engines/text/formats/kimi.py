"""Kimi K2::

    <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Ulm"}
    <|tool_call_end|><|tool_calls_section_end|>

A thought may end with the calls, without a mark of its own.
"""

from __future__ import annotations

import re

from penstock.engines.text.formats.family import Thoughts
from penstock.engines.text.formats.json_calls import close
from penstock.engines.text.formats.source import NotACall, Reading, Source

SECTIONS, CALL = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"), "<|tool_call_begin|>"
SECTION_ENDS = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
ARGUMENTS, CALL_END = "<|tool_call_argument_begin|>", "<|tool_call_end|>"

THOUGHTS = Thoughts(("<think>", "◁think▷"), ("</think>", "◁/think▷"), until=SECTIONS)


class KimiCalls:
    begins = (*SECTIONS, CALL)
    openings = ""
    marks = (*begins, *SECTION_ENDS, ARGUMENTS, CALL_END)

    def read(self, source: Source, mark: str) -> Reading[None]:
        if mark != CALL:
            yield from source.space()
            yield from source.expect(CALL)
        while True:
            yield from source.space()
            place = yield from source.word()
            yield from source.space()
            yield from source.expect(ARGUMENTS)
            yield from source.space()
            name = re.sub(r":\d+$", "", place.removeprefix("functions."))
            if not name:
                raise NotACall
            source.named(name)
            yield from source.arguments(name)
            yield from close(source, (CALL_END,))
            yield from source.space()
            if not (yield from source.take(CALL)):
                break
        if mark != CALL:
            yield from close(source, SECTION_ENDS)


TOOLS = KimiCalls()
