"""`python -m benchmarks`: every measurement is a command. See README.md for what the figures mean."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.load import Plan, Result, Server, loop_factory, run_load
from benchmarks.processes import TargetError
from benchmarks.stats import Spread
from benchmarks.targets import Running, default_variables, load_targets
from benchmarks.workload import Workload

if TYPE_CHECKING:
    from benchmarks.compare import Scenario

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)
console = Console(stderr=True)
RESULTS = Path(__file__).parent / "results"

Settings = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A target's placeholder.")]
Out = Annotated[Path | None, typer.Option(help="Where to write, without suffix; benchmarks/results/… by default.")]
Url = Annotated[str, typer.Option(help="A server that already runs.")]
TargetName = Annotated[str, typer.Option("--target", help="Or a target to start (see `targets`).")]
Pids = Annotated[list[int] | None, typer.Option("--pid", help="Of the server: CPU and memory, children included.")]


@app.command()
def load(
    url: Url = "",
    target: TargetName = "",
    dialect: Annotated[str, typer.Option(help="completions, chat or generate.")] = "completions",
    prompts: Annotated[str, typer.Option(help="ids or text.")] = "text",
    prompt_tokens: Annotated[str, typer.Option(help="Shortest-longest prompt.")] = "16-32",
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with, in front of their own.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="tokenizer.json, to count the tokens of text prompts.")] = "",
    concurrency: Annotated[list[int], typer.Option("--concurrency", "-c", help="Closed loop.")] = [1, 8, 64],  # noqa: B006
    rate: Annotated[list[float] | None, typer.Option(help="Open loop: Poisson arrivals a second.")] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", help="A cell; 8 times the concurrency by default.")] = 0,
    duration: Annotated[float, typer.Option(help="Seconds a cell, instead of a number of requests.")] = 0.0,
    max_tokens: int = 64,
    model: str = "",
    body: Annotated[str, typer.Option(help="More JSON for each request, as '{\"ignore_eos\": true}'.")] = "{}",
    header: Annotated[list[str] | None, typer.Option(help="Name: value, as Authorization: Bearer ….")] = None,
    pid: Pids = None,
    warmup: int = 8,
    timeout: float = 300.0,
    seed: int = 1,
    verify: Annotated[bool, typer.Option(help="Check every event of every reply (after the clock stops).")] = False,
    shape: str = "S",
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Load one server and report what it does."""
    low, _, high = prompt_tokens.partition("-")
    workload = Workload(
        dialect=dialect,
        prompts=prompts,
        min_prompt=int(low),
        max_prompt=int(high or low),
        shared_prefix=shared_prefix,
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        seed=seed,
    )
    common: dict[str, Any] = {"duration": duration, "timeout": timeout, "verify": verify}
    if rate:
        plans = [Plan(rate=each, requests=requests or (0 if duration else round(10 * each)), **common) for each in rate]
    else:
        plans = [Plan(each, requests=requests or (0 if duration else 8 * each), **common) for each in concurrency]
    extra = {"headers": dict(_pair(each, ":") for each in header or [])}
    results = []
    with _server(url, target, shape, settings, pid or []) as found:
        server = Server(
            url=found.url,
            model=model or found.model,
            body=found.body | json.loads(body),
            pids=found.pids,
            **extra,
        )
        with _progress() as bar:
            for position, plan in enumerate(plans):
                task = bar.add_task(plan.label, total=plan.requests or None)
                cell = Workload(**{**vars(workload), "seed": seed + position})
                results.append(
                    run_load(server, cell, plan, lambda done, t=task: bar.update(t, completed=done), warmup)  # type: ignore[misc]
                )
                bar.update(task, completed=results[-1].requests)
    markdown = f"# Load on {target or url}\n\n{report.result_table(results)}"
    document = {
        "target": target or url,
        "workload": vars(workload),
        "environment": report.environment(),
        "results": [report.result_json(result) for result in results],
    }
    path = out or RESULTS / f"load-{target or 'url'}"
    series = {
        figure: {target or url: [(value, value, value) for value in values]}
        for figure, values in {
            "tokens/s": [result.tokens_per_s for result in results],
            "TTFT p50 ms": [result.ttft_ms.p50 for result in results],
            "inter-token p99 ms": [result.inter_token_ms.p99 for result in results],
        }.items()
    }
    written = report.write(path, document, markdown)
    _finish(markdown, written, report.plot_bars(path, f"Load on {target or url}", [r.label for r in results], series))
    if any(result.errors for result in results):
        raise typer.Exit(1)


@app.command()
def ceiling(
    events: Annotated[int, typer.Option(help="Events of each row.")] = 300_000,
    dialect: Annotated[list[str], typer.Option()] = ["generate", "completions", "chat"],  # noqa: B006
    concurrency: Annotated[list[int], typer.Option("--concurrency", "-c")] = [1, 8, 64],  # noqa: B006
    burst: Annotated[list[int], typer.Option(help="Events a write of the canned server.")] = [1, 8, 64],  # noqa: B006
    out: Out = None,
) -> None:
    """Measure the harness itself against a canned server: its own CPU time per event."""
    from benchmarks.ceiling import measure

    cells = [(d, c, b) for d in dialect for b in burst for c in concurrency]
    rows = []
    with _progress() as bar:
        task = bar.add_task("ceiling", total=len(cells))
        for kind, level, size in cells:
            rows.append(measure(kind, level, size, events))
            bar.advance(task)
    table = report.table(
        [
            "dialect",
            "c",
            "burst",
            "events/read",
            "events/s measured",
            "CPU µs/event",
            "events/s of its own CPU",
            "errors",
        ],
        [
            [
                row.dialect,
                str(row.concurrency),
                str(row.burst),
                report.number(row.events_per_read),
                report.number(row.events_per_s),
                report.number(row.cpu_us_per_event),
                report.number(row.own_events_per_s),
                str(row.errors),
            ]
            for row in rows
        ],
    )
    markdown = f"# The harness's own ceiling\n\n{table}"
    document = {"environment": report.environment(), "rows": [asdict(row) for row in rows]}
    _finish(markdown, report.write(out or RESULTS / "ceiling", document, markdown))


@app.command()
def compare(
    scenario: Annotated[
        str, typer.Argument(help="vs_engine, vs_transformers, synthetic … (see `targets`), or a path to a .toml.")
    ],
    rounds: Annotated[int, typer.Option(help="Turns of each target.")] = 5,
    shape: Annotated[str, typer.Option(help="S, M or L.")] = "S",
    concurrency: Annotated[list[int] | None, typer.Option("--concurrency", "-c", help="Only these cells.")] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", help="A cell, instead of the scenario's number.")] = 0,
    targets: Annotated[list[str] | None, typer.Option("--target", help="Only these targets (repeatable).")] = None,
    baseline: Annotated[str, typer.Option(help="The target that ratios refer to.")] = "",
    keep: Annotated[bool, typer.Option(help="Keep servers up between rounds, stopped by SIGSTOP.")] = False,
    verify: Annotated[bool, typer.Option(help="Check every event of every reply.")] = False,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Measure several targets in turn under the same load; medians, spread, ratios."""
    from dataclasses import replace

    from benchmarks.compare import Scenario

    chosen = Scenario.load(scenario)
    chosen = replace(
        chosen,
        targets=targets or chosen.targets,
        concurrency=concurrency or chosen.concurrency,
        requests=requests or chosen.requests,
        baseline=baseline or (chosen.baseline if chosen.baseline in (targets or chosen.targets) else ""),
        verify=verify,
        variables=_variables(shape, settings),
    )
    _compare(chosen, rounds, keep, shape, out)


@app.command()
def peers(
    rounds: Annotated[int, typer.Option(help="Turns of each target.")] = 3,
    shape: Annotated[list[str] | None, typer.Option(help="S or M (repeatable); both by default.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option("--concurrency", "-c", help="Only these cells.")] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", help="A cell, instead of the scenario's number.")] = 0,
    pair: Annotated[list[str] | None, typer.Option(help="Only these pairs (repeatable).")] = None,
    scenario: str = "peers",
    verify: Annotated[bool, typer.Option(help="Check every event of every reply.")] = False,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Each engine's own server against Penstock on that engine, in turn. Those that are not installed are left out."""
    from dataclasses import replace

    from benchmarks.compare import Scenario
    from benchmarks.pairs import installed

    whole = Scenario.load(scenario)
    if unknown := set(pair or []) - set(whole.pairs):
        raise typer.BadParameter(f"no such pair: {', '.join(unknown)} (known: {', '.join(whole.pairs)})")
    for each in shape or ["S", "M"]:
        chosen = replace(
            whole,
            concurrency=concurrency or whole.concurrency,
            requests=requests or whole.requests,
            verify=verify,
            variables=_variables(each, settings),
        )
        chosen, absent = installed(chosen, load_targets(), pair)
        for why in absent:
            _complain(why)
        if not chosen.pairs:
            _give_up(TargetError("No peer is left to compare with: `make peers` installs them (some gigabytes)."))
        _compare(chosen, rounds, False, each, out and out.with_name(f"{out.name}-{each}"))


def _compare(chosen: Scenario, rounds: int, keep: bool, shape: str, out: Path | None) -> None:
    from benchmarks.compare import FIGURES, run_comparison

    with _progress() as bar:
        task = bar.add_task(chosen.name, total=rounds * len(chosen.targets) * len(chosen.concurrency))

        def advance(target: str, result: Result) -> None:
            bar.advance(task)
            figures = f"{FIGURES['tokens/s'](result):,.0f} tokens/s, TTFT {result.ttft_ms.p50:.1f} ms"
            errors = f", [red]{result.errors}[/red]" if result.errors else ""
            bar.console.print(f"  {target} {result.label}: {figures}{errors}", highlight=False)

        try:
            comparison = run_comparison(
                chosen, rounds, keep, lambda text: bar.update(task, description=text), advance, _complain
            )
        except TargetError as error:
            _give_up(error)
    markdown = comparison.markdown()
    name = f"{chosen.name}-{shape}" if chosen.workload.get("dialect") != "generate" else chosen.name
    _finish(markdown, comparison.write(out or RESULTS / name))


@app.command(name="idle-connections")
def idle_connections(
    url: Url = "",
    target: TargetName = "synthetic",
    connections: int = 2000,
    seconds: Annotated[float, typer.Option(help="How long they are left alone.")] = 30.0,
    path: str = "/v1/events?user_id=u{i}",
    pid: Pids = None,
    shape: str = "S",
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Memory and CPU of many idle SSE connections."""
    from benchmarks.scenarios.idle_connections import measure

    with _server(url, "" if url else target, shape, settings, pid or []) as server, _progress() as bar:
        task = bar.add_task("idle connections", total=None)
        cost = measure(server, connections, seconds, path, lambda text: bar.update(task, description=text))
    mib = 2**20
    rows = [
        ["connections open", f"{cost.opened} of {cost.asked}"],
        ["memory a connection", f"{cost.bytes_per_connection / 1024:.1f} KiB"],
        [
            "server RSS before / open / closed",
            f"{cost.rss_before / mib:.0f} / {cost.rss_open / mib:.0f} / {cost.rss_closed / mib:.0f} MiB",
        ],
        ["CPU of one core, nothing connected", f"{cost.cpu_share_before:.2%}"],
        [f"CPU of one core, {cost.opened} idle connections", f"{cost.cpu_share_open:.2%}"],
        [f"heartbeat bytes received in {cost.seconds:g} s", f"{cost.received:,}"],
    ]
    markdown = f"# Idle connections\n\n{report.table(['', 'measured'], rows)}"
    document = {"environment": report.environment(), "cost": asdict(cost)}
    _finish(markdown, report.write(out or RESULTS / "idle-connections", document, markdown))
    if cost.opened < cost.asked:
        raise typer.Exit(1)


@app.command(name="slow-reader")
def slow_reader(
    url: Url = "",
    target: TargetName = "synthetic-paced",
    dialect: str = "generate",
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", help="Streams of the load.")] = 16,
    duration: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 10.0,
    rounds: int = 5,
    max_tokens: int = 64,
    slow_tokens: Annotated[int, typer.Option(help="Length of the extra client's stream.")] = 4000,
    lead: Annotated[float, typer.Option(help="Seconds between the extra client's start and the measurement.")] = 3.0,
    model: str = "",
    pid: Pids = None,
    shape: str = "S",
    settings: Settings = None,
    out: Out = None,
) -> None:
    """The other streams' figures with and without a client that never reads."""
    from dataclasses import replace

    from benchmarks.scenarios.slow_reader import ARMS, measure

    workload = Workload(dialect=dialect, prompts="text", max_tokens=max_tokens)
    plan = Plan(concurrency, duration=duration)
    with _server(url, "" if url else target, shape, settings, pid or []) as server, _progress() as bar:
        task = bar.add_task("slow reader", total=rounds * len(ARMS))
        server = replace(server, model=model or server.model)
        results = measure(server, workload, plan, rounds, slow_tokens, lead, lambda *_: bar.advance(task))
    rows = []
    figures: dict[str, Callable[[Result], float]] = {
        "inter-token p99 ms": lambda r: r.inter_token_ms.p99,
        "inter-token p50 ms": lambda r: r.inter_token_ms.p50,
        "latency p99 ms": lambda r: r.latency_ms.p99,
        "TTFT p99 ms": lambda r: r.ttft_ms.p99,
        "tokens/s": lambda r: r.tokens_per_s,
        "others' CPU, cores": lambda r: r.foreign_cores,
        "errors": lambda r: float(sum(r.errors.values())),
    }
    for name, figure in figures.items():
        spreads = {arm: Spread.of(figure(result) for result in results[arm]) for arm in ARMS}
        change = {
            arm: f"{spreads['never'].median / spreads[arm].median - 1:+.1%}" if spreads[arm].median else "–"
            for arm in ("none", "reads")
        }
        cells = [report.spread(each) for each in spreads.values()]
        rows.append([name, *cells, change["none"], change["reads"]])
    headers = ["the others'", "no extra client", "extra reads", "extra never reads", "never vs none", "never vs reads"]
    markdown = f"# A client that never reads\n\nMedian (lowest–highest) of {rounds} rounds in turn.\n\n" + report.table(
        headers, rows
    )
    document = {
        "environment": report.environment(),
        "rounds": {arm: [report.result_json(result) for result in results[arm]] for arm in ARMS},
    }
    _finish(markdown, report.write(out or RESULTS / "slow-reader", document, markdown))


@app.command()
def broker(
    parts: Annotated[list[str] | None, typer.Option("--part", help="queue, append or workers (repeatable).")] = None,
    stores: Annotated[list[str] | None, typer.Option("--store", help="embedded, redis or redis-fast.")] = None,
    blocks: Annotated[int, typer.Option(help="Turns of each store; 64 calls of each kind in one.")] = 20,
    out: Out = None,
) -> None:
    """The brokers alone: submit, claim and append against real stores, in turn."""
    from benchmarks.scenarios import broker as scenario

    with _progress() as bar, asyncio.Runner(loop_factory=loop_factory()) as runner:
        task = bar.add_task("broker", total=None)
        try:
            results = runner.run(
                scenario.measure(parts or scenario.PARTS, stores or scenario.STORES, blocks, lambda: bar.advance(task))
            )
        except TargetError as error:
            _give_up(error)
    markdown = scenario.markdown(results)
    document = {
        "environment": report.environment(),
        "results": {part: [asdict(each) for each in rows] for part, rows in results.items()},
    }
    _finish(markdown, report.write(out or RESULTS / "broker", document, markdown))


@app.command()
def fairness(
    seconds: Annotated[float, typer.Option(help="How long service is compared.")] = 20.0,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Four tenants, one of which floods the queue: how far apart service grows. Exits with 1 beyond the bound."""
    from benchmarks.scenarios import fairness as scenario

    runs = {}
    with _progress() as bar:
        task = bar.add_task("fairness", total=len(scenario.WEIGHTS))
        for name, weights in scenario.WEIGHTS.items():
            try:
                runs[name] = scenario.measure(_variables("S", settings), weights, seconds)
            except TargetError as error:
                _give_up(error)
            bar.advance(task)
    markdown = scenario.markdown(runs)
    document = {"environment": report.environment(), "runs": {name: asdict(run) for name, run in runs.items()}}
    _finish(markdown, report.write(out or RESULTS / "fairness", document, markdown))
    if not all(run.holds for run in runs.values()):
        raise typer.Exit(1)


@app.command()
def precision(
    model: Annotated[Path, typer.Option(help="A folder with safetensors, or a .gguf file.")],
    only: Annotated[list[str] | None, typer.Option(help="A precision (repeatable); all by default.")] = None,
    text: Annotated[Path | None, typer.Option(help="What is scored; some prose by default.")] = None,
    out: Out = None,
) -> None:
    """What int8, int4 and the rest cost in agreement with f32, and gain in size and speed, in process."""
    from benchmarks.scenarios import precision as scenario

    names = ["f32", *(each for each in only or scenario.PRECISIONS if each != "f32")]
    with _progress() as bar:
        task = bar.add_task("precision", total=len(names) + (model.suffix == ".gguf"))
        words = (text or scenario.PROSE).read_text(encoding="utf-8")
        results = scenario.measure(model, names, words, lambda name: bar.advance(task))
    markdown = scenario.markdown(results)
    rows = {name: {**asdict(each), "perplexity": each.perplexity} for name, each in results.items()}
    document = {"environment": report.environment(), "model": model.name, "results": rows}
    _finish(markdown, report.write(out or RESULTS / "precision", document, markdown))


@app.command(name="cold-start")
def cold_start(
    rounds: Annotated[int, typer.Option(help="Turns of each server that count.")] = 5,
    shape: Annotated[list[str] | None, typer.Option(help="S or M (repeatable); both by default.")] = None,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """The first token of a model that is not loaded, and the gap when an engine dies, with and without spares."""
    from benchmarks.scenarios import cold_start as scenario

    results = {}
    shapes = shape or ["S", "M"]
    with _progress() as bar:
        task = bar.add_task("cold start", total=len(shapes) * len(scenario.ARMS) * (rounds + 1))
        for each in shapes:
            try:
                results[each] = scenario.measure(_variables(each, settings), rounds, lambda arm: bar.advance(task))
            except TargetError as error:
                _give_up(error)
    markdown = scenario.markdown(results)
    rows = {each: {arm: asdict(times) for arm, times in arms.items()} for each, arms in results.items()}
    document = {"environment": report.environment(), "results": rows}
    _finish(markdown, report.write(out or RESULTS / "cold-start", document, markdown))


@app.command()
def batch(
    lines: Annotated[int, typer.Option(help="Of the batch.")] = 2000,
    line_tokens: Annotated[int, typer.Option(help="Tokens of the reply to each.")] = 192,
    rate: Annotated[float, typer.Option(help="Interactive requests a second (Poisson arrivals).")] = 5.0,
    duration: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 20.0,
    rounds: int = 3,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each interactive reply.")] = 64,
    shape: str = "S",
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Interactive requests with and without a batch beside them, and what the batch gets."""
    from benchmarks.scenarios import batch as scenario

    workload = Workload(dialect="chat", prompts="text", max_tokens=max_tokens)
    with _progress() as bar:
        task = bar.add_task("batch", total=rounds * len(scenario.ARMS))
        try:
            turns = scenario.measure(
                _variables(shape, settings),
                workload,
                Plan(rate=rate, duration=duration),
                rounds,
                lines,
                line_tokens,
                lambda arm: bar.advance(task),
            )
        except TargetError as error:
            _give_up(error)
    markdown = scenario.markdown(turns, rounds, lines)
    document = {
        "environment": report.environment(),
        "turns": {
            arm: [asdict(turn) | {"load": report.result_json(turn.load)} for turn in each]
            for arm, each in turns.items()
        },
    }
    _finish(markdown, report.write(out or RESULTS / f"batch-{shape}", document, markdown))


@app.command(name="targets")
def list_targets() -> None:
    """What can be measured, and the scenarios that compare it."""
    from benchmarks.compare import Scenario, scenario_names

    for name, target in load_targets().items():
        console.print(f"[bold]{name}[/bold]  {target.about}", highlight=False)
    console.print("\nScenarios:")
    for name in scenario_names():
        console.print(f"[bold]{name}[/bold]  {Scenario.load(name).about}", highlight=False)


@contextmanager
def _server(url: str, target: str, shape: str, settings: list[str] | None, pids: list[int]) -> Iterator[Server]:
    """A server that runs already, or one started for this measurement."""
    if bool(url) == bool(target):
        raise typer.BadParameter("give --url or --target")
    if url:
        yield Server(url=url, pids=tuple(pids))
        return
    catalogue = load_targets()
    if target not in catalogue or catalogue[target].kind != "server":
        raise typer.BadParameter(f"no such server target: {target}")
    try:
        running = Running(catalogue[target], _variables(shape, settings))
    except TargetError as error:
        _give_up(error)
    with running:
        yield running.server()


def _variables(shape: str, settings: list[str] | None) -> dict[str, str]:
    return default_variables() | {"shape": shape} | dict(_pair(each, "=") for each in settings or [])


def _pair(text: str, separator: str) -> tuple[str, str]:
    name, found, value = text.partition(separator)
    if not found:
        raise typer.BadParameter(f"{text!r}: expected NAME{separator}VALUE")
    return name.strip(), os.path.expanduser(value.strip())


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,  # the display shares the harness's process
    )


def _finish(markdown: str, written: list[Path], plot: Path | None = None) -> None:
    print(markdown)
    console.print(
        "\nwritten: " + ", ".join(str(path) for path in [*written, *([plot] if plot else [])]), highlight=False
    )


def _complain(problem: str) -> None:
    console.print(f"[yellow]left out: {problem}[/yellow]", highlight=False)


def _give_up(error: Exception) -> None:
    console.print(f"[red]{error}[/red]", highlight=False)
    raise typer.Exit(2)


def _terminate(*_: object) -> None:
    """So that started servers are stopped. `timeout` sends the signal twice: the second must not break that off."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    app()
