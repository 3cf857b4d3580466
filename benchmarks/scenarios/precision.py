"""What the precisions of the OpenVINO engine cost and gain: quality, size, memory, speed, in process.

Each precision runs in a process of its own. The quality is told against the same weights in float32: the perplexity of
a fixed text (`benchmarks/prose.txt`), how often the likeliest next token of the text is the same, and how many tokens
of greedy replies are the same before the first that differs. A GGUF file is measured as it is, and the others from a
folder with its weights widened to float32.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

PROSE = Path(__file__).parent.parent / "prose.txt"
PRECISIONS = ("f32", "fast", "int8", "int8-fast", "int4", "int4-fast")
#: Requests at once, and tokens of each reply whose speed is measured.
CONCURRENCY, TOKENS = (1, 8, 64), 64
#: Greedy replies that are compared, to the words of the text from these on.
REPLIES, REPLY_TOKENS = 16, 64


@dataclass
class Measured:
    """``built``, ``loaded``: seconds. ``stored``, ``held``: bytes of the file, of the process. ``speed``: tokens/s."""

    told: str
    deterministic: bool
    built: float
    loaded: float
    stored: int
    held: int
    speed: dict[int, float]
    logprobs: list[float]
    likeliest: list[int]
    replies: list[list[int]]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))

    def agreement(self, reference: Measured) -> float:
        """Share of the text's tokens before which both find the same one likeliest."""
        return float(np.mean(np.array(self.likeliest) == np.array(reference.likeliest)))

    def same(self, reference: Measured) -> float:
        """Tokens of a greedy reply that are the same, on average."""
        pairs = zip(self.replies, reference.replies, strict=True)
        return float(np.mean([np.append(np.array(ours) == theirs, False).argmin() for ours, theirs in pairs]))


def measure(model: Path, precisions: Sequence[str], text: str, advance: Callable[[str], None]) -> dict[str, Measured]:
    """By precision; ``file``: a GGUF file as it is."""
    results: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-precision-") as scratch:
        folder = model
        if model.suffix == ".gguf":
            folder = _alone(_widened, model, Path(scratch) / model.stem)
            results["file"] = _alone(_measured, model, "f32", text, scratch)
            advance("file")
        for precision in precisions:
            results[precision] = _alone(_measured, folder, precision, text, scratch)
            advance(precision)
    return results


def _alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _widened(file: Path, folder: Path) -> Path:
    """A folder with the weights of a GGUF file in float32."""
    from safetensors.numpy import save_file

    from penstock.engines.openvino.ir.gguf import GgufWeights
    from penstock.engines.text.gguf import GgufFile, write_text

    weights = GgufWeights(GgufFile(file))
    folder.mkdir()
    write_text(weights.file, folder)
    (folder / "config.json").write_text(json.dumps(weights.config))
    tensors = {name: np.ascontiguousarray(weights.read(name).widened()) for name in weights.names()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _measured(place: Path, precision: str, text: str, cache: str) -> Measured:
    os.environ["PENSTOCK_CACHE"] = cache
    from penstock.core.job import Request, Sampling
    from penstock.engines.child.backend import load_backend
    from penstock.engines.host.memory import held_by
    from penstock.engines.openvino.files import resolve

    begun = time.perf_counter()
    files = resolve("m", str(place), lambda what, part: None, precision)
    built = time.perf_counter()
    backend = load_backend("openvino", "m", str(place), {"precision": precision}, lambda what, part: None)
    loaded = time.perf_counter()
    for _ in backend.spare_time or ():
        pass

    def request(ids: Sequence[int], tokens: int) -> Request:
        return Request("m", prompt_ids=tuple(ids), sampling=Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))

    scored = Request("m", prompt=text, task="score", sampling=Sampling(logprobs=1))
    (outputs,) = _run(backend, [scored])
    scores = [score for output in outputs for score in output.logprobs or () if score is not None]
    tokens = [id for output in outputs for id in output.ids]
    random = np.random.default_rng(1)
    speed = {}
    for count in CONCURRENCY:
        requests = [request(random.integers(100, 1000, 24).tolist(), TOKENS) for _ in range(count)]
        start = time.perf_counter()
        _run(backend, requests)
        speed[count] = count * TOKENS / (time.perf_counter() - start)
    every = (len(tokens) - 32) // REPLIES
    prompts = [request(tokens[i * every : i * every + 32], REPLY_TOKENS) for i in range(REPLIES)]
    return Measured(
        backend.info.precision,
        backend.info.deterministic,
        built - begun,
        loaded - built,
        files.ir.with_suffix(".bin").stat().st_size,
        held_by(os.getpid()),
        speed,
        [score.logprob for score in scores],
        [score.top[0].id for score in scores],
        [[id for output in reply for id in output.ids] for reply in _run(backend, prompts)],
    )


def _run(backend: Any, requests: Sequence[Any]) -> list[list[Any]]:
    """The outputs of each request."""
    from penstock.core.events import Prefix

    outputs: list[list[Any]] = [[] for _ in requests]
    for key, request in enumerate(requests):
        backend.add(key, request, [Prefix()], 1)
    while backend.busy:
        for output in backend.step():
            outputs[output.key].append(output)
    return outputs


def markdown(results: dict[str, Measured]) -> str:
    """A row for each precision."""
    reference = results["f32"]
    lines = [
        "| precision | file, MB | memory, MB | load, s | tokens/s at "
        + " / ".join(map(str, CONCURRENCY))
        + f" | perplexity | likeliest token as f32 | of {REPLY_TOKENS} greedy tokens the same |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in results.items():
        speed = " / ".join(f"{each.speed[count]:.0f}" for count in CONCURRENCY)
        lines.append(
            f"| {each.told if name == 'file' else f'`{name}`'} | {each.stored / 1e6:.0f} | {each.held / 1e6:.0f} "
            f"| {each.loaded:.1f} | {speed} | {each.perplexity:.3f} | {each.agreement(reference):.1%} "
            f"| {each.same(reference):.1f} |"
        )
    return "\n".join(lines) + "\n"
