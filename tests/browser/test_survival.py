"""What cuts a stream, and that the page goes on where it was: the text is the log's, whole and without a repeat."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Awaitable, Callable

import httpx
import pytest
from playwright.async_api import Locator, expect

from penstock.testing.oracle import check_log
from tests.support.api import ended
from tests.support.browser import Visit, is_over, job_of, result, shown, tokens_of
from tests.support.browser import text_of as page_text
from tests.support.nginx import Nginx
from tests.support.proxy import Proxy
from tests.support.server import PATIENCE, Server
from tests.support.sse import open_stream

pytestmark = pytest.mark.asyncio(loop_scope="session")  # the browser's

Open = Callable[..., Awaitable[Visit]]


async def same_as_the_log(server: Server, card: Locator, count: int) -> list[int]:
    """The card's text is its job's log; the attempts of the log's tokens."""
    job = await job_of(card)
    async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
        events = await stream.rest()
    check_log(events, job=job)
    tokens = [event.data for event in events if event.event == "token"]
    assert await page_text(card) == "".join(token["token"] for token in tokens)
    assert [int(token.partition("@")[0]) for token in await tokens_of(card)] == list(range(1, count + 1))
    return [token["attempt"] for token in tokens]


def client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False)


async def test_a_reload_goes_on(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    await tab.ask("one\ntwo\nthree", model="paced", max_tokens=40, lines=True)
    await expect(tab.page.locator(".card[data-state=running]")).to_have_count(3)
    await shown(tab.cards.first, 4)
    jobs = [await job_of(tab.cards.nth(number)) for number in range(3)]
    await tab.reload()
    await expect(tab.page.locator(".card[data-state=running]")).to_have_count(3)
    await expect(tab.page.locator(".prompt")).to_have_text(["three", "two", "one"])
    for number in range(3):
        await is_over(tab.cards.nth(number))
        await same_as_the_log(server, tab.cards.nth(number), 40)
    assert [await job_of(tab.cards.nth(number)) for number in range(3)] == jobs
    assert len(tab.sent("POST", "/v1/jobs")) == 3
    assert len(tab.sent("GET", "/v1/events")) == 2


async def test_a_job_that_ended_while_the_page_was_away(server: Server, http: httpx.AsyncClient, visit: Open) -> None:
    tab = await visit(server.url)
    card = await tab.ask("away", model="paced", max_tokens=16)
    job = await job_of(card)
    await tab.page.goto("about:blank")
    await ended(http, job)
    tab.requests.clear()
    await tab.open()
    await is_over(card)
    await same_as_the_log(server, card, 16)
    await expect(card.locator(".figures")).to_contain_text("16 tokens")
    tab.requests.clear()
    await tab.reload()  # now it is remembered: the server need not be asked
    await expect(card.locator(".chip")).to_have_text("Done: length")
    assert await page_text(card) == await result(http, job)
    assert tab.sent("GET", f"/v1/jobs/{job}") == []


async def test_a_reload_before_the_submit_was_answered(make_server: Callable[..., Server], visit: Open) -> None:
    """The prompt is remembered before it is sent, with its key: sent again, it is the same job."""
    server = make_server(rate=20)
    tab = await visit(server.url)
    tab.cut = True
    await tab.page.route("**/v1/jobs", lambda route: None if route.request.method == "POST" else route.continue_())
    card = await tab.ask("held up", model="synthetic", max_tokens=10)
    await expect(card).to_have_attribute("data-state", "sending")
    await tab.page.unroute_all(behavior="ignoreErrors")
    await tab.reload()
    await is_over(card)
    keys = {each.headers["idempotency-key"] for each in tab.sent("POST", "/v1/jobs")}
    assert len(keys) == 1
    await same_as_the_log(server, card, 10)


async def test_the_server_is_killed_and_restarted(make_server: Callable[..., Server], visit: Open) -> None:
    server = make_server(rate=8)
    tab = await visit(server.url)
    tab.cut = True
    await tab.ask("\n".join(f"stream {number}" for number in range(4)), model="synthetic", max_tokens=60, lines=True)
    await expect(tab.page.locator(".card[data-state=running]")).to_have_count(4)
    await shown(tab.cards.last, 5)
    await asyncio.to_thread(server.kill9)
    await expect(tab.page.locator("#connection")).to_have_text("Reconnecting…")
    before = [await page_text(tab.cards.nth(number)) for number in range(4)]
    await asyncio.to_thread(server.restart)
    await tab.connected()
    for number in range(4):
        card = tab.cards.nth(number)
        await is_over(card)
        attempts = await same_as_the_log(server, card, 60)
        assert (await page_text(card)).startswith(before[number]), "nothing that was shown was taken back"
        assert set(attempts) == {1, 2}
        first = attempts.index(2) + 1
        await expect(card.locator(".note")).to_have_text(f"Survived: attempt 2 from token {first} on.")
    assert len(tab.sent("POST", "/v1/jobs")) == 4


async def test_prompts_sent_while_the_server_is_away(make_server: Callable[..., Server], visit: Open) -> None:
    server = make_server(rate=20)
    tab = await visit(server.url)
    tab.cut = True
    await tab.compose("patient", model="synthetic", max_tokens=10)
    await asyncio.to_thread(server.kill9)
    await tab.page.locator("#composer button[type=submit]").click()
    card = tab.cards.first
    await expect(card.locator(".note")).to_have_text("The server cannot be reached. This page goes on trying.")
    await asyncio.to_thread(server.restart)
    await is_over(card)
    await same_as_the_log(server, card, 10)


async def test_the_server_is_away_at_the_first_visit(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    tab.cut = True
    await tab.context.route(f"{server.url}/v1/**", lambda route: route.abort())
    await tab.page.reload()  # the page itself comes from somewhere: a cache, a proxy
    await expect(tab.page.locator("#connection")).to_have_text("Reconnecting…")
    await tab.page.locator("#composer [name=prompt]").fill("patient")
    await tab.page.locator("#composer button[type=submit]").click()
    await expect(tab.page.locator("#composer-error")).to_have_text(re.compile("^No model is known yet"))
    await tab.context.unroute_all()
    await tab.connected()
    await expect(tab.page.locator("#composer [name=model]")).to_have_value("paced")
    await tab.page.locator("#composer button[type=submit]").click()
    await expect(tab.page.locator("#composer-error")).to_be_hidden()
    await is_over(tab.cards.first)


async def test_the_network_is_pulled(server: Server, visit: Open) -> None:
    """Cut in the middle of a token, nobody there for a while, and then a line that swallows everything."""
    async with Proxy(server.port, redis=False) as network:
        tab = await visit(f"http://127.0.0.1:{network.port}")
        tab.cut = True
        card = await tab.ask("far away", model="paced", max_tokens=80)
        await shown(card, 3)
        await network.refuse()
        network.drop()
        await expect(tab.page.locator("#connection")).to_have_text("Reconnecting…")
        await network.heal()
        await tab.connected()
        await shown(card, len(await tokens_of(card)) + 3)
        network.blackhole()
        await asyncio.sleep(1)  # tokens vanish meanwhile
        await network.heal()
        await is_over(card)
        await same_as_the_log(server, card, 80)
        assert len(tab.sent("POST", "/v1/jobs")) == 1


LOSE_ONE = """
const listen = EventSource.prototype.addEventListener;
EventSource.prototype.addEventListener = function (type, listener, ...rest) {
  const lossy = (event) => {
    if (!window.lost && type === "token" && JSON.parse(event.data).token.startsWith("5@")) window.lost = true;
    else listener(event);
  };
  return listen.call(this, type, lossy, ...rest);
};
"""


async def test_a_token_that_got_lost_is_fetched_again_and_none_counts_twice(server: Server, visit: Open) -> None:
    """The page then reads everything anew, of all that run."""
    tab = await visit(server.url)
    await tab.page.add_init_script(LOSE_ONE)
    await tab.reload()
    await tab.ask("one\ntwo", model="paced", max_tokens=40, lines=True)
    for number in range(2):  # while they run: an end brings the whole text from the server
        await shown(tab.cards.nth(number), 12)
        seen = [int(token.partition("@")[0]) for token in await tokens_of(tab.cards.nth(number))]
        assert seen == list(range(1, len(seen) + 1))
    assert await tab.page.evaluate("window.lost")
    for number in range(2):
        await is_over(tab.cards.nth(number))
        await same_as_the_log(server, tab.cards.nth(number), 40)


async def test_the_browser_goes_offline_and_back(server: Server, visit: Open) -> None:
    tab = await visit(server.url)
    tab.cut = True
    card = await tab.ask("in a tunnel", model="paced", max_tokens=50)
    await shown(card, 3)
    await tab.context.set_offline(True)
    await expect(tab.page.locator("#connection")).to_have_text("Offline")
    await tab.context.set_offline(False)
    await tab.connected()
    await is_over(card)
    await same_as_the_log(server, card, 50)


async def test_behind_a_proxy_that_answers_502(make_server: Callable[..., Server], visit: Open) -> None:
    """An EventSource gives up after such an answer; the page does not."""
    server = make_server(rate=8)
    nginx = Nginx([server.port])
    try:
        nginx.start()
        tab = await visit(nginx.url)
        tab.cut = True
        card = await tab.ask("proxied", model="synthetic", max_tokens=60)
        await shown(card, 4)
        asked = len(tab.sent("GET", "/v1/events"))
        await asyncio.to_thread(server.kill9)

        async def answers() -> list[int | None]:
            found = [await each.response() for each in tab.sent("GET", "/v1/events")[asked:]]
            return [each and each.status for each in found]

        while 502 not in await answers():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await asyncio.to_thread(server.restart)
        await is_over(card)
        attempts = await same_as_the_log(server, card, 60)
        assert set(attempts) == {1, 2}
        assert any("after=" in each.url for each in tab.sent("GET", "/v1/events")), "from where it was"
        await tab.page.get_by_role("tab", name="Now").click()
        await expect(tab.page.locator("#now-error")).to_contain_text("not public here")
        tab.problems = [problem for problem in tab.problems if "404" not in problem]
    finally:
        nginx.stop()


async def test_a_log_that_rewound_is_shown_anew(make_server: Callable[..., Server], visit: Open) -> None:
    """The store is replaced by an older copy of itself: what the page has seen is not what is true."""
    server = make_server(rate=8)
    tab = await visit(server.url)
    tab.cut = True
    card = await tab.ask("rewound", model="synthetic", max_tokens=120)
    await shown(card, 4)
    await asyncio.to_thread(server.kill9)
    copy = server.data_dir.with_name("copy")
    await asyncio.to_thread(shutil.copytree, server.data_dir, copy)
    await asyncio.to_thread(server.restart)
    await tab.connected()
    await shown(card, len(await tokens_of(card)) + 8)
    await asyncio.to_thread(server.kill9)
    await asyncio.to_thread(shutil.rmtree, server.data_dir)
    await asyncio.to_thread(shutil.move, copy, server.data_dir)
    await asyncio.to_thread(server.restart)
    await is_over(card)
    await same_as_the_log(server, card, 120)


async def test_a_result_that_is_no_longer_kept(make_server: Callable[..., Server], visit: Open) -> None:
    server = make_server(rate=20, settings={"result_ttl": 0.5})
    tab = await visit(server.url)
    tab.cut = True
    card = await tab.ask("soon forgotten", model="synthetic", max_tokens=30)
    job = await job_of(card)
    await tab.page.goto("about:blank")
    async with client(server) as http:
        while (await http.get(f"/v1/jobs/{job}")).status_code != 404:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await tab.open()
    await is_over(card, "gone")
    await expect(card.locator(".chip")).to_have_text("No longer kept")
    await expect(card.locator(".prompt")).to_have_text("soon forgotten")


async def test_a_reply_that_was_seen_stays_though_the_server_forgets_it(
    make_server: Callable[..., Server], visit: Open
) -> None:
    server = make_server(rate=0, settings={"result_ttl": 0.5})
    tab = await visit(server.url)
    tab.cut = True
    card = await tab.ask("kept here", model="synthetic", max_tokens=5)
    await is_over(card)
    job = await job_of(card)
    async with client(server) as http:
        while (await http.get(f"/v1/jobs/{job}")).status_code != 404:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await tab.reload()
    await is_over(card)
    assert [token.partition("@")[0] for token in await tokens_of(card)] == list("12345")
