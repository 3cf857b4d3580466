"""Prompts on the page: streamed, several at once, stopped, continued; each submitted once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import httpx
import pytest
from playwright.async_api import Route, expect

from tests.support.api import poll, submit, text_of
from tests.support.browser import Visit, is_over, job_of, result, shown
from tests.support.browser import text_of as page_text
from tests.support.server import PATIENCE, Server

pytestmark = pytest.mark.asyncio(loop_scope="session")  # the browser's

Open = Callable[..., Awaitable[Visit]]

#: Records every text that the first reply on the page ever had.
WATCH = """() => {
  window.texts = [];
  const watched = document.querySelector("#cards");
  new MutationObserver(() => {
    const text = watched.querySelector(".reply")?.textContent ?? "";
    if (text !== window.texts.at(-1)) window.texts.push(text);
  }).observe(watched, { childList: true, characterData: true, subtree: true });
}"""


async def jobs_of(http: httpx.AsyncClient, visit: Visit) -> list[str]:
    reply = await http.get("/v1/jobs", params={"user_id": await visit.user(), "limit": 500})
    return [job["id"] for job in reply.json()["data"]]


async def test_tokens_appear_one_by_one(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    tab = await visit(server.url)
    await tab.page.evaluate(WATCH)
    card = await tab.ask("count", model="paced", max_tokens=12)
    await is_over(card)
    assert await page_text(card) == await result(http, await job_of(card)) == text_of(12)
    texts = [text for text in await tab.page.evaluate("window.texts") if text]
    assert len(texts) > 4, "not in a few lumps"
    for text in texts:
        assert text == text_of(len(text.split())), "whole tokens, in order, nothing twice"


async def test_the_figures(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    tab = await visit(server.url)
    card = await tab.ask("count", model="paced", max_tokens=8)
    await is_over(card)
    await expect(card.locator(".figures")).to_have_text(re.compile(r"^8 tokens · first after .+s · [\d.]+ tokens/s$"))
    await expect(tab.page.locator("#announcer")).to_have_text("The reply to “count” is complete: 8 tokens")
    timings = (await http.get(f"/v1/jobs/{await job_of(card)}")).json()["timings"]
    told = await card.locator(".figures").inner_text()
    assert f"{timings['tokens_per_second']:.1f}".removesuffix(".0") in told


async def test_eight_streams_over_one_connection(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    tab = await visit(server.url)
    prompts = [f"stream {number}" for number in range(8)]
    await tab.ask("\n".join(prompts), model="paced", max_tokens=40, lines=True)
    await expect(tab.page.locator(".card[data-state=running]")).to_have_count(8)
    await expect(tab.page.locator("#totals")).to_have_text(re.compile(r"^8 running · \d+ tokens/s$"))
    await expect(tab.page.locator(".card[data-state=completed]")).to_have_count(8)
    jobs = [await job_of(tab.cards.nth(number)) for number in range(8)]
    assert sorted(jobs) == sorted(await jobs_of(http, tab))
    for number, job in enumerate(jobs):
        assert await page_text(tab.cards.nth(number)) == await result(http, job) == text_of(40)
    assert len(tab.sent("POST", "/v1/jobs")) == 8
    assert len(tab.sent("GET", "/v1/events")) == 1
    assert [each for each in tab.requests if re.search(r"/v1/jobs/\w+/events", each.url)] == []


async def test_the_place_in_the_queue_and_the_stop_button(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    tab = await visit(server.url)
    await tab.ask("first\nsecond\nthird\nfourth", model="crawl", max_tokens=500, lines=True)
    queued = tab.page.locator(".card[data-state=queued]")
    await expect(queued).to_have_count(2)
    await expect(queued.locator(".chip")).to_have_text(["Queued, place 2", "Queued, place 1"])
    running = tab.cards.last
    await shown(running, 2)
    job = await job_of(running)
    await running.get_by_role("button", name="Stop").click()
    await is_over(running, "cancelled")
    await expect(running.locator(".chip")).to_have_text("Stopped")
    assert (await http.get(f"/v1/jobs/{job}")).json()["status"] == "cancelled"
    assert await page_text(running) == await result(http, job)
    await expect(queued).to_have_count(1)  # the next one has its slot
    await expect(queued.locator(".chip")).to_have_text("Queued, place 1")
    await tab.page.get_by_role("button", name="Stop all").click()
    await expect(tab.page.locator(".card[data-state=cancelled]")).to_have_count(4)
    asked = len(tab.sent("GET", "/v1/jobs"))
    assert asked > 0
    await tab.page.evaluate("new Promise((resolve) => setTimeout(resolve, 2500))")
    assert len(tab.sent("GET", "/v1/jobs")) == asked, "nobody waits, nobody asks"


async def test_a_double_click_submits_once(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    tab = await visit(server.url)
    await tab.compose("once", model="paced", max_tokens=3)
    await tab.page.locator("#composer button[type=submit]").dblclick()
    await is_over(tab.cards.first)
    assert len(await jobs_of(http, tab)) == 1
    assert await tab.cards.count() == 1


async def test_a_lost_answer_is_asked_for_again_and_submits_once(
    server: Server, http: httpx.AsyncClient, visit: Open
) -> None:
    """The server has the job, the page never hears of it: it repeats the request with the same key."""
    tab = await visit(server.url)
    tab.cut = True
    lost: list[str | None] = []

    async def lose(route: Route) -> None:
        if route.request.method != "POST" or len(lost) == 2:
            await route.continue_()
            return
        await route.fetch()
        lost.append(route.request.headers.get("idempotency-key"))
        await route.abort()

    await tab.page.route("**/v1/jobs", lose)
    card = await tab.ask("once", model="paced", max_tokens=20)
    await is_over(card)
    sent = tab.sent("POST", "/v1/jobs")
    assert len(sent) == 3
    assert {each.headers["idempotency-key"] for each in sent} == set(lost)
    assert await jobs_of(http, tab) == [await job_of(card)]
    assert await page_text(card) == text_of(20)


async def test_what_the_server_refuses_is_said_on_the_card(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    tab.cut = True
    await tab.compose("x", model="paced")
    await tab.page.route("**/v1/jobs", lambda route: route.continue_(post_data={"model": "nobody", "prompt": "x"}))
    tab.problems.clear()
    await tab.page.locator("#composer button[type=submit]").click()
    card = tab.cards.first
    await is_over(card, "refused")
    await expect(card.locator(".note")).to_contain_text("'nobody' does not exist here")


async def test_a_job_that_fails_says_why(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    card = await tab.ask("please FAIL", model="paced")
    await is_over(card, "failed")
    await expect(card.locator(".note")).to_have_text("The synthetic engine was asked to fail.")
    await expect(card.locator(".figures")).to_be_empty()
    await expect(card.get_by_role("button", name="Copy")).to_be_disabled()


async def test_a_full_queue_is_waited_for(make_server: Callable[..., Server], visit: Open) -> None:
    server = make_server(options={"slots": 1}, rate=20, settings={"max_queued": 1})
    tab = await visit(server.url)
    tab.cut = True
    await tab.ask("one\ntwo\nthree\nfour", model="synthetic", max_tokens=10, lines=True)
    await expect(tab.page.locator(".card[data-state=completed]")).to_have_count(4)
    statuses = [(await each.response()).status for each in tab.sent("POST", "/v1/jobs")]  # type: ignore[union-attr]
    assert statuses.count(202) == 4
    assert 429 in statuses
    tab.problems = [problem for problem in tab.problems if "429" not in problem]


async def test_a_prompt_that_a_full_queue_refuses_can_be_stopped(
    make_server: Callable[..., Server], visit: Open
) -> None:
    server = make_server(options={"slots": 1}, rate=1, settings={"max_queued": 1})
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        running = await submit(http, prompt="x", max_tokens=500)
        await poll(lambda: http.get(f"/v1/jobs/{running}"), lambda reply: reply.json()["status"] == "running")
        await submit(http, prompt="x", max_tokens=500)
        tab = await visit(server.url)
        card = await tab.ask("too many", model="synthetic")
        await expect(card.locator(".note")).to_have_text(re.compile("^The queue is full.* This page goes on trying.$"))
        await expect(card.locator(".chip")).to_have_text("Not sent yet")
        await expect(card.get_by_role("button", name="Copy")).to_be_disabled()
        await card.get_by_role("button", name="Stop").click()
        await is_over(card, "cancelled")
        assert len((await http.get("/v1/jobs")).json()["data"]) == 2
    tab.problems = [problem for problem in tab.problems if "429" not in problem]


async def test_two_users_do_not_see_each_others_jobs(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    ann, bob = await visit(server.url), await visit(server.url)
    assert await ann.user() != await bob.user()
    await ann.be("ann")
    await bob.be("bob")
    of_ann = await ann.ask("Ann's secret", model="paced", max_tokens=30)
    of_bob = await bob.ask("Bob's secret", model="paced", max_tokens=30)
    await shown(of_ann, 3)
    await shown(of_bob, 3)
    jobs = [await job_of(of_ann), await job_of(of_bob)]
    for tab, mine, theirs in ((ann, jobs[0], jobs[1]), (bob, jobs[1], jobs[0])):
        await expect(tab.cards).to_have_count(1)
        await tab.page.get_by_role("tab", name="Jobs").click()
        await expect(tab.page.locator(f"#job-rows a[href='#jobs/{mine}']")).to_have_count(1)
        await expect(tab.page.locator(f"#job-rows a[href='#jobs/{theirs}']")).to_have_count(0)
        await tab.page.get_by_role("tab", name="Playground").click()
    for tab, user in ((ann, "ann"), (bob, "bob")):
        events = tab.sent("GET", "/v1/events")
        assert f"user_id={user}" in events[-1].url
    # Whoever says the other's name has the other's stream, and the cards of this browser stay with their user.
    await ann.be("bob")
    await expect(ann.cards).to_have_count(0)
    await ann.be("ann")
    await expect(ann.cards).to_have_count(1)
    await is_over(of_ann)
    assert await page_text(of_ann) == await result(http, jobs[0])


async def test_two_tabs_of_one_user_show_the_same(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    other = Visit(tab.context, await tab.context.new_page(), server.url)
    await other.open()
    card = await tab.ask("both", model="paced", max_tokens=20)
    await shown(other.cards.first, 3)
    await is_over(card)
    await is_over(other.cards.first)
    assert await page_text(other.cards.first) == text_of(20)
    await card.get_by_role("button", name="Remove").click()
    await expect(tab.cards).to_have_count(0)
    await expect(other.cards).to_have_count(0)
    other.check()


async def test_a_chat_is_continued(make_server: Callable[..., Server], visit: Open) -> None:
    """With the bundled model: what it said and what it was asked goes along."""
    server = make_server(bundled=True)
    tab = await visit(server.url)
    await tab.page.locator("#composer [name=temperature]").fill("0")
    card = await tab.ask("What is a river?", model="millrace", kind="chat", max_tokens=64)
    await is_over(card)
    first = await page_text(card)
    assert "water" in first
    await card.get_by_label("Follow up").fill("Why?")
    await card.get_by_label("Follow up").press("Enter")
    await expect(card.locator(".reply")).to_have_count(2)
    await is_over(card)
    second = await page_text(card)
    assert second
    sent = [each.post_data_json for each in tab.sent("POST", "/v1/jobs")]
    assert sent[1]["messages"] == [
        {"role": "user", "content": "What is a river?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Why?"},
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        assert second == await result(http, await job_of(card))
    await tab.reload()
    await expect(card.locator(".prompt")).to_have_text(["What is a river?", "Why?"])
    await expect(card.locator(".reply")).to_have_text([first.strip(), second.strip()])
    await card.get_by_role("button", name="Reuse").click()
    await expect(tab.page.locator("#composer [name=prompt]")).to_have_value("What is a river?")
    await expect(tab.page.locator("#composer [name=temperature]")).to_have_value("0")


async def test_parameters_are_sent_as_they_are_set(make_server: Callable[..., Server], visit: Open) -> None:
    server = make_server(bundled=True)
    tab = await visit(server.url)
    form = tab.page.locator("#composer")
    await form.locator("summary").click()
    fields = {"temperature": 0.9, "top_p": 0.8, "seed": 7, "top_k": 40, "min_p": 0.05, "presence_penalty": 0.5,
              "frequency_penalty": -0.5, "repetition_penalty": 1.1, "deadline": 60}  # fmt: skip
    for name, value in fields.items():
        await form.locator(f"[name={name}]").fill(str(value))
    await form.locator("[name=priority]").select_option("interactive")
    await form.locator("[name=stop]").fill("END\na\\nb")
    await form.locator("[name=system]").fill("Be brief.")
    await form.locator("[name=times]").fill("2")
    await tab.ask("Hello", model="millrace", kind="chat", max_tokens=8)
    await expect(tab.page.locator(".card[data-state=completed]")).to_have_count(2)
    one, other = [each.post_data_json for each in tab.sent("POST", "/v1/jobs")]
    assert one == {
        **fields, "model": "millrace", "max_tokens": 8, "priority": "interactive", "stop": ["END", "a\nb"],
        "user_id": await tab.user(),
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    }  # fmt: skip
    assert other == {**one, "seed": 8}, "the same prompt again is another reply"


async def test_what_the_engine_cannot_honour_is_switched_off(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    await tab.compose("x", model="paced")
    seed = tab.page.locator("#composer [name=seed]")
    await expect(seed).to_be_disabled()
    await expect(seed).to_have_attribute("title", "The engine synthetic cannot honour this")
    await expect(tab.page.locator("#composer [name=temperature]")).to_be_enabled()


async def test_what_a_model_writes_is_text(make_server: Callable[..., Server], visit: Open) -> None:
    """Markup in a prompt, a user's name and a job's metadata stays what it is."""
    nasty = "<img src=x onerror=alert(1)><b>bold</b>"
    server = make_server(rate=0)
    tab = await visit(server.url)
    await tab.be(nasty)
    card = await tab.ask(nasty, model="synthetic", max_tokens=2)
    await is_over(card)
    await expect(card.locator(".prompt")).to_have_text(nasty)
    await tab.page.goto(f"{server.url}/#jobs/{await job_of(card)}")
    await expect(tab.page.locator("#detail .facts")).to_contain_text(nasty)
    assert await tab.page.locator("main img, main b:not(.legend b)").count() == 0


async def test_cleared_is_forgotten(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    await tab.ask("short", model="paced", max_tokens=1)
    running = await tab.ask("long", model="crawl", max_tokens=100)
    await expect(tab.page.locator(".card[data-state=completed]")).to_have_count(1)
    await shown(running, 1)
    await tab.page.get_by_role("button", name="Clear ended").click()
    await expect(tab.cards).to_have_count(1)
    job = await job_of(running)
    await running.get_by_role("button", name="Remove").click()
    await expect(tab.cards).to_have_count(0)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        await poll(lambda: http.get(f"/v1/jobs/{job}"), lambda reply: reply.json()["status"] == "cancelled")
    await tab.reload()
    await expect(tab.page.locator("#no-cards")).to_be_visible()
    await asyncio.sleep(0)
