"""Families whose calls are JSON between marks, and differ in these alone.

==================== ===============================================================
Jamba, Hunyuan       ``<tool_calls>[{"name": …, "arguments": …}, …]</tool_calls>``
MiniMax M1           the same, with the objects one below the other
Nemotron             ``<TOOLCALL>[{"name": …, "arguments": …}, …]</TOOLCALL>``
InternLM 2           ``<|action_start|><|plugin|>{"name": …, "parameters": …}<|action_end|>``
==================== ===============================================================
"""

from __future__ import annotations

from penstock.engines.text.formats.json_calls import JSONCalls

JAMBA = JSONCalls(("<tool_calls>",), ("</tool_calls>",))
NEMOTRON = JSONCalls(("<TOOLCALL>",), ("</TOOLCALL>",))
INTERNLM = JSONCalls(("<|action_start|><|plugin|>",), ("<|action_end|>",))
