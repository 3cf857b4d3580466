"""For operators: alive, ready, what is up, what is counted, and the API described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.gateway.http import Call, Resource, json_reply
from penstock.gateway.operation import Operation
from penstock.gateway.operator.answers import Health, Live, Ready
from penstock.gateway.operator.models import MODELS

#: Renders what is counted: the bytes, and their media type.
METRICS: Resource[Callable[[], tuple[bytes, str]]] = Resource("Nothing is counted here.")


async def healthz(call: Call) -> ASGIApp:
    """Liveness: the process answers. It tells of the broker, as last seen, but does not fail with it: whoever restarts
    what is not alive would restart every gateway when Redis is."""
    broker = "connected" if call.catalogue.reachable else "unavailable"
    return json_reply({"status": "ok", "broker": broker})


async def readyz(call: Call) -> ASGIApp:
    """Readiness: the broker is reachable and a live worker serves the default model, or loads it when a job comes."""
    catalogue = call.catalogue
    await catalogue.refresh()
    checks = {
        "broker": catalogue.reachable,
        "worker": catalogue.ready(None),
        "accepting": not call.streams.closing,
    }
    ready = all(checks.values())
    headers = None if ready else {"retry-after": "1"}
    return json_reply({"status": "ready" if ready else "not ready", "checks": checks}, 200 if ready else 503, headers)


async def health(call: Call) -> ASGIApp:
    """The whole picture: broker, workers, models, queue."""
    catalogue = call.catalogue
    await catalogue.refresh()
    stats = catalogue.stats
    broker: dict[str, Any] = {"kind": call.config.broker, "connected": catalogue.reachable}
    well = catalogue.reachable and not any(catalogue.away(name) for name in catalogue.names)
    view: dict[str, Any] = {"status": "ok" if well else "degraded", "broker": broker}
    if stats is not None and catalogue.reachable:
        broker["durability"] = stats.durability
        view["queue"] = {
            "queued": stats.queued,
            "jobs": stats.jobs,
            "ended_per_second": stats.drain_rate,
            "leases_lost": stats.leases_lost,
        }
        view["workers"] = [
            {
                "id": worker.id,
                "state": worker.state,
                "slots": worker.slots,
                "models": [model.name for model in worker.models],
                "seen_at": worker.seen_at,
                "on_demand": worker.on_demand,
                "detail": worker.detail or None,
                "error": worker.error,
                "memory_bytes": worker.memory or None,
                "standby": worker.standby,
            }
            for worker in catalogue.workers
        ]
    queued = Counter[str]()
    for (name, _), count in stats.depth.items() if stats is not None else ():
        queued[name] += count
    view["manageable"] = call.has(MODELS) and "operator" in call.identity.rights
    view["models"] = [
        {
            "id": name,
            "ready": catalogue.ready(name),
            "state": catalogue.state(name),
            "queued": queued[name],
            "workers": {worker.id: worker.state_of(name) for worker in catalogue.workers_of(name)},
            "info": catalogue.info(name),
        }
        for name in catalogue.names
    ]
    return json_reply(view)


async def metrics(call: Call) -> ASGIApp:
    body, content_type = call.use(METRICS)()
    return Response(body, media_type=content_type)


OPERATIONS = [
    Operation(method="GET", path="/healthz", handler=healthz, summary="Liveness", answers={200: Live}, scope="public"),
    Operation(
        method="GET",
        path="/readyz",
        handler=readyz,
        summary="Readiness",
        answers={200: Ready, 503: Ready},
        scope="public",
    ),
    Operation(
        method="GET",
        path="/health",
        handler=health,
        summary="Broker, workers, models, queue",
        answers={200: Health},
        scope="viewer",
    ),
    Operation(method="GET", path="/metrics", handler=metrics, scope="viewer"),
]
