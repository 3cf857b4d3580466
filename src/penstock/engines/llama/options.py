"""``--option`` values of the llama.cpp engine."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from penstock.engines.options import Amount, Count, Positive, TextOptions


class LlamaOptions(TextOptions, frozen=True):
    """``slots``: sequences that run at once. ``context``: tokens that each of them may have, 0 for what the model was
    trained for, or less where the cache would not fit into ``cache_gb`` (GB; 0: a quarter of the memory). ``threads``:
    0 for all cores. ``gpu_layers``: layers that a GPU build of xllamacpp keeps on the GPU, -1 for all.
    ``adapters``: NAME=FILE.gguf[,NAME=FILE.gguf…], see `penstock.engines.adapters`.
    """

    slots: Positive = 8
    context: Count = 0
    cache_gb: Amount = 0.0
    threads: Count = 0
    gpu_layers: Annotated[int, Meta(ge=-1)] = -1
    adapters: str = ""
