"""The page for people: ``/`` and its files. Everything it shows comes from the public API."""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.core.errors import NotFound
from penstock.gateway.http import Call
from penstock.gateway.operation import Operation

#: What the page consists of, and how each kind is called. Anything else in the folder (licences, notes) is not served.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    # Everything from here, nothing inline: text that a model wrote cannot become a script, nor leave this origin.
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # ask each time, and get a 304: a page never outlives the server's version
}


class Asset(NamedTuple):
    body: bytes
    type: str
    etag: str


@functools.cache
def assets() -> dict[str, Asset]:
    """Every file of the page by its path in ``penstock/web``, read once. What is not here cannot be asked for."""
    return dict(_read(files("penstock").joinpath("web"), ""))


def _read(folder: Traversable, prefix: str) -> list[tuple[str, Asset]]:
    found: list[tuple[str, Asset]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
        elif (kind := TYPES.get(f".{entry.name.rpartition('.')[2]}")) is not None:
            body = entry.read_bytes()
            found.append((prefix + entry.name, Asset(body, kind, f'"{hashlib.sha256(body).hexdigest()[:24]}"')))
    return found


async def index(call: Call) -> ASGIApp:
    return _serve(call, "index.html")


async def static(call: Call) -> ASGIApp:
    return _serve(call, call.path["path"])


def _serve(call: Call, path: str) -> Response:
    asset = assets().get(path)
    if asset is None:
        raise NotFound(f"The page has no file {path[:100]!r}.")
    headers = {**HEADERS, "etag": asset.etag}
    if _known(call.headers.get("if-none-match", ""), asset.etag):
        return Response(status_code=304, headers=headers)
    return Response(asset.body, 200, headers, asset.type)


def _known(held: str, etag: str) -> bool:
    """Does ``If-None-Match`` name *etag*? Weakly compared, as RFC 9110 asks (a proxy that compresses weakens it)."""
    return held.strip() == "*" or etag in (each.strip().removeprefix("W/") for each in held.split(","))


OPERATIONS = [
    Operation("GET", "/", index, scope="public"),
    Operation("GET", "/static/{path:path}", static, scope="public"),
]
