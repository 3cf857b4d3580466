"""Rotary positions: how fast each pair of a head turns, by what the config says of scaling.

Sources: linear (kaiokendev), llama3 (Llama 3.1's release), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753), each
with the defaults that Hugging Face's library has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.plan import Rotary
from penstock.engines.openvino.ir.refusal import unbuildable

Floats = npt.NDArray[np.float64]

#: What configs call LongRoPE.
LONG_ROPE = ("longrope", "su")

#: Added to the positions of tokens whose text is longer than a LongRoPE's trained length: they turn by other factors.
LONG = 1 << 24


def rotary_of(
    config: Config,
    head: int,
    *,
    part: float = 1.0,
    theta: float = 10_000.0,
    interleaved: bool = False,
    rope: Mapping[str, Any] | None = None,
) -> Rotary:
    """*part* of a head that is turned and *theta* are the family's, where the config says nothing. *rope*: what it says
    of these layers, where they differ; else its ``rope_parameters`` (newer) or ``rope_scaling`` and ``rope_theta``."""
    rope = _parameters(config) if rope is None else rope
    theta = float(rope.get("rope_theta") or theta)
    turned = int(head * float(rope.get("partial_rotary_factor") or part))
    plain = 1.0 / theta ** (np.arange(0, turned, 2, dtype=np.float64) / turned)
    frequencies, scale = _scaled(rope, plain, theta, config)
    if _kind(rope) not in LONG_ROPE:
        return Rotary(tuple(frequencies.tolist()), scale, interleaved)
    longer = plain / np.array(rope["long_factor"], np.float64)
    trained = int(_trained(rope, config))
    return Rotary(tuple(frequencies.tolist()), scale, interleaved, tuple(longer.tolist()), trained)


def _parameters(config: Config) -> dict[str, Any]:
    given, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise unbuildable("its layers have different rotary positions")
    theta, part = config.get("rope_theta"), config.get("partial_rotary_factor")
    return {"rope_theta": theta, "partial_rotary_factor": part, **old, **given}


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _trained(rope: Mapping[str, Any], config: Config) -> float:
    """The length that the model was first trained with."""
    found = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return float(found or config.number("max_position_embeddings"))


def _scaled(rope: Mapping[str, Any], plain: Floats, theta: float, config: Config) -> tuple[Floats, float]:
    """The scaled frequencies, and what cosines and sines are multiplied with."""
    kind = _kind(rope)
    if kind == "default" or kind == "dynamic":  # dynamic: scaled beyond the config's context, where nothing is served
        return plain, 1.0
    if kind == "linear":
        return plain / float(rope["factor"]), 1.0
    if kind == "divided":  # of GGUF files, which have the quotients of other kinds worked out
        return plain / np.array(rope["factors"], np.float64), 1.0
    trained, longest = _trained(rope, config), config.number("max_position_embeddings")
    if kind == "llama3":
        return _llama3(rope, plain, trained), 1.0
    if kind == "yarn":
        return _yarn(rope, plain, theta, trained, float(rope.get("factor") or longest / trained))
    if kind in LONG_ROPE:
        factor, scale = float(rope.get("factor") or longest / trained), rope.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        return plain / np.array(rope["short_factor"], np.float64), float(scale)
    raise unbuildable(f"its rotary scaling is {kind!r}")


def _llama3(rope: Mapping[str, Any], frequencies: Floats, trained: float) -> Floats:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((trained / wavelengths - low) / (high - low), 0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies


def _yarn(
    rope: Mapping[str, Any], frequencies: Floats, theta: float, trained: float, factor: float
) -> tuple[Floats, float]:
    size = 2 * len(frequencies)

    def pair_of(turns: float) -> float:
        """Which pair turns so often over the trained length."""
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(float(rope.get("beta_fast") or 32)), pair_of(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    stretched = np.clip((np.arange(len(frequencies)) - first) / ((last - first) or 0.001), 0, 1)

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        weight, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = gain(weight) / gain(of_all) if weight and of_all else gain(1.0)
    return frequencies / factor * stretched + frequencies * (1 - stretched), float(scale)
