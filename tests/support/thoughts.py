"""What the models of `tests.support.families` say, for the contract."""

from __future__ import annotations

from penstock.testing.engine.thoughts import Script
from tests.support.families import ANSWER, CALL, FORCED, JSON, TEXT, THOUGHT, TOOLS, Family


def script_of(family: Family) -> Script:
    return Script(
        tools=TOOLS,
        ask_call=CALL,
        ask_answer=JSON,
        ask_forced=FORCED,
        thought=THOUGHT,
        text=TEXT,
        calls=family.called,
        answer=ANSWER,
        stop="STOP",
    )
