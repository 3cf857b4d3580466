"""Take the pictures of the page that the documentation shows: ``python -m tests.browser.screenshots``.

They look as this machine's fonts do; with Inter installed (on Debian: fonts-inter), as in the repository.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
from pathlib import Path

import httpx
from PIL import Image
from playwright.async_api import Browser, Page, expect

from tests.support.browser import Visit, chromium, is_over, job_of, shown
from tests.support.server import PATIENCE, Server, model

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
STORIES = ["Once upon a time, a fox", "The old miller", "In the morning, the sea", "A boy named Tom", "The little boat",
           "One day, a girl found", "Far away, on a hill,", "The rain began and"]  # fmt: skip
SIZE = (1440, 900)


def server_in(folder: Path) -> Server:
    """The bundled model, and a synthetic one that is slow enough to be looked at."""
    models = [
        {"name": "millrace", "options": {"threads": "1"}},
        model("synthetic", rate=14),
        model("queue", rate=9, slots=2),
    ]
    return Server(folder, models=models)


async def take(page: Page, name: str) -> None:
    picture = Image.open(io.BytesIO(await page.screenshot(animations="disabled"))).convert("RGB")
    small = picture.quantize(
        256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )  # flat colours: half the size
    small.save(IMAGES / f"{name}.png", optimize=True)
    print(f"{name}.png: {(IMAGES / f'{name}.png').stat().st_size // 1024} KiB")


async def visitor(browser: Browser, server: Server, scheme: str, size: tuple[int, int] = SIZE) -> Visit:
    context = await browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    tab = Visit(context, await context.new_page(), server.url)
    await tab.open()
    return tab


async def playground(browser: Browser, server: Server, scheme: str) -> None:
    """Eight streams at once, and one conversation that has ended."""
    tab = await visitor(browser, server, scheme)
    await tab.be("ann")
    chat = await tab.ask("What is a river?", model="millrace", kind="chat", max_tokens=64)
    await is_over(chat)
    await tab.page.locator("#composer summary").click()
    await tab.page.locator("#composer [name=ignore_eos]").check()
    await tab.page.locator("#composer summary").click()
    await tab.ask("\n".join(STORIES), model="millrace", max_tokens=900, lines=True)
    await expect(tab.page.locator(".card[data-state=running]")).to_have_count(8)
    await shown(tab.page.locator(".card[data-state=running]").first, 60)
    await expect(tab.page.locator(".card .figures", has_text="tokens/s")).to_have_count(9)
    await take(tab.page, f"playground-{scheme}")
    await tab.page.get_by_role("button", name="Stop all").click()
    await tab.context.close()


async def jobs(browser: Browser, server: Server, scheme: str) -> None:
    """A job that a killed server went on with, opened."""
    tab = await visitor(browser, server, scheme)
    tab.cut = True
    await tab.be("bob")
    for story in STORIES[:4]:
        await is_over(await tab.ask(story, model="millrace", max_tokens=60))
    card = await tab.ask("Count the boats", model="synthetic", max_tokens=64)
    await shown(card, 25)
    await asyncio.to_thread(server.kill9)
    await asyncio.to_thread(server.restart)
    await is_over(card)
    survivor = await job_of(card)
    await tab.ask("one\ntwo\nthree", model="queue", max_tokens=300, lines=True)
    await tab.page.goto(f"{server.url}/#jobs/{survivor}")
    await expect(tab.page.locator(".log-view .hint")).to_have_text("64 tokens, 2 attempts, complete")
    await take(tab.page, f"jobs-{scheme}")
    await tab.context.close()


async def now(browser: Browser, server: Server, scheme: str) -> None:
    """A minute of traffic."""
    tab = await visitor(browser, server, scheme)
    await tab.page.get_by_role("tab", name="Now").click()
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        for second in range(45):
            for number in range(1 + second % 15 // 4):
                text = {"model": "millrace", "prompt": STORIES[number % 4], "max_tokens": 20 + 10 * number}
                await http.post("/v1/jobs", json=text)
            if second % 3 == 0:
                await http.post("/v1/jobs", json={"model": "queue", "prompt": "x", "max_tokens": 20 + second})
            await asyncio.sleep(1)
        await take(tab.page, f"now-{scheme}")
    await tab.context.close()


async def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = server_in(Path(folder))
        try:
            await asyncio.to_thread(server.start)
            async with chromium() as browser:
                for scheme in ("light", "dark"):
                    await playground(browser, server, scheme)
                    await jobs(browser, server, scheme)
                await asyncio.gather(*(now(browser, server, scheme) for scheme in ("light", "dark")))
        finally:
            server.stop()


if __name__ == "__main__":
    asyncio.run(main())
