"""Families of reasoning models that call tools, each as a tiny model that writes as the real ones do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.core.job import Tool
from tests.support.scripted_models import GUIDED, Scripted, scripted

THOUGHT = "The mill turns, STOP or not? {} größer 🚰"
TEXT = "It turns: STOP 水車, I look"
ANSWER = {"turns": True, "why": "größer 🚰"}

Values = dict[str, Any]
CALLS: tuple[tuple[str, Values], ...] = (
    ("look", {"where": 'the "old" mill\n水車 🚰', "depth": 2}),
    ("wait", {}),
)
TOOLS = (
    Tool(
        "look",
        "Look at a place.",
        {
            "type": "object",
            "properties": {"where": {"type": "string"}, "depth": {"type": "integer"}},
            "required": ["where", "depth"],
        },
    ),
    Tool("wait", "Wait.", {"type": "object", "properties": {}}),
)
#: What a user asks for: a thought, a text and calls; a thought and JSON; a thought and a call that must be made.
CALL, JSON, FORCED = "turn ~", "turn ^", "turn @"


@dataclass(frozen=True)
class Family:
    """``thought`` and ``calls`` write them, with ``words`` and ``special`` that are tokens (the latter are no text);
    ``text`` writes what is neither."""

    thought: Callable[[str], str]
    calls: Callable[[list[tuple[str, Values]]], str]
    words: tuple[str, ...]
    special: tuple[str, ...] = ()
    says: str = ""
    """What its template says of that beside its tokens."""
    text: Callable[[str], str] = str
    before_calls: Callable[[str], str] | None = None
    """Where text before a call is written in another way."""
    formed: Callable[[str], str] | None = None
    """Where text that must have a form is written in another way."""
    most: int = 2
    """Calls that one reply has."""
    begin: str = "<|im_start|>{}\n"
    ends: tuple[str, ...] = ("<|im_end|>",)
    format: tuple[str, str] = ("", "")
    """Of calls and thoughts, by their names in the table."""
    thinks: str = THOUGHT
    tells: str = TEXT
    wants: tuple[tuple[str, Values], ...] = CALLS
    """The calls that it makes."""
    answers: Any = field(default_factory=lambda: ANSWER)

    @property
    def called(self) -> list[tuple[str, Values]]:
        return list(self.wants[: self.most])

    @property
    def scripts(self) -> dict[str, str]:
        """By selector."""
        thought = self.thought(self.thinks)
        bare = thought.rstrip("\n")  # a form begins at once
        (name, values) = self.called[0]
        where, depth = js(values["where"]), js(values["depth"])
        forced = f'{GUIDED}{{"name":"{name}","arguments":{{"where":"{GUIDED}{where[1:]}{GUIDED},"depth":{GUIDED}'
        forced += f"{depth}}}}}"
        return {
            "~": thought + (self.before_calls or self.text)(self.tells) + self.calls(self.called),
            "^": bare + (self.formed or self.text)(compact(self.answers)),
            "@": bare + (self.formed or self.text)(forced),
        }

    @property
    def template(self) -> str:
        begin, end = self.begin.format("' + m.role + '"), self.ends[0]
        shown = "".join((*self.words, *self.special, self.says))
        return (
            f"{{% if tools %}}{self.begin.format('system')}Call tools with {shown}:"
            f"{{% for tool in tools %}}\n{{{{ tool | tojson }}}}{{% endfor %}}{end}{{% endif %}}"
            f"{{% for m in messages %}}{{{{ '{_quoted(begin)}' }}}}"
            f"{{{{ m.reasoning_content or '' }}}}{{{{ m.content or '' }}}}"
            f"{{% for call in m.tool_calls or [] %}}{{{{ call | tojson }}}}{{% endfor %}}{end}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{self.begin.format('assistant')}{{% endif %}}"
        )

    def make(self, folder: Path) -> Scripted:
        marks = [word for word in (self.begin.partition("{")[0],) if word]
        return scripted(
            folder,
            template=self.template,
            opening=self.begin.format("assistant"),
            scripts=self.scripts,
            special=(*marks, *self.special),
            words=self.words,
            ends=self.ends,
        )


def _quoted(text: str) -> str:
    return text.replace("\n", "\\n")


def js(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def compact(value: Any) -> str:
    """As a guide has it: without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def think(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


def _hermes(calls: list[tuple[str, Values]]) -> str:
    return "".join(f"\n<tool_call>\n{js({'name': name, 'arguments': values})}\n</tool_call>" for name, values in calls)


def _qwen3_coder(calls: list[tuple[str, Values]]) -> str:
    def parameters(values: Values) -> str:
        return "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())

    return "".join(
        f"\n<tool_call>\n<function={name}>\n{parameters(values)}</function>\n</tool_call>" for name, values in calls
    )


def _glm(calls: list[tuple[str, Values]]) -> str:
    def pairs(values: Values) -> str:
        return "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items())

    return "".join(f"\n<tool_call>{name}\n{pairs(values)}</tool_call>" for name, values in calls)


def _mistral(calls: list[tuple[str, Values]]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{js(values)}" for name, values in calls)


def _deepseek(calls: list[tuple[str, Values]]) -> str:
    each = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{js(values)}<｜tool▁call▁end｜>" for name, values in calls
    )
    return f"<｜tool▁calls▁begin｜>{each}<｜tool▁calls▁end｜>"


def _kimi(calls: list[tuple[str, Values]]) -> str:
    each = "".join(
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{js(values)}<|tool_call_end|>"
        for i, (name, values) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{each}<|tool_calls_section_end|>"


def _command_r(calls: list[tuple[str, Values]]) -> str:
    each = ",\n".join(
        f'    {{"tool_call_id": "{i}", "tool_name": "{name}", "parameters": {js(values)}}}'
        for i, (name, values) in enumerate(calls)
    )
    return f"<|START_ACTION|>[\n{each}\n]<|END_ACTION|>"


def _harmony(calls: list[tuple[str, Values]]) -> str:
    ((name, values),) = calls
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{js(values)}<|call|>"


_THINK = ("<think>", "</think>")
_TOOL_CALL = ("<tool_call>", "</tool_call>")

FAMILIES: Mapping[str, Family] = {
    "qwen3": Family(think, _hermes, (*_THINK, *_TOOL_CALL), format=("hermes", "think")),
    "qwen3-coder": Family(
        think,
        _qwen3_coder,
        (*_THINK, *_TOOL_CALL),
        says="<function=name><parameter=name>",
        format=("qwen3_coder", "think"),
    ),
    "glm": Family(
        think,
        _glm,
        (*_THINK, *_TOOL_CALL),
        says="<arg_key>name</arg_key><arg_value>value</arg_value>",
        format=("glm", "think"),
    ),
    "mistral": Family(
        lambda text: f"[THINK]{text}[/THINK]",
        _mistral,
        (),
        ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"),
        format=("mistral", "mistral"),
    ),
    "deepseek": Family(
        think,
        _deepseek,
        _THINK,
        (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
        ),
        format=("deepseek", "think"),
    ),
    "kimi": Family(
        think,
        _kimi,
        _THINK,
        (
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
        format=("kimi", "think"),
    ),
    "command-r": Family(
        lambda text: f"<|START_THINKING|>{text}<|END_THINKING|>",
        _command_r,
        (),
        (
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
            "<|START_ACTION|>",
            "<|END_ACTION|>",
        ),
        text=lambda text: f"<|START_RESPONSE|>{text}<|END_RESPONSE|>",
        formed=str,
        format=("command_r", "command_r"),
    ),
    "gpt-oss": Family(
        lambda text: f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant",
        _harmony,
        (),
        ("<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"),
        text=lambda text: f"<|channel|>final<|message|>{text}",
        before_calls=lambda text: f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant",
        most=1,
        begin="<|start|>{}",
        ends=("<|return|>", "<|call|>"),
        format=("harmony", "harmony"),
    ),
}
