"""Calls that are JSON objects with a name and arguments: one, several, or a list of them, between marks."""

from __future__ import annotations

import json

import msgspec

from penstock.engines.text.formats.source import NotACall, Reading, Source, dumps

NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters", "args")
#: Keys that a call without a mark may begin with.
FIRST = ('arguments"', 'parameters"', 'name"', 'type"', 'id"')


class JSONCalls(msgspec.Struct, frozen=True):
    """``begins`` stand before the calls, ``ends`` behind them (models forget those). ``bare``: a reply that is nothing
    but calls needs no mark."""

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    bare: bool = False

    @property
    def openings(self) -> str:
        return "{[" if self.bare else ""

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.begins, *self.ends)

    def read(self, source: Source, mark: str) -> Reading[None]:
        if mark in self.begins:
            yield from read_marked(source, self.ends)
        else:
            yield from read_bare(source)


def read_marked(source: Source, ends: tuple[str, ...]) -> Reading[None]:
    """Calls behind a mark, and one of *ends* behind them."""
    yield from source.space()
    if (yield from source.take("[")):
        yield from source.space()
        while (yield from source.peek()) != "]":
            yield from read_call(source)
            yield from source.space()
            if not (yield from source.take(",")):
                break
            yield from source.space()
        if (yield from source.peek()):
            yield from source.expect("]")
    else:
        yield from read_call(source)
        while True:
            held = source.at
            yield from _between(source)
            if (yield from source.peek()) != "{":
                source.at = min(held, source.at)
                break
            yield from read_call(source)
    if ends:
        yield from close(source, ends)


def close(source: Source, ends: tuple[str, ...]) -> Reading[None]:
    """Consume the mark behind calls, and white space before it, where there is one; half of one at the reply's end."""
    held = source.at
    yield from source.space()
    if not (yield from source.take(*ends)):
        rest = source.text[source.at :]
        cut_off = source.over and any(end.startswith(rest) for end in ends)
        source.at = len(source.text) if cut_off else min(held, source.at)


def _between(source: Source) -> Reading[None]:
    while (char := (yield from source.peek())) and (char.isspace() or char in ";,"):
        source.at += 1


def read_call(source: Source) -> Reading[None]:
    """One object, whose arguments are given out as they come if its name stands before them."""
    yield from source.expect("{")
    name, arguments, given = "", "null", False
    while True:
        yield from source.space()
        key = yield from source.string()
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        if key in NAMES:
            name = yield from source.string()
            source.named(name)
        elif key not in ARGUMENTS:
            yield from source.value()
        elif name and (yield from source.peek()) == "{":
            yield from source.arguments(name)
            given = True
        else:
            arguments = yield from source.text_value()
        yield from source.space()
        if (yield from source.expect(",", "}")) == "}":
            break
    if not given:
        source.named(name)
        source.call(name, object_of(arguments))


def object_of(arguments: str) -> str:
    """Arguments as the JSON of an object. Some models write a string with the JSON in it, or nothing."""
    try:
        value = json.loads(arguments)
        if isinstance(value, str):
            arguments = value.strip() or "{}"
            value = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise NotACall from error
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise NotACall
    return arguments


def read_bare(source: Source) -> Reading[None]:
    """A reply that is nothing but calls. What cannot be one any more is text at once."""
    calls: list[tuple[str, str]] = []
    listed = yield from source.take("[")
    while True:
        yield from source.space()
        calls.append((yield from _bare_call(source)))
        if listed:
            yield from source.space()
            if (yield from source.expect(",", "]")) == "]":
                yield from source.space()
                break
        else:
            while (yield from source.peek()) in (*" \t\r\n;",):
                source.at += 1
        if not (yield from source.peek()) and not listed:
            break
    if (yield from source.peek()):
        raise NotACall
    for name, arguments in calls:
        source.call(name, arguments)


def _bare_call(source: Source) -> Reading[tuple[str, str]]:
    yield from source.expect("{")
    yield from source.space()
    yield from source.expect('"')
    key = (yield from source.expect(*FIRST))[:-1]
    names = sorted((dumps(name)[1:] for name in source.tools), key=len, reverse=True)
    name, arguments = "", "null"
    while True:
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        if key == "name":
            yield from source.expect('"')
            name = json.loads('"' + (yield from source.expect(*names)))
        elif key in ARGUMENTS:
            if (yield from source.peek()) not in ("{", '"', "n"):
                raise NotACall
            arguments = yield from source.text_value()
        else:
            yield from source.value()
        yield from source.space()
        if (yield from source.expect(",", "}")) == "}":
            break
        yield from source.space()
        key = yield from source.string()
    if not name:
        raise NotACall
    return name, object_of(arguments)
