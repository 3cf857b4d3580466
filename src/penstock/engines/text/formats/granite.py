"""Granite 3: a list of calls behind a mark, ``<|tool_call|>[{"name": …, "arguments": …}]``.

Thoughts of 3.2 stand between sentences, those of 3.3 between tags, and its text too::

    Here is my thought process: … Here is my response: …
    <think>…</think><response>…</response>
"""

from __future__ import annotations

from penstock.engines.text.formats.family import Thoughts
from penstock.engines.text.formats.json_calls import JSONCalls

TOOLS = JSONCalls(("<|tool_call|>", "<tool_call>", "<function_call>"), ("</tool_call>",), bare=True)

THOUGHTS = Thoughts(
    ("<think>", "Here is my thought process:", "Here's my thought process:"),
    ("</think>", "Here is my response:", "Here's my response:"),
    silent=("<response>", "</response>"),
)
