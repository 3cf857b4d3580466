"""The page in a real browser against real servers. A `Visit` checks at its end that nothing went wrong unseen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.support.browser import Visit, chromium, chromium_binary
from tests.support.server import PATIENCE, Server, model

VIOLATIONS = "addEventListener('securitypolicyviolation', (event) => console.error('CSP', event.violatedDirective))"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``paced`` (8 tokens/s, fails at the word FAIL), ``crawl`` (2 tokens/s, two slots), ``spare`` (on demand)."""
    chromium_binary()  # without one, no server either
    shared = Server(
        tmp_path_factory.mktemp("server"),
        models=[
            model("paced", rate=8, fail="FAIL"),
            model("crawl", rate=2, slots=2),
            {**model("spare", rate=50), "load": "demand"},
        ],
    )
    try:
        yield shared.start()
    finally:
        shared.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One for all tests; each visitor has a context of its own in it."""
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def visit(browser: Browser) -> AsyncIterator[Callable[..., Awaitable[Visit]]]:
    """Open the page of a server (its URL) as a new visitor; options are those of a browser context."""
    visits: list[Visit] = []

    async def make(url: str, view: str = "", **options: object) -> Visit:
        context = await browser.new_context(viewport={"width": 1280, "height": 860}, **options)  # type: ignore[arg-type]
        await context.add_init_script(VIOLATIONS)
        visits.append(Visit(context, await context.new_page(), url))
        return await visits[-1].open(view)

    yield make
    for each in visits:
        await each.context.close()
    for each in visits:
        each.check()
