"""The page's figures: the same that `/metrics` has, by another way."""

from __future__ import annotations

import re

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from penstock.api.stats import Distribution, Stats
from penstock.core.job import Priority, Status
from penstock.core.ports import QueueStats
from penstock.observability.jobs import JobRecord
from penstock.observability.metrics import Metrics
from penstock.observability.stats import distribution, total

BOUNDS = (0.1, 1, 5)


def histogram(*labels: str) -> Histogram:
    return Histogram("seconds", "…", labels, buckets=BOUNDS, registry=CollectorRegistry())


def test_a_distribution_counts_each_observation_once() -> None:
    observed = histogram()
    for seconds in (0.1, 0.5, 0.6, 7.0, 9.0):
        observed.observe(seconds)
    assert distribution(observed, BOUNDS) == Distribution([0.1, 1.0, 5.0], [1, 2, 0, 2])


def test_it_is_one_over_all_labels() -> None:
    observed = histogram("model")
    assert distribution(observed, BOUNDS) == Distribution([0.1, 1, 5], [0, 0, 0, 0])
    observed.labels("a").observe(0.5)
    observed.labels("b").observe(0.5)
    observed.labels("b").observe(3.0)
    assert distribution(observed, BOUNDS) == Distribution([0.1, 1.0, 5.0], [0, 2, 1, 0])


def test_a_counter_too() -> None:
    counter = Counter("things", "…", ["kind"], registry=CollectorRegistry())
    assert total(counter) == 0
    counter.labels("a").inc(2)
    counter.labels("b").inc(3)
    assert total(counter) == 5


def record(**fields: object) -> JobRecord:
    known = {
        "job": "job_1", "tenant": "t", "model": "m", "request_id": None, "status": Status.COMPLETED, "error": None,
        "attempt": 1, "prompt_tokens": 3, "cached_tokens": 2, "completion_tokens": 4, "reasoning_tokens": 1,
        "queue_wait": 0.0, "processing_time": 1.0,
        "total_time": 2.0, "time_to_first_token": 0.3, "time_per_token": 0.1,
    }  # fmt: skip
    return JobRecord(**known | fields)  # type: ignore[arg-type]


def watched(*, worker: bool) -> Metrics:
    metrics = Metrics(worker=worker)
    queue = QueueStats(
        depth={("m", Priority.NORMAL): 4, ("n", Priority.BATCH): 3}, jobs={Status.RUNNING: 2}, workers=[]
    )
    metrics.watch(lambda: queue, lambda: 5, lambda: 77)
    metrics.worker_tokens.inc(40)
    metrics.latency.labels("/v1/jobs").observe(0.2)
    metrics.event("job.ended", record().facts)
    return metrics


@pytest.mark.parametrize("worker", [True, False])
def test_the_figures_are_those_of_the_metrics(worker: bool) -> None:
    metrics = watched(worker=worker)
    stats = metrics.stats()
    text = metrics.render()[0].decode()

    def exported(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    assert stats.queued == exported("llm_queue_depth") == 7
    assert stats.running == exported("llm_gateway_batch_size") == 2
    assert stats.streams == exported("llm_sse_connections") == 5
    tokens, duration = (
        ("llm_worker_tokens_generated_total", "gen_ai_server_request_duration_seconds")
        if worker
        else ("llm_gateway_tokens_generated_total", "llm_gateway_request_latency_seconds")
    )
    assert stats.tokens == exported(tokens) == (40 if worker else 77)
    assert sum(stats.request_duration.counts) == exported(f"{duration}_count") == 1
    assert (stats.time_to_first_token is None) is (not worker)
    assert stats.cpu_seconds > 0
    assert stats.memory_bytes > 1e6
    later = metrics.stats()
    assert later.uptime > stats.uptime
    assert msgspec.json.decode(msgspec.json.encode(stats), type=Stats) == stats


def test_without_a_queue_there_is_nothing_in_it() -> None:
    metrics = Metrics()
    metrics.watch(lambda: None, lambda: 0, lambda: 0)
    assert (metrics.stats().queued, metrics.stats().running) == (0, 0)
