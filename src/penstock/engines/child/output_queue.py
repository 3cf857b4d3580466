"""For engines that run by themselves, in threads or in an event loop of their own: outputs are put into a queue, and
the process's main loop, which waits for commands, is woken by a file descriptor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import msgspec
import uvloop

from penstock.core.events import Prefix
from penstock.core.job import Request
from penstock.core.ports import Output
from penstock.engines.child.backend import Backend, failed_output
from penstock.engines.child.choices import ThreadedChoices


class OutputQueue:
    """Outputs on their way from any thread to `Backend.step`. ``fd`` is readable while there are any."""

    def __init__(self) -> None:
        self._items: deque[Output | BaseException] = deque()
        self.fd, self._writer = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._writer, False)
        self._notified = False

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._writer)

    def put(self, *outputs: Output) -> None:
        self._items.extend(outputs)
        self.notify()

    def fail(self, error: BaseException) -> None:
        """The engine is broken: `take` raises *error*, and the process ends."""
        self._items.append(error)
        self.notify()

    def notify(self) -> None:
        """Wake the main loop: there are outputs, or something else to see."""
        if not self._notified:
            self._notified = True
            os.write(self._writer, b".")

    def take(self) -> list[Output]:
        """Everything that came, one `Output` a key, in order."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 1 << 16)
        self._notified = False  # before looking: what comes after the look notifies again
        found: dict[int, Output] = {}
        while self._items:
            item = self._items.popleft()
            if isinstance(item, BaseException):
                raise item
            if (earlier := found.get(item.key)) is not None:
                earlier.extend(item)
            else:
                found[item.key] = item
        return list(found.values())


class ThreadedBackend(Backend):
    """All of a `Backend` but ``add``, for one whose threads put the outputs of `ThreadedChoices` into its queue."""

    def __init__(self) -> None:
        self.queue = OutputQueue()
        self.wakeup = self.queue.fd
        self.requests: dict[int, ThreadedChoices] = {}

    def abort(self, key: int) -> None:
        if (choices := self.requests.pop(key, None)) is not None:
            choices.over = True

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def delay(self) -> float | None:
        return None

    def step(self) -> list[Output]:
        outputs = [output for output in self.queue.take() if output.key in self.requests]
        for output in outputs:
            if output.finish is not None:
                del self.requests[output.key]
        return outputs


class AsyncBackend(Backend):
    """A `Backend` over an event loop in a thread of its own: one task a request.

    A subclass says `generate` (and ``info`` and ``slots``); it may `check` a request before it is accepted.
    """

    def __init__(self) -> None:
        self._queue = OutputQueue()
        self.wakeup = self._queue.fd
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._open: set[int] = set()
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="engine", daemon=True)
        self._thread.start()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def close(self) -> None:
        """End the loop. For tests: an engine process just ends."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self._queue.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do *work* in the loop and wait for its result (for loading)."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    # ------------------------------------------------------------------------------------ for subclasses

    def check(self, request: Request) -> None:
        """Raise a `PenstockError` for a request that must be refused."""

    def report_away(self, why: str) -> None:
        """From now on the model cannot serve, and *why*; or it can again (empty)."""
        if why != self.info.away:
            self.info = msgspec.structs.replace(self.info, away=why)
            self._queue.notify()

    def generate(self, key: int, request: Request, prefixes: list[Prefix]) -> AsyncIterator[Output]:
        """Outputs of one request; the first with ``prompt_tokens``, the last with ``finish``.

        An exception ends the request; one that is ``retryable`` has it tried again. ``aclose`` must stop
        the generation.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------ Backend

    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        self.check(request)
        self._open.add(key)
        self.loop.call_soon_threadsafe(self._begin, key, request, prefixes)

    def abort(self, key: int) -> None:
        self._open.discard(key)
        self.loop.call_soon_threadsafe(self._stop, key)

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def delay(self) -> float | None:
        return None

    def step(self) -> list[Output]:
        outputs = [output for output in self._queue.take() if output.key in self._open]
        self._open.difference_update(output.key for output in outputs if output.finish is not None)
        return outputs

    # ------------------------------------------------------------------------------------ in the loop

    def _begin(self, key: int, request: Request, prefixes: list[Prefix]) -> None:
        task = self.loop.create_task(self._generate(key, request, prefixes))
        self._tasks[key] = task
        task.add_done_callback(lambda task: self._tasks.pop(key, None))

    def _stop(self, key: int) -> None:
        if (task := self._tasks.get(key)) is not None:
            task.cancel()

    async def _generate(self, key: int, request: Request, prefixes: list[Prefix]) -> None:
        try:
            async with contextlib.aclosing(self.generate(key, request, prefixes)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    self._queue.put(output)
        except Exception as error:
            self._queue.put(failed_output(key, error))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._queue.fail(error)
