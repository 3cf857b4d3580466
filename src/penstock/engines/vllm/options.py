"""``--option`` values of the vLLM engine."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from penstock.engines.options import Amount, Count, Positive, TextOptions


class VLLMOptions(TextOptions, frozen=True):
    """vLLM's arguments under vLLM's names. 0 and "" leave a value to vLLM.

    ``max_num_seqs``: sequences that run at once (64 on a CPU, else 256). ``kv_cache_gb``: memory for the key/value
    cache in GB; on a CPU by default what ``max_num_seqs`` full contexts need, at most a quarter of the memory.
    ``threads``: of a CPU, 0 for all cores. ``adapters``: NAME=PATH[,NAME=PATH…], see `penstock.engines.adapters`.
    """

    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: Annotated[float, Meta(ge=0, le=1)] = 0.0
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: str = ""
    max_model_len: Count = 0
    max_num_seqs: Count = 0
    max_num_batched_tokens: Count = 0
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    kv_cache_gb: Amount = 0.0
    threads: Count = 0
    adapters: str = ""
