"""Pairs: a peer's own server against Penstock on the same engine, in one table, and the fastest of each side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks import report
from benchmarks.stats import Spread

if TYPE_CHECKING:
    from benchmarks.compare import Comparison, Scenario
    from benchmarks.targets import Target

SHOWN = (
    "tokens/s",
    "TTFT p50 ms",
    "TTFT p99 ms",
    "inter-token p50 ms",
    "inter-token p99 ms",
    "CPU s per 1M tokens",
)


def installed(
    scenario: Scenario, catalogue: Mapping[str, Target], names: Sequence[str] | None = None
) -> tuple[Scenario, list[str]]:
    """The scenario with the pairs of which both sides can run here, and why others cannot.

    With *names*, those pairs only; without, also the targets of ours that are in no pair.
    """
    alone = [] if names else _alone(scenario)
    pairs = {name: scenario.pairs[name] for name in names or scenario.pairs}
    paired = [target for pair in pairs.values() for target in pair]
    absent = {
        name: why for name in dict.fromkeys([*paired, *alone]) if (why := catalogue[name].missing(scenario.variables))
    }
    pairs = {name: pair for name, pair in pairs.items() if not absent.keys() & pair}
    here = [*(target for pair in pairs.values() for target in pair), *(name for name in alone if name not in absent)]
    return replace(scenario, pairs=pairs, targets=list(dict.fromkeys(here))), list(absent.values())


def _alone(scenario: Scenario) -> list[str]:
    paired = {target for pair in scenario.pairs.values() for target in pair}
    return [name for name in scenario.targets if name not in paired]


def markdown(comparison: Comparison) -> str:
    """A row for each figure of each pair, a column for each cell; below them the fastest of each side."""
    labels = comparison.labels()
    rows = []
    for name, (peer, ours) in comparison.scenario.pairs.items():
        if peer not in comparison.cells or ours not in comparison.cells:
            continue
        rows.append([f"{name}: {ours} ÷ {peer}", *(_ratio(comparison, ours, peer, label) for label in labels)])
        for figure in SHOWN:
            cells = [_two(comparison, ours, peer, label, figure) for label in labels]
            rows.append([f"… {figure}", *cells])
    best = [fastest(comparison, label) for label in labels]
    if any(best):
        ratios = [_ratio(comparison, *each, label) if each else "–" for each, label in zip(best, labels, strict=True)]
        rows.append(["fastest of Penstock's ÷ fastest peer", *ratios])
        rows.append(["… ours", *(_named(comparison, each[0], label) for each, label in _known(best, labels))])
        rows.append(["… the peer", *(_named(comparison, each[1], label) for each, label in _known(best, labels))])
        rows.append(["winner", *(winner(comparison, label) for label in labels)])
    explained = (
        "A ratio is of tokens/s: the median (lowest–highest) of what two neighbours in the same round did. "
        "The other rows have Penstock's median before its peer's."
    )
    return f"{explained}\n\n{report.table(['', *labels], rows)}"


def ratios(comparison: Comparison, ours: str, peer: str, label: str) -> Spread:
    """Tokens a second of *ours* ÷ those of *peer*, round by round."""
    done = zip(comparison.cells[ours].get(label, []), comparison.cells[peer].get(label, []), strict=False)
    return Spread.of(
        mine.tokens_per_s / theirs.tokens_per_s if theirs.tokens_per_s else math.nan for mine, theirs in done
    )


def fastest(comparison: Comparison, label: str) -> tuple[str, str] | None:
    """The target of ours and the peer that gave the most tokens a second in a cell; None while either side is missing.

    Whatever is no peer in a pair is ours.
    """
    peers = {peer for peer, _ in comparison.scenario.pairs.values()}
    speeds = {
        name: comparison.spread(name, label, "tokens/s").median
        for name, cells in comparison.cells.items()
        if label in cells
    }
    theirs = [name for name in speeds if name in peers]
    mine = [name for name in speeds if name not in peers]
    return (max(mine, key=speeds.__getitem__), max(theirs, key=speeds.__getitem__)) if mine and theirs else None


def winner(comparison: Comparison, label: str) -> str:
    """The fastest of all in a cell, or both sides' fastest where their ranges overlap: no difference is shown then."""
    found = fastest(comparison, label)
    if found is None:
        return "–"
    first, second = sorted(found, key=lambda name: -comparison.spread(name, label, "tokens/s").median)
    open_ = comparison.spread(first, label, "tokens/s").low <= comparison.spread(second, label, "tokens/s").high
    return f"{first} or {second}" if open_ else first


def _known(best: list[tuple[str, str] | None], labels: list[str]) -> list[tuple[tuple[str, str], str]]:
    return [(each or ("", ""), label) for each, label in zip(best, labels, strict=True)]


def _ratio(comparison: Comparison, ours: str, peer: str, label: str) -> str:
    return report.spread(ratios(comparison, ours, peer, label))


def _two(comparison: Comparison, ours: str, peer: str, label: str, figure: str) -> str:
    return " / ".join(report.number(comparison.spread(name, label, figure).median) for name in (ours, peer))


def _named(comparison: Comparison, name: str, label: str) -> str:
    return f"{name} {report.number(comparison.spread(name, label, 'tokens/s').median)}" if name else "–"
