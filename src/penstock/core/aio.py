"""What asyncio lacks and more than one package needs."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Backoff:
    """Pauses between attempts that fail: the longest doubles from *first* to *longest* seconds.

    Each pause is drawn evenly from its upper *jitter* (1: all of it, from 0 on; 0: always the longest), so that those
    who failed together don't come back together.
    """

    def __init__(self, first: float, longest: float, *, jitter: float = 1.0) -> None:
        self._first = first
        self._longest = longest
        self._jitter = jitter
        self.failures = 0
        """In a row."""

    def after(self, failures: int) -> float:
        """Seconds to wait after so many *failures* in a row (from 1)."""
        most = min(self._longest, self._first * 2.0 ** min(failures - 1, 64))
        return most * random.uniform(1 - self._jitter, 1)

    def next(self) -> float:
        """One more attempt has failed: seconds to wait before the next."""
        self.failures += 1
        return self.after(self.failures)

    def reset(self) -> None:
        """An attempt has succeeded."""
        self.failures = 0


async def first_done(*work: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Run all *work* until one is done. The others are cancelled, and have ended when this returns or is cancelled.

    Returns the tasks in the order of *work*: ``cancelled()`` says which were broken off. Raises nothing of theirs.
    """
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return tasks


async def run_until(event: asyncio.Event, work: Coroutine[Any, Any, Any]) -> bool:
    """Do *work*, unless *event* is set first: then it is broken off. Was it done? Raises what *work* raises."""
    doing, waiting = await first_done(work, event.wait())
    if doing.cancelled() and not waiting.cancelled():
        return False
    doing.result()
    return True


async def wait_for_event(event: asyncio.Event, timeout: float) -> bool:
    """Wait for *event*, at most *timeout* seconds; is it set?"""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()
    return event.is_set()


class TaskSet:
    """Background tasks of somebody whose life is no ``async with`` block, as that of a `asyncio.TaskGroup` has to be.

    *on_failure* is told of each task that fails. Without it asyncio reports the failure, unless somebody awaits the
    task.
    """

    def __init__(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def join(self, timeout: float) -> None:
        """Wait until all tasks have ended, those included that an ending one begins, at most *timeout* seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while self._tasks and (left := until - loop.time()) > 0:
            await asyncio.wait(list(self._tasks), timeout=left)

    async def aclose(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        while self._tasks:  # also those that an ending one begins
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if self._on_failure is not None and not task.cancelled() and (failure := task.exception()) is not None:
            self._on_failure(failure)


async def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Everything from all of *streams* as it comes, few items ahead of who takes them. The first failure is all's."""
    queue: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue(maxsize=2 * len(streams) or 1)

    async def pump(stream: AsyncGenerator[T]) -> None:
        try:
            async with contextlib.aclosing(stream) as items:
                async for item in items:
                    await queue.put((item,))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield found[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
