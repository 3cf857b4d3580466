"""Every file in ``examples/`` runs as it stands, against a server with the model in the box."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.async_api import async_playwright, expect

from tests.support.api import poll, running, submit
from tests.support.nginx import nginx_binary, substitute
from tests.support.server import PATIENCE, Server, free_port, model, wait_for
from tests.support.tools import ROOT, command, frameworks, node

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("box"), bundled=True, settings={"disconnect_grace": 10})
    try:
        yield server.start()
    finally:
        server.stop()


@contextmanager
def running_example(server: Server, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """An example that runs as a user would run it; killed at the end if it still does. Its pipes are not buffered."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "OPENAI_"))}
    environment |= {
        "PENSTOCK_URL": server.url,
        "PENSTOCK_MODEL": "millrace",
        "NO_PROXY": "127.0.0.1",
        "PYTHONIOENCODING": "utf-8",
    }
    command_line = [str(argument) for argument in arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command_line, cwd=EXAMPLES, env=environment, stdout=pipe, stderr=pipe, bufsize=0) as program:
        try:
            yield program
        finally:
            program.kill()


def run(server: Server, *arguments: str | Path) -> str:
    """What an example printed. It must succeed, without a word on its standard error."""
    with running_example(server, *arguments) as program:
        out, err = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0, (out + err).decode()
    assert err == b"", err.decode()
    return out.decode()


def newest_jobs(server: Server, count: int) -> list[dict[str, object]]:
    data: list[dict[str, object]] = server.get(f"/v1/jobs?limit={count}").json()["data"]
    return data


def text_of(server: Server, job: object) -> str:
    text: str = server.get(f"/v1/jobs/{job}").json()["result"]["text"]
    return text


def resumed(server: Server, printed: str) -> None:
    """One job was made, cut off and gone on with: each character of its text was printed once."""
    head, _, told = printed.partition("\n")
    job = head.removeprefix("job: ")
    assert newest_jobs(server, 1)[0]["id"] == job
    text = text_of(server, job)
    assert len(text) > 60
    assert told == text + "\n"


#: OpenAI's SDKs: what runs an example of each, and what its name ends with.
SDKS = {"python": (lambda: sys.executable, ".py"), "node": (node, ".js")}


@pytest.fixture(params=SDKS)
def example(request: pytest.FixtureRequest) -> Callable[[str], list[str | Path]]:
    """The command that runs the example of a name."""
    program, suffix = SDKS[request.param]
    folder = EXAMPLES / f"openai-{request.param}"
    return lambda name: [program(), folder / f"{name}{suffix}"]


Example = Callable[[str], list[str | Path]]


class TestOpenAI:
    """One set of examples for both SDKs."""

    def test_chat(self, box: Server, example: Example) -> None:
        before = len(newest_jobs(box, 500))
        resumed(box, run(box, *example("chat")))
        assert len(newest_jobs(box, 500)) == before + 1

    def test_responses(self, box: Server, example: Example) -> None:
        before = len(newest_jobs(box, 500))
        assert run(box, *example("responses")).strip()
        assert len(newest_jobs(box, 500)) == before, "it deleted what it made"

    def test_background_streaming(self, box: Server, example: Example) -> None:
        before = len(newest_jobs(box, 500))
        head, _, told = run(box, *example("background_streaming")).partition("\n")
        job = "job_" + head.removeprefix("response: resp_")
        assert told == text_of(box, job) + "\n"
        assert len(newest_jobs(box, 500)) == before + 1

    def test_background_streaming_over_a_kill(self, make_server: Callable[..., Server], example: Example) -> None:
        """The server dies while the example reads, and is started again: not an event is lost or repeated."""
        server = make_server(rate=40)
        with running_example(server, *example("background_streaming")) as program:
            assert program.stdout is not None
            head = program.stdout.readline()
            read = b"".join(iter(lambda: program.stdout.read(1), b"9"))  # type: ignore[union-attr]
            assert read.startswith(b"1@1 ")
            server.kill9()
            server.restart()
            out, err = program.communicate(timeout=PATIENCE)
        assert (program.returncode, err) == (0, b"")
        text = text_of(server, "job_" + head.decode().strip().removeprefix("response: resp_"))
        assert (read + b"9" + out).decode() == text + "\n"
        positions, attempts = zip(*(word.split("@") for word in text.split()), strict=True)
        assert positions == tuple(str(number) for number in range(1, 81))
        assert set(attempts) == {"1", "2"}

    def test_batches(self, box: Server, example: Example) -> None:
        head, _, answers = run(box, *example("batches")).partition("\n")
        assert box.get(f"/v1/batches/{head.removeprefix('batch: ')}").json()["status"] == "completed"
        for thing in ("river", "mill", "fox"):
            assert re.search(rf"^What is a {thing}\? \S", answers, re.MULTILINE)
        assert box.get("/v1/files").json()["data"] == [], "it deleted its files"

    def test_tools(self, box: Server, example: Example) -> None:
        assert re.search(r'\{"city": "(Ulm|Rome)"\} → Rain in \1\.$', run(box, *example("tools")), re.MULTILINE)


def test_anthropic_python(box: Server) -> None:
    told, _, rest = run(box, sys.executable, "anthropic_python.py").partition("\njob: ")
    job, call, *_ = rest.splitlines()
    assert told == text_of(box, job)
    assert re.fullmatch(r"weather \{'city': '(Ulm|Rome)'\} → Rain in \1\.", call)


def test_langchain(box: Server) -> None:
    *told, animal, call = run(box, frameworks(), "langchain_chat.py").splitlines()
    assert re.fullmatch(r"kind='(fox|bear|owl)' legs=[2-4]", animal)
    assert re.fullmatch(r"weather → Rain in (Ulm|Rome)\.", call)
    assert "\n".join(told) == text_of(box, newest_jobs(box, 3)[-1]["id"])


def test_llamaindex(box: Server) -> None:
    printed = run(box, frameworks(), "llamaindex_chat.py")
    second, first = newest_jobs(box, 2)
    assert printed == text_of(box, first["id"]) + "\n" + text_of(box, second["id"]) + "\n"


def test_curl(box: Server) -> None:
    command("curl")
    head, *lines = run(box, "sh", "curl.sh").splitlines()
    *events, behind, result = lines
    job = json.loads(result)
    assert head == f"job: {job['id']}"
    data = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(event["token"] for event in data[:-1]) == job["result"]["text"]
    assert len(data) == job["tokens"] + 1
    assert data[-1]["status"] == "completed"
    assert behind == "behind the end: 204"


@contextmanager
def one_origin(server: Server) -> Iterator[str]:
    """Where the page of ``examples/browser`` is served, by the nginx.conf of that folder with other ports."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="browser-"))  # not pytest's: that is closed to nginx's own user
    folder.chmod(0o755)
    shutil.copy(EXAMPLES / "browser" / "index.html", folder)
    configuration = (EXAMPLES / "browser" / "nginx.conf").read_text()
    configuration = substitute(r"listen 127.0.0.1:8080;", f"listen 127.0.0.1:{port};", configuration)
    configuration = substitute(r"proxy_pass http://127.0.0.1:8000;", f"proxy_pass {server.url};", configuration)
    (folder / "nginx.conf").write_text(configuration)
    with (folder / "nginx.log").open("wb") as log:
        nginx = subprocess.Popen([nginx_binary(), "-p", folder, "-c", "nginx.conf"], stderr=log)
    try:
        wait_for((folder / "nginx.pid").exists, "nginx")
        yield f"http://127.0.0.1:{port}/"
    finally:
        nginx.terminate()
        nginx.wait(PATIENCE)
        shutil.rmtree(folder)


async def test_browser(make_server: Callable[..., Server]) -> None:
    """The stream survives its server, and a reload shows it again from its beginning."""
    server = make_server(models=[model(rate=20)])
    expect.set_options(timeout=PATIENCE * 1000)
    with one_origin(server) as url:
        async with async_playwright() as play:
            browser = await play.chromium.launch(executable_path=command("chromium"), args=["--no-sandbox"])
            page = await browser.new_page()
            page.set_default_timeout(PATIENCE * 1000)
            await page.goto(url)
            await page.get_by_role("button").click()
            await expect(page.locator("output")).to_contain_text("5@1")
            async with page.expect_response(lambda reply: reply.status == 502):  # nginx: there is nobody
                server.kill9()
            await expect(page.get_by_text("reconnecting")).to_be_visible()
            server.restart()
            await expect(page.get_by_text("done: length")).to_be_visible()
            text = await page.locator("output").text_content()
            assert text == text_of(server, newest_jobs(server, 1)[0]["id"])
            await page.reload()
            await expect(page.get_by_text("done: length")).to_be_visible()
            assert await page.locator("output").text_content() == text
            await browser.close()


async def test_client_example(make_server: Callable[..., Server]) -> None:
    """Submit and poll: behind another job, with a full queue to begin with, and across a restart of the server."""
    server = make_server(rate=50, options={"slots": 1}, settings={"max_queued": 1})
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        blocker = await submit(http, max_tokens=100_000)
        await running(http, blocker)
        waiting = await submit(http, max_tokens=1)
        program = await asyncio.create_subprocess_exec(
            sys.executable, str(EXAMPLES / "client_example.py"), "one two", "--url", server.url, "--max-tokens", "30",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )  # fmt: skip
        full = 'llm_gateway_errors_total{code="overloaded"}'
        await poll(lambda: http.get("/metrics"), lambda reply: full in reply.text)
        await http.post(f"/v1/jobs/{waiting}/cancel")
        assert program.stderr is not None
        said = (await asyncio.wait_for(program.stderr.readline(), PATIENCE)).decode()
        assert re.fullmatch(r"job_[0-9a-f]{32} is queued, number 1 in the queue\n", said)
        await http.post(f"/v1/jobs/{blocker}/cancel")
        await running(http, said.split()[0])
    server.kill9()
    server.restart()
    out, err = await asyncio.wait_for(program.communicate(), PATIENCE)
    assert program.returncode == 0, err.decode()
    result, *metrics = out.decode().splitlines()
    assert re.findall(r"(\d+)@[12] ", result) == [str(position) for position in range(1, 31)]
    told = dict(line.strip().split(": ") for line in metrics)
    assert (told["prompt_tokens"], told["completion_tokens"]) == ("2", "30")
    assert float(told["total_time"]) >= float(told["processing_time"]) > 0
