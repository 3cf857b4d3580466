"""A reasoning model that calls tools, for a storm: what it says is known, so every reply has only one right form.

The model is real (see `tests.support.scripted_models`), and so is the engine: after a fault, it reads the log's ids
again and has to know where it was: in the thought, in a mark, in a character, in a call's arguments.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.core.calls import Call, call_text, read_calls
from penstock.core.events import Phase, segments
from penstock.testing.oracle import Token
from tests.support.families import CALL, FAMILIES, FORCED, JSON, TOOLS, Family, compact, js
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
#: The same without tokens for its marks: they begin and end within tokens, two of which are both thought and text, or
#: text and call (and no form can wait for them).
MUMBLER = replace(
    THINKER,
    words=("🚰\n</think>\n\nMüh", '歯\n<tool_call>\n{"name": "look", "arguments": {"'),
    says="".join(THINKER.words),
)

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
            case 2 | 3 if "</think>" not in self.family.words:
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
            found += [f"choice {choice}: {each}" for each in _differences("thought", thinks, thought, whole)]
            found += [f"choice {choice}: {each}" for each in _differences("text", tells, text, whole)]
            found += [f"choice {choice}: {each}" for each in _differences("calls", called, calls, whole)]
            if (tells or called) and thinks != thought:
                found.append(f"choice {choice}: it speaks before its thought is over")
            if called and tells != text:
                found.append(f"choice {choice}: it calls before its text is over")
        if view["status"] == "completed":
            reason = "length" if not whole else "tool_calls" if calls else "stop"
            if view["finish_reason"] != reason:
                found.append(f"it ended with {view['finish_reason']}, not {reason}")
        result = view["result"]
        thinks, tells, called = replies[0]
        told = [(call["function"]["name"], call["function"]["arguments"]) for call in result.get("tool_calls") or []]
        if (result.get("reasoning") or "", result["text"]) != (thinks, tells):
            found.append(f"the result is not what was streamed: {result['text']!r} and {result.get('reasoning')!r}")
        if told != [(call.name, call.arguments) for call in read_calls(called)]:
            found.append(f"the result's calls are not those that were streamed: {told}")
        if view["usage"]["completion_tokens"] != len(tokens):
            found.append(f"{view['usage']['completion_tokens']} tokens, and {len(tokens)} were streamed")
        return found

    def _expected(self, asked: str) -> tuple[str, str, str]:
        """Thought, text, and calls as the log has them."""
        if asked == JSON:
            return self.family.thinks, compact(self.family.answers), ""
        if asked == FORCED:
            ((name, values), *_) = self.family.called
            return self.family.thinks, "", call_text(Call(name, compact(values)))
        calls = "".join(call_text(Call(name, js(values))) for name, values in self.family.called)
        return self.family.thinks, self.family.tells, calls


def _differences(what: str, said: str, wanted: str, whole: bool) -> list[str]:
    """How what was *said* differs from what was *wanted*, or, if it is not *whole*, from its beginning, which may end
    within a character."""
    if not whole:
        said = said.rstrip("\ufffd")
        wanted = wanted[: len(said)]
    if said == wanted:
        return []
    at = next((i for i, (one, other) in enumerate(zip(said, wanted, strict=False)) if one != other), len(wanted))
    return [f"the {what} has {said[at : at + 40]!r} in place of {wanted[at : at + 40]!r} at {at} of {len(wanted)}"]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _parts(tokens: Sequence[Token]) -> tuple[str, str, str]:
    """The thought, the text and the calls of one choice."""
    said = dict.fromkeys(Phase, "")
    for token in tokens:
        for phase, text in segments(token.text, Phase.TEXT if token.phase is None else token.phase):
            said[phase] += text
    return said[Phase.REASONING], said[Phase.TEXT], said[Phase.TOOL]
