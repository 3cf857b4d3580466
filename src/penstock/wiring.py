"""Puts the concrete parts together. The only module that knows them all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import structlog
import uvicorn
from starlette.types import ASGIApp

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.errors import InvalidRequest, PenstockError
from penstock.core.ports import Broker, Engine, QueuePolicy
from penstock.engines.process import EngineProcess, EngineSpec
from penstock.gateway.app import create_app
from penstock.gateway.service import Gateway, GatewayConfig
from penstock.observability.jobs import JobRecord, ObservedBroker
from penstock.observability.logs import log_job, request_log
from penstock.observability.metrics import Metrics
from penstock.settings import ModelSettings, Settings
from penstock.worker.worker import Worker

log = structlog.get_logger("penstock")

#: (model, what is being done, fraction done or None)
Progress = Callable[[str, str, float | None], None]

#: Seconds between sweeps: how late a lost lease, a deadline or a delayed retry may be noticed.
SWEEP_INTERVAL = 0.25


def queue_policy(settings: Settings) -> QueuePolicy:
    return QueuePolicy(
        max_queued=settings.max_queued,
        max_queued_per_tenant=settings.max_queued_per_tenant,
        max_running_per_tenant=settings.max_running_per_tenant,
        weights=settings.tenant_weights,
        lease_ttl=settings.lease_ttl,
        result_ttl=settings.result_ttl,
        max_attempts=settings.max_attempts,
    )


def gateway_config(settings: Settings) -> GatewayConfig:
    loopback_names = ("localhost", "127.0.0.1", "::1", settings.host)
    return GatewayConfig(
        models=tuple(model.name for model in settings.models),
        max_body=settings.max_body,
        heartbeat=settings.heartbeat,
        send_deadline=settings.send_deadline,
        disconnect_grace=settings.disconnect_grace,
        drain_timeout=settings.drain_timeout,
        default_max_tokens=settings.default_max_tokens,
        allowed_hosts=tuple(settings.allowed_hosts) or (loopback_names if settings.loopback else ("*",)),
    )


def build_engine(model: ModelSettings, settings: Settings, progress: Progress) -> EngineProcess:
    spec = EngineSpec(model.engine, model.name, model.path, model.options)
    return EngineProcess(
        spec,
        hang_timeout=settings.hang_timeout,
        load_timeout=settings.load_timeout,
        on_progress=lambda what, fraction: progress(model.name, what, fraction),
    )


def build_worker(
    model: ModelSettings,
    settings: Settings,
    broker: Broker,
    metrics: Metrics,
    progress: Progress,
    on_ready: Callable[[str], None],
) -> Worker:
    engine: Engine = metrics.engine(build_engine(model, settings, progress))
    return Worker(
        broker,
        engine,
        lease_ttl=settings.lease_ttl,
        drain_timeout=settings.drain_timeout,
        on_ready=lambda: on_ready(model.name),
    )


async def serve(
    settings: Settings, *, on_listening: Callable[[str], None], progress: Progress, on_ready: Callable[[str], None]
) -> None:
    """Gateway, workers and engines over the embedded broker, until SIGTERM or SIGINT.

    *on_listening* is told the URL, *on_ready* each model that is up.
    """
    listener = _listen(settings)
    with contextlib.closing(listener):
        metrics = Metrics()
        embedded = EmbeddedBroker(settings.data_dir / "broker", policy=queue_policy(settings))
        await embedded.open()
        try:
            observers: list[Callable[[JobRecord], None]] = [metrics.job_ended, log_job]
            if settings.log_dir is not None:
                observers.append(request_log(settings.log_dir))
            broker = ObservedBroker(embedded, observers)
            gateway = Gateway(broker, gateway_config(settings))
            metrics.watch(lambda: gateway.catalogue.stats, lambda: len(gateway.streams))
            workers = [build_worker(model, settings, broker, metrics, progress, on_ready) for model in settings.models]
            app = create_app(gateway, metrics=metrics.render, middleware=[metrics.http])
            async with gateway.running():
                await _run(gateway, _http_server(app, settings), listener, workers, broker, on_listening)
        except* PenstockError as group:
            raise _first(group) from None
        finally:
            await embedded.close()


async def _run(
    gateway: Gateway,
    server: uvicorn.Server,
    listener: socket.socket,
    workers: Sequence[Worker],
    broker: Broker,
    on_listening: Callable[[str], None],
) -> None:
    """Everything at work until a signal; then the drain: streams end, jobs finish or are given back, HTTP closes."""
    with _termination() as terminate:
        async with asyncio.TaskGroup() as tasks:
            sweeping = tasks.create_task(_sweep(broker), name="sweep")
            http = tasks.create_task(server.serve(sockets=[listener]), name="http")
            working = [tasks.create_task(worker.run(), name="worker") for worker in workers]
            on_listening(_url(listener))
            await terminate.wait()
            log.info("draining", streams=len(gateway.streams))
            gateway.drain()
            server.should_exit = True
            for worker in workers:
                worker.stop()
            await asyncio.gather(http, *working)
            sweeping.cancel()


def _http_server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",  # `Gateway.running` is entered and left by us, around the drain
            http="httptools",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=round(settings.drain_timeout) + 2,
            server_header=False,
            date_header=False,
            backlog=4096,
        )
    )


def _first(group: BaseExceptionGroup[PenstockError]) -> PenstockError:
    """What stopped a task group: the rest of it is tasks that were cancelled because of it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PenstockError)
    return error


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the drain is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _termination() -> Iterator[asyncio.Event]:
    """An event set by the first SIGTERM or SIGINT; the second one ends the process at once."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if event.is_set():
            raise SystemExit(1)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield event
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _sweep(broker: Broker) -> None:
    while True:
        try:
            await broker.sweep()
        except PenstockError as error:
            log.warning("sweep_failed", error=error.message)
        await asyncio.sleep(SWEEP_INTERVAL)


def _listen(settings: Settings) -> socket.socket:
    """Bind before anything slow happens, so that a taken port is told at once."""
    if not settings.loopback and not settings.insecure_public:
        raise InvalidRequest(
            f"{settings.host} can be reached from other machines, and there is no authentication. Put a proxy that "
            "authenticates in front of the loopback address, or say --insecure-public if your network is closed."
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=4096)
    except OSError as error:
        where, why = f"{settings.host}:{settings.port}", os.strerror(error.errno or 0)
        raise InvalidRequest(f"Cannot listen on {where}: {why}. Choose another port with --port.") from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
