"""``--option`` values of the OpenVINO engine."""

from __future__ import annotations

from typing import Any, Literal

from penstock.engines.options import Amount, Count, EmbeddingOptions, Positive


class OpenVINOOptions(EmbeddingOptions, frozen=True):
    """``precision``: how weights are stored (f32, fast: as in the files; int8, int4) and computed with (in float32;
    -fast: in what the device is fastest in), or auto: by their size, in float32. ``device``: an OpenVINO device name
    (only CPU is tested). ``slots``: sequences that run at once. ``cache_gb``: memory for the key/value cache in GB, 0
    for what ``slots`` full contexts need but at most a quarter of the memory. ``prefix_caching``: share the cache of
    equal prompt beginnings (a tenant could learn from timing that somebody else sent the same beginning). ``threads``:
    0 for all cores.
    """

    precision: Literal["f32", "fast", "int8", "int8-fast", "int4", "int4-fast", "auto"] = "auto"
    device: str = "CPU"
    slots: Positive = 64
    cache_gb: Amount = 0.0
    prefix_caching: bool = True
    threads: Count = 0

    def properties(self, *, exact: bool) -> dict[str, Any]:
        """What the device is told of a model that is computed in float32 (*exact*) or however is fastest."""
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        if exact:
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        if self.threads:
            properties["INFERENCE_NUM_THREADS"] = self.threads
        return properties
