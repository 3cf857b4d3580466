"""The concrete parts, made from the settings. The only package that knows them all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, Protocol

from msgspec import structs
from starlette.types import ASGIApp

from penstock.brokers.registry import open_broker
from penstock.core.aio import first_done
from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.core.ports import Broker, SystemClock
from penstock.core.telemetry import Telemetry
from penstock.engines.adapters import adapter_names
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
from penstock.observability.jobs import JobWatch
from penstock.observability.logs import EventLog, RequestLog
from penstock.observability.metrics import Metrics
from penstock.observability.ops import worker_app
from penstock.observability.telemetry import Subscriber
from penstock.server import Address
from penstock.settings import ModelSettings, Settings
from penstock.worker.manager import Model, ModelManager
from penstock.worker.worker import Worker


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


# ---------------------------------------------------------------------------------------------- the broker


@contextlib.asynccontextmanager
async def opened_broker(
    settings: Settings, telemetry: Telemetry, watcher: Watcher, terminate: asyncio.Event
) -> AsyncGenerator[Broker | None]:
    """The broker once it is open; None when *terminate* came before."""
    opening = open_broker(
        settings.broker.url, structs.asdict(settings.broker), settings.queue, telemetry, watcher.waiting
    )
    opened, _ = await first_done(opening, terminate.wait())
    broker = None if opened.cancelled() else opened.result()
    try:
        yield broker
    finally:
        if broker is not None:
            await broker.close()


# ---------------------------------------------------------------------------------------------- the gateway


def claim_address(settings: Settings, api: bool) -> Address:
    """Where the API is, or what a worker says of itself."""
    if not api:
        return Address(settings.metrics.host, settings.metrics.port, flag="--metrics-port")
    server = settings.server
    if not server.loopback and not server.insecure_public:
        raise InvalidRequest(
            f"{server.host} can be reached from other machines, and there is no authentication. Put a proxy that "
            "authenticates in front of the loopback address, or say --insecure-public if your network is closed."
        )
    return Address(server.host, server.port, flag="--port")


def gateway_config(settings: Settings, broker: str, api: bool) -> GatewayConfig:
    """For the API, or for the part of it that a worker has on its metrics port."""
    listener = settings.server if api else settings.metrics
    loopback_names = ("localhost", "127.0.0.1", "::1", listener.host)
    chosen = structs.asdict(settings.http)
    chosen["allowed_hosts"] = settings.http.allowed_hosts or (loopback_names if listener.loopback else ("*",))
    return GatewayConfig(
        **chosen,
        broker=broker,
        models=tuple(model.name for model in settings.models),
        drain_timeout=settings.server.drain_timeout,
        manageable=listener.loopback or settings.server.insecure_public,
    )


def file_store(settings: Settings) -> FileStore:
    files = settings.files
    return FileStore(
        files.dir or settings.broker.data_dir / "files",
        max_file=files.max_file,
        max_bytes=files.max_bytes_per_tenant,
        ttl=files.ttl,
    )


def build_batches(settings: Settings, gateway: Gateway) -> BatchRunner:
    store = BatchStore(file_store(settings))
    return BatchRunner(gateway.jobs, store, BATCHABLE, window=batch_window(settings))


def batch_window(settings: Settings) -> int:
    """Jobs of batches for one model at once. For all models there are twice as many: half of the queue is left to
    everybody else, however many batches there are."""
    limits = [limit // 4 for limit in (settings.queue.max_queued, settings.queue.max_queued_per_tenant) if limit]
    return max(1, min([settings.files.batch_window, *limits]))


def build_app(
    gateway: Gateway, manager: ModelManager | None, batches: BatchRunner | None, jobs: JobWatch, metrics: Metrics
) -> ASGIApp:
    """The gateway's API; without one (and so without *batches*), what a worker says of itself."""
    resources: dict[Resource[Any], Any] = {MODELS: manager} if manager is not None else {}
    if batches is None:
        assert manager is not None
        return worker_app(
            metrics.render, lambda: manager.ready, create_app(gateway, resources, operations=MODEL_OPERATIONS)
        )
    metrics.watch(lambda: gateway.catalogue.stats, lambda: len(gateway.streams), lambda: jobs.tokens_read)
    resources |= {METRICS: metrics.render, STATS: metrics.stats, FILES: batches.store.files, BATCHES: batches}
    return create_app(gateway, resources, middleware=[metrics.http])


# ---------------------------------------------------------------------------------------------- the models


def check_models(settings: Settings) -> None:
    """Refuse what cannot be loaded at the start, before anybody connects. Models on demand cost their jobs only."""
    names = [name for model in settings.models for name in (model.name, *adapter_names(model.options))]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelLoadError(f"Several models or adapters are called {', '.join(twice)}.")
    for model in settings.models:
        if model.load == "start":
            check(EngineSpec(model.engine, model.name, model.path, model.options))


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
            lease_ttl=settings.queue.lease_ttl,
            drain_timeout=settings.server.drain_timeout,
            batch_reserve=settings.worker.batch_reserve,
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
        memory_budget=settings.worker.memory_budget.bytes,
        overhead=warm.measure,
        policy=settings.worker,
        heartbeat=settings.queue.lease_ttl / 4,
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
            hang_timeout=settings.engine.hang_timeout,
            load_timeout=settings.engine.load_timeout,
            telemetry=telemetry,
            spawn=warm.take,
        )

    return Standby(spec, make, wanted=model.standby, warm=warm, on_progress=on_progress, telemetry=telemetry)


# ---------------------------------------------------------------------------------------------- who hears


def subscribers(settings: Settings, metrics: Metrics) -> list[Subscriber]:
    """Who hears what the process tells of itself."""
    files = [RequestLog(settings.log.dir)] if settings.log.dir is not None else []
    return [metrics, EventLog(), *files]
