"""Break the product on purpose and see that the tests notice.

    python -m tests.chaos.mutants [NAME …]

Each mutant is an exact replacement of text in a copy of ``src``; a text that is no longer found fails loudly, so a
mutant cannot rot into one that changes nothing. The tests named with it run against the copy (PYTHONPATH). Exits with 1
if any mutant survives, or if the tests fail on the copy as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tests.chaos.mutations import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    mutant: Mutant
    killed: bool
    by: str
    seconds: float


def copy_source(folder: Path) -> Path:
    source = folder / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    return source


def apply(mutant: Mutant, source: Path) -> None:
    for file, old, new in mutant.edits:
        path = source / file
        text = path.read_text()
        count = text.count(old)
        if count == 0:
            raise SystemExit(f"mutant {mutant.name!r}: its text is no longer in {file}; bring it up to date:\n{old}")
        path.write_text(text.replace(old, new))


def run_tests(source: Path, arguments: tuple[str, ...]) -> tuple[bool, str]:
    """(all passed, the first failure)."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    where = "import penstock, sys; sys.exit(not penstock.__file__.startswith(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", where, str(source)], env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:randomly", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 5:
        raise SystemExit(f"no test matches {' '.join(arguments)}")
    if done.returncode not in (0, 1):
        return False, f"pytest exited with {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
    found = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.MULTILINE)
    return done.returncode == 0, found[1] if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mutants", description="Run the tests against mutants.")
    parser.add_argument("names", nargs="*", help="only mutants whose names contain one of these")
    parser.add_argument("--no-baseline", action="store_true", help="don't run the tests on the copy as it is first")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if not arguments.names or any(name in m.name for name in arguments.names)]
    console = Console(stderr=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="penstock-mutants-") as folder:
        for mutant in chosen:  # all of them, before anything slow: does each still say something?
            apply(mutant, copy_source(Path(folder) / "check"))
            shutil.rmtree(Path(folder) / "check")
        if not arguments.no_baseline:
            source = copy_source(Path(folder) / "baseline")
            for tests in dict.fromkeys(mutant.tests for mutant in chosen):
                with console.status(f"as it is: {' '.join(tests)}"):
                    passed, by = run_tests(source, tests)
                if not passed:
                    console.print(f"[red]The tests fail without any mutant:[/red] {' '.join(tests)}: {by}")
                    return 1
        for number, mutant in enumerate(chosen):
            source = copy_source(Path(folder) / str(number))
            apply(mutant, source)
            began = time.monotonic()
            with console.status(f"{number + 1}/{len(chosen)} {mutant.name}"):
                passed, by = run_tests(source, mutant.tests)
            results.append(Result(mutant, not passed, by, time.monotonic() - began))
            console.print(
                f"{'[red]SURVIVED[/red]' if passed else '[green]killed[/green]'}  {mutant.name}  {escape(by)}"
            )
            shutil.rmtree(source.parent)
    print("| mutant | result | by | seconds |\n|---|---|---|---:|")
    for result in results:
        fate = "killed" if result.killed else "SURVIVED"
        print(f"| {result.mutant.name} | {fate} | `{result.by}` | {result.seconds:.0f} |")
    return 0 if all(result.killed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
