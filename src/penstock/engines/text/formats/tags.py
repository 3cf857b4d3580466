"""Calls in tags, an argument in each. Values are texts: what they mean is in the tool's schema."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.engines.text.formats.json_calls import close
from penstock.engines.text.formats.source import NotACall, Reading, Source, dumps, literal


class TaggedCalls(msgspec.Struct, frozen=True):
    """``function`` and ``parameter``: what stands before the name, behind it, and at the end. ``begins`` and ``ends``
    stand around all of the calls. ``lines``: line breaks around a value are not part of it. ``kinds``: what stands
    behind a parameter's name where its value is a text, and where it is JSON."""

    begins: tuple[str, ...]
    ends: tuple[str, ...]
    function: tuple[str, str, str]
    parameter: tuple[str, str, str]
    lines: bool = False
    kinds: tuple[str, str] | None = None

    @property
    def openings(self) -> str:
        return ""

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.begins, *self.ends)

    def read(self, source: Source, mark: str) -> Reading[None]:
        if mark != self.function[0]:
            yield from source.space()
            yield from source.expect(self.function[0])
        while True:
            yield from self._call(source)
            yield from source.space()
            if not (yield from source.take(self.function[0])):
                break
        yield from close(source, self.ends)

    def _call(self, source: Source) -> Reading[None]:
        _, behind, end = self.function
        name, _ = yield from source.until(behind)
        source.named(name)
        schema = source.tools.get(name, {})
        arguments: dict[str, Any] = {}
        yield from source.space()
        word = yield from source.expect(self.parameter[0], end)
        while word != end:
            key, _ = yield from source.until(self.parameter[1])
            kind = "" if self.kinds is None else (yield from source.expect(*self.kinds, ">"))
            text, word = yield from self._value(source)
            if self.kinds is not None and kind in self.kinds:
                arguments[key] = text if kind == self.kinds[0] else _json(text)
            else:
                arguments[key] = typed(text, key, schema)
        source.call(name, dumps(arguments))

    def _value(self, source: Source) -> Reading[tuple[str, str]]:
        """A value, and what follows it. The end mark may be a part of the value: where something else follows."""
        text = ""
        while True:
            part, mark = yield from source.until(self.parameter[2])
            text += part
            begun = source.at
            yield from source.space()
            if word := (yield from source.take(self.parameter[0], self.function[2])):
                break
            text += mark + source.text[begun : source.at]
        if self.lines:
            text = text.removeprefix("\n").removesuffix("\n")
        return text, word


def _json(text: str) -> Any:
    try:
        return literal(text)
    except ValueError as error:
        raise NotACall from error


def typed(text: str, name: str, schema: Mapping[str, Any]) -> Any:
    """The value *text* of the argument *name* as the *schema* of all arguments has it: a text where it may be one."""
    properties = schema.get("properties")
    part = properties.get(name) if isinstance(properties, dict) else None
    types = _types(part, schema, 8)
    word = text.strip()
    if "string" in types:
        return None if "null" in types and word in ("null", "None") else text
    try:
        value = literal(word)
    except ValueError:
        value = _python(word, text)
    if "boolean" in types and isinstance(value, str) and word.lower() in ("true", "false"):
        return word.lower() == "true"
    return text if isinstance(value, str) and not types else value


def _python(word: str, text: str) -> Any:
    """Some models write values as Python does: True, None, {'a': 1}."""
    try:
        value = ast.literal_eval(word)
        dumps(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, bool | dict | list) or value is None else text


def _types(part: Any, schema: Mapping[str, Any], depth: int) -> set[str]:
    """The types that a part of a *schema* allows; none: nothing is known."""
    if not isinstance(part, dict) or not depth:
        return set()
    found: set[str] = set()
    if isinstance(path := part.get("$ref"), str) and path.startswith("#/"):
        target: Any = schema
        for step in path[2:].split("/"):
            target = target.get(step) if isinstance(target, dict) else None
        found |= _types(target, schema, depth - 1)
    kinds = part.get("type")
    found |= {kinds} if isinstance(kinds, str) else set(kinds) if isinstance(kinds, list) else set()
    for several in ("anyOf", "oneOf", "allOf"):
        for each in part.get(several) or ():
            found |= _types(each, schema, depth - 1)
    values = [*(part.get("enum") or ()), *([part["const"]] if "const" in part else ())]
    if not found and values:
        found |= {"string" if isinstance(value, str) else "null" if value is None else "number" for value in values}
    return found
