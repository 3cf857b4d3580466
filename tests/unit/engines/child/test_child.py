"""What goes wrong with one request inside an engine process is that request's failure, and nobody else's."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from tests.support.odd_engine import ODDITIES, OUTPUTS, spawn

from penstock.core.errors import EngineDied
from penstock.core.events import Phase, Prefix, TokenPhase
from penstock.core.job import Request
from penstock.core.ports import Finish, Output
from penstock.engines.child import backend
from penstock.engines.child import main as child
from penstock.engines.frames import Add, Failed, Load, Outputs, Splitter, ToChild, ToParent, encode
from penstock.engines.host.process import EngineProcess, EngineSpec
from penstock.engines.plugin import find_engine
from penstock.testing.engine.driver import lease, run


@pytest.fixture(params=["computing", "waiting"])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EngineProcess]:
    options = {"rate": "400"} if request.param == "computing" else {}
    with (tmp_path / "errors").open("wb") as errors:
        engine = EngineProcess(EngineSpec("odd", "m", request.param, options), spawn=partial(spawn, stderr=errors))
        await engine.start()
        yield engine
        await engine.close()


@pytest.mark.parametrize("oddity", [*ODDITIES, *OUTPUTS])
async def test_it_fails_alone(engine: EngineProcess, oddity: str, tmp_path: Path) -> None:
    pid = engine.pid
    before, odd, beside = await run(engine, *(lease(engine, prompt, max_tokens=60) for prompt in ("x", oddity, "x")))
    for result in (before, beside):
        assert result.ids == list(range(1, 61)), "a neighbour was disturbed"
        assert result.finish == Finish(("length",))
    assert odd.finish is not None
    assert odd.finish.error is not None
    assert odd.finish.error.code == "engine_error"
    assert "the server's log has the details" in odd.finish.error.message
    assert "Traceback" in (tmp_path / "errors").read_text()
    (after,) = await run(engine, lease(engine, "x", max_tokens=5))
    assert after.finish == Finish(("length",))
    assert engine.pid == pid, "it cost the process"


async def test_an_engine_that_breaks_while_it_computes_has_died() -> None:
    engine = EngineProcess(EngineSpec("odd", "m", "computing"), spawn=spawn)
    await engine.start()
    try:
        with pytest.raises(EngineDied, match="The engine broke: out of memory"):
            await run(engine, lease(engine, "x", max_tokens=10_000), lease(engine, "breaks the engine"))
    finally:
        await engine.close()


def test_frames_carry_what_a_token_is_part_of() -> None:
    phases: list[TokenPhase] = [Phase.REASONING, [(Phase.REASONING, 2), (Phase.TEXT, 1)], Phase.TEXT, Phase.TOOL]
    texts = ["a", "b c", "d", "{"]
    output = Output(7, [1, 2, 3, 4], texts, prompt_tokens=9, phases=phases, cached_tokens=4)
    add = Add(7, Request("m", prompt="x"), [Prefix([1, 2, 3, 4], texts, phases), Prefix()], 2)
    assert Splitter(ToParent).feed(encode(Outputs([output]))) == [Outputs([output])]
    assert Splitter(ToChild).feed(encode(add)) == [add]


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = msgspec.structs.replace(find_engine("llama"), load="no_such_library:load")
    monkeypatch.setattr(backend, "find_engine", lambda name: plugin)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode(Load("llama", "m", None, {})))
        assert child.load(child.Channel(theirs)) is None
        (reported,) = Splitter(ToParent).feed(ours.recv(1 << 16))
    assert isinstance(reported, Failed)
    assert reported.error.message == "The llama engine needs no_such_library: pip install 'penstock[llama]'."
    assert reported.error.code == "model_load_error"
