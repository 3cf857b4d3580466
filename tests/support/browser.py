"""The page in a real Chromium, and what every visit of it has to keep: no errors, nothing from elsewhere."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    async_playwright,
    expect,
)

from tests.support.api import poll
from tests.support.server import PATIENCE

expect.set_options(timeout=PATIENCE * 1000)


def chromium_binary() -> str:
    """Where Chromium is; a laptop without one skips the test, CI fails."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    message = "chromium is not installed (on Debian: apt install chromium)"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A headless browser of its own."""
    arguments = ["--disable-dev-shm-usage"]  # containers have little of it
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium_binary(), args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


class Visit:
    """One tab of one visitor at *url*, and everything that it asked for."""

    def __init__(self, context: BrowserContext, page: Page, url: str) -> None:
        self.context = context
        self.page = page
        self.url = url
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self.cut = False
        """The test takes the network or the server away: failed requests are no problem then."""
        page.set_default_timeout(PATIENCE * 1000)
        page.on("request", lambda request: self.requests.append(request))
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"{error}\n{error.stack}"))

    def _console(self, message: ConsoleMessage) -> None:
        failed = re.search(
            r"Failed to load resource: (net::|the server responded with a status of (404|502|503))", message.text
        )
        if message.type in ("error", "warning") and not (failed and self.cut):
            self.problems.append(f"{message.text} ({message.location})")

    async def open(self, view: str = "") -> Visit:
        await self.page.goto(f"{self.url}/{view}")
        await self.connected()
        return self

    async def connected(self) -> None:
        await expect(self.page.locator("#connection")).to_have_text("Live")

    async def reload(self) -> None:
        await self.page.reload()
        await self.connected()

    def sent(self, method: str, path: str) -> list[Request]:
        """Requests of *method* whose path (without the query) is *path*."""
        wanted = re.compile(rf"{re.escape(self.url)}{path}(\?.*)?")
        return [each for each in self.requests if each.method == method and wanted.fullmatch(each.url)]

    def check(self) -> None:
        assert self.problems == []
        elsewhere = [each.url for each in self.requests if not each.url.startswith(self.url + "/")]
        assert elsewhere == [], "a request left the origin"

    # ------------------------------------------------------------------------------------ playground

    async def user(self) -> str:
        return await self.page.locator("#user").input_value()

    async def be(self, name: str) -> None:
        field = self.page.locator("#user")
        await field.fill(name)
        await field.press("Enter")
        await self.connected()

    async def compose(
        self, text: str, *, model: str, kind: str = "completion", max_tokens: int = 16, lines: bool = False
    ) -> None:
        """Fill the form."""
        form = self.page.locator("#composer")
        await form.locator(f"option[value='{model}']").wait_for(state="attached")
        await form.locator("[name=model]").select_option(model)
        await form.locator(f"[name=kind][value={kind}]").check(force=True)  # its label is what one sees
        await form.locator("[name=max_tokens]").fill(str(max_tokens))
        await form.locator("[name=lines]").set_checked(lines)
        await form.locator("[name=prompt]").fill(text)

    async def ask(self, text: str, **fields: Any) -> Locator:
        """Send a prompt; its card. (With ``lines``: one of several.)"""
        await self.compose(text, **fields)
        await self.page.locator("#composer button[type=submit]").click()
        first = text.splitlines()[0] if fields.get("lines") else text
        return self.page.locator(".card").filter(has=self.page.locator(".prompt", has_text=first)).first

    @property
    def cards(self) -> Locator:
        return self.page.locator(".card")


async def job_of(card: Locator) -> str:
    """The id of the latest job of a card."""
    link = card.locator("a.button")
    await expect(link).to_have_attribute("href", re.compile("#jobs/job_"))
    return (await link.get_attribute("href") or "").removeprefix("#jobs/")


async def text_of(card: Locator) -> str:
    """The text of a card's latest reply, to the last blank."""
    return await card.locator(".reply").last.evaluate("element => element.textContent")


async def tokens_of(card: Locator) -> list[str]:
    """What the synthetic engine wrote, token by token."""
    return (await text_of(card)).split()


async def shown(card: Locator, count: int) -> None:
    """Wait until a card shows at least *count* tokens of the synthetic engine."""

    await poll(lambda: tokens_of(card), lambda tokens: len(tokens) >= count)


async def is_over(card: Locator, state: str = "completed") -> None:
    await expect(card).to_have_attribute("data-state", state)


async def result(http: httpx.AsyncClient, job: str) -> str:
    """A job's text by the API."""
    return str((await http.get(f"/v1/jobs/{job}")).raise_for_status().json()["result"]["text"])
