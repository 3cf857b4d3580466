"""What a storm hits: `Embedded`, one server process; or a fleet over Redis (see fleet.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tests.support.server import PATIENCE, Process, Server


@dataclass(frozen=True)
class Strike:
    """A fault that happened. Times are of the monotonic clock."""

    fault: str
    victim: str
    at: float
    since: float
    """From when on recovery counts: the fault itself, or the moment at which what it took away was there again."""


class Target(Protocol):
    @property
    def urls(self) -> Sequence[str]:
        """Where clients may connect: any of them, whether it is up or not."""
        ...

    async def strike(self, fault: str, dice: random.Random) -> Strike:
        """Do *fault* to a victim drawn with *dice*; returns when what it took away is there again."""
        ...

    def fallen(self) -> list[str]:
        """What ended without being asked to, or did not come back as it should."""
        ...

    async def leftovers(self) -> list[str]:
        """What is left although every job has ended and every client has gone."""
        ...


class Embedded:
    """``kill`` (kill -9 of the server, then a restart), ``engine`` (kill -9 of the engine process), ``hang`` (SIGSTOP
    of the engine process; the watchdog must find it)."""

    FAULTS = ("kill", "engine", "hang")

    def __init__(self, server: Server) -> None:
        self.server = server
        self._down = False
        self._problems: list[str] = []

    @property
    def urls(self) -> Sequence[str]:
        return [self.server.url]

    async def strike(self, fault: str, dice: random.Random) -> Strike:
        at = time.monotonic()
        if fault == "kill":
            self._down = True
            await asyncio.to_thread(self.server.kill9)
            await asyncio.to_thread(self.server.restart)
            self._down = False
        elif problem := await hurt_engine(self.server, signal.SIGKILL if fault == "engine" else signal.SIGSTOP):
            self._problems.append(problem)
        return Strike(fault, "server", at, time.monotonic() if fault == "kill" else at)

    def fallen(self) -> list[str]:
        return [*self._problems, *([] if self._down else exited(self.server, "the server"))]

    async def leftovers(self) -> list[str]:
        return []


async def hurt_engine(process: Process, number: int) -> str | None:
    """Send a signal to the engine, and wait for the new one: the next fault must meet that, not the one that is dying.
    What went wrong, or None."""
    old = await asyncio.to_thread(process.engine_pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(old, number)
    until = time.monotonic() + PATIENCE
    while not [pid for pid in await asyncio.to_thread(process.engine_pids) if pid != old]:
        if process.process is None or process.process.poll() is not None:
            return None  # `fallen` tells
        if time.monotonic() > until:
            return f"no new engine was started in place of {old}"
        await asyncio.sleep(0.02)
    return None


def exited(process: Process, name: str) -> list[str]:
    running: Any = process.process
    if running is None or running.poll() is None:
        return []
    return [f"{name} exited with {running.returncode} by itself"]
