"""Jobs and Now, by mouse, by keyboard and by what assistive technology is told."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from playwright.async_api import Page, expect

from tests.support.api import ended, poll, submit
from tests.support.browser import Visit, is_over, job_of, shown
from tests.support.server import PATIENCE, Server, model

pytestmark = pytest.mark.asyncio(loop_scope="session")  # the browser's

Open = Callable[..., Awaitable[Visit]]

#: Roles that a person acts on: each needs a name.
CONTROLS = {"button", "textbox", "combobox", "spinbutton", "checkbox", "radio", "tab", "link", "DisclosureTriangle"}


async def controls(page: Page) -> list[tuple[str, str]]:
    """Role and name of every control, as the browser tells assistive technology."""
    session = await page.context.new_cdp_session(page)
    nodes = (await session.send("Accessibility.getFullAXTree"))["nodes"]
    await session.detach()
    return [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in CONTROLS
    ]


#: Text and placeholders whose contrast with the ground behind is below 4.5, borders of fields below 3 (WCAG AA), as
#: "text: ratio".
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour[3] > 200) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest(":disabled, .away, noscript")) continue;
    const [one, other] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) poor.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  for (const field of document.querySelectorAll("input:not([type=checkbox], [type=radio]), select, textarea")) {
    if (field.disabled || !field.checkVisibility()) continue;
    const ratio = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const { borderTopColor } = getComputedStyle(field);
    const around = ratio(light(parse(borderTopColor)), light(ground(field.parentElement)));
    if (around < 3) poor.push(`border of ${field.name || field.id}: ${around.toFixed(2)}`);
    const { color, opacity } = getComputedStyle(field, "::placeholder");
    const behind = ground(field);
    const mixed = parse(color).map((c, i) => c * opacity + behind[i] * (1 - opacity));
    const inside = ratio(light(mixed.slice(0, 3)), light(behind));
    if (field.placeholder && inside < 4.5) poor.push(`${field.placeholder}: ${inside.toFixed(2)}`);
  }
  return poor;
}"""

#: Ids that are there twice, and references that lead nowhere.
REFERENCES = """() => {
  const ids = [...document.querySelectorAll("[id]")].map(({ id }) => id);
  const wrong = ids.filter((id, index) => ids.indexOf(id) !== index);
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls"])
    for (const element of document.querySelectorAll(`[${name}]`))
      for (const id of element.getAttribute(name).split(" "))
        if (!document.getElementById(id)) wrong.push(`${name} ${id}`);
  return wrong;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_control_has_a_name_and_every_text_contrast(server: Server, visit: Open, scheme: str) -> None:
    tab = await visit(server.url, color_scheme=scheme)
    card = await tab.ask("named", model="paced", kind="chat", max_tokens=3)
    await is_over(card)
    job = await job_of(card)
    await tab.page.locator("#composer summary").click()
    running = await tab.ask("more", model="crawl", max_tokens=60)
    await shown(running, 1)
    for view, some in (
        ("playground", "Stop"),
        ("jobs", "Older →"),
        (f"jobs/{job}", "Copy id"),
        ("now", "Unload paced"),
    ):
        await tab.page.evaluate("(view) => { location.hash = view; }", view)
        await tab.page.get_by_role("button", name=some, exact=True).first.wait_for()
        found = await controls(tab.page)
        assert some in [name for _, name in found], view
        assert [role for role, name in found if not name.strip()] == [], view
        assert await tab.page.evaluate(REFERENCES) == [], view
        assert await tab.page.evaluate(CONTRAST) == [], view
        assert await tab.page.locator("h1").count() == 1
    await tab.page.evaluate("location.hash = 'playground'")
    await running.get_by_role("button", name="Stop").click()
    # Streams of tokens are not read out: one quiet region for what is worth saying, and one for the connection.
    live = await tab.page.locator("[aria-live], [role=status], [role=log]").evaluate_all(
        "(all) => all.map(({id}) => id)"
    )
    assert live == ["connection", "announcer"]


async def test_by_keyboard_alone(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    tab = await visit(server.url)
    keyboard = tab.page.keyboard

    async def focused() -> str:
        return str(await tab.page.evaluate("document.activeElement.name || document.activeElement.textContent"))

    async def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(60):
            if await focused() == name:
                return
            await keyboard.press(key)
        raise AssertionError(f"{name} cannot be reached; the focus is on {await focused()}")

    await tab_to("Playground")
    await keyboard.press("ArrowRight")
    assert await focused() == "Jobs"
    await expect(tab.page.locator("#jobs")).to_be_visible()
    await keyboard.press("End")
    await expect(tab.page.locator("#now")).to_be_visible()
    await keyboard.press("ArrowRight")  # around
    await expect(tab.page.locator("#playground")).to_be_visible()
    await expect(tab.page.get_by_role("tab", name="Playground")).to_have_attribute("aria-selected", "true")
    await tab_to("kind")
    await keyboard.press("ArrowRight")
    await expect(tab.page.locator("[name=kind][value=completion]")).to_be_checked()
    await tab_to("model")
    await keyboard.type("crawl")
    await tab_to("prompt")
    await keyboard.type("typed")
    await tab_to("max_tokens")
    await keyboard.press("Control+a")
    await keyboard.type("200")
    await keyboard.press("Control+Enter")
    card = tab.cards.first
    await shown(card, 1)
    await tab_to("Stop")
    await keyboard.press("Enter")
    await is_over(card, "cancelled")
    await tab_to("Remove")
    await keyboard.press("Enter")
    await expect(tab.cards).to_have_count(0)
    assert await focused() == "prompt", "the focus is not lost with what had it"


async def test_the_list_its_filters_and_pages(make_server: Callable[..., Server], visit: Open) -> None:
    server = make_server(models=[model(), model("other", rate=1)])
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        jobs = [await submit(http, prompt="x", max_tokens=2, user_id="ann") for _ in range(30)]
        for job in jobs:
            await ended(http, job)
        running = await submit(http, prompt="x", max_tokens=500, user_id="bob", model="other")
        await poll(lambda: http.get(f"/v1/jobs/{running}"), lambda reply: reply.json()["status"] == "running")
        tab = await visit(server.url, "#jobs")
        rows = tab.page.locator("#job-rows tr")
        await expect(tab.page.locator("#no-jobs")).to_have_text("No jobs like these.")
        await tab.page.get_by_label("Whose").select_option("all")
        await expect(rows).to_have_count(25)
        await expect(rows.first).to_contain_text("bob")
        await tab.page.get_by_role("button", name="Older").click()
        await expect(rows).to_have_count(6)
        await expect(tab.page.locator("#page-number")).to_have_text("Page 2")
        await expect(tab.page.get_by_role("button", name="Older")).to_be_disabled()
        await expect(rows.last.locator("a")).to_have_attribute("href", f"#jobs/{jobs[0]}")
        await tab.page.get_by_role("button", name="Newer").click()
        await expect(rows).to_have_count(25)
        # A refresh leaves alone what has not changed: the focus, a selection, a click that is half done.
        tokens = await rows.first.locator(".number").first.inner_text()
        await rows.nth(3).locator("a").evaluate("(link) => { link.kept = true; link.focus(); }")
        await expect(rows.first.locator(".number").first).not_to_have_text(tokens)
        assert await rows.nth(3).locator("a").evaluate("(link) => link.kept && link === document.activeElement")
        await tab.page.get_by_label("Status").select_option("running")
        await expect(rows).to_have_count(1)
        await tab.page.get_by_label("Status").select_option("")
        await tab.page.locator("#filters [name=model]").select_option("other")
        await expect(rows).to_have_count(1)
        await tab.page.locator("#filters [name=model]").select_option("")
        await tab.page.locator("#filters [name=user]").fill("bob")
        await tab.page.locator("#filters [name=user]").press("Enter")
        await expect(rows).to_have_count(1)
        await tab.be("ann")
        await tab.page.get_by_label("Whose").select_option("mine")
        await expect(rows).to_have_count(25)


async def test_a_job_with_its_log_its_attempts_and_its_end(make_server: Callable[..., Server], visit: Open) -> None:
    server = make_server(rate=8)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        job = await submit(http, prompt="x", max_tokens=500, metadata={"colour": "blue"})
        tab = await visit(server.url, f"#jobs/{job}")
        tab.cut = True
        detail = tab.page.locator("#detail")
        log = detail.get_by_role("group", name="Log", exact=True)
        await expect(log).to_contain_text("3@1 ")
        await asyncio.to_thread(server.kill9)
        await asyncio.to_thread(server.restart)
        await expect(detail.locator(".mark")).to_have_text(re.compile(r"^attempt 2 from \d+$"))
        await expect(detail.locator(".facts")).to_contain_text("blue")
        await expect(log).to_contain_text(re.compile(r"@2 \d+@2 "))
        await detail.get_by_role("button", name="Cancel").click()
        await expect(detail.locator(".log-view .hint")).to_have_text(re.compile(r"^\d+ tokens, 2 attempts, complete$"))
        await expect(detail.locator(".error")).to_contain_text("cancelled")
        await expect(detail.locator(".times li span")).to_have_text(["Created", "Started", "First token", "Ended"])
        await expect(detail.get_by_role("button", name="Cancel")).to_be_hidden()
        text = (await http.get(f"/v1/jobs/{job}")).json()["result"]["text"]
        parts = await log.locator("[data-attempt]").all_text_contents()
        assert "".join(parts) == text
        assert all(f"@{number}" in part for number, part in enumerate(parts, 1))
        await detail.get_by_role("radio", name="Tokens").check(force=True)
        await expect(log.locator(".token")).to_have_count(len(text.split()))
        await expect(log.locator(".token").nth(2)).to_have_attribute("title", "Position 3, token 3, attempt 1")
        tab.page.on("dialog", lambda dialog: asyncio.ensure_future(dialog.accept()))
        await detail.get_by_role("button", name="Delete").click()
        await expect(detail).to_be_hidden()
        assert (await http.get(f"/v1/jobs/{job}")).status_code == 404


async def test_a_waiting_job_is_followed_through_the_queue(make_server: Callable[..., Server], visit: Open) -> None:
    server = make_server(options={"slots": 1}, rate=4)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        first, second, third = [await submit(http, prompt="x", max_tokens=500) for _ in range(3)]
        tab = await visit(server.url, f"#jobs/{third}")
        tab.cut = True
        facts = tab.page.locator("#detail .facts")
        await expect(facts).to_contain_text("Place in the queue2")
        await http.post(f"/v1/jobs/{second}/cancel")
        await expect(facts).to_contain_text("Place in the queue1")
        await asyncio.to_thread(server.kill9)
        await expect(tab.page.locator(".log-view .hint")).to_have_text("0 tokens, reconnecting")
        await asyncio.to_thread(server.restart)
        await http.post(f"/v1/jobs/{first}/cancel")
        await expect(facts).to_contain_text("running")
        await expect(tab.page.locator("#detail .error")).to_have_count(0)


async def test_a_job_that_does_not_exist(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    tab.cut = True
    await tab.page.evaluate("location.hash = 'jobs/job_' + '0'.repeat(32)")
    await expect(tab.page.locator("#detail .error")).to_have_text("No such job.")


async def test_now_shows_what_happens(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    jobs = [await submit(http, prompt="x", model="crawl", max_tokens=300) for _ in range(3)]
    tab = await visit(server.url, "#now")

    def tile(name: str) -> Any:
        return tab.page.locator(".tile", has=tab.page.get_by_text(name, exact=True)).locator("dd")

    await expect(tile("Running")).to_have_text("2")
    await expect(tile("Queued")).to_have_text("1")
    await expect(tile("Tokens/s")).to_have_text(re.compile(r"^[\d.]+$"))
    for number in range(4):
        await ended(http, await submit(http, prompt=str(number), model="paced", max_tokens=2))
    await expect(tile("First token p95")).to_have_text(re.compile(r"^[\d.]+ (ms|s)$"))
    await expect(tile("Whole job p95")).to_have_text(re.compile(r"^[\d.]+ (ms|s)$"))
    await expect(tile("CPU")).to_have_text(re.compile(r"%$"))
    await expect(tile("Memory")).to_have_text(re.compile(r"iB$"))
    assert await tab.page.locator(".chart canvas").count() == 6
    await expect(tab.page.locator("#workers tbody tr")).to_have_count(3)
    spare = tab.page.locator("#models tr", has_text="spare")
    await spare.get_by_role("button", name="Load spare").click()
    await expect(spare.locator(".chip")).to_have_text("ready")
    await spare.get_by_role("button", name="Unload spare").click()
    await expect(spare.locator(".chip")).to_have_text("unloaded")
    for job in jobs:
        await http.post(f"/v1/jobs/{job}/cancel")
    await expect(tile("Running")).to_have_text("0")
    await tab.page.get_by_role("tab", name="Jobs").click()
    asked = len(tab.sent("GET", "/v1/stats"))
    await tab.page.evaluate("new Promise((resolve) => setTimeout(resolve, 3000))")
    assert len(tab.sent("GET", "/v1/stats")) <= asked + 1, "nobody looks, nothing is asked"


async def test_the_theme_is_a_choice_that_stays(server: Server, visit: Open) -> None:
    tab = await visit(server.url, color_scheme="dark")

    async def ground() -> str:
        return str(await tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    dark = await ground()
    button = tab.page.locator("#theme")
    await expect(button).to_have_text("Theme: system")
    await button.click()
    await expect(button).to_have_text("Theme: light")
    light = await ground()
    assert light != dark
    await tab.reload()
    assert await ground() == light
    await button.click()
    await expect(button).to_have_text("Theme: dark")
    assert await ground() == dark


async def test_still_where_the_system_asks_for_it(server: Server, visit: Open) -> None:
    tab = await visit(server.url, reduced_motion="reduce")
    await shown(await tab.ask("still", model="crawl", max_tokens=6), 1)
    moving = "document.getAnimations().filter((each) => each.playState === 'running').length"
    assert await tab.page.evaluate(moving) == 0


async def test_on_a_phone_nothing_is_cut_off(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    await is_over(await tab.ask("narrow", model="paced", kind="chat", max_tokens=3))
    await tab.page.set_viewport_size({"width": 360, "height": 740})
    for view in ("playground", "jobs", "now"):
        await tab.page.evaluate("(view) => { location.hash = view; }", view)
        await expect(tab.page.locator(f"#{view}")).to_be_visible()
        await tab.page.evaluate("new Promise(requestAnimationFrame)")
        assert await tab.page.evaluate("document.documentElement.scrollWidth") <= 360, view


async def test_on_a_phone_the_reply_comes_into_view(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    await tab.page.set_viewport_size({"width": 390, "height": 740})
    card = await tab.ask("below the form", model="paced", max_tokens=3)
    await expect(card.locator(".prompt")).to_be_in_viewport()
