"""Hermes, Qwen 2.5 and 3, Granite 4, SmolLM3, EXAONE 4, ERNIE 4.5; also what models are told whose template knows no
tools::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Ulm"}}
    </tool_call>

Weak models leave the marks out: a reply that is nothing but such objects is taken too.
"""

from __future__ import annotations

from penstock.engines.text.formats.json_calls import JSONCalls

TOOLS = JSONCalls(("<tool_call>",), ("</tool_call>",), bare=True)
