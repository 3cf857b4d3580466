"""The precisions: how weights are stored, and in which format is computed with them; and which one ``auto`` is.

``auto`` keeps replies exact and saves bits where weights are large: reading the weights is what a step with few
sequences costs, so that fewer bits are faster, too (docs/engines.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: As the files have them; or made smaller when the network is built.
Stored = Literal["as they are", "int8", "int4"]


@dataclass(frozen=True)
class Precision:
    """``exact``: activations and cache are float32, so that greedy replies do not depend on what runs beside them."""

    weights: Stored
    exact: bool


PRECISIONS = {
    "f32": Precision("as they are", True),
    "fast": Precision("as they are", False),
    "int8": Precision("int8", True),
    "int8-fast": Precision("int8", False),
    "int4": Precision("int4", True),
    "int4-fast": Precision("int4", False),
}

#: Weights up to this many bytes in their files are left as they are.
SMALL = 2_000_000_000
#: The share of the machine's memory that larger ones may take; the cache and a second model need some, too.
SHARE = 0.5


def automatic(size: int, memory: int, packed: Callable[[], bool]) -> str:
    """The name of the precision for weights of *size* bytes in files of 16-bit numbers, on a machine with *memory*
    bytes; *packed*: do the files have whole numbers of few bits, which stay as they are?"""
    if size <= SMALL or packed():
        return "f32"
    return "int8" if size / 2 <= SHARE * memory else "int4"
