"""Llama 3: a call is the whole reply, ``{"name": …, "parameters": …}``, several are separated by semicolons; behind
``<|python_tag|>`` stand calls too, those of built-in tools as ``brave_search.call(query="…")``. Custom tools may be
written ``<function=get_weather>{"city": "Ulm"}</function>``."""

from __future__ import annotations

from penstock.engines.text.formats.json_calls import close, read_marked
from penstock.engines.text.formats.pythonic import give, parse, read_bare_list
from penstock.engines.text.formats.source import NotACall, Reading, Source

TAG, FUNCTION = "<|python_tag|>", "<function="


class LlamaCalls:
    begins = (TAG, FUNCTION)
    openings = "{["
    marks = (TAG,)

    def read(self, source: Source, mark: str) -> Reading[None]:
        if mark == FUNCTION:
            name, _ = yield from source.until(">")
            source.named(name)
            yield from source.space()
            yield from source.arguments(name)
            yield from close(source, ("</function>",))
        elif mark != TAG:
            yield from read_bare_list(source)
        else:
            yield from source.space()
            if (yield from source.peek()) in ("{", "["):
                yield from read_marked(source, ())
            else:
                yield from self._built_in(source)

    def _built_in(self, source: Source) -> Reading[None]:
        tools = sorted((f"{name}.call(" for name in source.tools), key=len, reverse=True)
        begun = source.at
        yield from source.expect(*tools)
        while (yield from source.peek()):
            source.at = len(source.text)
        calls = parse(source.text[begun:])
        if len(calls) != 1:
            raise NotACall
        give(source, [(name.removesuffix(".call"), arguments) for name, arguments in calls])


TOOLS = LlamaCalls()
