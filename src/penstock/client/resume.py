"""How far a log was delivered, and how long to wait before the next attempt."""

from __future__ import annotations

import time
from collections.abc import Callable

from penstock.api import DoneEvent, ErrorEvent, TokenEvent
from penstock.api.events import PhaseName
from penstock.client.errors import ProtocolError
from penstock.client.results import End, Token
from penstock.client.sse import ServerEvent
from penstock.core.aio import Backoff
from penstock.core.errors import LogRewound, PenstockError
from penstock.core.foreign import Malformed, decode
from penstock.core.job import Status

#: Exponential backoff with full jitter, in seconds: the first pause is up to the first, no pause above the second
#: (both on top of what the server asks for).
BACKOFF, BACKOFF_MAX = 0.25, 8.0


class ResumePoint:
    """How far a log was delivered. Checks that every connection continues it, and drops what was delivered before."""

    def __init__(self, after: int) -> None:
        self.position = after
        self._attempt = 0
        self._here: int | None = None
        self._ended = False

    def reconnected(self) -> None:
        self._here = None

    def take(self, event: ServerEvent) -> Token | End | None:
        """*event* as the next token or the end; None if it is old, or of a kind that we don't know.

        Raises `LogRewound` when the server's log is shorter than what was delivered, `ProtocolError` when the log has
        a gap, a repeat or an attempt that was over.
        """
        if self._ended:
            raise ProtocolError(f"The stream goes on after its end, with {event.event[:40]!r}.")
        try:
            if event.event == "token":
                return self._token(event.id, decode(event.data, TokenEvent))
            if event.event == "done":
                done = decode(event.data, DoneEvent)
                reasons = tuple(done.finish_reasons or (done.finish_reason,))
                return End(self._end(event.id), Status.COMPLETED, reasons, done.usage)
            if event.event == "error":
                failed = decode(event.data, ErrorEvent)
                if failed.error.code == LogRewound.code:
                    raise LogRewound(failed.error.message, param=failed.error.param)
                return End(self._end(event.id), failed.status, error=failed.error.info)
        except Malformed as error:
            raise ProtocolError(f"An event of the stream cannot be read: {error}") from error
        return None

    def _token(self, id: str, token: TokenEvent) -> Token | None:
        position = self._advance(id)
        if position is None:
            return None
        if token.attempt < self._attempt:
            raise ProtocolError(f"Attempt {token.attempt} wrote at {position}, after attempt {self._attempt}.")
        self._attempt = token.attempt
        segments = _segments(token)
        parts: dict[PhaseName, str] = {"text": "", "reasoning": "", "tool": ""}
        for phase, text in segments:
            parts[phase] += text
        return Token(
            position,
            parts["text"],
            token.token_id,
            token.attempt,
            token.index or 0,
            token.logprob,
            tuple(token.top_logprobs or ()),
            segments[0][0],
            parts["reasoning"],
            parts["tool"],
        )

    def _end(self, id: str) -> int:
        position = self._advance(id)
        if position is None:
            raise ProtocolError(f"The log ends at {id}, but {self.position} was delivered before.")
        self._ended = True
        return position

    def _advance(self, id: str) -> int | None:
        """The event's position if it is the next one, None if it was delivered by an earlier connection."""
        if not (id.isascii() and id.isdigit()):
            raise ProtocolError(f"An event of the stream has the id {id[:40]!r}, which is not a position.")
        position = int(id)
        here, self._here = self._here, position
        in_order = position == here + 1 if here is not None else 1 <= position <= self.position + 1
        if not in_order:
            raise ProtocolError(f"The stream jumps to position {position} after {here or self.position}.")
        if position <= self.position:
            return None
        self.position = position
        return position


def _segments(token: TokenEvent) -> list[tuple[PhaseName, str]]:
    """A token's text, cut where its phase changes. Raises `ProtocolError` where the segments are not its text."""
    if not isinstance(token.phase, list):
        return [(token.phase or "text", token.token)]
    if not token.phase or sum(length for _, length in token.phase) != len(token.token):
        raise ProtocolError(f"The phases {token.phase} are not those of the token {token.token[:40]!r}.")
    found: list[tuple[PhaseName, str]] = []
    start = 0
    for phase, length in token.phase:
        found.append((phase, token.token[start : start + length]))
        start += length
    return found


class RetryBudget:
    """How long to wait before the next attempt, and when to give up: after *limit* seconds without any progress."""

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._failing_since: float | None = None
        self._backoff = Backoff(BACKOFF, BACKOFF_MAX)

    def progress(self) -> None:
        self._failing_since = None
        self._backoff.reset()

    def pause(self, error: PenstockError, asked: float = 0.0) -> float:
        """Seconds to wait after *error*, at least those that the server *asked* for. Raises *error* when it is over.

        The clock starts at the first failure, not at the last progress: a caller may take its time between two tokens.
        """
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        left = self._limit - (now - self._failing_since)
        if left <= 0 or asked > left:
            raise error
        return min(asked + self._backoff.next(), left)
