"""Prometheus metrics (SPEC section 9): a subscriber of the telemetry, and wrappers around HTTP and engines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import cast

import psutil
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.api.stats import Stats
from penstock.core.job import Status
from penstock.core.ports import WORKER_STATES, Engine, Lease, Output, QueueStats, WorkerInfo
from penstock.core.telemetry import Fact
from penstock.observability.broker import VERBS
from penstock.observability.jobs import JobRecord
from penstock.observability.stats import distribution, total
from penstock.observability.telemetry import Ended
from penstock.observability.wrapper import Wrapper

disable_created_metrics()  # type: ignore[no-untyped-call]

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BROKER = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30)
_LOAD = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
#: What an event says of whether a replica serves.
_REPLICA_UP = {"replica.down": 0, "replica.resting": 0, "replica.back": 1, "replica.up": 1}
#: Requests that generate, on which the p50/p95/p99 gauges look back.
WINDOW = 2048


class Metrics:
    """One process's metrics. ``render`` is what ``/metrics`` answers.

    A process exports what it does: a *gateway*'s series, a *worker*'s, or both.
    """

    def __init__(self, *, gateway: bool = True, worker: bool = True) -> None:
        self.registry = CollectorRegistry()
        self._worker = worker
        self._process = psutil.Process()
        self._began = time.perf_counter()
        self._queue: Callable[[], QueueStats | None] = lambda: None
        self._streams: Callable[[], int] = lambda: 0
        self._tokens_read: Callable[[], int] = lambda: 0
        front = self.registry if gateway else None
        back = self.registry if worker else None
        self.requests = Counter("llm_gateway_request_count", "HTTP requests", ["status"], registry=front)
        self.inflight = Gauge("llm_gateway_inflight_requests", "HTTP requests under way", registry=front)
        self.errors = Counter("llm_gateway_errors", "Errors answered, and jobs that failed", ["code"], registry=front)
        self.latency = Histogram(
            "llm_gateway_request_latency_seconds",
            "Duration of requests that generate",
            ["route"],
            buckets=_LATENCY,
            registry=front,
        )
        self.worker_batch = Gauge("llm_worker_batch_size", "Jobs in the latest engine step", registry=back)
        self.worker_tokens = Counter("llm_worker_tokens_generated", "Tokens generated", registry=back)
        self.worker_errors = Counter("llm_worker_errors", "Jobs that ended with an error", registry=back)
        self.duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From submit to the end of a job",
            ["gen_ai_request_model"],
            buckets=_LATENCY,
            registry=back,
        )
        self.first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From submit to the first token",
            ["gen_ai_request_model"],
            buckets=_LATENCY,
            registry=back,
        )
        self.per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Between tokens after the first",
            ["gen_ai_request_model"],
            buckets=_TOKEN,
            registry=back,
        )
        self.queue_wait = Histogram(
            "llm_queue_wait_seconds", "From submit to the first claim", buckets=_LATENCY, registry=back
        )
        self.loads = Histogram(
            "penstock_engine_load_seconds",
            "From the start of an engine process until its model is loaded",
            ["model"],
            buckets=_LOAD,
            registry=back,
        )
        self.deaths = Counter(
            "penstock_engine_deaths", "Engine processes that died by themselves", ["model"], registry=back
        )
        self.replicas = Gauge(
            "penstock_replica_up", "Does this replica of an upstream model serve?", ["model", "replica"], registry=back
        )
        self.usage = {
            field: Counter(f"penstock_{field}", what, ["model"], registry=back)
            for field, what in (
                ("prompt_tokens", "Tokens of the prompts of jobs that have ended"),
                ("cached_tokens", "Those of them that engines still had"),
                ("completion_tokens", "Tokens of the replies of jobs that have ended"),
                ("reasoning_tokens", "Those of them that were thoughts"),
            )
        }
        self.attempts = Counter("penstock_attempts", "Attempts at jobs that are over", ["outcome"], registry=back)
        self.verbs = Histogram(
            "penstock_broker_verb_seconds",
            "Duration of calls to the broker",
            ["verb"],
            buckets=_BROKER,
            registry=self.registry,
        )
        self.commits = Histogram(
            "penstock_broker_commit_seconds",
            "Until what was written is durable",
            buckets=_BROKER,
            registry=self.registry,
        )
        self._verbs = {f"broker.{verb}": self.verbs.labels(verb) for verb in VERBS}
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.registry.register(_Process())
        if gateway:
            self.registry.register(_Percentiles(self._recent))

    def watch(
        self, queue: Callable[[], QueueStats | None], streams: Callable[[], int], tokens_read: Callable[[], int]
    ) -> None:
        """Also report the queue as it was last seen, how many streams are open, and the tokens that readers got."""
        self._queue, self._streams, self._tokens_read = queue, streams, tokens_read
        self.registry.register(_Gateway(queue, streams, tokens_read))

    def watch_models(self, workers: Callable[[], list[WorkerInfo]]) -> None:
        """Also report how the models of this process's *workers* stand."""
        self.registry.register(_Models(workers))

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def stats(self) -> Stats:
        """The figures that the page draws, from what `watch` was given."""
        queue = self._queue()
        cpu = self._process.cpu_times()
        return Stats(
            uptime=time.perf_counter() - self._began,
            queued=queue.queued if queue is not None else 0,
            running=queue.jobs.get(Status.RUNNING, 0) if queue is not None else 0,
            streams=self._streams(),
            tokens=total(self.worker_tokens) if self._worker else self._tokens_read(),
            time_to_first_token=distribution(self.first_token, _LATENCY) if self._worker else None,
            request_duration=distribution(self.duration if self._worker else self.latency, _LATENCY),
            cpu_seconds=cpu.user + cpu.system,
            memory_bytes=self._process.memory_info().rss,
        )

    # ------------------------------------------------------------------------------------ wrappers

    def http(self, app: ASGIApp) -> ASGIApp:
        """Middleware that counts every request, and times those that a model answers (not what is accepted for later,
        nor probes and lists: a flood of them would be all that is seen)."""

        async def metered(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            started = time.perf_counter()
            status = 500

            async def watching(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            self.inflight.inc()
            try:
                await app(scope, receive, watching)
            finally:
                elapsed = time.perf_counter() - started
                self.inflight.dec()
                self.requests.labels(str(status)).inc()
                if (route := scope.get("penstock.generation")) is not None and status != 202:
                    self.latency.labels(route).observe(elapsed)
                    self._recent.append(elapsed)
                if (code := scope.get("penstock.error")) is not None:
                    self.errors.labels(code).inc()

        return metered

    def engine(self, engine: Engine) -> Engine:
        """*engine*, with its steps counted."""
        return cast("Engine", _MeteredEngine(engine, self))

    # ------------------------------------------------------------------------------------ telemetry

    def span(self, span: Ended) -> None:
        if span.name == "engine.load":
            if span.error is None:
                self.loads.labels(span.facts["model"]).observe(span.seconds)
        elif span.name == "store.commit":
            self.commits.observe(span.seconds)
        elif (verb := self._verbs.get(span.name)) is not None:
            verb.observe(span.seconds)

    def event(self, name: str, facts: Mapping[str, Fact]) -> None:
        if name == "job.ended":
            self._job_ended(JobRecord.of(facts))
        elif name == "job.attempt":
            self.attempts.labels(facts["outcome"]).inc()
        elif name == "engine.died":
            self.deaths.labels(facts["model"]).inc()
        elif name in _REPLICA_UP:
            self.replicas.labels(facts["model"], facts["replica"]).set(_REPLICA_UP[name])

    def _job_ended(self, record: JobRecord) -> None:
        for field, counter in self.usage.items():
            counter.labels(record.model).inc(getattr(record, field))
        self.duration.labels(record.model).observe(record.total_time)
        if record.time_to_first_token is not None:
            self.first_token.labels(record.model).observe(record.time_to_first_token)
        if record.time_per_token is not None:
            self.per_token.labels(record.model).observe(record.time_per_token)
        if record.queue_wait is not None:
            self.queue_wait.observe(record.queue_wait)
        if record.error is not None:
            self.worker_errors.inc()
            self.errors.labels(record.error).inc()


class _MeteredEngine(Wrapper[Engine]):
    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        super().__init__(engine)
        self._metrics = metrics
        self._others: set[int] = set()
        """Keys of jobs whose outputs are no tokens."""

    async def start(self) -> None:
        self._others.clear()
        await self._wrapped.start()

    def add(self, key: int, lease: Lease) -> None:
        if lease.job.request.task != "generate":
            self._others.add(key)
        self._wrapped.add(key, lease)

    def abort(self, key: int) -> None:
        self._others.discard(key)
        self._wrapped.abort(key)

    async def step(self) -> list[Output]:
        outputs = await self._wrapped.step()
        self._metrics.worker_batch.set(len(outputs))
        self._metrics.worker_tokens.inc(sum(len(output.ids) for output in outputs if output.key not in self._others))
        self._others.difference_update(output.key for output in outputs if output.finish is not None)
        return outputs


class _Percentiles(Collector):
    def __init__(self, recent: deque[float]) -> None:
        self._recent = recent

    def collect(self) -> list[Metric]:
        ordered = sorted(self._recent)
        return [
            GaugeMetricFamily(
                f"llm_gateway_request_latency_p{percent}_seconds",
                f"{percent}th percentile of the latest {WINDOW} requests that generate",
                value=ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0,
            )
            for percent in (50, 95, 99)
        ]


class _Process(Collector):
    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()

    def collect(self) -> list[Metric]:
        return [
            GaugeMetricFamily(
                "llm_process_cpu_percent", "CPU since the last scrape", value=self._process.cpu_percent()
            ),
            GaugeMetricFamily("llm_process_memory_bytes", "Resident memory", value=self._process.memory_info().rss),
        ]


class _Models(Collector):
    def __init__(self, workers: Callable[[], list[WorkerInfo]]) -> None:
        self._workers = workers

    def collect(self) -> list[Metric]:
        state = GaugeMetricFamily("llm_model_state", "1 for the state that the model is in", labels=["model", "state"])
        memory = GaugeMetricFamily("llm_model_memory_bytes", "Memory of the model's processes", labels=["model"])
        standby = GaugeMetricFamily("llm_model_standby", "Spare processes that are ready", labels=["model"])
        for worker in self._workers():
            for model in worker.models:
                for each in WORKER_STATES:
                    state.add_metric([model.name, each], each == worker.state)
                memory.add_metric([model.name], worker.memory)
                standby.add_metric([model.name], worker.standby)
        return [state, memory, standby]


class _Gateway(Collector):
    def __init__(
        self, stats: Callable[[], QueueStats | None], connections: Callable[[], int], tokens: Callable[[], int]
    ) -> None:
        self._stats = stats
        self._connections = connections
        self._tokens = tokens

    def collect(self) -> list[Metric]:
        depth = GaugeMetricFamily("llm_queue_depth", "Jobs waiting", labels=["model", "priority"])
        jobs = GaugeMetricFamily("llm_jobs", "Jobs kept, by status", labels=["status"])
        batch = GaugeMetricFamily("llm_gateway_batch_size", "Jobs that run now, on all workers")
        lost = CounterMetricFamily("llm_leases_lost", "Leases that ran out")
        stats = self._stats()
        if stats is not None:
            for (model, priority), count in stats.depth.items():
                depth.add_metric([model, priority.name.lower()], count)
            for status, count in stats.jobs.items():
                jobs.add_metric([status.value], count)
            batch.add_metric([], stats.jobs.get(Status.RUNNING, 0))
            lost.add_metric([], stats.leases_lost)
        connections = GaugeMetricFamily("llm_sse_connections", "Open event streams", value=self._connections())
        tokens = CounterMetricFamily("llm_gateway_tokens_generated", "Tokens that readers got", value=self._tokens())
        return [depth, jobs, batch, lost, connections, tokens]
