"""The official ``openai`` Node SDK, unchanged: each test of ``openai_node.test.js`` is one here.

The examples of this SDK, which stream, go on with what broke and run batches, are in `test_examples`.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import PATIENCE, Server, model
from tests.support.tools import NODE_PROJECT, node

PROGRAM = Path(__file__).with_name("openai_node.test.js")
NAMES = re.findall(r'^test\("(.+)",', PROGRAM.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The models that the program's head names, and a grace that tests can wait for."""
    server = Server(
        tmp_path_factory.mktemp("box"),
        models=[
            model("millrace", engine="openvino"),
            model("synthetic"),
            model("paced", rate=50),
            model("crawl", rate=2, slots=1),
        ],
        settings={"disconnect_grace": 0.3, "heartbeat": 0.3, "max_queued": 8},
    )
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def report(box: Server) -> dict[str, str]:
    """By test what node reports of it (TAP), from one run of all."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "OPENAI_"))}
    done = subprocess.run(
        [node(), "--test", "--test-reporter=tap", str(PROGRAM)],
        cwd=NODE_PROJECT, env={**environment, "PENSTOCK_URL": box.url, "NO_PROXY": "127.0.0.1"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    parts = re.split(r"^# Subtest: (.+)\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_openai_node(report: dict[str, str], name: str) -> None:
    assert re.match(r"ok \d+ - ", report[name]), report[name]
