"""What a long run found, for people and for machines."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.chaos.harness import Outcome, Recovery


def as_dict(command: str, seed: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "command": command,
        "seed": seed,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "totals": totals(outcomes),
        "faults": {kind: figures(kind, outcomes) for kind in kinds(outcomes)},
        "storms": [storm.as_dict() for storm in outcomes],
    }


def kinds(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({kind for outcome in outcomes for kind in outcome.faults})


def totals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    notes = Counter[str]()
    for outcome in outcomes:
        notes.update(outcome.notes)
    return {
        "storms": len(outcomes),
        "faults": sum(sum(outcome.faults.values()) for outcome in outcomes),
        "streams": sum(outcome.streams for outcome in outcomes),
        "tokens": sum(outcome.tokens for outcome in outcomes),
        "reconnects": sum(outcome.reconnects for outcome in outcomes),
        "streams continued by a later attempt": sum(outcome.interrupted for outcome in outcomes),
        "ended": dict(sum((outcome.statuses for outcome in outcomes), Counter[str]())),
        "problems": sum(len(outcome.problems) for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        **notes,
    }


def figures(kind: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    hit: list[Recovery] = [each for outcome in outcomes for each in outcome.recoveries if each.fault == kind]
    struck = [outcome for outcome in outcomes if kind in outcome.faults]
    return {
        "strikes": sum(outcome.faults[kind] for outcome in struck),
        "measured": sum(outcome.faults[kind] for outcome in struck if outcome.measured),
        "streams_hit": len(hit),
        "recovery": quantiles([each.seconds for each in hit]),
        "pause": quantiles([each.pause for each in hit]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p99 and the largest (the p-th of n: the ⌈p·n⌉-th smallest)."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        name: round(ordered[math.ceil(part * len(ordered)) - 1], 3)
        for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def markdown(command: str, seed: int, outcomes: Sequence[Outcome]) -> str:
    lines = ["# Chaos", "", f"`{command}` (seed {seed}, {os.cpu_count()} CPUs)", "", "| | |", "|---|---:|"]
    for name, value in totals(outcomes).items():
        shown = ", ".join(f"{count} {status}" for status, count in value.items()) if name == "ended" else value
        lines.append(f"| {name} | {shown} |")
    lines += [
        "",
        "A stream counts as hit when its reader saw nothing for 0.3 s or it went on under a later attempt. Recovery:",
        "from the fault (of Redis and gateways: from when they are up again) to its next token. Pause: how long its",
        "reader saw nothing. Seconds; measured where faults did not overlap.",
        "",
        "| fault | strikes | measured | streams hit | recovery p50 | p99 | max | pause p50 | p99 | max |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in kinds(outcomes):
        found = figures(kind, outcomes)
        cells = [f"{quantile:.2f}" for name in ("recovery", "pause") for quantile in (found[name] or {}).values()] or [
            "–"
        ] * 6
        counts = f"{found['strikes']} | {found['measured']} | {found['streams_hit']}"
        lines.append(f"| {kind} | {counts} | {' | '.join(cells)} |")
    lines += [
        "",
        "| storm | streams | tokens | faults | at once | reconnects | highest attempt | seconds | problems |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for storm in outcomes:
        lines.append(
            f"| {storm.seed} | {storm.streams} | {storm.tokens} | {sum(storm.faults.values())} | {storm.overlap} | "
            f"{storm.reconnects} | {storm.attempts} | {storm.seconds:.1f} | {len(storm.problems)} |"
        )
    if any(storm.gaps for storm in outcomes):
        lines += [
            "",
            "Between two tokens of a stream, 99th percentile, in ms, without and with hostile clients beside it:",
            "",
            "| storm | model | alone | beside them |",
            "|---:|---|---:|---:|",
        ]
    for storm in outcomes:
        for model, gaps in storm.gaps.items():
            lines.append(f"| {storm.seed} | {model} | {' | '.join(f'{1e3 * gap:.1f}' for gap in gaps)} |")
    for storm in outcomes:
        lines += [f"\n- storm {storm.seed}: {problem[:2000]}" for problem in storm.problems[:20]]
    return "\n".join(lines) + "\n"
