"""``--option`` values of the OpenVINO engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from penstock.engines.options import Amount, Count, EmbeddingOptions, Positive

#: Weights up to this many bytes are computed in float32 unless the operator chooses otherwise.
SMALL = 2_000_000_000


class OpenVINOOptions(EmbeddingOptions, frozen=True):
    """``precision``: f32, fast, or auto (f32 for weights up to 2 GB). ``device``: an OpenVINO device name (only CPU is
    tested). ``slots``: sequences that run at once. ``cache_gb``: memory for the key/value cache in GB, 0 for what
    ``slots`` full contexts need but at most a quarter of the memory. ``prefix_caching``: share the cache of equal
    prompt beginnings (a tenant could learn from timing that somebody else sent the same beginning). ``threads``: 0
    for all cores.
    """

    precision: Literal["f32", "fast", "auto"] = "auto"
    device: str = "CPU"
    slots: Positive = 64
    cache_gb: Amount = 0.0
    prefix_caching: bool = True
    threads: Count = 0

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
