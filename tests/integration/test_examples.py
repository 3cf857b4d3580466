"""Every file in ``examples/`` runs as it stands, against a server with the model in the box."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import PATIENCE, Server
from tests.support.tools import NODE_PROJECT, ROOT, command, frameworks, node

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("box"), bundled=True, settings={"disconnect_grace": 10})
    try:
        yield server.start()
    finally:
        server.stop()


def run(server: Server, *arguments: str | Path, cwd: Path = EXAMPLES) -> str:
    """Run an example as a user would; what it printed. It must succeed, without a word on its standard error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "OPENAI_"))}
    environment |= {"PENSTOCK_URL": server.url, "NO_PROXY": "127.0.0.1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", done.stderr
    return done.stdout


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


def test_openai_python(box: Server) -> None:
    before = len(newest_jobs(box, 500))
    resumed(box, run(box, sys.executable, "openai_python.py"))
    assert len(newest_jobs(box, 500)) == before + 1


def test_openai_node(box: Server) -> None:
    before = len(newest_jobs(box, 500))
    resumed(box, run(box, node(), "chat.js", cwd=NODE_PROJECT))
    assert len(newest_jobs(box, 500)) == before + 1


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
