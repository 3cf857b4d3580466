"""The parent's side of an engine process: starts it, feeds it, drains it, notices when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import psutil

from penstock.core.errors import EngineDied, ErrorInfo, ModelLoadError, error_from_info
from penstock.core.events import split_choices
from penstock.core.ports import Lease, ModelInfo, Output
from penstock.core.telemetry import Fact, NoTelemetry, Telemetry
from penstock.engines.adapters import adapter_names, served
from penstock.engines.frames import (
    Abort,
    Add,
    Failed,
    Load,
    Loading,
    Notice,
    Outputs,
    Ping,
    Progress,
    Ready,
    Splitter,
    ToChild,
    ToParent,
    encode,
)

#: Tokens that may wait to be taken before the child is made to wait.
MAX_UNREAD = 32_768


NO_TELEMETRY = NoTelemetry()


class EngineSpec(msgspec.Struct, frozen=True):
    """Which engine serves which model: what ``--engine``, ``--model NAME=PATH`` and ``--option`` say."""

    engine: str
    model: str
    path: str | None = None
    options: Mapping[str, str] = {}


#: The only variable of ours that engines need: where converted models are kept. The others are settings of the server,
#: and one may hold the broker's password.
PASSED_ON = frozenset({"PENSTOCK_CACHE"})


class Child:
    """An engine process that has no model yet: it imports its engine's library, and waits to be told what to load."""

    def __init__(self, engine: str, process: asyncio.subprocess.Process, sock: socket.socket) -> None:
        self.engine = engine
        self.process = process
        self.socket = sock

    @classmethod
    async def spawn(cls, engine: str) -> Child:
        ours, theirs = socket.socketpair()
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith("PENSTOCK_") or name in PASSED_ON
        }
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "penstock.engines.child",
                str(theirs.fileno()),
                engine,
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                env={**environment, "PYTHONUNBUFFERED": "1"},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return cls(engine, process, ours)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def kill(self) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class EngineProcess(asyncio.Protocol):
    """`penstock.core.ports.Engine` over a child process.

    A child that sends nothing for *hang_timeout* seconds (it answers pings between steps) is killed: a step of a real
    engine is bounded, since prompts are prefilled in chunks. *load_timeout* bounds the loading of the model. *spawn*
    gives the child to load it in.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        hang_timeout: float = 30.0,
        load_timeout: float = 900.0,
        on_progress: Progress = lambda what, fraction: None,
        telemetry: Telemetry = NO_TELEMETRY,
        spawn: Callable[[str], Awaitable[Child]] = Child.spawn,
    ) -> None:
        self.spec = spec
        self.on_progress = on_progress
        self._telemetry = telemetry
        self._spawn = spawn
        self._hang_timeout = hang_timeout
        self._load_timeout = load_timeout
        self._child: Child | None = None
        self._transport: asyncio.Transport | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._info: ModelInfo | None = None
        self._slots = 0
        self._died = False
        self._reset()

    def _reset(self) -> None:
        self._splitter = Splitter(ToParent)
        self._unread: dict[int, Output] = {}
        self._unread_tokens = 0
        self._paused = False
        self._heard_at = time.monotonic()
        self._readable = asyncio.Event()
        self._ready: asyncio.Future[None] | None = None
        self._death: ErrorInfo | None = None

    # ------------------------------------------------------------------------------------ Engine

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return served(self._info, adapter_names(self.spec.options)) if self._info else ()

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child and self._child.alive else None

    @property
    def alive(self) -> bool:
        """Is it up, with its model loaded?"""
        return self._watchdog is not None and self._death is None and self.pid is not None

    async def start(self) -> None:
        """Start the child and wait until its model is loaded. Raises `ModelLoadError`."""
        await self.close()
        self._reset()
        with self._telemetry.span("engine.load", model=self.spec.model, engine=self.spec.engine):
            started = time.monotonic()
            await self._load()
        self._watchdog = asyncio.create_task(self._watch(), name=f"engine watchdog: {self.spec.model}")
        self._tell(
            "engine.restarted" if self._died else "engine.loaded",
            pid=self.pid,
            seconds=round(time.monotonic() - started, 3),
            memory=self._resident(),
        )
        self._died = False

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._child = await self._spawn(self.spec.engine)
            self._tell("engine.started", pid=self._child.process.pid)
            self._ready = loop.create_future()
            self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self._child.socket)
            self._send(Load(self.spec.engine, self.spec.model, self.spec.path, dict(self.spec.options)))
            async with asyncio.timeout(self._load_timeout):
                await self._ready
        except TimeoutError:
            await self.close()
            raise ModelLoadError(f"Loading {self.spec.model!r} took longer than {self._load_timeout:.0f} s.") from None
        except BaseException:
            await self.close()
            raise

    def _resident(self) -> int:
        """Bytes of main memory that the child has by now, its children's not counted; 0: not known."""
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(self.pid).memory_info().rss) if self.pid else 0
        return 0

    def add(self, key: int, lease: Lease) -> None:
        request = lease.job.request
        prefixes = split_choices(lease.ids, lease.texts, lease.choices, request.n, lease.phases)
        self._send(Add(key, request, prefixes, lease.attempt))

    def abort(self, key: int) -> None:
        self._unread.pop(key, None)
        self._send(Abort(key))

    async def step(self) -> list[Output]:
        """Everything that came since the last call, one `Output` per key; waits while there is nothing."""
        while not self._unread:
            if self._death is not None:
                raise EngineDied(self._death.message)
            self._readable.clear()
            await self._readable.wait()
        outputs = list(self._unread.values())
        self._unread = {}
        self._unread_tokens = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return outputs

    async def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if self._child is not None:
            await self._child.kill()
            self._child = None

    # ------------------------------------------------------------------------------------ asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        for message in self._splitter.feed(data):
            match message:
                case Outputs(outputs):
                    self._collect(outputs)
                case Loading(what, fraction):
                    self.on_progress(what, fraction)
                case Ready(info, slots):
                    self._info, self._slots = info, slots
                    if self._ready is not None and not self._ready.done():
                        self._ready.set_result(None)
                case Notice(name, facts):
                    self._tell(name, **facts)
                case Failed(error, trace):
                    if trace:
                        print(trace, file=sys.stderr, flush=True)
                    self._die(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._die(ErrorInfo(f"The engine process for {self.spec.model!r} died.", code="engine_error"))

    def _collect(self, outputs: list[Output]) -> None:
        unread = self._unread
        for output in outputs:
            self._unread_tokens += len(output.ids)
            earlier = unread.get(output.key)
            if earlier is None:
                unread[output.key] = output
                continue
            earlier.extend(output)
        self._readable.set()
        if self._unread_tokens > MAX_UNREAD and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    # ------------------------------------------------------------------------------------ inside

    def _tell(self, name: str, **facts: Fact) -> None:
        self._telemetry.event(name, **{**facts, "model": self.spec.model, "engine": self.spec.engine})

    def _send(self, message: ToChild) -> None:
        # uvloop raises where asyncio only warns: a child that died a moment ago is `step`'s news, not ours.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    def _die(self, error: ErrorInfo) -> None:
        if self._death is None:
            self._death = error
            if self._watchdog is not None:
                self._died = True
                self._tell("engine.died", error=error.message)
        if self._ready is not None and not self._ready.done():
            failure = error_from_info(error)
            self._ready.set_exception(failure if isinstance(failure, ModelLoadError) else ModelLoadError(error.message))
        self._readable.set()

    async def _watch(self) -> None:
        """Ping; kill a child that has been silent for too long (stopped, dead-locked, swapped out)."""
        interval = self._hang_timeout / 4
        while True:
            self._send(Ping())
            asleep = time.monotonic()
            await asyncio.sleep(interval)
            if self._paused or time.monotonic() - asleep > 2 * interval:
                self._heard_at = time.monotonic()  # it may be us who don't listen, or who were stopped
            if time.monotonic() - self._heard_at > self._hang_timeout and self.pid is not None:
                seconds = f"{self._hang_timeout:.0f}"
                self._die(
                    ErrorInfo(f"The engine process for {self.spec.model!r} hung for {seconds} s.", code="timeout")
                )
                os.kill(self.pid, signal.SIGKILL)
                return
