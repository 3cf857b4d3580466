"""How much main memory a model takes: guessed from its files before it was ever loaded, then measured."""

from __future__ import annotations

import psutil

from penstock.engines.host.process import EngineSpec
from penstock.engines.models import local_place
from penstock.engines.options import parse
from penstock.engines.plugin import find_engine

#: Bytes of an engine process without a model: the interpreter and the engine's library.
BASE = 150_000_000
#: What weights are likely to take in memory, relative to their files: engines keep them in a layout of their own beside
#: the file's pages, and need room for the cache. (OpenVINO at f32: 2.2 for 110 M parameters.)
HEADROOM = 2.0

#: Files with weights, the format that engines prefer first. Only one of them is read.
_WEIGHTS = ("*.safetensors", "openvino_*.bin", "*.gguf", "*.bin")


def estimate(spec: EngineSpec) -> tuple[int, int]:
    """Bytes that a process with this model will hold: at least, and likely.

    `BASE` of a model whose files are not here.
    """
    place = local_place(spec.model, spec.path)
    size = 0
    if place.is_file():
        size = place.stat().st_size
    elif place.is_dir():
        sizes = (sum(file.stat().st_size for file in place.glob(pattern)) for pattern in _WEIGHTS)
        size = next(filter(None, sizes), 0)
    plugin = find_engine(spec.engine)
    kept = size * plugin.weights(spec.model, spec.path, parse(plugin.options, spec.options, spec.engine))
    return BASE + round(kept), BASE + round(HEADROOM * kept)


def held_by(pid: int) -> int:
    """Bytes that a process and its children hold, shared pages divided among those who share them where the system
    tells (Linux); 0 when it is gone. Reads /proc: not for an event loop when the process is large."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            try:
                full = each.memory_full_info()
                total += getattr(full, "pss", 0) or full.rss
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:
                total += each.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return total
