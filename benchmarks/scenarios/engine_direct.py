"""Engines in process, without any server: the most that a server around them can give.

Two engines: `genai`, OpenVINO GenAI's own continuous-batching pipeline (an engine we do not control, and the
denominator of the main ratio), and `penstock`, Penstock's OpenVINO backend called directly (what the server around it
costs, exactly).

The GenAI loop is the least that can be written: admit while a slot is free, `step()`, and as good as nothing else. A
running sequence gets one token a step, so it is looked at when its first token is due (for the time to first token) and
again when enough steps have passed for it to be through. With `--read-each-step` every token is read after its step, as
a streaming server must; the difference is what reading costs.

    python -m benchmarks.scenarios.engine_direct --model benchmarks/models/S -c 1 -c 64
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy
import openvino
import openvino_genai
import typer

from benchmarks.load import Result
from benchmarks.resources import Meter, ProcessUse
from benchmarks.stats import Times
from benchmarks.workload import Workload

RUNNING = openvino_genai.GenerationStatus.RUNNING


@dataclass(slots=True)
class Sequence:
    """One generation under way."""

    handle: Any
    admitted: float
    last: float = 0.0
    steps: int = 0
    tokens: int = 0

    def read(self) -> None:
        self.tokens += sum(len(output.generated_ids) for output in self.handle.read().values())

    def read_rest(self) -> None:
        while self.handle.can_read():
            self.read()


class GenAIEngine:
    """A pipeline and the closed loop over it."""

    def __init__(
        self, folder: Path, precision: str, slots: int, batched_tokens: int, cache_gb: int, cache_precision: str
    ) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = slots
        scheduler.max_num_batched_tokens = batched_tokens
        scheduler.cache_size = cache_gb
        properties = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "f32" else {}
        if cache_precision:
            properties["KV_CACHE_PRECISION"] = cache_precision
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
        self._admitted = 0

    def run(self, workload: Workload, concurrency: int, requests: int, read_each_step: bool = False) -> Result:
        """`requests` generations of `workload.max_tokens` greedy tokens, `concurrency` at a time."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = workload.max_tokens
        config.ignore_eos = True
        config.do_sample = False
        prompts = deque(
            openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in workload.prompt_list(requests)
        )
        pipeline, limit = self._pipeline, workload.max_tokens - 1
        fresh: list[Sequence] = []  # admitted, still without a token
        active: list[Sequence] = []
        ended: list[Sequence] = []
        first_tokens: list[float] = []
        gaps: list[float] = []
        meter = Meter([])
        while prompts or fresh or active:
            while prompts and len(active) + len(fresh) < concurrency:
                handle = pipeline.add_request(self._admitted, prompts.popleft(), config)
                fresh.append(Sequence(handle, perf_counter()))
                self._admitted += 1
            pipeline.step()
            now = perf_counter()
            through = False
            for sequence in active:
                sequence.steps += 1
                through = through or sequence.steps >= limit
                if read_each_step and sequence.handle.can_read():
                    sequence.read()
                    gaps.append(now - sequence.last)
                    sequence.last = now
            if through:
                still = []
                for sequence in active:
                    if sequence.steps < limit or sequence.handle.get_status() == RUNNING:
                        still.append(sequence)
                        continue
                    if not read_each_step:
                        gaps.append((now - sequence.last) / limit)
                        sequence.last = now
                    sequence.read_rest()
                    ended.append(sequence)
                active = still
            if fresh:
                waiting = []
                for sequence in fresh:
                    if sequence.handle.can_read():
                        sequence.read()
                        sequence.last = now
                        first_tokens.append(now - sequence.admitted)
                        active.append(sequence)
                    else:
                        waiting.append(sequence)
                fresh = waiting
        return _result(concurrency, workload, ended, first_tokens, gaps, meter)


class PenstockEngine:
    """Penstock's backend, driven as its child process drives it, without that process."""

    def __init__(self, folder: Path, precision: str, slots: int) -> None:
        from penstock.engines.child.backend import load_backend

        self._backend = load_backend(
            "openvino", "bench", str(folder), {"precision": precision, "slots": str(slots)}, lambda what, part: None
        )
        self._admitted = 0

    def run(self, workload: Workload, concurrency: int, requests: int) -> Result:
        """As `GenAIEngine.run`; every token is read, and detokenized, as it comes."""
        from penstock.core.events import Prefix
        from penstock.core.job import Request, Sampling

        sampling = Sampling(max_tokens=workload.max_tokens, temperature=0.0, ignore_eos=True)
        waiting = deque(
            Request(model="bench", prompt_ids=tuple(int(token) for token in prompt), sampling=sampling)
            for prompt in workload.prompt_list(requests)
        )
        backend = self._backend
        active: dict[int, Sequence] = {}
        ended: list[Sequence] = []
        first_tokens: list[float] = []
        gaps: list[float] = []
        meter = Meter([])
        while waiting or active:
            while waiting and len(active) < concurrency:
                active[self._admitted] = Sequence(None, perf_counter())
                backend.add(self._admitted, waiting.popleft(), [Prefix()], 1)
                self._admitted += 1
            outputs = backend.step()
            now = perf_counter()
            for output in outputs:
                sequence = active[output.key]
                if sequence.tokens:
                    gaps.append(now - sequence.last)
                else:
                    first_tokens.append(now - sequence.admitted)
                sequence.tokens += len(output.ids)
                sequence.last = now
                if output.finish is not None:
                    ended.append(active.pop(output.key))
        return _result(concurrency, workload, ended, first_tokens, gaps, meter)


def _result(
    concurrency: int,
    workload: Workload,
    ended: list[Sequence],
    first_tokens: list[float],
    gaps: list[float],
    meter: Meter,
) -> Result:
    wall, uses = meter.elapsed(), meter.read()
    tokens = sum(sequence.tokens for sequence in ended)
    return Result(
        label=f"c={concurrency}",
        requests=len(ended),
        errors={},
        short_replies=sum(sequence.tokens < workload.max_tokens for sequence in ended),
        wall_s=wall,
        tokens=tokens,
        events=tokens,
        events_per_read=1.0,
        tokens_per_s=tokens / wall,
        requests_per_s=len(ended) / wall,
        ttft_ms=Times.of(first_tokens),
        inter_token_ms=Times.of(gaps),
        latency_ms=Times.of(sequence.last - sequence.admitted for sequence in ended),
        processes=[ProcessUse("engine", uses[-1].cpu_s, uses[-1].peak_rss)],
        foreign_cores=meter.foreign(uses),
    )


def main(
    model: Annotated[
        Path, typer.Option(help="Folder with an OpenVINO IR, or with Llama safetensors (needs Penstock).")
    ],
    concurrency: Annotated[list[int], typer.Option("--concurrency", "-c")] = [1, 8, 64],  # noqa: B006
    requests: Annotated[list[int], typer.Option("--requests", "-n", help="For each concurrency; one for all.")] = [64],  # noqa: B006
    warmup: Annotated[int, typer.Option(help="Requests before the first measurement.")] = 8,
    engine: Annotated[str, typer.Option(help="genai or penstock.")] = "genai",
    precision: Annotated[str, typer.Option(help="f32, or fast: the engine's default.")] = "f32",
    max_tokens: int = 64,
    seed: int = 1,
    slots: Annotated[int, typer.Option(help="Sequences in one batch.")] = 64,
    batched_tokens: Annotated[int, typer.Option(help="Tokens in one step, prompts included.")] = 2048,
    cache_gb: Annotated[int, typer.Option(help="KV cache of genai.")] = 1,
    cache_precision: Annotated[str, typer.Option(help="KV cache of genai, as f32; its own choice by default.")] = "",
    read_each_step: bool = False,
) -> None:
    """Measure the engine without a server. Prints one JSON object for each concurrency."""
    if engine == "penstock":
        run = PenstockEngine(model, precision, slots).run
    else:
        pipeline = GenAIEngine(find_ir(model), precision, slots, batched_tokens, cache_gb, cache_precision)
        run = partial(pipeline.run, read_each_step=read_each_step)
    if warmup:
        run(Workload(seed=seed + 7919, max_tokens=max_tokens), warmup, warmup)
    numbers = requests * len(concurrency) if len(requests) == 1 else requests
    for position, (level, number) in enumerate(zip(concurrency, numbers, strict=True)):
        workload = Workload(seed=seed + position, max_tokens=max_tokens)
        print(json.dumps(asdict(run(workload, level, number))), flush=True)


def find_ir(folder: Path) -> Path:
    """The folder's own IR, or the one that Penstock builds from its safetensors: both sides must run the same graph."""
    if (folder / "openvino_model.xml").exists():
        return folder
    from penstock.engines.openvino.files import resolve

    return resolve(folder.name, str(folder), lambda what, part: None).ir.parent


if __name__ == "__main__":
    typer.run(main)
