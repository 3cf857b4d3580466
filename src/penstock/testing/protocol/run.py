"""Run the rules against a server, one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from typing import Literal

import httpx
import msgspec

from penstock.testing.oracle import OracleError
from penstock.testing.protocol.rule import RULES, Rule, Skipped, Violation
from penstock.testing.protocol.server import Server
from penstock.testing.protocol.stream import NoAnswer


class Outcome(msgspec.Struct, frozen=True):
    """What came of one rule. ``why`` says what was seen, or why the rule was skipped."""

    rule: str
    title: str
    outcome: Literal["passed", "failed", "skipped"]
    why: str = ""


def chosen(only: Collection[str]) -> list[Rule]:
    """The rules whose id, or whose section (``4``, ``responses``), is in *only*; all without. Raises LookupError."""
    for name in only:
        if not any(_is_meant(rule, name) for rule in RULES):
            raise LookupError(f"No rule is called {name!r}: there are {', '.join(rule.id for rule in RULES)}.")
    return [rule for rule in RULES if not only or any(_is_meant(rule, name) for name in only)]


def _is_meant(rule: Rule, name: str) -> bool:
    return rule.id == name or rule.id.startswith(f"{name}.")


async def check(
    url: str,
    *,
    model: str | None = None,
    headers: Mapping[str, str] | None = None,
    only: Collection[str] = (),
    patience: float = 30.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[Outcome]:
    """Hold the server at *url* against the rules.

    Raises LookupError for a name in *only* that no rule has, `httpx.ConnectError` where nobody listens.

    *model*: the server's first one by default. *patience*: seconds after which what has not come counts as missing.
    """
    rules = chosen(only)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=patience, trust_env=False, transport=transport
    ) as http:
        await http.head("/")
        server = Server(http, model=model, patience=patience)
        try:
            for rule in rules:
                yield await _outcome(rule, server)
        finally:
            await server.forget_all()


async def _outcome(rule: Rule, server: Server) -> Outcome:
    try:
        await rule.check(server)
    except Skipped as reason:
        return Outcome(rule.id, rule.title, "skipped", str(reason))
    except (Violation, NoAnswer, OracleError) as seen:
        return Outcome(rule.id, rule.title, "failed", str(seen))
    except httpx.HTTPError as error:
        return Outcome(rule.id, rule.title, "failed", f"the connection broke: {str(error) or type(error).__name__}")
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # what came has another form than any rule says
        return Outcome(rule.id, rule.title, "failed", f"an answer cannot be read: {type(error).__name__}: {error}")
    return Outcome(rule.id, rule.title, "passed")
