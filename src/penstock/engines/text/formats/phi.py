"""Phi-4-mini: ``<|tool_call|>[{"name": …, "arguments": …}]<|/tool_call|>``, or ``functools[…]``."""

from __future__ import annotations

from penstock.engines.text.formats.json_calls import JSONCalls

TOOLS = JSONCalls(("<|tool_call|>", "functools"), ("<|/tool_call|>",), bare=True)
