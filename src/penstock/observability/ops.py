"""What a worker answers over HTTP: nothing but how it is. It has no gateway."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

#: As on every answer of the gateway.
HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


def worker_app(render: Callable[[], tuple[bytes, str]], is_ready: Callable[[], bool], models: ASGIApp) -> ASGIApp:
    """``/metrics`` as *render* writes them, ``/healthz`` (the process answers), ``/readyz`` (its models are up, or
    loaded when they are wanted); *models* answers everything else: what its operator may do with them."""

    async def metrics(request: Request) -> Response:
        body, media_type = render()
        return Response(body, headers=HEADERS, media_type=media_type)

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers=HEADERS)

    async def readyz(request: Request) -> Response:
        ready = is_ready()
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503, HEADERS)

    routes = [Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]
    return Router(routes, default=models, redirect_slashes=False)
