"""The text of a reply while it comes, as those who read it see it.

A format is read by a generator (`Reading`): it takes what it wants from a `Source`, and yields where it has to wait for
more text. So it reads like a parser of a whole text, and cannot say anything else when the text comes in other pieces.
"""

from __future__ import annotations

import enum
import functools
import json
import re
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

from penstock.core.calls import CALL_END, call_head
from penstock.core.events import Phase, Span
from penstock.core.job import Request

T = TypeVar("T")

Reading = Generator[None, None, T]

#: Levels of brackets in arguments; parsers downstream stop at 128.
MAX_DEPTH = 100

_WORD = re.compile(r"[\w.:/-]*")
_SCALAR = re.compile(r"[\w.+-]*")
_JSON_SCALAR = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|true|false|null", re.ASCII)
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})')


class _Held(enum.Enum):
    """What becomes of consumed text: it is held until that is known, or passed on as it comes."""

    YES = 0
    AS_TEXT = 1
    AS_CALL = 2
    NOWHERE = 3


class NotACall(Exception):
    """What was tried is no call: it is text."""


class Marks:
    """Finds words in a text that comes in pieces."""

    __slots__ = ("_firsts", "_longest", "_pattern", "words")

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(sorted(set(words), key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self.words)) or "(?!)")
        self._firsts = frozenset(word[0] for word in self.words)
        self._longest = max(map(len, self.words), default=1)

    def search(self, text: str, start: int) -> re.Match[str] | None:
        return self._pattern.search(text, start)

    def partial(self, text: str, start: int) -> int:
        """Where in *text*, behind *start*, a word may begin that is not complete; its length if nowhere."""
        for at in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts and any(word.startswith(text[at:]) for word in self.words):
                return at
        return len(text)


@functools.lru_cache(256)
def marks_of(words: tuple[str, ...]) -> Marks:
    return Marks(words)


class Source:
    """Text comes in (`text`), and segments go out (`out`). What is consumed (``text[:at]``) is held until it is known
    what it is: `keep` makes text of it, `drop` nothing.
    """

    def __init__(self, request: Request) -> None:
        self.tools = {tool.name: tool.parameters for tool in request.callable_tools}
        self._most = None if request.parallel_tool_calls else 1
        self.text = ""
        self.at = 0
        self.over = False
        """The reply has ended: nothing follows."""
        self.out: list[Span] = []
        self.phase = Phase.TEXT
        """What is being read."""
        self.calls = 0
        """Number of calls so far."""
        self.broken = False
        """A call's arguments were no JSON, after its beginning was given out: whatever follows is text."""
        self._held = _Held.YES
        self._midline = False  # text was given out, and no line has ended since
        self._quiet = False  # a call or a thought was given out: white space behind it is no text

    # ---------------------------------------------------------------------------- what goes out

    def give(self, phase: Phase, text: str) -> None:
        if not text:
            return
        if phase is Phase.TEXT:
            self._midline, self._quiet = True, False
        if self.out and self.out[-1][0] is phase:
            text = self.out.pop()[1] + text
        self.out.append((phase, text))

    def drop(self) -> None:
        self.text, self.at = self.text[self.at :], 0

    def keep(self, phase: Phase = Phase.TEXT) -> None:
        self.give(phase, self.text[: self.at])
        self.drop()

    def quiet(self) -> None:
        """White space that ends the reply behind this is no text, and another line begins."""
        self._quiet, self._midline = True, False

    def _pass(self) -> None:
        """Pass on what is consumed, where it is not held."""
        if self._held is _Held.YES or not self.at:
            return
        if self._held is not _Held.NOWHERE:
            self.give(Phase.TEXT if self._held is _Held.AS_TEXT else Phase.TOOL, self.text[: self.at])
        self.drop()

    def more(self) -> Reading[None]:
        """Wait for more text."""
        self._pass()
        yield

    # ---------------------------------------------------------------------------- what is next

    def peek(self) -> Reading[str]:
        """The next character; "" at the end."""
        while self.at >= len(self.text):
            if self.over:
                return ""
            yield from self.more()
        return self.text[self.at]

    def space(self) -> Reading[None]:
        """Consume white space."""
        while (char := (yield from self.peek())) and char.isspace():
            self.at += 1

    def take(self, *words: str) -> Reading[str]:
        """Consume whichever of *words* (longest first) comes next; "" if none does."""
        while True:
            for word in words:
                if self.text.startswith(word, self.at):
                    self.at += len(word)
                    return word
                if not self.over and word.startswith(self.text[self.at :]):
                    break
            else:
                return ""
            yield from self.more()

    def expect(self, *words: str) -> Reading[str]:
        """The same. Raises `NotACall` if none does."""
        if not (word := (yield from self.take(*words))):
            raise NotACall
        return word

    def word(self) -> Reading[str]:
        """Consume a name of letters, digits and ``_.:/-``. Raises `NotACall` if there is none."""
        while (match := _WORD.match(self.text, self.at)) and match.end() == len(self.text) and not self.over:
            if match.end() - self.at > 1000:
                break
            yield
        if match is None or not match.group():
            raise NotACall
        self.at = match.end()
        return match.group()

    def until(self, *words: str) -> Reading[tuple[str, str]]:
        """Consume the text before the first of *words*, and that word. Raises `NotACall` if there is none."""
        self._pass()
        marks, begun, start = marks_of(words), self.at, self.at
        while (match := marks.search(self.text, start)) is None:
            if self.over:
                raise NotACall
            start = marks.partial(self.text, start)
            yield
        text = self.text[begun : match.start()]
        self.at = match.end()
        return text, match.group()

    def find(self, marks: Marks, phase: Phase = Phase.TEXT, *, lines: frozenset[str] = frozenset()) -> Reading[str]:
        """Give the text out up to the next of *marks*, which is consumed, and held with the white space before it; ""
        at the end. Those in *lines* count only where they begin a line."""
        start = 0
        while True:
            match = marks.search(self.text, start)
            end = marks.partial(self.text, start) if match is None else match.start()
            text = self.text[:end].rstrip()
            if match is not None and match.group() in lines and self._inside_a_line(text, end):
                start = match.end()
                continue
            if text:
                self.give(phase, text)
                self.text = self.text[len(text) :]
            if match is not None:
                self.at = match.end() - len(text)
                return match.group()
            start = 0
            if self.over:
                self.at = len(self.text)
                if self.text.isspace() and (self._quiet or phase is not Phase.TEXT):
                    self.drop()
                self.keep(phase)
                return ""
            yield

    def _inside_a_line(self, text: str, end: int) -> bool:
        return bool(text or self._midline) and "\n" not in self.text[len(text) : end]

    # ---------------------------------------------------------------------------- JSON

    def value(self) -> Reading[None]:
        """Consume a value of JSON's. Raises `NotACall` as soon as it is none."""
        open_ = ""
        state = "value"
        while True:
            yield from self.space()
            char = yield from self.peek()
            if state in ("value", "value or end") and not (char == "]" and state == "value or end"):
                if char in ("{", "["):
                    open_ += char
                    self.at += 1
                    if len(open_) > MAX_DEPTH:
                        raise NotACall
                    state = "key or end" if char == "{" else "value or end"
                    continue
                yield from self._string() if char == '"' else self._scalar()
            elif char == '"' and state in ("key", "key or end"):
                yield from self._string()
                yield from self.space()
                yield from self.expect(":")
                state = "value"
                continue
            elif char == "," and state == "behind":
                self.at += 1
                state = "key" if open_[-1] == "{" else "value"
                continue
            elif open_ and char == ("}" if open_[-1] == "{" else "]") and state not in ("key", "value"):
                self.at += 1
                open_ = open_[:-1]
            else:
                raise NotACall
            if not open_:
                return
            state = "behind"

    def _string(self) -> Reading[None]:
        self.at += 1
        while char := (yield from self.peek()):
            if char == '"':
                self.at += 1
                return
            if char == "\\":
                while (escape := _ESCAPE.match(self.text, self.at)) is None:
                    if self.over or len(self.text) >= self.at + 6:
                        raise NotACall
                    yield from self.more()
                self.at = escape.end()
            elif (plain := _PLAIN.match(self.text, self.at)) is not None:
                self.at = plain.end()
            else:  # a line break or a tabulator as it is, which JSON does not allow in a string, but models write
                self._control(char)
        raise NotACall

    def _control(self, char: str) -> None:
        self._pass()
        self.at += 1
        if self._held is _Held.AS_CALL:
            self.give(Phase.TOOL, json.dumps(char)[1:-1])
            self.drop()

    def _scalar(self) -> Reading[None]:
        while (match := _SCALAR.match(self.text, self.at)) is None or (match.end() == len(self.text) and not self.over):
            if len(self.text) > self.at + 1000:
                raise NotACall
            yield from self.more()
        if not _JSON_SCALAR.fullmatch(self.text, self.at, match.end()):
            raise NotACall
        self.at = match.end()

    def text_value(self) -> Reading[str]:
        """Consume a value; its JSON."""
        yield from self.space()
        start = self.at
        yield from self.value()
        return '""' if self._held is not _Held.YES else as_json(self.text[start : self.at])

    def string(self) -> Reading[str]:
        """Consume a string of JSON's; what it says."""
        if (yield from self.peek()) != '"':
            raise NotACall
        return str(json.loads((yield from self.text_value())))

    # ---------------------------------------------------------------------------- calls

    def named(self, name: str) -> None:
        """The call that is being read is one of the tool *name*. What calls nobody is text, up to its end."""
        if name not in self.tools or self.broken:
            self._held = _Held.AS_TEXT
            self._pass()

    def call(self, name: str, arguments: str) -> None:
        """A whole call of a tool, which was `named`; *arguments* are JSON. One too many is dropped."""
        if self._held is not _Held.YES:
            return
        self.quiet()
        if self._begin(name):
            self.give(Phase.TOOL, arguments + CALL_END)

    def arguments(self, name: str) -> Reading[None]:
        """Consume the arguments of a call of a tool, which was `named`: an object. Give them out as they come.

        Raises `NotACall`.
        """
        if (yield from self.peek()) != "{":
            raise NotACall
        if self._held is _Held.AS_TEXT:
            yield from self.value()
            return
        self.drop()
        self.quiet()
        self._held = _Held.AS_CALL if self._begin(name) else _Held.NOWHERE
        yield from self.value()
        self._pass()
        if self._held is _Held.AS_CALL:
            self.give(Phase.TOOL, CALL_END)
        self._held = _Held.YES

    def _begin(self, name: str) -> bool:
        if self._most is not None and self.calls >= self._most:
            return False
        self.give(Phase.TOOL, call_head(name))
        self.calls += 1
        return True

    def attempt(self, reading: Reading[None]) -> Reading[None]:
        """Read calls; what is none of them becomes text."""
        self.phase = Phase.TOOL
        try:
            yield from reading
        except NotACall:
            self.broken = self.broken or self._held is _Held.AS_CALL
            if self._held is _Held.YES:
                self.keep()
        self._pass()
        self._held = _Held.YES
        self.drop()
        self.phase = Phase.TEXT


def as_json(text: str) -> str:
    """JSON whose strings may have line breaks as they are, as JSON. Raises `NotACall`."""
    try:
        value = json.loads(text, strict=False)
        try:
            json.loads(text)
        except ValueError:
            return dumps(value)
    except (ValueError, RecursionError) as error:
        raise NotACall from error
    return text


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def literal(text: str) -> Any:
    """What *text* says as JSON. Raises `ValueError`."""
    try:
        return json.loads(text, strict=False)
    except RecursionError as error:
        raise ValueError(text) from error
