"""What a rule is, and how a check says that it is broken or cannot be seen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NoReturn

import msgspec

from penstock.testing.protocol.server import Server

Check = Callable[[Server], Awaitable[None]]


class Violation(AssertionError):
    """The server broke the rule; the message says what was seen."""


class Skipped(Exception):
    """This server, as it is now, does not show whether it keeps the rule; the message says why."""


class Rule(msgspec.Struct, frozen=True):
    """One promise of docs/protocol.md. ``id``: its section, the heading within it, its number there."""

    id: str
    title: str
    check: Check


#: All rules, in the order in which they are defined, which is that of the specification.
RULES: list[Rule] = []


def rule(id: str, title: str) -> Callable[[Check], Check]:
    """Register a check of the rule *id*. It returns if the rule is kept."""

    def register(check: Check) -> Check:
        assert all(known.id != id for known in RULES), f"two rules are called {id}"
        RULES.append(Rule(id, title, check))
        return check

    return register


def expect(kept: object, seen: str) -> None:
    """The rule is broken unless *kept*; *seen* says how."""
    if not kept:
        raise Violation(seen)


def expect_equal(seen: object, wanted: object, what: str) -> None:
    expect(seen == wanted, f"{what} is {_short(seen)}, not {_short(wanted)}")


def none_of(problems: list[str]) -> None:
    """The rule is broken if there are any."""
    expect(not problems, "; ".join(problems[:5]))


def skip(why: str) -> NoReturn:
    raise Skipped(why)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
