"""For operators: alive, ready, what is up, what is counted, and the API described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from msgspec import UNSET
from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.api.errors import Error
from penstock.api.stats import Stats
from penstock.core.ports import QueueStats, WorkerInfo
from penstock.gateway.catalogue import Catalogue
from penstock.gateway.http import Call, Resource, json_reply
from penstock.gateway.operation import Operation
from penstock.gateway.operator.answers import (
    BrokerHealth,
    Checks,
    Health,
    Live,
    ModelHealth,
    QueueHealth,
    Ready,
    WorkerHealth,
)
from penstock.gateway.operator.models import MODELS

#: Renders what is counted: the bytes, and their media type.
METRICS: Resource[Callable[[], tuple[bytes, str]]] = Resource("Nothing is counted here.")
#: The figures that the page draws, with the queue as the catalogue saw it last.
STATS: Resource[Callable[[], Stats]] = Resource("Nothing is counted here.")


async def healthz(call: Call) -> ASGIApp:
    """Liveness: the process answers. It tells of the broker, as last seen, but does not fail with it: whoever restarts
    what is not alive would restart every gateway when Redis is."""
    broker: Literal["connected", "unavailable"] = "connected" if call.catalogue.reachable else "unavailable"
    return json_reply(Live("ok", broker))


async def readyz(call: Call) -> ASGIApp:
    """Readiness: the broker is reachable and a live worker serves the default model, or loads it when a job comes."""
    catalogue = call.catalogue
    await catalogue.refresh()
    checks = Checks(catalogue.reachable, catalogue.ready(None), not call.streams.closing)
    ready = checks.broker and checks.worker and checks.accepting
    headers = None if ready else {"retry-after": "1"}
    return json_reply(Ready("ready" if ready else "not ready", checks), 200 if ready else 503, headers)


async def health(call: Call) -> ASGIApp:
    """The whole picture: broker, workers, models, queue. What the broker tells is there while it is reachable."""
    catalogue = call.catalogue
    await catalogue.refresh()
    stats = catalogue.stats if catalogue.reachable else None
    well = stats is not None and not any(catalogue.away(name) for name in catalogue.names)
    answer = Health(
        status="ok" if well else "degraded",
        broker=BrokerHealth(call.config.broker, catalogue.reachable, stats.durability if stats else UNSET),
        queue=_queue(stats) if stats else UNSET,
        workers=[_worker(worker) for worker in catalogue.workers] if stats else UNSET,
        models=_models(catalogue),
        manageable=call.has(MODELS) and "operator" in call.identity.rights,
    )
    return json_reply(answer)


def _queue(stats: QueueStats) -> QueueHealth:
    jobs = {status.value: count for status, count in stats.jobs.items()}
    return QueueHealth(stats.queued, jobs, stats.drain_rate, stats.leases_lost)


def _worker(worker: WorkerInfo) -> WorkerHealth:
    return WorkerHealth(
        id=worker.id,
        state=worker.state,
        slots=worker.slots,
        models=[model.name for model in worker.models],
        seen_at=worker.seen_at,
        on_demand=worker.on_demand,
        detail=worker.detail or None,
        error=Error.of(worker.error) if worker.error is not None else None,
        memory_bytes=worker.memory or None,
        standby=worker.standby,
    )


def _models(catalogue: Catalogue) -> list[ModelHealth]:
    queued = Counter[str]()
    for (name, _), count in catalogue.stats.depth.items() if catalogue.stats is not None else ():
        queued[name] += count
    return [
        ModelHealth(
            id=name,
            ready=catalogue.ready(name),
            state=catalogue.state(name),
            queued=queued[name],
            workers={worker.id: worker.state_of(name) for worker in catalogue.workers_of(name)},
            info=catalogue.info(name),
        )
        for name in catalogue.names
    ]


async def metrics(call: Call) -> ASGIApp:
    body, content_type = call.use(METRICS)()
    return Response(body, media_type=content_type)


async def stats(call: Call) -> ASGIApp:
    """What the page draws, from the sources of the metrics."""
    await call.catalogue.refresh()
    return json_reply(call.use(STATS)())


OPERATIONS = [
    Operation("GET", "/healthz", healthz, "Liveness", answers={200: Live}, scope="public"),
    Operation("GET", "/readyz", readyz, "Readiness", answers={200: Ready, 503: Ready}, scope="public"),
    Operation("GET", "/health", health, "Broker, workers, models, queue", answers={200: Health}, scope="viewer"),
    Operation("GET", "/metrics", metrics, scope="viewer"),
    Operation("GET", "/v1/stats", stats, "The figures of one process", answers={200: Stats}, scope="viewer"),
]
