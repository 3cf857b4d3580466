"""The page's files over HTTP; what it does in a browser is in tests/browser."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import httpx
import pytest

from penstock.gateway.operator.page import assets
from tests.support.api import check_error
from tests.support.http import send
from tests.support.server import Server

#: What one file of the page says of others.
NAMES = {
    ".html": r'(?:src|href)="([^"#]+)"',
    ".js": r'(?:from|import) "([^"]+)"',
    ".css": r"url\(\"?([^)\"]+)\"?\)",
}


async def test_the_page_and_all_that_it_names(http: httpx.AsyncClient) -> None:
    """Walked as a browser would; every file that is served is reached, and none leads elsewhere."""
    found: dict[str, httpx.Response] = {}
    todo = ["/"]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found[path] = reply = await http.get(path)
        assert reply.status_code == 200, path
        kind = path[path.rfind(".") :] if "." in path else ".html"
        text = re.sub(r"/\*.*?\*/", "", reply.text, flags=re.DOTALL)  # types are imported in comments
        for name in re.findall(NAMES.get(kind, r"(?!)"), text):
            there = urljoin(path, name)
            assert there.startswith("/"), f"{path} names {name}"
            if there not in ("/docs", "/openapi.json"):
                todo.append(there)
    assert set(found) == {"/"} | {f"/static/{path}" for path in assets() if path != "index.html"}
    for path, reply in found.items():
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';"), path
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"
    kinds = {path[path.rfind(".") :]: reply.headers["content-type"] for path, reply in found.items() if "." in path}
    assert kinds == {
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".svg": "image/svg+xml",
    }
    assert found["/"].headers["content-type"] == "text/html; charset=utf-8"


async def test_nothing_is_inline(http: httpx.AsyncClient) -> None:
    """The policy would refuse it; and what a model wrote is only ever set as text."""
    html = (await http.get("/")).text
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", html)
    for path in assets():
        if path.endswith(".js") and not path.startswith("vendor/"):
            text = (await http.get(f"/static/{path}")).text
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


async def test_what_has_not_changed_is_not_sent_again(http: httpx.AsyncClient) -> None:
    for path in ("/", "/static/style.css", "/static/js/main.js"):
        first = await http.get(path)
        etag = first.headers["etag"]
        for held in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            again = await http.get(path, headers={"if-none-match": held})
            assert (again.status_code, again.content) == (304, b""), held
            assert again.headers["etag"] == etag
        other = await http.get(path, headers={"if-none-match": '"other"'})
        assert other.content == first.content


async def test_head(http: httpx.AsyncClient) -> None:
    for path in ("/", "/static/style.css"):
        whole, head = await http.get(path), await http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))
        assert head.headers["etag"] == whole.headers["etag"]
    assert (await http.post("/")).status_code == 405


@pytest.mark.parametrize(
    "path",
    ["nothing.js", "", "js", "js/", "vendor/uplot/LICENSE", "../settings.py", "..%2fsettings.py", "%2e%2e/settings.py",
     "js/../../settings.py", "/etc/passwd", "%2fetc%2fpasswd", "style.css%00", "..\\settings.py", "STYLE.CSS"],
)  # fmt: skip
async def test_only_the_pages_files_are_served(server: Server, path: str) -> None:
    async with await send(f"{server.url}/static/{path}") as answer:  # by hand: clients tidy such paths up
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "not_found"


async def test_health_says_whether_models_can_be_managed_here(http: httpx.AsyncClient) -> None:
    """The page has buttons for it only where they would work."""
    assert (await http.get("/health")).json()["manageable"] is True
    check_error(await http.post("/v1/models/nothing/load"), 404, "model_not_found")
