"""GLM 4.5 and later; without the line breaks from 4.7 on::

<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Ulm</arg_value>
</tool_call>
"""

from __future__ import annotations

from typing import Any

from penstock.engines.text.formats.source import Reading, Source, dumps
from penstock.engines.text.formats.tags import typed

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class GLMCalls:
    begins = (BEGIN,)
    openings = ""
    marks = (BEGIN, END, KEY, KEY_END, VALUE, VALUE_END)

    def read(self, source: Source, mark: str) -> Reading[None]:
        yield from source.space()
        name = yield from source.word()
        source.named(name)
        arguments: dict[str, Any] = {}
        yield from source.space()
        word = yield from source.expect(KEY, END)
        while word != END:
            key, _ = yield from source.until(KEY_END)
            yield from source.space()
            yield from source.expect(VALUE)
            text = ""
            while True:
                part, end = yield from source.until(VALUE_END)
                text += part
                begun = source.at
                yield from source.space()
                if word := (yield from source.take(KEY, END)):
                    break
                text += end + source.text[begun : source.at]
            arguments[key.strip()] = typed(text, key.strip(), source.tools.get(name, {}))
        source.call(name, dumps(arguments))


TOOLS = GLMCalls()
