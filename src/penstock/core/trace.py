"""W3C Trace Context: which trace a request belongs to, over process borders (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
import secrets
from typing import Self

import msgspec

_HEADER = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

#: Flags that we know; all others are cleared when we pass a trace on, as the standard asks.
SAMPLED = 0x01
RANDOM = 0x02


class TraceContext(msgspec.Struct, frozen=True):
    """A ``traceparent``: the trace, and the span in it that is the parent of what comes. As text it is the header."""

    trace_id: str
    """32 hexadecimal digits, not all zero."""
    span_id: str
    """16 hexadecimal digits, not all zero."""
    flags: int = 0

    @classmethod
    def parse(cls, header: str | None) -> Self | None:
        """What the header says; None where there is none, or one that the standard tells to ignore. Several header
        lines are one that is ignored: join them with a comma."""
        found = _HEADER.fullmatch(header.strip(" \t")) if header is not None else None
        if found is None:
            return None
        version, trace_id, span_id, flags, rest = found.groups()
        if version == "00" and rest is not None:
            return None  # later versions may say more; this one says nothing behind the flags
        return cls(trace_id, span_id, int(flags, 16) & (SAMPLED | RANDOM))

    @classmethod
    def new(cls, *, sampled: bool = True) -> Self:
        """The beginning of a trace."""
        return cls(_digits(16), _digits(8), RANDOM | (SAMPLED if sampled else 0))

    def child(self) -> TraceContext:
        """A new span of the same trace."""
        return TraceContext(self.trace_id, _digits(8), self.flags)

    @property
    def sampled(self) -> bool:
        """Does who began the trace record it?"""
        return bool(self.flags & SAMPLED)

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def _digits(count: int) -> str:
    """*count* random bytes in hexadecimal, not all zero."""
    while not any(drawn := secrets.token_bytes(count)):
        pass
    return drawn.hex()
