"""Tools and JSON replies as every engine and dialect sees them: what may be asked for, and calls found in a text.

A model that *must* call a tool writes ``{"name": …, "arguments": …}`` and nothing else: its engine holds it to that
(`Request.guide`). One that *may* call tools writes freely, in the form that it was trained on:

- ``<tool_call>{"name": …, "arguments": …}</tool_call>``, any number, between other text (Hermes, Qwen);
- ``{"name": …, "parameters": …}`` as the whole reply, several separated by a semicolon or white space (Llama 3);
- ``[{"name": …, "arguments": …}, …]`` as the whole reply, with or without ``[TOOL_CALLS]`` before it (Mistral).

Anything that does not name a given tool, or is not JSON, is ordinary text. The exception is a call that an upstream
server reported: if its arguments are not JSON, or its tool was not given, the arguments stand between the tags as a
string and are taken unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import msgspec

from penstock.core.errors import InvalidRequest
from penstock.core.job import Request, ResponseFormat, ToolCall

#: Limits of a schema: bytes of its JSON, and levels of nesting (parsers downstream stop at 128).
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
#: Limit of ``multipleOf``, in units of its last digit: its automaton has that many states.
MAX_MULTIPLE = 10_000
#: Limits of a regular expression, in characters, and of the texts that a reply may be chosen from.
MAX_PATTERN = 4096
MAX_CHOICES = 1024

BEGIN, END = "<tool_call>", "</tool_call>"
MISTRAL = "[TOOL_CALLS]"

_decoder = json.JSONDecoder()


# ------------------------------------------------------------------------------------------ bounds of a request


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Refuse a JSON schema that would cost too much to follow; *param* names the field it came in.

    Raises `InvalidRequest`. Whether every keyword can be followed is for the engine to say.
    """
    size = len(msgspec.json.encode(schema))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"The JSON schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are taken.", param=param)
    multiples: list[Fraction] = []
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                multiples += _multiple(part.get("multipleOf"), param)
                below += part.values()
            elif isinstance(part, list):
                below += part
            elif isinstance(part, int) and not -(2**63) <= part < 2**64:
                raise InvalidRequest("The JSON schema has a number of more than 64 bits.", param=param)
        level = below
        if not level:
            break
    else:
        raise InvalidRequest(f"The JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.", param=param)
    unit = math.lcm(1, *(multiple.denominator for multiple in multiples))
    if math.lcm(1, *(int(multiple * unit) for multiple in multiples)) > MAX_MULTIPLE:
        raise InvalidRequest(
            f"The schema's multipleOf values have a least common multiple above {MAX_MULTIPLE} (in units of their last "
            "digit); leave some of them out.",
            param=param,
        )


def check_form(form: ResponseFormat, param: str) -> None:
    """Refuse a form other than JSON that is empty or too large; *param* names the field it came in.

    Raises `InvalidRequest`. Whether it can be followed is for the engine to say.
    """
    size = len(form.pattern) + len(form.grammar) + sum(map(len, form.choices))
    if form.json_schema is None and not (form.choices if form.type == "choice" else size):
        raise InvalidRequest(f"The {form.type} is empty.", param=param)
    if len(form.pattern) > MAX_PATTERN:
        raise InvalidRequest(
            f"The regular expression has {len(form.pattern)} characters; at most {MAX_PATTERN} are taken.", param=param
        )
    if len(form.choices) > MAX_CHOICES:
        raise InvalidRequest(f"There are {len(form.choices)} choices; at most {MAX_CHOICES} are taken.", param=param)
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"The {form.type} has {size} characters; at most {MAX_SCHEMA_BYTES} are taken.", param=param
        )


def _multiple(value: Any, param: str) -> list[Fraction]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []  # none, or a property of that name
    if not 1e-6 <= value <= 1e9:
        raise InvalidRequest("multipleOf must be between 0.000001 and 1,000,000,000.", param=param)
    return [Fraction(repr(value))]


# ------------------------------------------------------------------------------------------ what was called


class Call(msgspec.Struct, frozen=True):
    """A call that was found in a text; ``arguments`` is JSON, as the model wrote it."""

    name: str
    arguments: str


class CallDelta(msgspec.Struct, frozen=True):
    """More of the call number *index*: its first piece has the name, the pieces' ``arguments`` are to be joined."""

    index: int
    name: str | None
    arguments: str


#: What a parser gives out: a stretch of the reply's text, or of a call.
Piece = str | CallDelta


class ToolParser:
    """Splits a reply into text and calls as it comes. After each push it has given out everything that does not depend
    on the text that follows, in whatever pieces the text came.
    """

    def __init__(self, request: Request) -> None:
        self._names = frozenset(tool.name for tool in request.callable_tools)
        self._most = None if request.parallel_tool_calls else 1
        self._held = ""
        self.calls = 0
        """Number of calls so far."""
        self._state = self._forced if request.tool_choice == "required" else self._opening
        self._shape = _Shape(self._names)
        self._scanned = 0  # characters of a call's text whose meaning is known
        self._in_string = False
        self._arguments: list[str] = []  # of the forced call

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._state(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The rest of the reply, which was held back: nothing follows."""
        pieces: list[Piece] = []
        held, self._held = self._held, ""
        state: Any = self._state
        if state == self._more_arguments:
            self._last_arguments(held, pieces)
        elif state == self._call:  # models end a reply without the closing tag
            self._take(held, held.lstrip()[len(BEGIN) :], pieces, tagged=True)
        elif state in (self._whole, self._forced):
            self._take(held, held.strip().removeprefix(MISTRAL), pieces)
        elif held.strip() or not self.calls:
            pieces.append(held)
        return [piece for piece in pieces if piece != ""]

    # Each state reads the held text, appends what can be given out, and returns whether there is more to do.

    def _opening(self, pieces: list[Piece]) -> bool:
        """Only white space so far. A reply that begins like JSON either is a call as a whole, or has none."""
        start = self._held.lstrip()
        if start:
            self._state = self._whole if start[0] in "{[" else self._text
        return bool(start)

    def _whole(self, pieces: list[Piece]) -> bool:
        if self._shape.take(self._held[self._scanned :]):
            self._scanned = len(self._held)
            return False
        self._state = self._text
        return True

    def _text(self, pieces: list[Piece]) -> bool:
        found = self._held.find(BEGIN)
        if found >= 0:
            self._give(found, pieces)
            self._state, self._scanned, self._in_string = self._call, 0, False
            return True
        # Hold back white space, which is no text if a call follows, and what may become the beginning of a call.
        self._give(len(self._held) - _partial(self._held, BEGIN), pieces)
        return False

    def _give(self, end: int, pieces: list[Piece]) -> None:
        """Give out the text before *end*, without the white space at its end."""
        text = self._held[:end].rstrip()
        if text:
            pieces.append(text)
            self._held = self._held[len(text) :]

    def _call(self, pieces: list[Piece]) -> bool:
        for match in _STRINGS.finditer(self._held, self._scanned):
            if match.group() == '"':
                self._in_string = not self._in_string
            elif match.group() == END and not self._in_string:
                block, self._held = self._held[: match.end()], self._held[match.end() :]
                self._state = self._text
                self._take(block, block.strip()[len(BEGIN) : -len(END)], pieces, tagged=True)
                return True
            self._scanned = match.end()
        # What follows is not known yet: it may be half a closing tag, or half an escape.
        rest = self._held[self._scanned :]
        self._scanned = len(self._held) - max(_partial(rest, END), int(rest.endswith("\\")))
        return False

    def _forced(self, pieces: list[Piece]) -> bool:
        if self._held.lstrip()[:1] not in ("", "{"):  # an engine that writes enforced calls in its own form
            self._state = self._opening
            return True
        header = _HEADER.match(self._held)
        if header is None or header[1] not in self._names:
            return False
        self.calls = 1
        pieces.append(CallDelta(0, header[1], ""))
        self._held = self._held[header.end() :]
        self._state = self._more_arguments
        return True

    def _more_arguments(self, pieces: list[Piece]) -> bool:
        """Give out the arguments of an enforced call, except what may be the end of the object around them."""
        text = self._held.rstrip()
        if text.endswith("}"):
            text = text[:-1].rstrip()
        self._more(text, pieces)
        self._held = self._held[len(text) :]
        return False

    def _last_arguments(self, held: str, pieces: list[Piece]) -> None:
        try:
            json.loads("".join(self._arguments))
        except (ValueError, RecursionError):  # the reply was cut off: what is held belongs to them
            self._more(held, pieces)

    def _more(self, text: str, pieces: list[Piece]) -> None:
        if text:
            self._arguments.append(text)
            pieces.append(CallDelta(0, None, text))

    def _take(self, block: str, inside: str, pieces: list[Piece], *, tagged: bool = False) -> None:
        """Give out the calls in *inside*, or, if it has none, the whole *block* as text."""
        calls = _calls(inside, self._names, tagged=tagged)
        if not calls:
            pieces.append(block)
        for call in calls:
            if self._most is None or self.calls < self._most:
                pieces.append(CallDelta(self.calls, call.name, call.arguments))
                self.calls += 1


_State = Callable[[str], Any]
_SPACE = " \t\r\n"


class _Shape:
    """Reads a reply that begins like JSON, character by character: may the whole of it still be calls (see `_calls`)?

    Each state takes the next character and returns the next state, or None if it can no longer be a call.
    """

    #: Keys that a call may begin with.
    KEYS = ("name", "arguments", "parameters", "id", "type")

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._state: _State | None = self._start
        self._word = ""  # a key, the tool's name, or what is left of a tag
        self._key = ""
        self._open = ""  # brackets that a value has open
        self._behind: _State = self._between
        self._named = False

    def take(self, text: str) -> bool:
        for char in text:
            if self._state is None:
                break
            self._state = self._state(char)
        return self._state is not None

    def _start(self, char: str) -> _State | None:
        return self._tag_or_list if char == "[" else self._calls(char) or (self._start if char.isspace() else None)

    def _tag_or_list(self, char: str) -> _State | None:
        if char != MISTRAL[1]:
            return self._list(char)
        self._word = MISTRAL[2:]
        return self._tag

    def _tag(self, char: str) -> _State | None:
        if char != self._word[0]:
            return None
        self._word = self._word[1:]
        return self._tag if self._word else self._tagged

    def _tagged(self, char: str) -> _State | None:
        return self._tagged if char in _SPACE else self._list if char == "[" else self._calls(char)

    def _list(self, char: str) -> _State | None:
        self._behind = self._item_end
        return self._list if char in _SPACE else self._calls(char)

    def _item_end(self, char: str) -> _State | None:
        if char in _SPACE:
            return self._item_end
        return self._list if char == "," else self._end if char == "]" else None

    def _end(self, char: str) -> _State | None:
        return self._end if char in _SPACE else None

    def _between(self, char: str) -> _State | None:
        return self._between if char in f"{_SPACE};" else self._calls(char)

    def _calls(self, char: str) -> _State | None:
        self._named = False
        return self._first_key if char == "{" else None

    def _first_key(self, char: str) -> _State | None:
        self._word = ""
        return self._first_key if char in _SPACE else self._known_key if char == '"' else None

    def _known_key(self, char: str) -> _State | None:
        if char == '"':
            return self._key_end(char) if self._word in self.KEYS else None
        self._word += char
        return self._known_key if any(key.startswith(self._word) for key in self.KEYS) else None

    def _next_key(self, char: str) -> _State | None:
        self._word = ""
        return self._next_key if char in _SPACE else self._any_key if char == '"' else None

    def _any_key(self, char: str) -> _State | None:
        if char == '"':
            return self._key_end(char)
        self._word += char
        return self._escaped(self._any_key) if char == "\\" else self._any_key

    def _key_end(self, char: str) -> _State | None:
        self._key, self._word = self._word, ""
        return self._colon

    def _colon(self, char: str) -> _State | None:
        return self._colon if char in _SPACE else self._value if char == ":" else None

    def _value(self, char: str) -> _State | None:
        if char in _SPACE:
            return self._value
        if self._key == "name":
            return self._name if char == '"' else None
        if self._key in ("arguments", "parameters") and char not in '{"n':
            return None
        self._open = ""
        return self._inside(char) if char in '{["' else self._scalar

    def _name(self, char: str) -> _State | None:
        if char == '"':
            self._named = True
            return self._value_end if self._word in self._names else None
        self._word += char
        return self._name if any(name.startswith(self._word) for name in self._names) else None

    def _scalar(self, char: str) -> _State | None:
        return self._scalar if char.isalnum() or char in "+-." else self._value_end(char)

    def _inside(self, char: str) -> _State | None:
        if char == '"':
            return self._string
        if char in "{[":
            self._open += char
        elif char in "}]":
            if self._open[-1] != ("{" if char == "}" else "["):
                return None
            self._open = self._open[:-1]
        return self._inside if self._open else self._value_end

    def _string(self, char: str) -> _State | None:
        if char == "\\":
            return self._escaped(self._string)
        if char != '"':
            return self._string
        return self._inside if self._open else self._value_end

    def _escaped(self, behind: _State) -> _State:
        return lambda char: behind

    def _value_end(self, char: str) -> _State | None:
        if char in _SPACE:
            return self._value_end
        if char == "}":
            return self._behind if self._named else None
        return self._next_key if char == "," else None


#: The beginning of what `Request.guide` makes a model write.
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_STRINGS = re.compile(r'\\.|"|' + re.escape(END), re.DOTALL)


def _partial(text: str, tag: str) -> int:
    """How many characters at the end of *text* may be the beginning of *tag*."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


class _Written(msgspec.Struct):
    """A call as models write it."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"null")
    parameters: msgspec.Raw = msgspec.Raw(b"null")


def _calls(text: str, names: frozenset[str], *, tagged: bool) -> list[Call]:
    """*text* as calls of the tools *names*: one or more objects, or a list of them. Empty if any part is not a call.

    *tagged*: it stood between `BEGIN` and `END`, where arguments may be a string that is taken unchanged.
    """
    found: list[Call] = []
    try:
        if text.lstrip().startswith("["):
            written = msgspec.json.decode(text, type=list[_Written])
        else:
            written = [msgspec.json.decode(part, type=_Written) for part in _objects(text)]
        for call in written:
            raw = call.parameters if bytes(call.arguments) == b"null" else call.arguments
            text = bytes(raw).decode()
            told = tagged and text.startswith('"')
            arguments = json.loads(text) if told else _arguments(text)
            if arguments is None or not (told or call.name in names):
                return []
            found.append(Call(call.name, arguments))
    except (ValueError, RecursionError):  # msgspec's errors and JSON's are ValueErrors
        return []
    return found


def _objects(text: str) -> list[str]:
    """The JSON values in *text*, which are separated by white space or semicolons."""
    parts = []
    position = 0
    while position < len(text):
        if text[position] in " \t\r\n;":
            position += 1
            continue
        _, end = _decoder.raw_decode(text, position)
        parts.append(text[position:end])
        position = end
    return parts


def _arguments(text: str) -> str | None:
    """Arguments as the JSON of an object. Some models write a string with the JSON in it, or nothing; else None."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        text = json.loads(text)
    return text if isinstance(json.loads(text), dict) else None


def parse_tool_calls(text: str, request: Request) -> tuple[str | None, list[Call]]:
    """The text of a whole reply as (content, calls). The content is None where there are only calls."""
    if not request.callable_tools:
        return text, []
    parser = ToolParser(request)
    return join([*parser.push(text), *parser.finish()])


def join(pieces: Sequence[Piece]) -> tuple[str | None, list[Call]]:
    """What a parser gave out, put together as (content, calls)."""
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, CallDelta):
            names.setdefault(piece.index, piece.name or "")
            arguments[piece.index] = arguments.get(piece.index, "") + piece.arguments
    calls = [Call(name, arguments[index]) for index, name in names.items()]
    return content or (None if calls else ""), calls


def finish_reason(request: Request, reason: str, text: str) -> str:
    """The finish reason for the log: *reason* is the engine's own, *text* the whole reply."""
    if reason != "stop" or not request.callable_tools:
        return reason
    return "tool_calls" if parse_tool_calls(text, request)[1] else reason


def call_id(job: str, choice: int, index: int) -> str:
    """The id of a call: a function of where it is, so every reader of the reply sees the same."""
    return "call_" + hashlib.sha256(f"{job}/{choice}/{index}".encode()).hexdigest()[:24]


def named(calls: Sequence[Call], job: str, choice: int) -> list[ToolCall]:
    """The calls of one choice, with their ids."""
    return [ToolCall(call_id(job, choice, index), call.name, call.arguments) for index, call in enumerate(calls)]
