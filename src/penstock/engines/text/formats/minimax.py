"""MiniMax M2::

<minimax:tool_call>
<invoke name="get_weather">
<parameter name="city">Ulm</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from penstock.engines.text.formats.tags import TaggedCalls

TOOLS = TaggedCalls(
    ("<minimax:tool_call>",),
    ("</minimax:tool_call>",),
    function=('<invoke name="', '">', "</invoke>"),
    parameter=('<parameter name="', '">', "</parameter>"),
)
