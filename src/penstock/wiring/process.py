"""A process that serves, from its start to the end of its drain: a gateway, workers with their engines, or both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import structlog
import uvicorn

from penstock.core.aio import first_done
from penstock.core.errors import PenstockError, first_of
from penstock.core.ports import Broker
from penstock.engines.host.standby import WarmPool
from penstock.gateway.gateway import Gateway
from penstock.observability.broker import observed
from penstock.observability.jobs import JobWatch
from penstock.observability.metrics import Metrics
from penstock.observability.telemetry import Publisher
from penstock.server import Address, http_server, termination
from penstock.settings import Settings
from penstock.wiring import parts
from penstock.wiring.parts import Watcher
from penstock.worker.manager import ModelManager

log = structlog.get_logger("penstock")

#: Seconds between sweeps: how late a lost lease, a deadline or a delayed retry may be noticed.
SWEEP_INTERVAL = 0.25


async def run(settings: Settings, watcher: Watcher, *, api: bool, workers: bool) -> None:
    """Serve the *api*, *workers*, or both, over the broker of *settings*; until SIGTERM or SIGINT."""
    if workers:
        parts.check_models(settings)
    metrics = Metrics(gateway=api, worker=workers)
    telemetry = Publisher(*parts.subscribers(settings, metrics))
    with parts.claim_address(settings, api) as address, termination() as terminate:
        try:
            async with parts.opened_broker(settings, telemetry, watcher, terminate) as store:
                if store is None:
                    return  # the signal came first
                jobs = JobWatch(observed(store, telemetry), telemetry)
                warm = WarmPool(settings.engine.warm_processes)
                manager = (
                    parts.build_manager(settings, jobs.broker, metrics, warm, watcher, telemetry) if workers else None
                )
                gateway = Gateway(jobs.broker, parts.gateway_config(settings, store.kind, api), models=manager)
                batches = parts.build_batches(settings, gateway) if api else None
                app = parts.build_app(gateway, manager, batches, jobs, metrics)
                server = http_server(app, drain_timeout=settings.server.drain_timeout)
                async with contextlib.AsyncExitStack() as running:
                    await running.enter_async_context(contextlib.aclosing(warm))
                    await running.enter_async_context(gateway.running(catalogue=api))
                    if batches is not None:
                        await running.enter_async_context(batches.running())
                    address.open()
                    watcher.listening(address.url)
                    await _work(gateway, manager, server, address, jobs.broker, terminate, api=api)
        except* PenstockError as group:
            raise first_of(group) from None


async def _work(
    gateway: Gateway,
    manager: ModelManager | None,
    server: uvicorn.Server,
    address: Address,
    broker: Broker,
    terminate: asyncio.Event,
    *,
    api: bool,
) -> None:
    """Everything at work until a signal, or until a part of it fails; then the drain: streams end, jobs finish or are
    given back, HTTP closes. Raises what failed."""
    http = asyncio.create_task(server.serve(sockets=[address.socket]), name="http")
    working: list[asyncio.Task[Any]] = [http, asyncio.create_task(_sweep(broker), name="sweep")]
    ends: list[Coroutine[Any, Any, Any]] = [terminate.wait()]
    if manager is not None:
        working.append(models := asyncio.create_task(manager.run(), name="models"))
        ends.append(manager.stopped())
    try:
        await first_done(asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED), *ends)
        log.info("draining", streams=len(gateway.streams))
        gateway.drain()
        server.should_exit = api  # a worker alone tells how its drain goes to the end
        if manager is not None:
            manager.stop()
            await asyncio.wait([models])
        server.should_exit = True
        await asyncio.wait([http])
    finally:
        for task in working:
            task.cancel()
        results = await asyncio.gather(*working, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _sweep(broker: Broker) -> None:
    while True:
        try:
            await broker.sweep()
        except PenstockError as error:
            log.warning("sweep_failed", error=error.message)
        await asyncio.sleep(SWEEP_INTERVAL)
