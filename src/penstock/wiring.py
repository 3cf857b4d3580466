"""Puts the concrete parts together. The only module that knows them all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog
import uvicorn
from starlette.types import ASGIApp

from penstock.brokers.registry import open_broker
from penstock.core.aio import first_done
from penstock.core.errors import InvalidRequest, PenstockError, first_of
from penstock.core.ports import Broker, QueuePolicy, SystemClock
from penstock.core.telemetry import Telemetry
from penstock.engines.frames import Progress
from penstock.engines.host.check import check
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.engines.host.standby import Standby, WarmPool
from penstock.gateway.app import create_app
from penstock.gateway.batches.routes import BATCHES
from penstock.gateway.batches.runner import BatchRunner
from penstock.gateway.batches.store import BatchStore
from penstock.gateway.config import GatewayConfig
from penstock.gateway.dialects.registry import BATCHABLE
from penstock.gateway.files.routes import FILES
from penstock.gateway.files.store import FileStore
from penstock.gateway.gateway import Gateway
from penstock.gateway.http import Resource
from penstock.gateway.operator.health import METRICS, STATS
from penstock.gateway.operator.models import MODELS
from penstock.gateway.operator.models import OPERATIONS as MODEL_OPERATIONS
from penstock.observability.broker import observed
from penstock.observability.jobs import JobWatch
from penstock.observability.logs import EventLog, RequestLog
from penstock.observability.metrics import Metrics
from penstock.observability.ops import worker_app
from penstock.observability.telemetry import Publisher, Subscriber
from penstock.server import Address, http_server, termination
from penstock.settings import ModelSettings, Settings, parse_size
from penstock.worker.manager import Model, ModelManager
from penstock.worker.placement import Policy
from penstock.worker.worker import Worker

log = structlog.get_logger("penstock")

T = TypeVar("T")

#: Seconds between sweeps: how late a lost lease, a deadline or a delayed retry may be noticed.
SWEEP_INTERVAL = 0.25


class Watcher(Protocol):
    """Is told how the start goes."""

    def waiting(self, why: str, pause: float) -> None:
        """The broker cannot be reached; the next attempt comes in *pause* seconds."""

    def listening(self, url: str) -> None: ...

    def progress(self, model: str, what: str, fraction: float | None) -> None:
        """*what* is being done for *model*, and how much of it is done where that is known."""

    def ready(self, model: str) -> None: ...

    def deferred(self, model: str) -> None:
        """*model* does not fit beside the others: it is loaded when a job comes for it."""


async def run(settings: Settings, watcher: Watcher, *, gateway: bool, workers: bool) -> None:
    """A gateway, workers with their engines, or both, over the broker of *settings*; until SIGTERM or SIGINT."""
    if workers:
        _check_models(settings)
    metrics = Metrics(gateway=gateway, worker=workers)
    telemetry = Publisher(*_subscribers(settings, metrics))
    with _address(settings, gateway) as address, termination() as terminate:
        try:
            async with _broker(settings, telemetry, watcher, terminate) as store:
                if store is None:
                    return  # the signal came first
                jobs = JobWatch(observed(store, telemetry), telemetry)
                broker = jobs.broker
                warm = WarmPool(settings.warm_processes)
                crew = build_manager(settings, broker, metrics, warm, watcher, telemetry) if workers else None
                front = Gateway(broker, gateway_config(settings, gateway), models=crew)
                batches = build_batches(settings, front) if gateway else None
                app = build_app(front, crew, batches, jobs, metrics)
                server = http_server(app, drain_timeout=settings.drain_timeout)
                async with contextlib.AsyncExitStack() as running:
                    await running.enter_async_context(contextlib.aclosing(warm))
                    await running.enter_async_context(front.running(catalogue=gateway))
                    if batches is not None:
                        await running.enter_async_context(batches.running())
                    address.open()
                    watcher.listening(address.url)
                    await _work(front, crew, server, address, broker, terminate, gateway=gateway)
        except* PenstockError as group:
            raise first_of(group) from None


async def _work(
    front: Gateway,
    crew: ModelManager | None,
    server: uvicorn.Server,
    address: Address,
    broker: Broker,
    terminate: asyncio.Event,
    *,
    gateway: bool,
) -> None:
    """Everything at work until a signal, or until a part of it fails; then the drain: streams end, jobs finish or are
    given back, HTTP closes. Raises what failed."""
    http = asyncio.create_task(server.serve(sockets=[address.socket]), name="http")
    sweeping = asyncio.create_task(_sweep(broker), name="sweep")
    parts: list[asyncio.Task[Any]] = [http, sweeping]
    ends: list[asyncio.Task[Any]] = [asyncio.create_task(terminate.wait(), name="signal")]
    if crew is not None:
        parts.append(working := asyncio.create_task(crew.run(), name="models"))
        ends.append(asyncio.create_task(crew.stopped(), name="models: end"))
    try:
        await asyncio.wait([*parts, *ends], return_when=asyncio.FIRST_COMPLETED)
        log.info("draining", streams=len(front.streams))
        front.drain()
        server.should_exit = gateway  # a worker alone tells how its drain goes to the end
        if crew is not None:
            crew.stop()
            await asyncio.wait([working])
        server.should_exit = True
        await asyncio.wait([http])
    finally:
        for task in (*parts, *ends):
            task.cancel()
        results = await asyncio.gather(*parts, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


def _address(settings: Settings, gateway: bool) -> Address:
    if not gateway:
        return Address(settings.metrics_host, settings.metrics_port, flag="--metrics-port")
    if not settings.loopback and not settings.insecure_public:
        raise InvalidRequest(
            f"{settings.host} can be reached from other machines, and there is no authentication. Put a proxy that "
            "authenticates in front of the loopback address, or say --insecure-public if your network is closed."
        )
    return Address(settings.host, settings.port, flag="--port")


def _check_models(settings: Settings) -> None:
    """Refuse what cannot be loaded at the start, before anybody connects. Models on demand cost their jobs only."""
    for model in settings.models:
        if model.load == "start":
            check(EngineSpec(model.engine, model.name, model.path, model.options))


async def _sweep(broker: Broker) -> None:
    while True:
        try:
            await broker.sweep()
        except PenstockError as error:
            log.warning("sweep_failed", error=error.message)
        await asyncio.sleep(SWEEP_INTERVAL)


# ---------------------------------------------------------------------------------------------- the parts


def queue_policy(settings: Settings) -> QueuePolicy:
    return QueuePolicy(
        max_queued=settings.max_queued,
        max_queued_per_tenant=settings.max_queued_per_tenant,
        max_running_per_tenant=settings.max_running_per_tenant,
        max_bytes_per_tenant=settings.max_bytes_per_tenant,
        weights=settings.tenant_weights,
        lease_ttl=settings.lease_ttl,
        result_ttl=settings.result_ttl,
        max_attempts=settings.max_attempts,
    )


def gateway_config(settings: Settings, gateway: bool = True) -> GatewayConfig:
    """For the API, or for the part of it that a worker has on its metrics port."""
    host, loopback = settings.host, settings.loopback
    if not gateway:
        host, loopback = settings.metrics_host, settings.metrics_loopback
    loopback_names = ("localhost", "127.0.0.1", "::1", host)
    return GatewayConfig(
        broker="embedded" if settings.embedded else "redis",
        models=tuple(model.name for model in settings.models),
        max_body=settings.max_body,
        heartbeat=settings.heartbeat,
        send_deadline=settings.send_deadline,
        disconnect_grace=settings.disconnect_grace,
        drain_timeout=settings.drain_timeout,
        default_max_tokens=settings.default_max_tokens,
        allowed_hosts=tuple(settings.allowed_hosts) or (loopback_names if loopback else ("*",)),
        allowed_origins=tuple(settings.allowed_origins),
        manageable=loopback or settings.insecure_public,
    )


def file_store(settings: Settings) -> FileStore:
    return FileStore(
        settings.files_dir or settings.data_dir / "files",
        max_file=settings.max_file,
        max_bytes=settings.max_file_bytes_per_tenant,
        ttl=settings.file_ttl,
    )


def build_batches(settings: Settings, front: Gateway) -> BatchRunner:
    store = BatchStore(file_store(settings))
    return BatchRunner(front.jobs, store, BATCHABLE, window=batch_window(settings))


def batch_window(settings: Settings) -> int:
    """Jobs of batches for one model at once. For all models there are twice as many: half of the queue is left to
    everybody else, however many batches there are."""
    limits = [limit // 4 for limit in (settings.max_queued, settings.max_queued_per_tenant) if limit]
    return max(1, min([settings.batch_window, *limits]))


def build_manager(
    settings: Settings,
    broker: Broker,
    metrics: Metrics,
    warm: WarmPool,
    watcher: Watcher,
    telemetry: Telemetry,
) -> ModelManager:
    """The workers of all configured models, and who decides which are loaded."""

    def make_worker(model: Model, up: Callable[[], None]) -> Worker:
        def ready() -> None:
            up()
            watcher.ready(model.name)

        return Worker(
            broker,
            model.engine,
            lease_ttl=settings.lease_ttl,
            drain_timeout=settings.drain_timeout,
            batch_reserve=settings.batch_reserve,
            on_ready=ready,
            about=model.about,
            clock=clock,
        )

    def progress(name: str, what: str, fraction: float | None) -> None:
        manager.progress(name, what, fraction)
        watcher.progress(name, what, fraction)

    clock = SystemClock()
    models = []
    for each in settings.models:
        engine = build_engine(each, settings, warm, partial(progress, each.name), telemetry)
        models.append(Model(each.name, metrics.engine(engine), engine, on_demand=each.load == "demand"))
        if each.load == "demand":
            warm.fill(each.engine)
    manager = ModelManager(
        broker,
        models,
        make_worker,
        memory_budget=parse_size(settings.memory_budget),
        overhead=warm.measure,
        policy=Policy(idle_unload=settings.idle_unload, swap_after=settings.swap_after),
        heartbeat=settings.lease_ttl / 4,
        clock=clock,
        on_deferred=watcher.deferred,
    )
    metrics.watch_models(manager.workers)
    return manager


def build_engine(
    model: ModelSettings, settings: Settings, warm: WarmPool, on_progress: Progress, telemetry: Telemetry
) -> Standby:
    spec = EngineSpec(model.engine, model.name, model.path, model.options)

    def make() -> EngineProcess:
        return EngineProcess(
            spec,
            hang_timeout=settings.hang_timeout,
            load_timeout=settings.load_timeout,
            telemetry=telemetry,
            spawn=warm.take,
        )

    return Standby(spec, make, wanted=model.standby, warm=warm, on_progress=on_progress, telemetry=telemetry)


def build_app(
    front: Gateway, crew: ModelManager | None, batches: BatchRunner | None, jobs: JobWatch, metrics: Metrics
) -> ASGIApp:
    """The gateway's API; without one (and so without *batches*), what a worker says of itself."""
    resources: dict[Resource[Any], Any] = {MODELS: crew} if crew is not None else {}
    if batches is None:
        assert crew is not None
        return worker_app(metrics.render, lambda: crew.ready, create_app(front, resources, operations=MODEL_OPERATIONS))
    metrics.watch(lambda: front.catalogue.stats, lambda: len(front.streams), lambda: jobs.tokens_read)
    resources |= {METRICS: metrics.render, STATS: metrics.stats, FILES: batches.store.files, BATCHES: batches}
    return create_app(front, resources, middleware=[metrics.http])


def _subscribers(settings: Settings, metrics: Metrics) -> list[Subscriber]:
    """Who hears what the process tells of itself."""
    files = [RequestLog(settings.log_dir)] if settings.log_dir is not None else []
    return [metrics, EventLog(), *files]


# ---------------------------------------------------------------------------------------------- the broker


def broker_options(settings: Settings) -> dict[str, Any]:
    """What can be set of a broker beside its address; each takes what it knows."""
    return {
        "data_dir": settings.data_dir,
        "durability": settings.durability,
        "prefix": settings.broker_prefix,
        "shards": settings.shards,
        "replicas": settings.replicas,
        "timeout": settings.broker_timeout,
    }


@contextlib.asynccontextmanager
async def _broker(
    settings: Settings, telemetry: Telemetry, watcher: Watcher, terminate: asyncio.Event
) -> AsyncGenerator[Broker | None]:
    """The broker once it is open; None when *terminate* came before."""
    opening = open_broker(settings.broker, broker_options(settings), queue_policy(settings), telemetry, watcher.waiting)
    opened, _ = await first_done(opening, terminate.wait())
    broker = None if opened.cancelled() else opened.result()
    try:
        yield broker
    finally:
        if broker is not None:
            await broker.close()
