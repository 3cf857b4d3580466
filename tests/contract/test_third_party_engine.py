"""An engine in a package of its own is an engine like those in the box."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tests.support.server import PATIENCE, Server
from tests.support.third_party import install

from penstock.core.errors import ModelLoadError
from penstock.engines.host.check import check
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.engines.plugin import engine_names, find_engine
from penstock.testing.engine import EngineContract


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the installed package; child processes see it too."""
    folder = install(tmp_path / "site")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


class TestParrot(EngineContract):
    @pytest.fixture
    async def engine(self, package: Path) -> AsyncIterator[EngineProcess]:
        engine = EngineProcess(EngineSpec("parrot", "polly", None, {"slots": "64"}))
        await engine.start()
        yield engine
        await engine.close()


def test_it_is_served(package: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "server", models=[{"name": "polly", "engine": "parrot"}])
    try:
        server.start()
        body = {"model": "polly", "messages": [{"role": "user", "content": "pieces of eight"}], "max_tokens": 5}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE, trust_env=False).json()
    finally:
        server.stop()
    assert reply["choices"][0]["message"]["content"] == "pieces of eight pieces of "
    usage = {name: count for name, count in reply["usage"].items() if isinstance(count, int)}
    assert usage == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        (None, {"slot": "3"}, "The parrot engine has no option 'slot': did you mean 'slots'"),
        (None, {"slots": "0"}, "Option slots is a whole number, at least 1, not '0'"),
        ("polly.bin", {}, "Parrots have no files: leave polly.bin out"),
    ],
)
def test_it_is_checked_where_it_is_configured(
    package: Path, path: str | None, options: dict[str, str], words: str
) -> None:
    with pytest.raises(ModelLoadError, match=words):
        check(EngineSpec("parrot", "polly", path, options))


def test_an_unknown_engine(package: Path) -> None:
    assert {"parrot", "openvino"} <= set(engine_names())
    with pytest.raises(ModelLoadError, match=r"There is no engine 'parot'\. Did you mean parrot\?"):
        find_engine("parot")


def test_one_that_cannot_be_imported_says_why(package: Path) -> None:
    (package / "parrot-1.0.dist-info" / "entry_points.txt").write_text(
        "[penstock.engines]\nbroken = no_such_module:PLUGIN\nother = os:sep\n"
    )
    with pytest.raises(ModelLoadError, match="'broken' of parrot cannot be imported: No module named 'no_such_module'"):
        find_engine("broken")
    with pytest.raises(ModelLoadError, match=r"'other' of parrot is no penstock\.engines\.plugin\.Plugin"):
        find_engine("other")


def test_two_of_one_name(package: Path) -> None:
    os.rename(package / "parrot-1.0.dist-info", package / "budgie-1.0.dist-info")
    (package / "budgie-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.4\nName: budgie\nVersion: 1.0\n")
    install(package)
    with pytest.raises(ModelLoadError, match=r"Several packages bring an engine 'parrot': (budgie|parrot), "):
        find_engine("parrot")
