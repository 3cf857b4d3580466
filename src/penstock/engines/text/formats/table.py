"""Which family writes how, and which one a model is: its chat template says it, or its tokens.

The names are those of the options ``tool_format`` and ``reasoning_format``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import msgspec

from penstock.core.errors import ModelLoadError
from penstock.core.job import Request
from penstock.engines.text.formats import (
    apertus,
    command_r,
    deepseek,
    gemma,
    glm,
    granite,
    harmony,
    hermes,
    kimi,
    lists,
    llama,
    minimax,
    mistral,
    phi,
    pythonic,
    qwen3_coder,
    think,
)
from penstock.engines.text.formats.family import Reader, Thoughts, Tools
from penstock.engines.text.formats.forced import Forced

#: Name → how calls are written, and words of a chat template that say so (all of them). The first that fits is taken.
TOOLS: dict[str, tuple[Tools, tuple[str, ...]]] = {
    "harmony": (hermes.TOOLS, ("<|channel|>", "<|start|>")),
    "gemma4": (gemma.GEMMA4, ("<|tool_call>",)),
    "functiongemma": (gemma.FUNCTION_GEMMA, ("<start_function_call>",)),
    "deepseek_v32": (deepseek.DSML, ("DSML｜",)),
    "deepseek": (deepseek.TOOLS, (deepseek.BEGIN,)),
    "kimi": (kimi.TOOLS, (kimi.CALL,)),
    "mistral": (mistral.TOOLS, (mistral.BEGIN,)),
    "glm": (glm.TOOLS, (glm.KEY,)),
    "seed_oss": (qwen3_coder.SEED, ("<seed:tool_call>",)),
    "minimax": (minimax.TOOLS, ("<minimax:tool_call>",)),
    "qwen3_coder": (qwen3_coder.TOOLS, ("<function=", "<parameter=")),
    "command_r": (command_r.TOOLS, ("<|START_ACTION|>",)),
    "command_r1": (command_r.TOOLS, ("Action:", "tool_name")),
    "apertus": (apertus.TOOLS, ("<|tools_prefix|>",)),
    "lfm2": (pythonic.LFM2, ("<|tool_call_start|>",)),
    "olmo3": (pythonic.OLMO, ("<function_calls>",)),
    "nemotron": (lists.NEMOTRON, ("<TOOLCALL>",)),
    "jamba": (lists.JAMBA, ("<tool_calls>",)),
    "internlm": (lists.INTERNLM, ("<|plugin|>",)),
    "phi4_mini": (phi.TOOLS, ("<|tool|>",)),
    "granite": (granite.TOOLS, ("<|tool_call|>",)),
    "hermes": (hermes.TOOLS, ("<tool_call>",)),
    "llama4": (pythonic.LLAMA4, ("<|python_start|>",)),
    "llama3": (llama.TOOLS, ("<|start_header_id|>", "tools")),
    "pythonic": (llama.TOOLS, ("func_name1(",)),
    "gemma": (gemma.TOOLS, ("<start_of_turn>",)),
}

#: The same for thoughts.
THOUGHTS: dict[str, tuple[Thoughts, tuple[str, ...]]] = {
    "harmony": (think.THOUGHTS, ("<|channel|>", "<|start|>")),
    "gemma4": (gemma.THOUGHTS, ("<|channel>",)),
    "mistral": (mistral.THOUGHTS, ("[THINK]",)),
    "command_r": (command_r.THOUGHTS, ("<|START_THINKING|>",)),
    "seed_oss": (qwen3_coder.SEED_THOUGHTS, ("<seed:think>",)),
    "apertus": (apertus.THOUGHTS, ("<|inner_prefix|>",)),
    "granite": (granite.THOUGHTS, ("Here is my thought process:",)),
    "granite33": (granite.THOUGHTS, ("<think>", "<response>", "Granite")),
    "ernie": (think.ERNIE, ("<think>", "<response>")),
    "hunyuan": (think.HUNYUAN, ("<think>", "<answer>")),
    "kimi": (kimi.THOUGHTS, ("◁think▷",)),
    "think": (think.THOUGHTS, ("<think>",)),
}

#: What a model writes whose template knows no tools, or none that is known here: what it is told to (`hermes`).
DEFAULT_TOOLS = "hermes"

#: Words that say it where the template does not: reasoning models whose templates leave thoughts to themselves.
_THINKS = "<think>"


class Formats(msgspec.Struct, frozen=True):
    """Names of the table, or "": it is not looked for."""

    tools: str = ""
    thoughts: str = ""

    @property
    def words(self) -> set[str]:
        """All marks of thoughts and calls."""
        thoughts = THOUGHTS[self.thoughts][0].marks if self.thoughts else ()
        return {*thoughts, *(TOOLS[self.tools][0].marks if self.tools else ())}

    @property
    def begins(self) -> tuple[str, ...]:
        """What begins a thought, in a reply or at the end of its prompt."""
        return () if self.thoughts in ("", "harmony") else THOUGHTS[self.thoughts][0].begins

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends it."""
        return () if self.thoughts in ("", "harmony") else THOUGHTS[self.thoughts][0].ends

    def reader(self, request: Request, *, opened: bool = False) -> Reader | None:
        """For one choice of *request*, whose prompt may have *opened* a thought; None where all is text."""
        if request.messages is None:
            return None
        tools: Tools | None = None
        if request.callable_tools and request.form is not None:
            tools = Forced()
        elif request.callable_tools and self.tools:
            tools = TOOLS[self.tools][0]
        if "harmony" in (self.tools, self.thoughts):
            return harmony.HarmonyReader(request, None, tools if request.form is not None else None)
        thoughts = THOUGHTS[self.thoughts][0] if self.thoughts else None
        if tools is None and thoughts is None:
            return None
        return Reader(request, thoughts, tools, opened=opened)


def choose(
    template: str, knows: Callable[[str], bool], tool_format: str = "auto", reasoning_format: str = "auto"
) -> Formats:
    """The formats of a model with this chat *template* (empty: none) that *knows* a word as a token, or those that the
    operator names. Raises `ModelLoadError` for a name that nobody knows."""
    tools, thoughts = _named("tool_format", tool_format, TOOLS), _named("reasoning_format", reasoning_format, THOUGHTS)
    if not template:
        return Formats()
    if tools is None:
        tools = next((name for name, (_, words) in TOOLS.items() if _all(words, template)), DEFAULT_TOOLS)
    if thoughts is None:
        found = next((name for name, (_, words) in THOUGHTS.items() if _all(words, template)), "")
        thoughts = found or ("think" if "</think>" in template or knows(_THINKS) else "")
    return Formats(tools, thoughts)


def _named(
    option: str,
    name: str,
    table: dict[str, tuple[Tools, tuple[str, ...]]] | dict[str, tuple[Thoughts, tuple[str, ...]]],
) -> str | None:
    """The *name* of a format; "" for "none", None for "auto"."""
    if name in ("auto", "none"):
        return None if name == "auto" else ""
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelLoadError(f"Option {option} knows no format {name!r}: {hint}It is auto, none, {', '.join(table)}.")
    return name


def _all(words: tuple[str, ...], template: str) -> bool:
    return all(word in template for word in words)
