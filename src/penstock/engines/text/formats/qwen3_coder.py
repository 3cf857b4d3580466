"""Qwen3-Coder, Qwen 3.5, Nemotron 3, Step 3.5; Seed-OSS with marks of its own::

<tool_call>
<function=get_weather>
<parameter=city>
Ulm
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

from penstock.engines.text.formats.family import Thoughts
from penstock.engines.text.formats.tags import TaggedCalls

FUNCTION, PARAMETER = ("<function=", ">", "</function>"), ("<parameter=", ">", "</parameter>")

TOOLS = TaggedCalls(("<tool_call>", "<function="), ("</tool_call>",), FUNCTION, PARAMETER, lines=True)
SEED = TaggedCalls(("<seed:tool_call>",), ("</seed:tool_call>",), FUNCTION, PARAMETER, lines=True)
SEED_THOUGHTS = Thoughts(("<seed:think>",), ("</seed:think>",), until=("<seed:tool_call>",))
