"""The precisions: how weights are stored, and in which format is computed with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
