"""A conversation as chat templates expect it: with tools and developers, or without where a template knows none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.core.job import Message, Tool
from penstock.engines.text.chat_template import tojson


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: arguments of calls as objects, the tool's name with its answer."""
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            names |= {call.id: call.name for call in message.tool_calls}
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": _arguments(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
            if message.tool_call_id in names:
                turn["name"] = names[message.tool_call_id]
        turns.append(turn)
    return turns


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tool_view(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


_TOOLS = """You may call these functions, described in JSON:
%s
To call one, write {"name": <its name>, "arguments": <an object>} between <tool_call> and </tool_call>."""


def with_tools_as_text(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows nothing of tools: they become text, in the form of Hermes."""
    plain: list[dict[str, Any]] = []
    if tools:
        plain.append({"role": "system", "content": _TOOLS % "\n".join(map(tojson, tools))})
    for turn in turns:
        role, content = turn["role"], turn["content"]
        for call in turn.get("tool_calls", ()):
            content += f"\n<tool_call>\n{tojson(call['function'])}\n</tool_call>"
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if role == "system" and len(plain) == 1 and tools:  # many templates take one system message only
            plain[0]["content"] = f"{content}\n\n{plain[0]['content']}"
        else:
            plain.append({"role": role, "content": content.strip() if turn.get("tool_calls") else content})
    return plain


def with_developers_as_system(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that has no such role, and would leave out what a developer says."""
    plain: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] != "developer":
            plain.append(dict(turn))
        elif plain and plain[-1]["role"] == "system":  # many templates take one system message only
            plain[-1]["content"] += f"\n\n{turn['content']}"
        else:
            plain.append({**turn, "role": "system"})
    return plain


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
