"""What metrics hold, summed up for `penstock.api.stats`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from prometheus_client import Counter, Histogram

from penstock.api.stats import Distribution


def distribution(histogram: Histogram, bounds: Sequence[float]) -> Distribution:
    """What *histogram*, whose buckets are *bounds*, has over all its labels."""
    up_to = dict.fromkeys((*bounds, math.inf), 0)
    for family in histogram.collect():
        for sample in family.samples:
            if "le" in sample.labels:
                up_to[float(sample.labels["le"])] += int(sample.value)
    return Distribution(list(bounds), [upper - lower for lower, upper in itertools.pairwise((0, *up_to.values()))])


def total(counter: Counter) -> int:
    """What *counter* has over all its labels."""
    return int(sum(sample.value for family in counter.collect() for sample in family.samples))
