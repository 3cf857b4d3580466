"""An engine with bugs, in a real engine process: what goes wrong is what the prompt says.

``python -m tests.support.odd_engine FD odd`` is that process; `spawn` starts it for an `EngineProcess`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import IO, Any

from penstock.core.events import Prefix
from penstock.core.job import Request
from penstock.core.ports import Finish, ModelInfo, Output
from penstock.engines.child import backend
from penstock.engines.child import main as child
from penstock.engines.child.notices import notify
from penstock.engines.child.output_queue import AsyncBackend
from penstock.engines.frames import Progress
from penstock.engines.host.process import Child
from penstock.engines.plugin import Plugin
from penstock.engines.synthetic import SyntheticBackend, SyntheticOptions

#: What an engine may come upon with one request.
ODDITIES = {
    "raises": lambda: 1 // 0,
    "nests": lambda: _nest(),
    "decodes": lambda: b"\xff".decode(),
    "encodes": lambda: "\ud83d".encode(),
}
#: What it may make of it that no frame can hold: ids and texts.
OUTPUTS = {"half a character": ([1], ["\ud83d"]), "a huge id": ([2**70], ["x"])}


def _nest() -> Any:
    return _nest()


class Computing(SyntheticBackend):
    """Computes in `step`, whose failure is everybody's."""

    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        super().add(key, request, prefixes, attempt)
        if request.prompt in ODDITIES:
            ODDITIES[request.prompt]()

    def step(self) -> list[Output]:
        outputs = super().step()
        for output in outputs:
            sequence = self._sequences.get(output.key)
            prompt = sequence.request.prompt if sequence is not None else None
            if prompt in OUTPUTS:
                output.ids, output.texts = map(list, OUTPUTS[prompt])  # type: ignore[assignment]
            if prompt == "breaks the engine":
                raise RuntimeError("out of memory")
        return outputs


class Waiting(AsyncBackend):
    """Runs by itself, as the upstream engine does."""

    slots = 8

    def __init__(self, name: str) -> None:
        super().__init__()
        self.info = ModelInfo(name=name, engine="odd", context_length=1000)

    async def generate(self, key: int, request: Request, prefixes: list[Prefix]) -> AsyncIterator[Output]:
        prompt = request.prompt or ""
        yield Output(key, [1], ["1@1 "], prompt_tokens=1)
        if prompt in ODDITIES:
            ODDITIES[prompt]()
        if prompt in OUTPUTS:
            ids, texts = OUTPUTS[prompt]
            yield Output(key, list(ids), list(texts))
        for position in range(2, request.sampling.max_tokens + 1):
            await asyncio.sleep(0.002)
            yield Output(key, [position], [f"{position}@1 "])
        yield Output(key, finish=Finish(("length",)))


def load(name: str, path: str | None, options: SyntheticOptions, progress: Progress) -> Any:
    notify("odd.loading", half="\ud83d")
    return Waiting(name) if path == "waiting" else Computing(name, options, progress)


async def spawn(engine: str, stderr: IO[bytes] | None = None) -> Child:
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.odd_engine",
            str(theirs.fileno()),
            engine,
            pass_fds=[theirs.fileno()],
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    ours.setblocking(False)
    return Child(engine, process, ours)


if __name__ == "__main__":
    plugin = Plugin(load="tests.support.odd_engine:load", options=SyntheticOptions)
    for module in (backend, child):
        module.find_engine = lambda name: plugin  # type: ignore[attr-defined]
    child.main()
