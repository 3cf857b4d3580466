"""Open WebUI in a headless Chromium: an account, a chat, a tool of its own, and a document that is asked about."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

URL, MODEL, EMBED = (os.environ[f"PENSTOCK_{name}"] for name in ("URL", "MODEL", "EMBED"))
PATIENCE = 120
TOOL = '''
class Tools:
    def weather(self, city: str) -> str:
        """
        The weather in a city.
        :param city: The city's name
        """
        return f"sunny in {city}"
'''
expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    """Its address. Nothing of it looks for models or versions elsewhere: embeddings are Penstock's."""
    folder = tmp_path_factory.mktemp("webui")
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "DATA_DIR": str(folder),
        "HOME": str(folder),
        "WEBUI_SECRET_KEY": "of this test",
        "OPENAI_API_BASE_URL": f"{URL}/v1",
        "OPENAI_API_KEY": "none",
        "DEFAULT_MODELS": MODEL,
        "ENABLE_OLLAMA_API": "False",
        "RAG_EMBEDDING_ENGINE": "openai",
        "RAG_OPENAI_API_BASE_URL": f"{URL}/v1",
        "RAG_OPENAI_API_KEY": "none",
        "RAG_EMBEDDING_MODEL": EMBED,
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "ENABLE_VERSION_UPDATE_CHECK": "False",
        "ANONYMIZED_TELEMETRY": "False",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **settings},
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 2 * PATIENCE
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/health").close()
                break
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def page(webui):
    """Of somebody who has just made an account."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("chromium is not installed (on Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(webui)
        page.get_by_role("button", name="Get started").click()
        page.locator("input[autocomplete=name]").fill("Somebody")
        page.locator("input[type=email]").fill("somebody@example.com")
        page.locator("input[type=password]").first.fill("correct horse 1A!")
        page.get_by_role("button", name="Create Admin Account").click()
        page.get_by_role("button", name="Okay, Let's Go!").click()
        yield page
        browser.close()


def ask(page, text):
    page.locator("#chat-input").click()
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.wait_for_url("**/c/*")


def reply(page):
    """The last message of the model's."""
    return page.locator(".chat-assistant").last


def test_the_models_are_there(webui, page):
    token = page.evaluate("localStorage.token")
    told = page.request.get(f"{webui}/api/models", headers={"Authorization": f"Bearer {token}"}).json()
    assert {MODEL, EMBED} <= {model["id"] for model in told["data"]}


def test_a_chat(webui, page):
    page.goto(webui)
    ask(page, 'Say "one two three four five".')
    expect(reply(page)).to_contain_text("one two three four five")


def test_a_second_turn(page):
    ask(page, 'Now say "six seven".')
    expect(reply(page)).to_contain_text("six seven")


def test_a_tool(webui, page):
    token = page.evaluate("localStorage.token")
    made = page.request.post(
        f"{webui}/api/v1/tools/create",
        headers={"Authorization": f"Bearer {token}"},
        data={"id": "weather", "name": "Weather", "content": TOOL, "meta": {"description": "", "manifest": {}}},
    )
    assert made.ok, made.text()
    page.goto(f"{webui}/?models={MODEL}&tools=weather")
    ask(page, "What is the weather in Paris?")
    expect(reply(page)).to_contain_text("The tool says: sunny in Paris")


def test_a_document(webui, page, tmp_path):
    document = tmp_path / "fox.txt"
    document.write_text("The fox of the valley is named Nibbles. It lives behind the old mill.")
    page.goto(webui)
    with page.expect_response(lambda each: "/api/v1/files" in each.url and each.request.method == "POST") as uploaded:
        page.locator("input[type=file]").first.set_input_files(document)
    assert uploaded.value.ok
    ask(page, "What is the fox of the valley named?")
    expect(reply(page)).to_contain_text("The fox of the valley is named Nibbles")
