"""The long run: storm after storm, until the time is over or enough faults have happened.

    python -m tests.chaos --minutes 10                         one server, the embedded broker
    python -m tests.chaos --redis --faults 300 --seed 1 --report chaos
    python -m tests.chaos --cluster --minutes 5
    python -m tests.chaos --thinking --redis --minutes 5       either, with a reasoning model that calls tools
    python -m tests.chaos --hostile --minutes 5                nothing dies, but some clients send what hurts

Each storm has its own seed (printed; ``--seed`` repeats the whole run, ``--only SEED`` one storm), draws how many
streams, how fast, and which faults come in which order, and is judged by the oracle. Writes REPORT.json and REPORT.md
and exits with 1 if any promise was broken. A storm that broke one leaves its logs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.chaos import report
from tests.chaos.fleet import CLUSTER_FAULTS, FAULTS, Fleet
from tests.chaos.harness import Outcome, Plan, Storm
from tests.chaos.hostile import INPUTS, Crowd
from tests.chaos.hostile import storm as hostile_storm
from tests.chaos.target import Embedded
from tests.chaos.thinking import MUMBLER, THINKER, Thinker
from tests.support.server import Server

Show = Callable[[int, int], None]


async def embedded(seed: int, folder: Path, kinds: Sequence[str], show: Show) -> Outcome:
    dice = random.Random(seed)
    plan = Plan(
        seed,
        faults=[dice.choice(kinds) for _ in range(dice.randint(1, 6))],
        streams=dice.choice([10, 50, 100]),
        tokens=dice.choice([50, 150, 400]),
        drops=dice.choice([0, 0.3, 3]),
        twins=0.1,
    )
    options = {"slots": dice.choice([8, 64, 256])}
    server = Server(folder, rate=dice.choice([100, 150, 200]), options=options, settings={"hang_timeout": 2})
    try:
        await asyncio.to_thread(server.start)
        return await Storm(Embedded(server), plan, on_progress=show).run()
    finally:
        await asyncio.to_thread(server.stop)


async def thinking(seed: int, folder: Path, kinds: Sequence[str], show: Show, *, redis: bool) -> Outcome:
    dice = random.Random(seed)
    thinker = Thinker.make(dice.choice([THINKER, MUMBLER]), folder / "model")
    plan = Plan(
        seed,
        faults=dice.sample(kinds, len(kinds)),
        streams=dice.choice([12, 18]),
        tokens=400,
        drops=dice.choice([0.1, 0.3, 3]),
        twins=0.25,
        cancels=0.1,
        every=1500,
    )
    bodies = thinker.bodies(plan.streams, dice)
    if redis:
        async with Fleet(folder, models=[thinker.served]) as target:
            return await Storm(target, plan, on_progress=show, says=thinker.says).run(bodies)
    server = Server(folder / "server", models=[thinker.served], settings={"hang_timeout": 2, "load_timeout": 10})
    try:
        await asyncio.to_thread(server.start)
        return await Storm(Embedded(server), plan, on_progress=show, says=thinker.says).run(bodies)
    finally:
        await asyncio.to_thread(server.stop)


async def fleet(seed: int, folder: Path, kinds: Sequence[str], show: Show, *, nodes: int = 1) -> Outcome:
    """Each kind of fault once, in any order; in one storm of three, three go on at once (and nothing is measured)."""
    dice = random.Random(seed)
    plan = Plan(
        seed,
        faults=dice.sample(kinds, len(kinds)),
        streams=dice.choice([16, 24, 32]),
        tokens=dice.choice([100, 300, 600]),
        drops=dice.choice([0.1, 0.3, 3]),
        twins=0.25,
        cancels=0.1,
        every=1500,
        overlap=dice.choice([1, 1, 3]),
    )
    clocks = any(kind.endswith("-clock") for kind in kinds)
    target = Fleet(
        folder, nodes=nodes, rate=100, slots=dice.choice([12, 64]), lease_ttl=dice.choice([2, 3]), clocks=clocks
    )
    async with target:
        outcome = await Storm(target, plan, on_progress=show).run()
        outcome.notes = {"writes refused by the fence": target.zombies(), "starts without Redis": target.respawns}
        outcome.missed = target.missed
    return outcome


async def hostile(seed: int, folder: Path, kinds: Sequence[str], show: Show) -> Outcome:
    dice = random.Random(seed)
    plan = Plan(seed, streams=dice.choice([20, 40]), tokens=dice.choice([100, 200]), faults=())
    async with Crowd(folder, rate=dice.choice([30, 50])) as crowd:
        return await hostile_storm(crowd, plan, kinds, show)


async def run(arguments: argparse.Namespace, console: Console) -> list[Outcome]:
    if arguments.redis or arguments.cluster:
        known = CLUSTER_FAULTS if arguments.cluster else FAULTS
    else:
        known = tuple(INPUTS) if arguments.hostile else Embedded.FAULTS
    if arguments.thinking and arguments.redis:
        known = tuple(kind for kind in known if not kind.endswith("-clock"))
    kinds = arguments.kinds.split(",") if arguments.kinds else known
    if unknown := set(kinds) - set(known):
        raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # type: ignore[union-attr]
    minutes = arguments.minutes or (None if arguments.faults else 5.0)
    dice = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    began = time.monotonic()

    def done() -> float:
        """The part of the run that is over."""
        passed = (time.monotonic() - began) / 60 / minutes if minutes else 0.0
        struck = sum(len(outcome.strikes) for outcome in outcomes) / arguments.faults if arguments.faults else 0.0
        return min(1.0, max(passed, struck))

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        overall = progress.add_task(f"chaos, seed {arguments.seed}", total=1.0, what="")
        while True:
            seed = arguments.only if arguments.only is not None else dice.randrange(10**9)
            task = progress.add_task(f"storm {seed}", total=len(kinds), what="")

            def show(events: int, strikes: int, task: object = task) -> None:
                progress.update(task, completed=strikes, what=f"{strikes} faults, {events} events")  # type: ignore[arg-type]

            folder = Path(tempfile.mkdtemp(prefix="penstock-chaos-"))
            try:
                if arguments.thinking:
                    outcome = await thinking(seed, folder, kinds, show, redis=arguments.redis)
                elif arguments.redis or arguments.cluster:
                    outcome = await fleet(seed, folder, kinds, show, nodes=3 if arguments.cluster else 1)
                elif arguments.hostile:
                    outcome = await hostile(seed, folder, kinds, show)
                else:
                    outcome = await embedded(seed, folder, kinds, show)
            except Exception:
                outcome = Outcome(seed, problems=[traceback.format_exc()])
            outcomes.append(outcome)
            progress.remove_task(task)
            if outcome.problems:
                console.print(f"[red]storm {seed}: {len(outcome.problems)} problems[/red], logs in {folder}")
                console.print(*outcome.problems[:5], sep="\n  ", markup=False)
            else:
                shutil.rmtree(folder)
            progress.update(overall, completed=done(), what=f"{sum(len(each.strikes) for each in outcomes)} faults")
            if done() >= 1 or arguments.only is not None:
                return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--redis", action="store_true", help="two gateways and three workers over Redis")
    target.add_argument("--cluster", action="store_true", help="the same over a Redis Cluster of three nodes")
    target.add_argument("--hostile", action="store_true", help="one client in ten sends what has broken others' work")
    parser.add_argument("--thinking", action="store_true", help="a reasoning model that calls tools; also with --redis")
    parser.add_argument("--minutes", type=float, help="how long to go on (default 5, unless --faults is given)")
    parser.add_argument("--faults", type=int, help="go on until that many faults have happened")
    parser.add_argument("--kinds", help="only these faults (with commas)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the whole run")
    parser.add_argument("--only", type=int, help="repeat the one storm with this seed")
    parser.add_argument("--report", type=Path, help="write REPORT.json and REPORT.md (a path without its suffix)")
    arguments = parser.parse_args()
    if arguments.thinking and (arguments.cluster or arguments.hostile):
        parser.error("--thinking goes with --redis only")
    console = Console(stderr=True)
    console.print(f"seed {arguments.seed}")
    outcomes = asyncio.run(run(arguments, console))
    command = " ".join(["python -m tests.chaos", *(word for word in sys.argv[1:])])
    text = report.markdown(command, arguments.seed, outcomes)
    print(text)
    if arguments.report is not None:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        result = report.as_dict(command, arguments.seed, outcomes)
        arguments.report.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        arguments.report.with_suffix(".md").write_text(text)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
