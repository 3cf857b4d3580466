"""What a job's log holds: runs of tokens, closed by exactly one terminal event.

A position is the 1-based index of a token in its job's log; the terminal event's position is the last
token's plus one. Runs are stored column-wise because a step appends to every running job at once and the
common case (one choice, no logprobs) then needs two short lists and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from penstock.core.errors import ErrorInfo
from penstock.core.job import Status, Usage


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token that might have been drawn. ``data``: its bytes, if they are not text by themselves."""

    id: int
    text: str
    logprob: float
    data: bytes | None = None


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of the chosen token and of its best alternatives.

    ``text`` and ``data`` are the chosen token's own, as in `TopLogprob`. The reply's text may have less of it (half a
    character, text that may become a stop string). None in logs of older versions.
    """

    logprob: float
    top: tuple[TopLogprob, ...] = ()
    text: str | None = None
    data: bytes | None = None


#: A token of a choice: its id, the text that it added, and how likely it was, where that is known.
TokenLogprob = tuple[int, str, Logprob | None]


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """Tokens at positions ``position`` … ``position + len(ids) - 1``, all written under one attempt.

    ``texts[i]`` is the text that token ``ids[i]`` completed (possibly empty: half a UTF-8 character, text held
    back because it may become a stop string, the end-of-sequence token). ``choices`` tells which of the request's
    ``n`` choices each token belongs to (None: all to choice 0).
    """

    position: int
    attempt: int
    ids: list[int]
    texts: list[str]
    choices: list[int] | None = None
    logprobs: list[Logprob | None] | None = None

    @property
    def last(self) -> int:
        return self.position + len(self.ids) - 1

    def after(self, position: int) -> Tokens:
        """The part of this run after *position*, or the run itself if that is all of it."""
        skip = position - self.position + 1
        return self if skip <= 0 else self._part(slice(skip, None))

    def up_to(self, position: int) -> Tokens:
        """The part of this run up to and including *position*, or the run itself if that is all of it."""
        return self if position >= self.last else self._part(slice(0, position - self.position + 1))

    def _part(self, part: slice) -> Tokens:
        return Tokens(
            self.position + part.start,
            self.attempt,
            self.ids[part],
            self.texts[part],
            None if self.choices is None else self.choices[part],
            None if self.logprobs is None else self.logprobs[part],
        )


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """The terminal event. ``finish_reasons`` has one entry per choice when ``status`` is completed.

    So has ``stops`` if a stop string ended any of them: which one, or None.
    """

    position: int
    attempt: int
    status: Status
    finish_reasons: tuple[str, ...] = ()
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    stops: tuple[str | None, ...] = ()

    @property
    def finish_reason(self) -> str | None:
        return self.finish_reasons[0] if self.finish_reasons else None

    def stop(self, choice: int = 0) -> str | None:
        """The stop string that ended the *choice*, if one did and the engine reported it."""
        return self.stops[choice] if self.stops else None


Event = Tokens | Ended


class Completion(msgspec.Struct):
    """A folded log: the text of each choice, its logprobs where asked for, and how it ended."""

    texts: list[str]
    ids: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    ended: Ended | None = None
    pieces: list[list[str]] = []
    """For each choice, the text that each of its positions added."""


def fold(events: Iterable[Event], n: int = 1) -> Completion:
    """A JSON reply is a fold of the log: join each choice's texts in order."""
    parts: list[list[str]] = [[] for _ in range(n)]
    result = Completion([""] * n, [[] for _ in range(n)], [[] for _ in range(n)])
    for event in events:
        if isinstance(event, Ended):
            result.ended = event
            continue
        for i, (token, text) in enumerate(zip(event.ids, event.texts, strict=True)):
            choice = event.choices[i] if event.choices is not None else 0
            parts[choice].append(text)
            result.ids[choice].append(token)
            logprob = event.logprobs[i] if event.logprobs is not None else None
            if logprob is not None:
                result.logprobs[choice].append((token, text, logprob))
    result.texts = ["".join(part) for part in parts]
    result.pieces = parts
    return result


class Prefix(msgspec.Struct, array_like=True):
    """The tokens of one choice that earlier attempts logged: an engine continues from them."""

    ids: list[int] = []
    texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)


def split_choices(ids: Sequence[int], texts: Sequence[str], choices: Sequence[int] | None, n: int) -> list[Prefix]:
    """A logged prefix as one `Prefix` per choice."""
    result = [Prefix([], []) for _ in range(n)]
    for token, text, choice in zip(ids, texts, choices or [0] * len(ids), strict=True):
        result[choice].ids.append(token)
        result[choice].texts.append(text)
    return result
