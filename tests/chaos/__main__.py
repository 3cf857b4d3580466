"""The long run: storm after storm, until the time is over.

    python -m tests.chaos --minutes 10 --seed 1 --report chaos

Each storm has its own seed (printed; ``--seed`` repeats the whole run, ``--only SEED`` one storm), draws how many
streams, how fast, and which faults come in which order, and is judged by the oracle. Writes REPORT.json and REPORT.md
and exits with 1 if any promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.chaos.harness import FAULTS, Outcome, Plan, Storm
from tests.support.server import Server


def draw(seed: int) -> tuple[Plan, float, int]:
    """A plan from a seed: (plan, rate, slots)."""
    dice = random.Random(seed)
    faults = [dice.choice(FAULTS) for _ in range(dice.randint(1, 6))]
    plan = Plan(
        seed, streams=dice.choice([10, 50, 100]), tokens=dice.choice([50, 150, 400]), faults=faults,
        drops=dice.choice([0, 0.3, 3]),
    )  # fmt: skip
    return plan, dice.choice([100, 150, 200]), dice.choice([8, 64, 256])


async def storm(seed: int, progress: Progress) -> Outcome:
    plan, rate, slots = draw(seed)
    what = f"seed {seed}: {plan.streams} streams, {' '.join(plan.faults)}"
    task = progress.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as folder:
        server = Server(Path(folder), rate=rate, options={"slots": slots}, settings={"hang_timeout": 2})
        try:
            await asyncio.to_thread(server.start)
            outcome = await Storm(server, plan, on_progress=show).run()
        finally:
            server.stop()
        if outcome.problems:
            progress.console.print(
                f"[red]seed {seed}: {len(outcome.problems)} problems[/red]", *outcome.problems[:5], sep="\n  "
            )
            progress.console.print(server.tail())
    progress.remove_task(task)
    return outcome


def markdown(outcomes: list[Outcome]) -> str:
    lines = [
        "| seed | streams | tokens | faults | streams hit | reconnects | highest attempt | seconds | problems |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for each in outcomes:
        faults = ", ".join(f"{count} × {name}" for name, count in sorted(each.faults.items())) or "none"
        lines.append(
            f"| {each.seed} | {each.streams} | {each.tokens} | {faults} | {each.interrupted} | {each.reconnects} | "
            f"{each.attempts} | {each.seconds:.1f} | {len(each.problems)} |"
        )
    total = sum(each.tokens for each in outcomes)
    strikes = sum(sum(each.faults.values()) for each in outcomes)
    wrong = sum(len(each.problems) for each in outcomes)
    lines += ["", f"{len(outcomes)} storms, {strikes} faults, {total} tokens: {wrong} problems."]
    return "\n".join(lines) + "\n"


async def run(arguments: argparse.Namespace, console: Console) -> list[Outcome]:
    dice = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    until = time.monotonic() + 60 * arguments.minutes
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} events"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        overall = progress.add_task(f"chaos, seed {arguments.seed}", total=60 * arguments.minutes)
        while True:
            seed = arguments.only if arguments.only is not None else dice.randrange(10**9)
            outcomes.append(await storm(seed, progress))
            left = until - time.monotonic()
            progress.update(overall, completed=60 * arguments.minutes - max(0, left))
            if left <= 0 or arguments.only is not None:
                return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to go on (default 5)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the whole run")
    parser.add_argument("--only", type=int, help="repeat the one storm with this seed")
    parser.add_argument("--report", type=Path, help="write REPORT.json and REPORT.md (a path without its suffix)")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    console.print(f"seed {arguments.seed}")
    outcomes = asyncio.run(run(arguments, console))
    report = markdown(outcomes)
    print(report)
    if arguments.report is not None:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        result = {"seed": arguments.seed, "storms": [outcome.as_dict() for outcome in outcomes]}
        arguments.report.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        arguments.report.with_suffix(".md").write_text(report)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
