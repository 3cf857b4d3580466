"""Calls as Python writes them: LFM2 (between marks), Llama 3.2 and 4 (the whole reply), OLMo 3 (a line each)::

<|tool_call_start|>[get_weather(city="Ulm"), clock()]<|tool_call_end|>
"""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

import msgspec

from penstock.engines.text.formats.json_calls import close, read_bare, read_marked
from penstock.engines.text.formats.source import NotACall, Reading, Source

_NAMES = {"true": True, "false": False, "null": None}


class PythonicCalls(msgspec.Struct, frozen=True):
    """``bare``: a reply that is nothing but a list of calls needs no mark."""

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    bare: bool = False

    @property
    def openings(self) -> str:
        return "[{" if self.bare else ""

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.begins, *self.ends)

    def read(self, source: Source, mark: str) -> Reading[None]:
        if mark not in self.begins:
            yield from read_bare_list(source)
            return
        yield from source.space()
        if (yield from source.peek()) == "{":
            yield from read_marked(source, self.ends)
            return
        if (yield from source.peek()) == "[":
            calls = yield from read_list(source)
            yield from close(source, self.ends)
        else:
            text, _ = yield from source.until(*self.ends)
            calls = parse(text)
        give(source, calls)


def give(source: Source, calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Give *calls* out if all are of given tools. Raises `NotACall`."""
    if not calls or source.broken or any(name not in source.tools for name, _ in calls):
        raise NotACall
    for name, arguments in calls:
        source.call(name, json.dumps(arguments, ensure_ascii=False))


def read_bare_list(source: Source) -> Reading[None]:
    """A reply that is a list of calls in Python, or calls in JSON."""
    begun = source.at
    if (yield from source.take("[")):
        yield from source.space()
        if (yield from source.take(*sorted((f"{name}(" for name in source.tools), key=len, reverse=True))):
            source.at = begun
            calls = yield from read_list(source)
            yield from source.space()
            if (yield from source.peek()):
                raise NotACall
            give(source, calls)
            return
        source.at = begun
    yield from read_bare(source)


def read_list(source: Source) -> Reading[list[tuple[str, dict[str, Any]]]]:
    """Consume a list of calls, brackets and all."""
    begun, depth, quote = source.at, 0, ""
    while char := (yield from source.peek()):
        source.at += 1
        if quote:
            if char == "\\":
                yield from source.peek()
                source.at += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if not depth:
                return parse(source.text[begun : source.at])
    raise NotACall


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Calls (name, arguments): a list of them, or one a line. Nothing is evaluated. Raises `NotACall`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in strings
            body = ast.parse(text.strip()).body
        calls: list[ast.expr] = []
        for line in body:
            if not isinstance(line, ast.Expr):
                raise NotACall
            calls += line.value.elts if isinstance(line.value, ast.List) else [line.value]
        found = [_call(call) for call in calls]
        json.dumps(found, allow_nan=False)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise NotACall from error
    return found


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise NotACall
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise NotACall
        arguments[keyword.arg] = _value(keyword.value)
    return _dotted(node.func), arguments


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise NotACall


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise NotACall
            return dict(zip(names, map(_value, values), strict=True))
    raise NotACall


LFM2 = PythonicCalls(("<|tool_call_start|>",), ("<|tool_call_end|>",))
OLMO = PythonicCalls(("<function_calls>",), ("</function_calls>",))
LLAMA4 = PythonicCalls(("<|python_start|>",), ("<|python_end|>",), bare=True)
