"""Percentiles and what is said about a set of times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median


def percentile(ordered: Sequence[float], percent: float, leading_zeros: int = 0) -> float:
    """The nearest-rank percentile of sorted values, `leading_zeros` of which are left out of `ordered`."""
    size = len(ordered) + leading_zeros
    if not size:
        return math.nan
    rank = max(1, math.ceil(percent / 100 * size)) - 1
    return 0.0 if rank < leading_zeros else ordered[rank - leading_zeros]


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    p50: float
    p95: float
    p99: float
    mean: float

    @classmethod
    def of(cls, seconds: Iterable[float], zeros: int = 0) -> Times:
        ordered = sorted(seconds)
        p50, p95, p99 = (percentile(ordered, percent, zeros) * 1e3 for percent in (50, 95, 99))
        mean = fmean(ordered) * len(ordered) / (len(ordered) + zeros) * 1e3 if ordered else (0.0 if zeros else math.nan)
        return cls(p50, p95, p99, mean)


@dataclass(frozen=True)
class Spread:
    """A figure over several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = [value for value in values if not math.isnan(value)]
        return cls(median(known), min(known), max(known)) if known else cls(math.nan, math.nan, math.nan)
