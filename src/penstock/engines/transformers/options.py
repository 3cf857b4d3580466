"""``--option`` values of the transformers engine."""

from __future__ import annotations

from typing import Literal

from penstock.engines.options import Amount, Count, EmbeddingOptions, Positive


class TransformersOptions(EmbeddingOptions, frozen=True):
    """``device``: cpu, cuda, cuda:1 …; auto takes the first CUDA device if there is one. ``dtype``: f32, bf16, f16, or
    auto: the checkpoint's own on CUDA; on a CPU f32 for weights up to 2 GB, else bf16. ``slots``: sequences that run at
    once. ``context``: tokens that each may have, 0 for what the model was trained for, or less where the cache of all
    slots would not fit into ``cache_gb`` (GB; 0: a quarter of the memory). ``batching``: continuous, static, or auto.
    ``window``: milliseconds that a static batch waits for others of its kind. ``threads``: 0 for all cores.
    ``adapters``: NAME=PATH[,NAME=PATH…], see `penstock.engines.adapters`.
    """

    device: str = "auto"
    dtype: Literal["f32", "bf16", "f16", "auto"] = "auto"
    slots: Positive = 64
    context: Count = 0
    cache_gb: Amount = 0.0
    batching: Literal["continuous", "static", "auto"] = "auto"
    window: Amount = 20.0
    threads: Count = 0
    adapters: str = ""
