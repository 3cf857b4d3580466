"""The events that docs/metrics.md lists are those that the code tells."""

from __future__ import annotations

import re
from pathlib import Path

import penstock

SOURCE = Path(penstock.__file__).parent
DOCS = SOURCE.parents[1] / "docs" / "metrics.md"

#: Names that the code says are spans.
SPANS = {"engine.load"}


def test_every_event_is_listed_and_no_other() -> None:
    told = {
        name
        for path in SOURCE.rglob("*.py")
        for name in re.findall(r'"((?:job|engine|replica)\.[a-z_]+)"', path.read_text())
    }
    replicas = (SOURCE / "engines/upstream/replicas.py").read_text()
    told |= {f"replica.{what}" for what in re.findall(r'\.notify\("([a-z]+)"', replicas)}
    table = DOCS.read_text().split("| event |")[1].split("\n\n")[0]
    listed = {name for row in table.splitlines() for name in re.findall(r"`([a-z]+\.[a-z_]+)`", row.split("|")[1:2][0])}
    assert listed == told - SPANS
