"""Puts the concrete parts together. The only module that knows them all."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

import structlog
import uvicorn
from starlette.types import ASGIApp

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.errors import BrokerUnavailable, InvalidRequest, PenstockError, first_of
from penstock.core.ports import Broker, QueuePolicy
from penstock.engines.process import EngineProcess, EngineSpec
from penstock.gateway.app import create_app
from penstock.gateway.service import Gateway, GatewayConfig
from penstock.observability.jobs import JobRecord, ObservedBroker
from penstock.observability.logs import log_job, request_log
from penstock.observability.metrics import Metrics
from penstock.observability.ops import worker_app
from penstock.server import Address, http_server, termination
from penstock.settings import ModelSettings, Settings
from penstock.worker.worker import Worker

log = structlog.get_logger("penstock")

#: Seconds between sweeps: how late a lost lease, a deadline or a delayed retry may be noticed.
SWEEP_INTERVAL = 0.25
#: Longest pause between two attempts to reach the broker at the start, in seconds.
MAX_BACKOFF = 5.0


class Watcher(Protocol):
    """Is told how the start goes."""

    def waiting(self, why: str, pause: float) -> None:
        """The broker cannot be reached; the next attempt comes in *pause* seconds."""

    def listening(self, url: str) -> None: ...

    def progress(self, model: str, what: str, fraction: float | None) -> None:
        """*what* is being done for *model*, and how much of it is done where that is known."""

    def ready(self, model: str) -> None: ...


async def run(settings: Settings, watcher: Watcher, *, gateway: bool, workers: bool) -> None:
    """A gateway, workers with their engines, or both, over the broker of *settings*; until SIGTERM or SIGINT."""
    with _address(settings, gateway) as address, termination() as terminate:
        try:
            async with _broker(settings, watcher, terminate) as store:
                if store is None:
                    return  # the signal came first
                metrics = Metrics(gateway=gateway, worker=workers)
                broker = ObservedBroker(store, _observers(settings, metrics))
                front = Gateway(broker, gateway_config(settings)) if gateway else None
                models = settings.models if workers else []
                crew = [build_worker(model, settings, broker, metrics, watcher) for model in models]
                server = http_server(build_app(front, crew, broker, metrics), drain_timeout=settings.drain_timeout)
                async with front.running() if front else contextlib.nullcontext():
                    address.open()
                    watcher.listening(address.url)
                    await _work(front, crew, server, address, broker, terminate)
        except* PenstockError as group:
            raise first_of(group) from None


async def _work(
    front: Gateway | None,
    crew: Sequence[Worker],
    server: uvicorn.Server,
    address: Address,
    broker: Broker,
    terminate: asyncio.Event,
) -> None:
    """Everything at work until a signal; then the drain: streams end, jobs finish or are given back, HTTP closes."""
    async with asyncio.TaskGroup() as tasks:
        sweeping = tasks.create_task(_sweep(broker), name="sweep")
        http = tasks.create_task(server.serve(sockets=[address.socket]), name="http")
        working = [tasks.create_task(worker.run(), name="worker") for worker in crew]
        await terminate.wait()
        log.info("draining", streams=len(front.streams) if front else 0)
        if front is not None:
            front.drain()
            server.should_exit = True
        for worker in crew:
            worker.stop()
        await asyncio.gather(*working)
        server.should_exit = True  # a worker alone tells how its drain goes to the end
        await http
        sweeping.cancel()


def _address(settings: Settings, gateway: bool) -> Address:
    if not gateway:
        return Address(settings.metrics_host, settings.metrics_port, flag="--metrics-port")
    if not settings.loopback and not settings.insecure_public:
        raise InvalidRequest(
            f"{settings.host} can be reached from other machines, and there is no authentication. Put a proxy that "
            "authenticates in front of the loopback address, or say --insecure-public if your network is closed."
        )
    return Address(settings.host, settings.port, flag="--port")


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


def gateway_config(settings: Settings) -> GatewayConfig:
    loopback_names = ("localhost", "127.0.0.1", "::1", settings.host)
    return GatewayConfig(
        broker="embedded" if settings.embedded else "redis",
        models=tuple(model.name for model in settings.models),
        max_body=settings.max_body,
        heartbeat=settings.heartbeat,
        send_deadline=settings.send_deadline,
        disconnect_grace=settings.disconnect_grace,
        drain_timeout=settings.drain_timeout,
        default_max_tokens=settings.default_max_tokens,
        allowed_hosts=tuple(settings.allowed_hosts) or (loopback_names if settings.loopback else ("*",)),
    )


def build_worker(
    model: ModelSettings, settings: Settings, broker: Broker, metrics: Metrics, watcher: Watcher
) -> Worker:
    engine = EngineProcess(
        EngineSpec(model.engine, model.name, model.path, model.options),
        hang_timeout=settings.hang_timeout,
        load_timeout=settings.load_timeout,
        on_progress=lambda what, fraction: watcher.progress(model.name, what, fraction),
    )
    return Worker(
        broker,
        metrics.engine(engine),
        lease_ttl=settings.lease_ttl,
        drain_timeout=settings.drain_timeout,
        on_ready=lambda: watcher.ready(model.name),
    )


def build_app(front: Gateway | None, crew: Sequence[Worker], broker: ObservedBroker, metrics: Metrics) -> ASGIApp:
    """The gateway's API; without one, what a worker says of itself."""
    if front is None:
        return worker_app(metrics.render, lambda: all(worker.info.state == "ready" for worker in crew))
    metrics.watch(lambda: front.catalogue.stats, lambda: len(front.streams), lambda: broker.tokens_read)
    return create_app(front, metrics=metrics.render, middleware=[metrics.http])


def _observers(settings: Settings, metrics: Metrics) -> list[Callable[[JobRecord], None]]:
    """Who is told of the end of a job."""
    files = [request_log(settings.log_dir)] if settings.log_dir is not None else []
    return [metrics.job_ended, log_job, *files]


# ---------------------------------------------------------------------------------------------- the broker


class _Store(Broker, Protocol):
    async def open(self) -> None: ...

    async def close(self) -> None: ...


@contextlib.asynccontextmanager
async def _broker(settings: Settings, watcher: Watcher, terminate: asyncio.Event) -> AsyncIterator[Broker | None]:
    """The broker once it is open; None when *terminate* came before."""
    store = await _open_embedded(settings) if settings.embedded else await _open_redis(settings, watcher, terminate)
    try:
        yield store
    finally:
        if store is not None:
            await store.close()


async def _open_embedded(settings: Settings) -> _Store:
    store = EmbeddedBroker(settings.data_dir / "broker", policy=queue_policy(settings))
    await store.open()
    return store


async def _open_redis(settings: Settings, watcher: Watcher, terminate: asyncio.Event) -> _Store | None:
    """A server that is away comes back, so it is waited for. One that is set up wrongly is refused."""
    from penstock.brokers.redis import RedisBroker  # imported by who uses it

    delay = 0.2
    while not terminate.is_set():
        store = RedisBroker(
            settings.broker,
            policy=queue_policy(settings),
            durability=settings.durability,
            shards=settings.shards,
            prefix=settings.broker_prefix,
            replicas=settings.replicas,
            timeout=settings.broker_timeout,
        )
        try:
            if await _unless(terminate, store.open()):
                return store
        except BrokerUnavailable as error:
            pause = random.uniform(0, delay)
            delay = min(MAX_BACKOFF, 2 * delay)
            watcher.waiting(error.message, pause)
            await _unless(terminate, asyncio.sleep(pause))
    return None


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do *work*; False when *event* came first, and it was broken off."""
    doing = asyncio.create_task(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([doing, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        doing.cancel()
        await asyncio.wait([doing])
    if doing.cancelled():
        return False
    doing.result()
    return True
