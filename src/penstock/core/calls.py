"""Calls of tools as the log has them, whatever form the model writes them in.

Each call is ``{"name": …, "arguments": …}``, one behind the other with or without white space between them. The
arguments are an object, as JSON. What an upstream server reported as arguments and is no object stands there as a
string and is taken unchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import msgspec

from penstock.core.job import ToolCall


class Call(msgspec.Struct, frozen=True):
    """``arguments`` is JSON, as the model wrote it."""

    name: str
    arguments: str


class CallDelta(msgspec.Struct, frozen=True):
    """More of the call number *index*: its first piece has the name, the pieces' ``arguments`` are to be joined."""

    index: int
    name: str | None
    arguments: str


def call_head(name: str) -> str:
    """How a call begins in the log; its arguments and `CALL_END` follow."""
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


CALL_END = "}\n"


def call_text(call: Call) -> str:
    """A whole call, as the log has it."""
    return call_head(call.name) + call.arguments + CALL_END


_HEAD = re.compile(r'[\s;,]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=[{"])', re.DOTALL)
_STEPS = re.compile(r'["\\{}\[\]]')


class CallReader:
    """Reads the calls of one choice's log as they come, in whatever pieces the text comes. After each push it has given
    out everything that is known."""

    def __init__(self) -> None:
        self.calls = 0
        """Number of calls so far."""
        self._held = ""
        self._depth = -1  # of brackets that the arguments have open; -1: outside of them
        self._string = False
        self._raw = False

    def push(self, text: str) -> list[CallDelta]:
        self._held += text
        deltas: list[CallDelta] = []
        while self._held and (self._begin(deltas) if self._depth < 0 else self._more(deltas)):
            pass
        return deltas

    def _begin(self, deltas: list[CallDelta]) -> bool:
        head = _HEAD.match(self._held)
        if head is None:
            # The brace that closes the call before, and white space.
            rest = self._held.lstrip("} \t\r\n;,") if self.calls else self._held
            self._held, changed = rest, rest != self._held
            return changed and bool(rest)
        if head.end() == len(self._held):
            return False
        deltas.append(CallDelta(self.calls, json.loads(head[1], strict=False), ""))
        self.calls += 1
        self._held = self._held[head.end() :]
        self._depth, self._string, self._raw = 0, False, self._held[0] == '"'
        return True

    def _more(self, deltas: list[CallDelta]) -> bool:
        if self._raw:
            return self._more_raw(deltas)
        position = 0
        while (step := _STEPS.search(self._held, position)) is not None:
            position = step.end()
            char = step.group()
            if char == "\\":
                if position == len(self._held):  # half an escape
                    position -= 1
                    break
                position += 1
            elif char == '"':
                self._string = not self._string
            elif not self._string:
                self._depth += 1 if char in "{[" else -1
                if not self._depth:
                    self._give(position, deltas)
                    self._depth = -1
                    return True
        else:
            position = len(self._held)
        self._give(position, deltas)
        return False

    def _give(self, end: int, deltas: list[CallDelta]) -> None:
        if end:
            deltas.append(CallDelta(self.calls - 1, None, self._held[:end]))
            self._held = self._held[end:]

    def _more_raw(self, deltas: list[CallDelta]) -> bool:
        """Arguments that are a string: given out when it is whole."""
        whole = re.match(r'"(?:[^"\\]|\\.)*"', self._held, re.DOTALL)
        if whole is None:
            return False
        deltas.append(CallDelta(self.calls - 1, None, json.loads(whole.group(), strict=False)))
        self._held, self._depth = self._held[whole.end() :], -1
        return True


def read_calls(text: str) -> list[Call]:
    """All calls in *text*, which is what a log has of the phase `Phase.TOOL`. Of a reply that was cut off, the last
    one's arguments may be cut off too."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for delta in CallReader().push(text):
        names.setdefault(delta.index, delta.name or "")
        arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments
    return [Call(name, arguments[index]) for index, name in names.items()]


def call_id(job: str, choice: int, index: int) -> str:
    """The id of a call: a function of where it is, so every reader of the reply sees the same."""
    return "call_" + hashlib.sha256(f"{job}/{choice}/{index}".encode()).hexdigest()[:24]


def named(calls: Sequence[Call], job: str, choice: int) -> list[ToolCall]:
    """The calls of one choice, with their ids."""
    return [ToolCall(call_id(job, choice, index), call.name, call.arguments) for index, call in enumerate(calls)]
