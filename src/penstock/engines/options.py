"""``--option NAME=VALUE`` as a frozen dataclass: each engine has one, whose defaults tell the types.

They are here, and not beside their engines, so that they can be checked where no engine's library is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from penstock.core.errors import ModelLoadError

T = TypeVar("T")

#: Weights up to this many bytes are computed in float32 unless the operator chooses otherwise.
SMALL = 2_000_000_000

_SWITCH = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def parse(cls: type[T], given: Mapping[str, Any], engine: str) -> T:
    """An instance of the dataclass *cls* with the values *given* (texts, mostly) for its fields.

    What the values mean together is checked by the dataclass itself (``__post_init__``). Raises `ModelLoadError` for an
    unknown name (with the nearest known one) or a bad value.
    """
    types = {field.name: type(field.default) for field in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(types)}."
            raise ModelLoadError(f"The {engine} engine has no option {name!r}: {hint}")
        values[name] = _value(name, value, types[name])
    return cls(**values)


def _value(name: str, value: Any, kind: type) -> Any:
    if kind is bool:
        if (switch := _SWITCH.get(str(value).lower())) is None:
            raise ModelLoadError(f"Option {name} is on or off, not {value!r}.")
        return switch
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ModelLoadError(f"Option {name} is a number, not {value!r}.") from None


def one_of(name: str, value: str, *allowed: str) -> None:
    """Raise `ModelLoadError` unless *value* of option *name* is one of *allowed*."""
    if value not in allowed:
        raise ModelLoadError(f"Option {name} is {', '.join(allowed[:-1])} or {allowed[-1]}, not {value!r}.")


@dataclass(frozen=True)
class OpenVINOOptions:
    """``--option`` values of this engine.

    ``precision``: f32, fast, or auto (f32 for weights up to 2 GB). ``device``: an OpenVINO device name (only CPU is
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

    precision: str = "auto"
    device: str = "CPU"
    slots: int = 64
    cache_gb: float = 0.0
    prefix_caching: bool = True
    threads: int = 0
    pooling: str = "auto"
    normalize: bool = True
    max_length: int = 0
    truncate: bool = False
    query_instruction: str = ""
    passage_instruction: str = ""
    matryoshka: str = "auto"
    step_tokens: int = 1024

    def __post_init__(self) -> None:
        one_of("precision", self.precision, "f32", "fast", "auto")
        one_of("pooling", self.pooling, "cls", "mean", "last", "auto")
        one_of("matryoshka", self.matryoshka, "on", "off", "auto")
        if self.slots < 1 or self.step_tokens < 1 or min(self.threads, self.cache_gb, self.max_length) < 0:
            raise ModelLoadError(
                "Options slots and step_tokens must be at least 1; threads, cache_gb and max_length not negative."
            )

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


@dataclass(frozen=True)
class TransformersOptions:
    """``--option`` values of this engine.

    ``device``: cpu, cuda, cuda:1 …; auto takes the first CUDA device if there is one. ``dtype``: f32, bf16, f16, or
    auto: the checkpoint's own on CUDA; on a CPU f32 for weights up to 2 GB, else bf16. ``slots``: sequences that run at
    once. ``context``: tokens that each may have, 0 for what the model was trained for, or less where the cache of all
    slots would not fit into ``cache_gb`` (GB; 0: a quarter of the memory). ``batching``: continuous, static, or auto.
    ``window``: milliseconds that a static batch waits for others of its kind. ``threads``: 0 for all cores.
    """

    device: str = "auto"
    dtype: str = "auto"
    slots: int = 64
    context: int = 0
    cache_gb: float = 0.0
    batching: str = "auto"
    window: float = 20.0
    threads: int = 0

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, "f32", "bf16", "f16", "auto")
        one_of("batching", self.batching, "continuous", "static", "auto")
        if self.slots < 1 or min(self.threads, self.cache_gb, self.context, self.window) < 0:
            raise ModelLoadError(
                "Option slots must be at least 1; context, cache_gb, window and threads must not be negative."
            )


@dataclass(frozen=True)
class LlamaOptions:
    """``--option`` values of this engine.

    ``slots``: sequences that run at once. ``context``: tokens that each of them may have, 0 for what the model was
    trained for, or less where the cache would not fit into ``cache_gb`` (GB; 0: a quarter of the memory). ``threads``:
    0 for all cores. ``gpu_layers``: layers that a GPU build of xllamacpp keeps on the GPU, -1 for all.
    """

    slots: int = 8
    context: int = 0
    cache_gb: float = 0.0
    threads: int = 0
    gpu_layers: int = -1

    def __post_init__(self) -> None:
        if self.slots < 1 or min(self.context, self.threads, self.cache_gb) < 0 or self.gpu_layers < -1:
            raise ModelLoadError(
                "Option slots must be at least 1; context, threads and cache_gb must not be negative; gpu_layers is "
                "-1 or more."
            )


@dataclass(frozen=True)
class VLLMOptions:
    """``--option`` values of this engine: vLLM's arguments under vLLM's names. 0 and "" leave a value to vLLM.

    ``max_num_seqs``: sequences that run at once (64 on a CPU, else 256). ``kv_cache_gb``: memory for the key/value
    cache in GB; on a CPU by default what ``max_num_seqs`` full contexts need, at most a quarter of the memory.
    ``threads``: of a CPU, 0 for all cores.
    """

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.0
    dtype: str = "auto"
    quantization: str = ""
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    kv_cache_gb: float = 0.0
    threads: int = 0

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, "auto", "bfloat16", "float16", "float32")
        if self.tensor_parallel_size < 1:
            raise ModelLoadError("Option tensor_parallel_size is at least 1.")
        if not 0 <= self.gpu_memory_utilization <= 1:
            raise ModelLoadError("Option gpu_memory_utilization is a share of the memory: at most 1.")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_gb", "threads"):
            if getattr(self, name) < 0:
                raise ModelLoadError(f"Option {name} must not be negative.")
