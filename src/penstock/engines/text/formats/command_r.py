"""Command R and A::

    <|START_THINKING|>…<|END_THINKING|>
    <|START_ACTION|>[{"tool_call_id": "0", "tool_name": …, "parameters": …}]<|END_ACTION|>
    <|START_RESPONSE|>…<|END_RESPONSE|>

The first Command R writes the list into a block of code behind ``Action:``.
"""

from __future__ import annotations

from penstock.engines.text.formats.family import Thoughts
from penstock.engines.text.formats.json_calls import JSONCalls

TOOLS = JSONCalls(("<|START_ACTION|>", "Action: ```json", "Action:```json"), ("<|END_ACTION|>", "```"))

THOUGHTS = Thoughts(
    ("<|START_THINKING|>",),
    ("<|END_THINKING|>",),
    until=("<|START_ACTION|>",),
    silent=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
