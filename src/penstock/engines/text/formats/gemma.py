"""Gemma. Version 3 has no form of its own; it writes Python or JSON in a block of code, as it was shown in training::

    ```tool_code
    print(get_weather(city="Ulm"))
    ```

FunctionGemma, and Gemma 4 with other marks::

    <start_function_call>call:get_weather{city:<escape>Ulm<escape>}<end_function_call>
    <|tool_call>call:get_weather{city:<|"|>Ulm<|"|>,days:[1,2]}<tool_call|>

Gemma 4 thinks between ``<|channel>thought`` and ``<channel|>``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.engines.text.formats.family import Thoughts
from penstock.engines.text.formats.json_calls import close, read_bare, read_marked
from penstock.engines.text.formats.pythonic import give, parse
from penstock.engines.text.formats.source import MAX_DEPTH, NotACall, Reading, Source, dumps, literal

THOUGHTS = Thoughts(("<|channel>thought",), ("<channel|>",), until=("<|tool_call>",))

CODE, FENCE = ("```tool_code", "```tool_call"), "```"
HERMES, HERMES_END = "<tool_call>", "</tool_call>"


class GemmaCalls:
    """Version 3."""

    begins = (*CODE, HERMES)
    openings = "{["
    marks = ()

    def read(self, source: Source, mark: str) -> Reading[None]:
        if mark == HERMES:
            yield from read_marked(source, (HERMES_END,))
        elif mark in CODE:
            yield from self._code(source)
        else:
            yield from read_bare(source)

    def _code(self, source: Source) -> Reading[None]:
        yield from source.space()
        if (yield from source.peek()) == "{":
            yield from read_marked(source, (FENCE,))
            return
        code, _ = yield from source.until(FENCE)
        code = code.strip()
        if code.startswith("print(") and code.endswith(")"):
            code = code[len("print(") : -1]
        give(source, [(name.removeprefix("default_api."), arguments) for name, arguments in parse(code)])


class FunctionCalls(msgspec.Struct, frozen=True):
    """``call:`` and a name, and arguments that are JSON but for keys without quotes, and *quote* around texts."""

    begin: str
    end: str
    quote: str

    @property
    def begins(self) -> tuple[str, ...]:
        return (self.begin,)

    @property
    def openings(self) -> str:
        return ""

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.begin, self.end, self.quote)

    def read(self, source: Source, mark: str) -> Reading[None]:
        yield from source.space()
        yield from source.expect("call:")
        yield from source.space()
        name = yield from source.word()
        source.named(name)
        yield from source.space()
        if (yield from source.peek()) != "{":
            raise NotACall
        arguments = yield from self._value(source, MAX_DEPTH)
        source.call(name, dumps(arguments))
        yield from close(source, (self.end,))

    def _value(self, source: Source, depth: int) -> Reading[Any]:
        yield from source.space()
        if not depth:
            raise NotACall
        if (yield from source.take(self.quote)):
            text, _ = yield from source.until(self.quote)
            return text
        match (yield from source.peek()):
            case "{":
                return (yield from self._object(source, depth - 1))
            case "[":
                return (yield from self._list(source, depth - 1))
            case '"':
                return (yield from source.string())
            case _:
                word = yield from source.word()
                try:
                    return literal(word)
                except ValueError as error:
                    raise NotACall from error

    def _object(self, source: Source, depth: int) -> Reading[dict[str, Any]]:
        source.at += 1
        found: dict[str, Any] = {}
        yield from source.space()
        if (yield from source.take("}")):
            return found
        while True:
            yield from source.space()
            if (yield from source.take(self.quote)):
                key, _ = yield from source.until(self.quote)
                yield from source.space()
                yield from source.expect(":")
            else:
                key, _ = yield from source.until(":")
            found[key.strip()] = yield from self._value(source, depth)
            yield from source.space()
            if (yield from source.expect(",", "}")) == "}":
                return found

    def _list(self, source: Source, depth: int) -> Reading[list[Any]]:
        source.at += 1
        found: list[Any] = []
        yield from source.space()
        if (yield from source.take("]")):
            return found
        while True:
            found.append((yield from self._value(source, depth)))
            yield from source.space()
            if (yield from source.expect(",", "]")) == "]":
                return found


TOOLS = GemmaCalls()
FUNCTION_GEMMA = FunctionCalls("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA4 = FunctionCalls("<|tool_call>", "<tool_call|>", '<|"|>')
