"""A reasoning model that calls tools, for a storm: what it says is known, so every reply has only one right form.

The model is real (see `tests.support.scripted_models`), and so is the engine: after a fault, it reads the log's ids
again and has to know where it was: in the thought, in a mark, in a character, in a call's arguments.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.core.calls import read_calls
from penstock.core.events import Phase, segments
from penstock.testing.oracle import Token
from tests.support.families import CALL, FAMILIES, FORCED, JSON, TOOLS, Family, compact
from tests.support.server import model

NAME = "thinker"
#: Long enough for a storm, and every piece of it is new.
STORY = "; ".join(f"the {n}th 水車 “turns” {n * n} times 🚰" for n in range(101, 125))
SIGHT = {"where": " ".join(f"at {n} größer \\ “{n * 7}”\n" for n in range(201, 221)), "depth": 2}
THINKER = replace(
    FAMILIES["qwen3"],
    thinks=STORY,
    tells="; ".join(f"Mühle {n} hat {n * 3} 歯" for n in range(301, 321)),
    wants=(("look", SIGHT), ("wait", {})),
)
#: The same without tokens for its marks: they begin and end within tokens (and no form can wait for them).
MUMBLER = replace(THINKER, words=(), says="".join(THINKER.words))

LOOK = {"type": "function", "function": {"name": "look"}}
#: Nothing is required: what a schema leaves no choice in is not the model's to write.
SCHEMA = {"type": "object", "properties": {"turns": {"type": "boolean"}, "why": {"type": "string"}}}


@dataclass(frozen=True)
class Thinker:
    """The *family*'s model: how it is served, what it is asked, and what it must have said."""

    family: Family
    folder: Path

    @classmethod
    def make(cls, family: Family, folder: Path) -> Thinker:
        return cls(family, family.make(folder).folder)

    @property
    def served(self) -> Any:
        return model(NAME, engine="openvino", path=str(self.folder), slots=32)

    def bodies(self, count: int, dice: random.Random) -> list[dict[str, Any]]:
        return [self._body(number, dice) for number in range(count)]

    def _body(self, number: int, dice: random.Random) -> dict[str, Any]:
        """Mostly long replies with calls; each sixth a form, a call that must be made, two choices, a cut thought."""
        tools = [{"type": "function", "function": {"name": each.name, "parameters": each.parameters}} for each in TOOLS]
        asked: dict[str, Any] = {"model": NAME, "max_tokens": 1000, "temperature": 1, "seed": number}
        match number % 6:
            case 2 | 3 if not self.family.words:
                pass
            case 2:
                form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
                return {**asked, "messages": _user(JSON), "response_format": form}
            case 3:
                return {**asked, "messages": _user(FORCED), "tools": tools, "tool_choice": LOOK}
            case 4:
                return {**asked, "messages": _user(CALL), "tools": tools, "n": 2}
            case 5:
                return {**asked, "messages": _user(CALL), "tools": tools, "max_tokens": dice.randint(40, 120)}
        return {**asked, "messages": _user(CALL), "tools": tools}

    def says(self, body: dict[str, Any], tokens: Sequence[Token], view: dict[str, Any]) -> list[str]:
        """Problems of a reply (see `tests.chaos.harness.Says`). One that was cut off is as far as it goes right."""
        found: list[str] = []
        whole = view["status"] == "completed" and view["finish_reason"] != "length"
        replies = [_parts([token for token in tokens if (token.choice or 0) == n]) for n in range(body.get("n", 1))]
        thought, text, calls = self._expected(body["messages"][0]["content"])
        for choice, (thinks, tells, called) in enumerate(replies):
            heard = [(call.name, call.arguments) for call in read_calls(called)]
            if whole:
                heard_calls = [(name, json.loads(arguments)) for name, arguments in heard]
                right = (thinks, tells, heard_calls) == (thought, text, calls)
            else:  # the calls that are whole are right; what is behind a thought comes when the thought is over
                right = thought.startswith(thinks) and text.startswith(tells) and len(heard) <= len(calls)
                right = right and all(name == calls[i][0] for i, (name, _) in enumerate(heard))
                right = right and (not (tells or called) or thinks == thought)
            if not right:
                found.append(f"choice {choice} says {thinks!r}, {tells!r}, {heard}")
        if view["status"] == "completed":
            reason = "length" if not whole else "tool_calls" if calls else "stop"
            if view["finish_reason"] != reason:
                found.append(f"it ended with {view['finish_reason']}, not {reason}")
        result = view["result"]
        thinks, tells, called = replies[0]
        told = [(call["function"]["name"], call["function"]["arguments"]) for call in result.get("tool_calls") or []]
        if (result.get("reasoning") or "", result["text"]) != (thinks, tells):
            found.append(f"the result is not what was streamed: {result['text']!r} and {result.get('reasoning')!r}")
        if whole and told != [(call.name, call.arguments) for call in read_calls(called)]:
            found.append(f"the result's calls are not those that were streamed: {told}")
        if view["usage"]["completion_tokens"] != len(tokens):
            found.append(f"{view['usage']['completion_tokens']} tokens, and {len(tokens)} were streamed")
        return found

    def _expected(self, asked: str) -> tuple[str, str, list[tuple[str, Any]]]:
        if asked == JSON:
            return self.family.thinks, compact(self.family.answers), []
        calls = self.family.called
        return (self.family.thinks, self.family.tells, calls) if asked == CALL else (self.family.thinks, "", calls[:1])


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _parts(tokens: Sequence[Token]) -> tuple[str, str, str]:
    """The thought, the text and the calls of one choice."""
    said = dict.fromkeys(Phase, "")
    for token in tokens:
        for phase, text in segments(token.text, Phase.TEXT if token.phase is None else token.phase):
            said[phase] += text
    return said[Phase.REASONING], said[Phase.TEXT], said[Phase.TOOL]
