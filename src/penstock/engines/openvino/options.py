"""``--option`` values of the OpenVINO engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock.engines.options import Amount, Count, Positive

#: Weights up to this many bytes are computed in float32 unless the operator chooses otherwise.
SMALL = 2_000_000_000


class OpenVINOOptions(msgspec.Struct, frozen=True):
    """``precision``: f32, fast, or auto (f32 for weights up to 2 GB). ``device``: an OpenVINO device name (only CPU is
    tested). ``slots``: sequences that run at once. ``cache_gb``: memory for the key/value cache in GB, 0 for what
    ``slots`` full contexts need but at most a quarter of the memory. ``prefix_caching``: share the cache of equal
    prompt beginnings (a tenant could learn from timing that somebody else sent the same beginning). ``threads``: 0
    for all cores.

    Of models that embed: ``pooling``: cls, mean, last, or auto, what the folder says.
    ``normalize``: vectors have the length 1. ``max_length``: tokens that an input may have, 0 for what the folder says;
    ``truncate``: longer ones are cut instead of refused. ``query_instruction``, ``passage_instruction``: what is put
    before a text; empty: what the folder says. ``matryoshka``: may vectors be cut to fewer dimensions? on, off, or
    auto, what the folder says. ``step_tokens``: computed at once, with padding.
    """

    precision: Literal["f32", "fast", "auto"] = "auto"
    device: str = "CPU"
    slots: Positive = 64
    cache_gb: Amount = 0.0
    prefix_caching: bool = True
    threads: Count = 0
    pooling: Literal["cls", "mean", "last", "auto"] = "auto"
    normalize: bool = True
    max_length: Count = 0
    truncate: bool = False
    query_instruction: str = ""
    passage_instruction: str = ""
    matryoshka: Literal["on", "off", "auto"] = "auto"
    step_tokens: Positive = 1024

    def properties(self, precision: str) -> dict[str, Any]:
        """What the device is told of a model that is computed in *precision*."""
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        if precision == "f32":
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        if self.threads:
            properties["INFERENCE_NUM_THREADS"] = self.threads
        return properties

    def precision_of(self, model_file: Path) -> str:
        if self.precision != "auto":
            return self.precision
        return "f32" if model_file.with_suffix(".bin").stat().st_size <= SMALL else "fast"
