"""DeepSeek R1, Qwen 3, GLM, MiniMax, SmolLM3, Phi-4 reasoning, Nemotron and most others: ``<think>…</think>``.

Some put the text behind it between marks of its own.
"""

from __future__ import annotations

from penstock.engines.text.formats.family import Thoughts

THOUGHTS = Thoughts(("<think>",), ("</think>",))

#: ERNIE 4.5.
ERNIE = Thoughts(("<think>",), ("</think>",), silent=("<response>", "</response>"))

#: Hunyuan A13B.
HUNYUAN = Thoughts(("<think>",), ("</think>",), silent=("<answer>", "</answer>"))
