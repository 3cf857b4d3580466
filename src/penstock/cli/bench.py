"""``penstock bench``: a quick look at a running server's speed. The serious harness is in ``benchmarks/``."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.cli.common import URL, Json, Url, choose_model, connect, print_json, stderr, stdout, table
from penstock.client import AsyncClient, Options
from penstock.core.errors import PenstockError


class Sample(msgspec.Struct, frozen=True):
    """One request: tokens it got, seconds to the first one and to the end."""

    tokens: int
    first: float
    total: float


def bench(
    model: Annotated[str | None, typer.Option(help="The model to measure; default: the server's first.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests at once.")] = 8,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="Requests in all.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per request.")] = 64,
    prompt: Annotated[str, typer.Option(help="{i} becomes the request's number.")] = "Story number {i}: once upon a",
    json: Json = False,
    url: Url = URL,
) -> None:
    """Measure a running server: a closed loop of streamed requests. Exits with 1 if any of them fails."""
    with connect(url) as probe:
        name = choose_model(probe.models(), model)
    options: Options = {"model": name, "max_tokens": max_tokens, "ignore_eos": True}
    prompts = [prompt.replace("{i}", str(i)) for i in range(1, requests + 1)]
    begun = time.perf_counter()
    samples, failures = asyncio.run(_closed_loop(url, prompts, concurrency, options))
    report = summary(samples, failures, time.perf_counter() - begun)
    if json:
        print_json({"model": name, "concurrency": concurrency, **report})
    else:
        _show(report)
    if failures:
        raise typer.Exit(1)


async def _closed_loop(
    url: str, prompts: Sequence[str], concurrency: int, options: Options
) -> tuple[list[Sample], Counter[str]]:
    samples: list[Sample] = []
    failures: Counter[str] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = stderr()
    waiting = iter(prompts)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{concurrency} at once", total=len(prompts))

        async def user(client: AsyncClient, prompts: Iterator[str]) -> None:
            for prompt in prompts:
                try:
                    samples.append(await _request(client, prompt, options))
                except PenstockError as error:
                    failures[error.code] += 1
                progress.advance(bar)

        async with AsyncClient(url, give_up=10.0) as client, asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, len(prompts))):
                tasks.create_task(user(client, waiting))
    return samples, failures


async def _request(client: AsyncClient, prompt: str, options: Options) -> Sample:
    begun = time.perf_counter()
    first = 0.0
    tokens = 0
    async for _ in client.generate_stream(prompt, **options):
        tokens += 1
        first = first or time.perf_counter() - begun
    return Sample(tokens, first, time.perf_counter() - begun)


def summary(samples: Sequence[Sample], failures: Counter[str], seconds: float) -> dict[str, Any]:
    """The figures: rates per second, times in milliseconds."""
    tokens = sum(sample.tokens for sample in samples)
    return {
        "requests": len(samples),
        "failures": dict(failures),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "requests_per_second": round(len(samples) / seconds, 2),
        "time_to_first_token_ms": _percentiles([sample.first for sample in samples]),
        "latency_ms": _percentiles([sample.total for sample in samples]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Nearest-rank percentiles in milliseconds; nothing of nothing."""
    ordered = sorted(seconds)
    return {
        f"p{percent}": round(ordered[math.ceil(percent / 100 * len(ordered)) - 1] * 1000, 2)
        for percent in (50, 95, 99)
        if ordered
    }


def _show(report: dict[str, Any]) -> None:
    rows = table("", "p50", "p95", "p99")
    for title, name in (("first token (ms)", "time_to_first_token_ms"), ("latency (ms)", "latency_ms")):
        rows.add_row(title, *(f"{value:.1f}" for value in report[name].values()))
    out = stdout()
    out.print(
        f"{report['requests']} requests, {report['tokens']} tokens in {report['seconds']:.2f} s: "
        f"{report['tokens_per_second']:.0f} tokens/s, {report['requests_per_second']:.1f} requests/s",
        style="bold",
    )
    out.print(rows)
    for code, count in report["failures"].items():
        out.print(f"{count} failed: {code}", style="red")
