"""The whole gateway in one place: its routes, and how a request finds the one that it means."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.routing import Router, compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import InvalidRequest, NotFound
from penstock.gateway import openapi
from penstock.gateway.batches import routes as batches
from penstock.gateway.dialects.registry import DIALECTS
from penstock.gateway.files import routes as files
from penstock.gateway.gateway import Gateway
from penstock.gateway.http import NATIVE, Dialect, Resources, refuse
from penstock.gateway.identity import anybody
from penstock.gateway.middleware import Frame, HostCheck, Middleware, OriginCheck, Slashes
from penstock.gateway.operation import Endpoint, Operation
from penstock.gateway.operator import health, models, page

#: Every route there is: what clients of all kinds ask for, files and batches, what operators ask for, the page.
OPERATIONS: list[Operation] = [
    *DIALECTS,
    *files.OPERATIONS,
    *batches.OPERATIONS,
    *models.OPERATIONS,
    *health.OPERATIONS,
    *page.OPERATIONS,
]
OPERATIONS += openapi.operations(OPERATIONS)


def create_app(
    gateway: Gateway,
    resources: Resources | None = None,
    *,
    middleware: Sequence[Middleware] = (),
    operations: Sequence[Operation] = OPERATIONS,
) -> ASGIApp:
    """The ASGI app. *resources*: what this server has besides jobs. *middleware* (outermost first) sees all of HTTP."""
    app: ASGIApp = _Dispatch(gateway)
    app = OriginCheck(app, gateway.config.allowed_origins)
    app = HostCheck(app, gateway.config.allowed_hosts)
    app = Routes(app, gateway, operations, resources or {})
    app = Frame(app)
    app = Slashes(app)
    for layer in reversed(middleware):
        app = layer(app)
    return app


class Routes:
    """Finds the operation that is meant, before anything is refused: so that whatever refuses does it in its words."""

    def __init__(self, app: ASGIApp, gateway: Gateway, operations: Sequence[Operation], resources: Resources) -> None:
        self.app = app
        paths: dict[str, _Path] = {}
        nobody = anybody(operates=gateway.config.manageable)
        for operation in operations:
            endpoint = Endpoint(operation, gateway.jobs, resources, nobody)
            paths.setdefault(operation.path, _Path()).add(endpoint)
        # What ends in any path would take those that go on behind it: it comes last.
        ordered = sorted(paths.items(), key=lambda each: each[0].endswith(":path}"))
        self._paths = [(*compile_path(path), found) for path, found in ordered]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["endpoint"], scope["penstock.dialect"] = self._find(scope)
        if (error := scope.get("penstock.refusal")) is not None:  # what came was no HTTP
            await refuse(error, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _find(self, scope: Scope) -> tuple[ASGIApp, Dialect]:
        for pattern, _, converters, path in self._paths:
            if (match := pattern.match(scope["path"])) is not None:
                given = match.groupdict().items()
                scope["path_params"] = {name: converters[name].convert(value) for name, value in given}
                return path.meant(scope)
        return _nothing_here, self._nearest(scope["path"])

    def _nearest(self, path: str) -> Dialect:
        """Of the longest path above *path* that is somebody's."""
        above = [(len(form), found) for _, form, _, found in self._paths if f"{path}/".startswith(f"{form}/")]
        return max(above)[1].endpoints[0].operation.dialect if above else NATIVE


class _Path:
    """The endpoints of one path; those that ask for a header come first."""

    def __init__(self) -> None:
        self.endpoints: list[Endpoint] = []

    def add(self, endpoint: Endpoint) -> None:
        self.endpoints.insert(0 if endpoint.operation.header else len(self.endpoints), endpoint)

    def meant(self, scope: Scope) -> tuple[ASGIApp, Dialect]:
        """Who answers, and in which words."""
        fit = [each for each in self.endpoints if _asked_by(each.operation.header, scope)]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        for endpoint in fit:
            if endpoint.operation.method in (method, "*"):
                if endpoint.operation.generates:
                    scope["penstock.generation"] = endpoint.operation.path
                return endpoint, endpoint.operation.dialect
        return self._not_allowed, (fit or self.endpoints)[0].operation.dialect

    async def _not_allowed(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods = list(dict.fromkeys(endpoint.operation.method for endpoint in self.endpoints))
        allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
        error = InvalidRequest(f"{scope['method']} is not allowed on {scope['path']}: {allowed} is.")
        error.status = 405
        await refuse(error, scope, receive, send, {"allow": allowed})


def _asked_by(header: str, scope: Scope) -> bool:
    return not header or any(name == header.encode() for name, _ in scope["headers"])


class _Dispatch:
    """The innermost layer: whoever was found answers."""

    def __init__(self, gateway: Gateway) -> None:
        @contextlib.asynccontextmanager
        async def lifespan(app: object) -> AsyncIterator[None]:
            async with gateway.running():
                yield

        self._others = Router(lifespan=lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (scope["endpoint"] if scope["type"] == "http" else self._others)(scope, receive, send)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    await refuse(NotFound(f"There is nothing at {scope['path']}. See /docs."), scope, receive, send)
