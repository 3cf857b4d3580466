"""What a batch costs those who wait for a reply, and what it gets of the machine.

Three servers with the same model stay up side by side and take turns under the same interactive load (an open loop of
streamed replies): `alone` runs nothing else, `batch` runs a batch of so many lines beside it, `no reserve` does so with
``--batch-reserve 0``, so that lines may take every slot of the engine. The load is offered while the batch runs, then
the batch is waited for: each line must have succeeded, once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import httpx

from benchmarks import report
from benchmarks.load import Plan, Result, run_load
from benchmarks.processes import TargetError
from benchmarks.stats import Spread
from benchmarks.targets import Running, Target
from benchmarks.workload import Workload

ARMS = {"alone": [], "batch": [], "no reserve": ["--batch-reserve", "0"]}

#: Of each request, interactive or not.
BODY = {"ignore_eos": True, "temperature": 0}
SERVER = Target(
    name="batch",
    command=[
        *("{penstock}", "serve", "--engine", "openvino", "--model", "m={models}/{shape}", "--option", "precision=f32"),
        *("--port", "{port}", "--data-dir", "{data_dir}"),
    ],
    ready="/readyz",
    model="m",
    body={**BODY, "stream_options": {"include_usage": True}},
)
#: Seconds until a batch runs with all it can get, and those to wait for its end.
LEAD, PATIENCE = 2.0, 1800.0


@dataclass(frozen=True)
class Turn:
    """One turn of one arm."""

    load: Result
    lines: int
    """Of the batch, that were done while the load was offered."""
    covered: bool
    """The batch outlasted the load."""
    seconds: float
    """From the batch's creation to its end; 0 without one."""


def measure(
    variables: dict[str, str],
    workload: Workload,
    plan: Plan,
    rounds: int,
    lines: int,
    line_tokens: int,
    advance: Callable[[str], None] = lambda arm: None,
) -> dict[str, list[Turn]]:
    """By arm. A warm-up comes first and is not counted."""
    turns: dict[str, list[Turn]] = {arm: [] for arm in ARMS}
    with ExitStack() as stack:
        servers = {
            arm: stack.enter_context(Running(replace(SERVER, command=[*SERVER.command, *flags]), variables))
            for arm, flags in ARMS.items()
        }
        for server in servers.values():
            run_load(server.server(), workload, Plan(64, requests=128))
        for turn in range(rounds):
            own = replace(workload, seed=workload.seed + turn)
            for arm, server in servers.items():
                if arm == "alone":
                    turns[arm].append(Turn(run_load(server.server(), own, plan), 0, True, 0.0))
                else:
                    turns[arm].append(_beside(server, own, plan, lines, line_tokens))
                advance(arm)
    return turns


def markdown(turns: dict[str, list[Turn]], rounds: int, lines: int) -> str:
    figures: dict[str, Callable[[Turn], float]] = {
        "TTFT p50 ms": lambda turn: turn.load.ttft_ms.p50,
        "TTFT p95 ms": lambda turn: turn.load.ttft_ms.p95,
        "TTFT p99 ms": lambda turn: turn.load.ttft_ms.p99,
        "between two events p50 ms": lambda turn: turn.load.inter_token_ms.p50,
        "between two events p99 ms": lambda turn: turn.load.inter_token_ms.p99,
        "latency p95 ms": lambda turn: turn.load.latency_ms.p95,
        "requests": lambda turn: turn.load.requests,
        "errors": lambda turn: sum(turn.load.errors.values()),
        "tokens/s": lambda turn: turn.load.tokens_per_s,
        "the batch's lines/s meanwhile": lambda turn: turn.lines / turn.load.wall_s,
        "the batch, seconds": lambda turn: turn.seconds,
        "others' CPU, cores": lambda turn: turn.load.foreign_cores,
    }
    rows = [
        [name, *(report.spread(Spread.of(figure(turn) for turn in turns[arm])) for arm in ARMS)]
        for name, figure in figures.items()
    ]
    table = report.table(["of the interactive load", *ARMS], rows)
    short = sum(not turn.covered for arm in turns.values() for turn in arm)
    note = f"\n\nIn {short} turns the batch ended before the load did: give it more lines." if short else ""
    return (
        f"# A batch of {lines:,} lines beside interactive traffic\n\n"
        f"Median (lowest–highest) of {rounds} rounds in turn.\n\n{table}{note}"
    )


def _beside(server: Running, workload: Workload, plan: Plan, lines: int, tokens: int) -> Turn:
    prompts = replace(workload, seed=workload.seed + 7919).prompt_list(lines)
    body = {"model": SERVER.model, "max_tokens": tokens, **BODY}
    content = "".join(
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {**body, "prompt": prompt},
            }
        )
        + "\n"
        for number, prompt in enumerate(prompts)
    )
    with httpx.Client(base_url=f"{server.server().url}/v1", timeout=60) as client:
        file = _call(client, "POST", "/files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", content)})
        begun = time.monotonic()
        request = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        path = f"/batches/{_call(client, 'POST', '/batches', json=request)['id']}"
        _wait(client, path, "in_progress", "finalizing", "completed")
        time.sleep(LEAD)
        before = _call(client, "GET", path)["request_counts"]["completed"]
        load = run_load(server.server(), workload, plan)
        after = _call(client, "GET", path)
        batch = _wait(client, path, "completed")
        seconds = batch["completed_at"] - batch["created_at"]
        if seconds < 10:  # the stamps are whole seconds
            seconds = time.monotonic() - begun
        ids = [json.loads(line)["custom_id"] for line in _lines(client, batch["output_file_id"])]
    if sorted(ids) != sorted(f"line-{number}" for number in range(lines)):
        raise TargetError(f"the output has {len(ids)} lines, {len(set(ids))} of them different, of {lines}")
    done = after["request_counts"]["completed"] - before
    return Turn(load, done, after["status"] == "in_progress", seconds)


def _wait(client: httpx.Client, path: str, *states: str) -> Any:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        batch = _call(client, "GET", path)
        if batch["status"] in states:
            return batch
        if batch["status"] not in ("validating", "in_progress", "finalizing"):
            raise TargetError(f"the batch is {batch['status']}: {batch['errors'] or batch['request_counts']}")
        time.sleep(0.2)
    raise TargetError(f"the batch is still {batch['status']} after {PATIENCE:g} s: {batch['request_counts']}")


def _call(client: httpx.Client, method: str, path: str, **arguments: Any) -> Any:
    answer = client.request(method, path, **arguments)
    if answer.status_code != 200:
        raise TargetError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
    return answer.json()


def _lines(client: httpx.Client, file: str) -> list[str]:
    answer = client.get(f"/files/{file}/content")
    answer.raise_for_status()
    return answer.text.splitlines()
