"""What is written: JSON with everything, a Markdown table to read, a plot to show."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.load import Result
from benchmarks.stats import Spread, Times

_PACKAGES = ("penstock", "openvino-genai", "transformers", "torch", "uvloop", "uvicorn", "starlette")


def environment() -> dict[str, Any]:
    """What a reader needs to know about the machine and the code."""
    cpu = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "commit": commit,
    }


def number(value: float) -> str:
    """Three significant figures or the whole number, whichever is longer."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(value: Times) -> str:
    return " / ".join(number(each) for each in (value.p50, value.p95, value.p99))


def spread(value: Spread) -> str:
    """Median (lowest–highest)."""
    if math.isnan(value.median):
        return "–"
    return f"{number(value.median)} ({number(value.low)}–{number(value.high)})"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it reads in a terminal too."""
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if at == 0 else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return "\n".join([line(headers), f"| {' | '.join(rule)} |", *(line(row) for row in rows)])


def result_table(results: Sequence[Result]) -> str:
    """One row a run, and below it what is wrong with any of them."""
    rows = []
    for result in results:
        costs = result.cpu_s_per_million_tokens
        peak = sum(use.peak_rss for use in result.processes if use.name != "harness") / 2**20
        rows.append(
            [
                result.label,
                number(result.tokens_per_s),
                number(result.requests_per_s),
                times(result.ttft_ms),
                times(result.inter_token_ms),
                times(result.latency_ms),
                ", ".join(f"{name} {number(cost)}" for name, cost in costs.items()),
                f"{peak:,.0f}" if peak else "–",
                number(result.foreign_cores),
                f"{sum(result.errors.values())} of {result.requests}",
            ]
        )
    headers = [
        "load",
        "tokens/s",
        "requests/s",
        "TTFT ms p50/p95/p99",
        "inter-token ms",
        "latency ms",
        "CPU s per 1M tokens",
        "peak RSS MiB",
        "others' CPU, cores",
        "errors",
    ]
    return "\n".join([table(headers, rows), *(f"\n{note}" for note in notes(results))])


def notes(results: Sequence[Result]) -> list[str]:
    """Everything that makes a figure doubtful."""
    found = []
    for result in results:
        for error, times_seen in result.errors.items():
            found.append(f"**{result.label}**: {times_seen} × {error}")
        if result.short_replies:
            found.append(f"**{result.label}**: {result.short_replies} replies had fewer tokens than asked for")
        found += [f"{result.label}, a bad reply began: `{' '.join(sample.split())[:200]}`" for sample in result.samples]
    return found


def write(path: Path, document: dict[str, Any], markdown: str) -> list[Path]:
    """Write `<path>.json` and `<path>.md`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    json_path, markdown_path = path.with_suffix(".json"), path.with_suffix(".md")
    json_path.write_text(json.dumps(document, indent=1, allow_nan=True) + "\n")
    markdown_path.write_text(markdown.rstrip() + "\n")
    return [json_path, markdown_path]


def plot_bars(
    path: Path, title: str, labels: Sequence[str], series: dict[str, dict[str, list[tuple[float, float, float]]]]
) -> Path | None:
    """Grouped bars with low–high whiskers, one panel a figure: `series[figure][target]` has one triple a label.

    Returns None where matplotlib is not installed: a plot is a convenience.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    image, panels = pyplot.subplots(1, len(series), figsize=(5.2 * len(series), 3.8), squeeze=False)
    for panel, (figure, targets) in zip(panels[0], series.items(), strict=True):
        width = 0.8 / max(len(targets), 1)
        for at, (target, triples) in enumerate(targets.items()):
            middles = [triple[0] for triple in triples]
            whiskers = [
                [max(middle - low, 0) for middle, low, _ in triples],
                [max(high - middle, 0) for middle, _, high in triples],
            ]
            places = [place + (at - (len(targets) - 1) / 2) * width for place in range(len(labels))]
            panel.bar(places, middles, width * 0.92, yerr=whiskers, capsize=3, label=target)
        panel.set_xticks(range(len(labels)), labels)
        panel.set_title(figure, fontsize=10)
        shown = [triple[0] for triples in targets.values() for triple in triples]
        panel.set_yscale("log" if figure.endswith("ms") and any(value > 0 for value in shown) else "linear")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8, frameon=False)
    image.suptitle(title, fontsize=11)
    image.tight_layout()
    png = path.with_suffix(".png")
    png.parent.mkdir(parents=True, exist_ok=True)
    image.savefig(png, dpi=130)
    pyplot.close(image)
    return png


def result_json(result: Result) -> dict[str, Any]:
    """A result with its derived figures."""
    return asdict(result) | {"cpu_s_per_million_tokens": result.cpu_s_per_million_tokens}


def result_from_json(document: dict[str, Any]) -> Result:
    """The inverse, for what a command target prints."""
    from benchmarks.resources import ProcessUse

    fields = {key: value for key, value in document.items() if key != "cpu_s_per_million_tokens"}
    for key in ("ttft_ms", "inter_token_ms", "latency_ms"):
        fields[key] = Times(**fields[key])
    fields["processes"] = [ProcessUse(**use) for use in fields["processes"]]
    return Result(**fields)
