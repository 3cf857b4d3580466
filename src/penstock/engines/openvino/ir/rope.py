"""Rotary position embeddings: the angle per position of each pair of a head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.engines.openvino.ir.refusal import unbuildable


def rotary_frequencies(config: Mapping[str, Any], head: int) -> npt.NDArray[np.float32]:
    """Angle per position of each of the head's pairs. Newer configs have one ``rope_parameters`` for all of it."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    frequencies = 1.0 / theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        frequencies = frequencies / float(rope["factor"])
    elif kind == "llama3":
        # Long wavelengths are stretched by the factor, short ones kept, those between blended.
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        trained = float(rope["original_max_position_embeddings"])
        wavelengths = 2 * math.pi / frequencies
        blend = np.clip((trained / wavelengths - low) / (high - low), 0, 1)
        frequencies = (1 - blend) * frequencies / factor + blend * frequencies
    elif kind == "divided":  # of GGUF files, which have the quotients of other kinds worked out
        frequencies = frequencies / np.array(rope["factors"], np.float64)
    elif kind != "default":
        raise unbuildable(f"its rotary scaling is {kind!r}")
    if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise unbuildable("only a part of each head is rotated")
    return frequencies.astype(np.float32)
