"""Side by side: several targets in turn (A B A B …), medians with their spread, and ratios of medians.

Each round starts a target afresh (own port, own empty data directory), warms it up, runs every cell, and stops it, so
that nothing idle eats the CPU of what is measured. With `keep` servers stay up, stopped by SIGSTOP while another one is
measured; a server with a hang watchdog will not like that. A target that says `keep` itself stays up without being
stopped.
"""

from __future__ import annotations

import json
import math
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import pairs, report
from benchmarks.load import Plan, Result, run_load
from benchmarks.processes import TargetError
from benchmarks.stats import Spread
from benchmarks.targets import HERE, Running, Target, default_variables, fill, load_targets
from benchmarks.workload import Workload

FIGURES: dict[str, Callable[[Result], float]] = {
    "tokens/s": lambda r: r.tokens_per_s,
    "requests/s": lambda r: r.requests_per_s,
    "TTFT p50 ms": lambda r: r.ttft_ms.p50,
    "TTFT p99 ms": lambda r: r.ttft_ms.p99,
    "inter-token p50 ms": lambda r: r.inter_token_ms.p50,
    "inter-token p99 ms": lambda r: r.inter_token_ms.p99,
    "latency p50 ms": lambda r: r.latency_ms.p50,
    "latency p95 ms": lambda r: r.latency_ms.p95,
    "latency p99 ms": lambda r: r.latency_ms.p99,
    "CPU s per 1M tokens": lambda r: sum(v for k, v in r.cpu_s_per_million_tokens.items() if k != "harness"),
    "harness CPU s per 1M tokens": lambda r: r.cpu_s_per_million_tokens.get("harness", 0.0),
    "peak RSS MiB": lambda r: sum(use.peak_rss for use in r.processes if use.name != "harness") / 2**20,
    "events per read": lambda r: r.events_per_read,
    "others' CPU, cores": lambda r: r.foreign_cores,
    "errors": lambda r: float(sum(r.errors.values()) + r.short_replies),
}
_OF_PROCESS = "CPU µs a token: "
_PLOTTED = ("tokens/s", "TTFT p50 ms", "inter-token p99 ms")


@dataclass(frozen=True)
class Scenario:
    """A comparison: who, under which load."""

    name: str
    about: str
    workload: dict[str, Any]
    concurrency: list[int]
    targets: list[str] = field(default_factory=list)
    """In the order of their turns. Pairs need not be listed: theirs come first."""
    requests: int | dict[str, dict[str, int]] = 0
    """A number for all cells, or by shape and concurrency."""
    baseline: str = ""
    pairs: dict[str, list[str]] = field(default_factory=dict)
    """Who is set against whom: a peer's target and ours, under the name of what they share."""
    warmup: int = 0
    """Requests before each cell, at least; the target's own number if 0."""
    verify: bool = False
    variables: dict[str, str] = field(default_factory=default_variables)

    @classmethod
    def load(cls, name: str) -> Scenario:
        path = Path(name) if name.endswith(".toml") else HERE / "scenarios" / f"{name}.toml"
        read = tomllib.loads(path.read_text())
        of_pairs = [target for pair in read.get("pairs", {}).values() for target in pair]
        return cls(name=path.stem, **read | {"targets": list(dict.fromkeys([*of_pairs, *read.get("targets", [])]))})

    def requests_at(self, concurrency: int) -> int:
        if isinstance(self.requests, int):
            return self.requests or 8 * concurrency
        return self.requests[self.variables["shape"]][str(concurrency)]

    def cell_workload(self, position: int) -> Workload:
        """Each cell has prompts of its own, so that no prefix cache has seen them."""
        workload = Workload(**fill(self.workload, self.variables))
        return replace(workload, seed=workload.seed + position)


def scenario_names() -> list[str]:
    return sorted(path.stem for path in (HERE / "scenarios").glob("*.toml") if path.stem != "targets")


@dataclass
class Comparison:
    """The results so far: `cells[target][label]` has one result a round."""

    scenario: Scenario
    cells: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Targets that did not start, and why."""

    def add(self, target: str, result: Result) -> None:
        self.cells.setdefault(target, {}).setdefault(result.label, []).append(result)

    def spread(self, target: str, label: str, figure: str) -> Spread:
        return Spread.of(_figure(result, figure) for result in self.cells.get(target, {}).get(label, []))

    def ratio(self, target: str, label: str, figure: str) -> float:
        base = self.spread(self.scenario.baseline, label, figure).median
        return self.spread(target, label, figure).median / base if base else float("nan")

    def figures(self) -> list[str]:
        """The figures of all targets, and what each kind of process of theirs costs."""
        results = [result for cells in self.cells.values() for each in cells.values() for result in each]
        names = dict.fromkeys(use.name for result in results for use in result.processes if use.name != "harness")
        return [*FIGURES, *(_OF_PROCESS + name for name in names)]

    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for cells in self.cells.values() for label in cells))

    def markdown(self) -> str:
        scenario, parts = self.scenario, []
        shape = (
            f", shape {scenario.variables['shape']}"
            if "{shape}" in json.dumps(scenario.workload) or self._shaped()
            else ""
        )
        rounds = max((len(results) for cells in self.cells.values() for results in cells.values()), default=0)
        parts.append(f"# {scenario.about}{shape}\n")
        parts.append(f"Median (lowest–highest) of {rounds} rounds in turn; ratios are of medians.\n")
        if scenario.pairs:
            parts.append(pairs.markdown(self) + "\n")
        for label in self.labels():
            parts.append(f"## {label}\n")
            names = [name for name in self.cells if label in self.cells[name]]
            compared = [name for name in names if scenario.baseline in names and name != scenario.baseline]
            headers = ["", *names, *(f"{name} ÷ {scenario.baseline}" for name in compared)]
            rows = []
            for figure in self.figures():
                spreads = [self.spread(name, label, figure) for name in names]
                cells = [report.spread(each) for each in spreads]
                rows.append([figure, *cells, *(report.number(self.ratio(name, label, figure)) for name in compared)])
            parts.append(report.table(headers, rows) + "\n")
        doubts = [
            f"- {name}: {note}"
            for name, cells in self.cells.items()
            for results in cells.values()
            for note in report.notes(results)
        ]
        doubts += [f"- {name} was left out: {' '.join(why.split())}" for name, why in self.failed.items()]
        if doubts:
            parts += ["## Doubtful\n", *dict.fromkeys(doubts)]
        return "\n".join(parts)

    def document(self) -> dict[str, Any]:
        summary = {
            name: {
                label: {figure: vars(self.spread(name, label, figure)) for figure in self.figures()} for label in cells
            }
            for name, cells in self.cells.items()
        }
        return {
            "scenario": {key: value for key, value in vars(self.scenario).items() if key != "variables"},
            "shape": self.scenario.variables["shape"],
            "environment": report.environment(),
            "summary": summary,
            "rounds": {
                name: {label: [report.result_json(result) for result in results] for label, results in cells.items()}
                for name, cells in self.cells.items()
            },
        }

    def write(self, path: Path) -> list[Path]:
        """JSON, Markdown and, with matplotlib, a plot."""
        written = report.write(path, self.document(), self.markdown())
        labels = self.labels()
        series: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
        for figure in _PLOTTED:
            series[figure] = {}
            for name in self.cells:
                spreads = [self.spread(name, label, figure) for label in labels]
                series[figure][name] = [(spread.median, spread.low, spread.high) for spread in spreads]
        plot = report.plot_bars(path, self.scenario.about, labels, series)
        return [*written, plot] if plot else written

    def _shaped(self) -> bool:
        return not isinstance(self.scenario.requests, int)


def _figure(result: Result, name: str) -> float:
    if name.startswith(_OF_PROCESS):
        return result.cpu_s_per_million_tokens.get(name.removeprefix(_OF_PROCESS), math.nan)
    return FIGURES[name](result)


def run_comparison(
    scenario: Scenario,
    rounds: int,
    keep: bool = False,
    announce: Callable[[str], None] = lambda _: None,
    advance: Callable[[str, Result], None] = lambda *_: None,
    fail: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Run all rounds. `announce` is told what happens, `advance` gets each cell's result, `fail` what is left out.

    Where pairs are compared, one that cannot be started is left out from then on; else that ends the comparison.
    """
    catalogue = load_targets()
    unknown = [name for name in scenario.targets if name not in catalogue]
    if unknown:
        raise TargetError(f"no such target: {', '.join(unknown)} (known: {', '.join(catalogue)})")
    targets = [catalogue[name] for name in scenario.targets]
    comparison = Comparison(scenario)
    with ExitStack() as stack:
        kept: dict[str, Running] = {}
        for turn in range(1, rounds + 1):
            for target in targets:
                if target.name in comparison.failed:
                    continue
                announce(f"round {turn}/{rounds}: {target.name}")
                if target.kind == "command":
                    results = _run_command(target, scenario)
                elif keep or target.keep:
                    results = _load_kept(target, scenario, kept, stack, pause=keep)
                else:
                    results = _load_fresh(target, scenario)
                try:
                    for result in results:
                        comparison.add(target.name, result)
                        advance(target.name, result)
                except TargetError as error:
                    if not scenario.pairs:
                        raise
                    comparison.failed[target.name] = str(error)
                    fail(str(error))
    return comparison


def _load_fresh(target: Target, scenario: Scenario) -> Iterator[Result]:
    with Running(target, scenario.variables) as running:
        yield from _load(running, scenario)


def _load_kept(
    target: Target, scenario: Scenario, kept: dict[str, Running], stack: ExitStack, pause: bool
) -> Iterator[Result]:
    if target.name in kept:
        kept[target.name].resume()
    else:
        kept[target.name] = stack.enter_context(Running(target, scenario.variables))
    try:
        yield from _load(kept[target.name], scenario)
    finally:
        if pause:
            kept[target.name].pause()


def _load(running: Running, scenario: Scenario) -> Iterator[Result]:
    for position, concurrency in enumerate(scenario.concurrency):
        plan = Plan(concurrency, requests=scenario.requests_at(concurrency), verify=scenario.verify)
        warmup = max(scenario.warmup or running.target.warmup, min(concurrency, 16))
        yield run_load(running.server(), scenario.cell_workload(position), plan, warmup=warmup)


def _run_command(target: Target, scenario: Scenario) -> Iterator[Result]:
    """A command target gets the cells as options and prints one JSON object for each."""
    workload = scenario.cell_workload(0)
    command = fill(target.command, scenario.variables)
    command += ["--max-tokens", str(workload.max_tokens), "--seed", str(workload.seed), "--warmup", "16"]
    for concurrency in scenario.concurrency:
        command += ["--concurrency", str(concurrency), "--requests", str(scenario.requests_at(concurrency))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
    if done.returncode:
        raise TargetError(f"{target.name} exited with {done.returncode}:\n{done.stderr[-1500:]}")
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield report.result_from_json(json.loads(line))
