"""A conversation as a model's chat template expects it.

What the template does not know is told in another way, so that nothing of a conversation vanishes: a developer speaks
as the system does, the system, where there is none, in the first message of the user; tools become text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from penstock.core.job import Message, Request, Tool
from penstock.engines.text.chat_template import ChatTemplate, tojson
from penstock.engines.text.formats import deepseek

Turn = dict[str, Any]


def conversation(
    messages: Sequence[Message], tools: Sequence[Tool], template: ChatTemplate
) -> tuple[list[Turn], list[Turn]]:
    """(messages, tools) for the *template*."""
    turns, shown = turns_of(messages, template), [tool_view(tool) for tool in tools]
    if not template.takes_developers:
        turns = with_developers_as_system(turns)
    if not template.takes_tools and (shown or not template.takes_calls):
        if not template.takes_calls:
            turns = with_calls_as_text(turns)
        if shown:
            told = _TOOLS % ("\n".join(map(tojson, shown)), _how_to_call(template))
            turns, shown = with_system(turns, told), []
    if not template.takes_system:
        turns = with_system_as_user(turns)
    if template.takes_parts:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return turns, shown


def variables_of(request: Request, template: ChatTemplate) -> dict[str, Any]:
    """What a *request* tells the template besides messages and tools.

    How much to think is said in as many ways as templates ask for: by effort, or on and off.
    """
    told: dict[str, Any] = {}
    thinks = request.chat_template_kwargs.get("enable_thinking")
    if (effort := request.reasoning_effort) is not None:
        told["reasoning_effort"] = effort
        thinks = effort not in ("none", "minimal") if thinks is None else thinks
    if thinks is not None:
        told |= {name: thinks for name in ("enable_thinking", "thinking") if name in template.variables}
    return told | request.chat_template_kwargs


def turns_of(messages: Sequence[Message], template: ChatTemplate) -> list[Turn]:
    """Messages in Hugging Face's form: calls with their arguments, the tool's name with its answer, thoughts."""
    turns: list[Turn] = []
    names: dict[str, str] = {}
    for message in messages:
        turn: Turn = {"role": message.role, "content": message.content}
        if message.name is not None:
            turn["name"] = message.name
        if message.reasoning:
            turn |= dict.fromkeys(template.thought_keys, message.reasoning)
        if message.tool_calls:
            names |= {call.id: call.name for call in message.tool_calls}
            turn["tool_calls"] = [
                {
                    "id": _id(call.id, template),
                    "type": "function",
                    "function": {"name": call.name, "arguments": _arguments(call.arguments, template)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = _id(message.tool_call_id, template)
            if message.tool_call_id in names:
                turn["name"] = names[message.tool_call_id]
        turns.append(turn)
    return turns


def _id(id: str, template: ChatTemplate) -> str:
    if not template.short_ids or re.fullmatch("[a-zA-Z0-9]{9}", id):
        return id
    return hashlib.sha256(id.encode()).hexdigest()[:9]


def _arguments(text: str, template: ChatTemplate) -> Any:
    try:
        arguments = json.loads(text)
        return tojson(arguments) if template.takes_calls and template.takes_argument_texts else arguments
    except (ValueError, RecursionError):
        return text


def tool_view(tool: Tool) -> Turn:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


_TOOLS = """You may call these functions, described in JSON:
%s
To call one, write %s."""

_HERMES = '{"name": <its name>, "arguments": <an object>} between <tool_call> and </tool_call>'


def _how_to_call(template: ChatTemplate) -> str:
    """In the template's own form, where it shows calls."""
    return deepseek.HOW if deepseek.BEGIN in template.source else _HERMES


def with_system(turns: Sequence[Turn], text: str) -> list[Turn]:
    """*text* is the system's, behind what it says already: many templates take one such message only."""
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def with_calls_as_text(turns: Sequence[Turn]) -> list[Turn]:
    """Calls in the form of Hermes. What tools answered to them is the user's, together with what the user says then:
    many templates want turns to alternate."""
    plain: list[Turn] = []
    answered = False
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if calls := turn.get("tool_calls", ()):
            texts = [f"<tool_call>\n{tojson(call['function'])}\n</tool_call>" for call in calls]
            content = "\n".join([content, *texts]).strip()
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if answered and role == "user":
            plain[-1]["content"] += f"\n{content}"
        else:
            plain.append({**turn, "role": role, "content": content})
        answered = role == "user" and (answered or turn["role"] == "tool")
    for turn in plain:
        turn.pop("tool_calls", None)
        if turn.pop("tool_call_id", None) is not None:
            turn.pop("name", None)
    return plain


def with_developers_as_system(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation for a template that has no such role, and would leave out what a developer says."""
    plain: list[Turn] = []
    for turn in turns:
        if turn["role"] != "developer":
            plain.append(dict(turn))
        elif plain and plain[-1]["role"] == "system":  # many templates take one system message only
            plain[-1]["content"] += f"\n\n{turn['content']}"
        else:
            plain.append({**turn, "role": "system"})
    return plain


def with_system_as_user(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation for a template that takes no system message: the next user says it."""
    plain: list[Turn] = []
    said: list[str] = []
    for turn in turns:
        if turn["role"] == "system":
            said.append(turn["content"])
        elif said and turn["role"] == "user":
            plain.append({**turn, "content": "\n\n".join([*said, turn["content"]])})
            said = []
        else:
            plain.append(turn)
    return [*plain, *([{"role": "user", "content": "\n\n".join(said)}] if said else [])]


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a value of JSON's kinds, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from strings_in(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from strings_in(part)
