"""The engine process: ``python -m penstock.engines.child FD ENGINE``. Imports the engine's library, loads one model
when told which, then takes commands and steps.

Single-threaded on purpose: native steps may hold the interpreter lock all through, so commands are read between
steps. The process dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pkgutil
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator

from penstock.core.errors import ErrorInfo, ModelLoadError, PenstockError
from penstock.core.ports import ModelInfo, Output
from penstock.engines.child import notices
from penstock.engines.child.backend import Backend, failed_output, load_backend, tokenized_output
from penstock.engines.child.coalescer import OutputCoalescer
from penstock.engines.frames import (
    Abort,
    Add,
    Failed,
    Load,
    Loading,
    Outputs,
    Ping,
    Pong,
    Ready,
    Splitter,
    ToChild,
    ToParent,
    encode,
)
from penstock.engines.plugin import find_engine

#: The engine takes every core it gets; the server's short work (the log, the streams) must not queue behind it.
NICENESS = 5


class Channel:
    """The child's end of the pair: blocking sends (a parent that is behind slows the engine), polled receives.

    Only `send` may be called from other threads than the main one.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._splitter = Splitter(ToChild)

    def send(self, message: ToParent) -> None:
        frame = encode(message)
        with self._sending:
            self._socket.sendall(frame)

    def receive(self, wait: float | None, wakeup: int | None = None) -> list[ToChild]:
        """Commands that have arrived; waits up to *wait* seconds (None: for ever) for the first, or until *wakeup* is
        readable. Exits at the end."""
        if wait != 0:
            sources: list[socket.socket | int] = [self._socket] if wakeup is None else [self._socket, wakeup]
            select.select(sources, [], [], wait)
        try:
            data = self._socket.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            os._exit(0)
        return self._splitter.feed(data)


def serve(channel: Channel, backend: Backend) -> None:
    """Commands in, outputs out; for ever."""
    coalescer = OutputCoalescer()
    running: set[int] = set()
    reported: ModelInfo | None = None
    spare_time: Iterator[None] | None = backend.spare_time

    def send(outputs: list[Output]) -> None:
        try:
            channel.send(Outputs(outputs))
        except (UnicodeEncodeError, OverflowError) as error:  # half a surrogate is no text, nor every number an id
            if len(outputs) > 1:
                for output in outputs:
                    send([output])
                return
            (output,) = outputs
            backend.abort(output.key)
            running.discard(output.key)
            coalescer.drop(output.key)
            channel.send(Outputs([failed_output(output.key, error)]))

    while True:
        if backend.info is not reported:
            reported = backend.info
            channel.send(Ready(reported, backend.slots))
        wait = backend.delay() if backend.busy else None
        if coalescer.holds and backend.wakeup is not None and (due := coalescer.due()) > 0:
            wait = due  # an engine that runs by itself may have more until then
        elif wait != 0 and (held := coalescer.flush()):
            send(held)
        if spare_time is not None and not backend.busy:
            wait = 0.0
        answered: list[Output] = []
        commands = channel.receive(wait, backend.wakeup)
        if spare_time is not None and not commands and not backend.busy and next(spare_time, True):
            spare_time = None
        for command in commands:
            match command:
                case Add(key, request, prefixes, attempt):
                    try:
                        backend.info.check(request)  # it may have been accepted before anything was known of the model
                        if request.task == "tokenize" and (found := backend.tokenize(request)) is not None:
                            answered.append(tokenized_output(key, found))
                        else:
                            backend.add(key, request, prefixes, attempt)
                            running.add(key)
                    except Exception as error:
                        if not isinstance(error, PenstockError):
                            backend.abort(key)  # whatever it had begun
                        answered.append(failed_output(key, error))
                case Abort(key):
                    backend.abort(key)
                    running.discard(key)
                    coalescer.drop(key)
                case Ping():
                    channel.send(Pong())
        # What an aborted sequence left in an output queue has to be taken out too, or it would wake us for ever.
        outputs = answered + backend.step() if backend.busy or backend.wakeup is not None else answered
        running.difference_update(output.key for output in outputs if output.finish is not None)
        if now := coalescer.take(outputs, max(len(running), len(outputs))):
            send(now)


def prepare(engine: str) -> None:
    """What loading any model begins with, done before one is named."""
    with contextlib.suppress(Exception):  # `load` meets it again, and tells
        pkgutil.resolve_name(find_engine(engine).load)


def load(channel: Channel) -> Backend | None:
    messages: list[ToChild] = []
    while not messages:
        messages = channel.receive(None)
    command = messages[0]
    assert isinstance(command, Load)
    try:
        return load_backend(
            command.engine,
            command.model,
            command.path,
            command.options,
            lambda what, fraction: channel.send(Loading(what, fraction)),
        )
    except PenstockError as error:
        channel.send(Failed(error.info, ""))
        return None
    except Exception as error:
        message = f"Loading {command.model!r} with the {command.engine} engine failed: {error}"
        channel.send(Failed(ModelLoadError(message).info, traceback.format_exc()))
        return None


def _die_with_parent() -> None:
    if sys.platform == "linux":
        parent = os.getppid()
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent == 1 or os.getppid() != parent:  # it died before we asked
            os._exit(1)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they go to the whole group or service; the parent decides
    _die_with_parent()
    os.nice(NICENESS)
    os.dup2(2, 1)  # whatever a native library prints must not mix with the server's own output
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    notices.listen(channel.send)
    prepare(sys.argv[2])
    backend = load(channel)
    if backend is None:
        sys.exit(1)
    try:
        serve(channel, backend)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except Exception as error:
        channel.send(Failed(ErrorInfo(f"The engine broke: {error}", code="engine_error"), traceback.format_exc()))
        sys.exit(1)
