"""The page's scripts that need no page: each file of tests here is run by node."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.support.server import PATIENCE
from tests.support.tools import command

PROGRAMS = sorted(Path(__file__).parent.glob("*.test.js"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_scripts(program: Path) -> None:
    done = subprocess.run(
        [command("node", "nodejs"), "--test", "--test-reporter=spec", str(program)],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_some() -> None:
    assert {"log.test.js", "sse.test.js", "store.test.js"} <= {program.name for program in PROGRAMS}
