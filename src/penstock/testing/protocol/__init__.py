"""The rules of docs/protocol.md against any running server: ``python -m penstock.testing URL``.

`check` yields an outcome a rule. A rule (`rules/`) is a function that talks to a `Server` and says with `expect` what
it saw instead of what the specification promises. What cannot be seen from outside is in `NOT_CHECKED`, with why.
"""

from __future__ import annotations

from penstock.testing.protocol import rules
from penstock.testing.protocol.rule import RULES, Rule
from penstock.testing.protocol.run import Outcome, check

__all__ = ["NOT_CHECKED", "RULES", "Outcome", "Rule", "check", "rules"]

#: Rules of the specification that no check is for, and why.
NOT_CHECKED = {
    "2.3": "what a client should do",
    "3.5": "what a client must accept",
    "3.7": "what a client must ignore",
    "7.4": "a half-closed connection takes more than an HTTP client",
    "7.5": "a reader that takes nothing must be waited for",
    "8": "the server would have to go down",
    "9": "what a broker must provide: `penstock.testing.broker`",
}
