"""What the page makes of a model that thinks and calls tools."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import msgspec
import pytest
from playwright.async_api import expect

from penstock.client import AsyncClient
from tests.support.browser import Visit, chromium_binary, is_over
from tests.support.families import CALLS, FAMILIES, TEXT, THOUGHT, TOOLS
from tests.support.server import Server, model

pytestmark = pytest.mark.asyncio(loop_scope="session")  # the browser's

Open = Callable[..., Awaitable[Visit]]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    chromium_binary()  # without one, no server either
    made = FAMILIES["qwen3"].make(tmp_path_factory.mktemp("scripted") / "qwen3")
    server = Server(
        tmp_path_factory.mktemp("server"), models=[model("thinker", engine="openvino", path=str(made.folder))]
    )
    try:
        yield server.start()
    finally:
        server.stop()


async def test_a_card_folds_the_thought_away_once_the_text_begins(thinking: Server, visit: Open) -> None:
    tab = await visit(thinking.url)
    card = await tab.ask("turn ~", model="thinker", kind="chat", max_tokens=400)
    await is_over(card)
    thought = card.locator("details.thought")
    await expect(thought).not_to_have_attribute("open", "")
    await expect(card.locator(".reply")).to_contain_text(TEXT)
    await expect(card.locator(".reply")).not_to_contain_text(THOUGHT)
    await thought.locator("summary").click()
    await expect(thought).to_have_text(f"Thought{THOUGHT}")
    await tab.reload()  # it is remembered
    await expect(tab.cards.first.locator("details.thought")).to_contain_text(THOUGHT)


async def test_a_jobs_log_shows_thoughts_and_calls_as_blocks(thinking: Server, visit: Open) -> None:
    async with AsyncClient(thinking.url) as client:
        tools = [{"type": "function", "function": msgspec.to_builtins(tool)} for tool in TOOLS]
        job = await client.submit(messages=[{"role": "user", "content": "turn ~"}], tools=tools, max_tokens=400)
        result = await client.result(job)
        assert (result.reasoning.strip(), result.text.strip()) == (THOUGHT, TEXT)
        assert [call.name for call in result.tool_calls] == [name for name, _ in CALLS]
        assert result.finish_reason == "tool_calls"
        view = await client.job(job)
        assert view.result is not None
        assert (view.result.text, view.result.reasoning) == (result.text, result.reasoning)
        assert [call.id for call in view.result.tool_calls or ()] == [call.id for call in result.tool_calls]
    tab = await visit(thinking.url, f"#jobs/{job.id}")
    log = tab.page.locator(".log.whole")
    await expect(log.locator("details.thought")).to_contain_text(THOUGHT)
    await expect(log.locator("[data-phase=text]").first).to_contain_text(TEXT)
    await expect(log.locator(".call").first).to_contain_text('{"name": "look", "arguments": {')
