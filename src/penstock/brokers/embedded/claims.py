"""Claims that wait: served in the very commit that brings a job, and given back when nobody waits any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from penstock.brokers.embedded.queue import Demand, FairQueue
from penstock.brokers.embedded.store import Store, Transaction
from penstock.core.aio import TaskSet
from penstock.core.ports import Clock, Lease, Release


class _Claimant:
    """A claim that waits for its *demand*."""

    def __init__(self, demand: Demand, future: asyncio.Future[list[Lease]]) -> None:
        self.demand = demand
        self.future = future
        self.gave_up = False


class Claims:
    """*release* gives back what nobody waits for any more."""

    def __init__(
        self,
        queue: FairQueue,
        clock: Clock,
        release: Callable[[Sequence[Release]], Coroutine[Any, Any, None]],
    ) -> None:
        self._queue = queue
        self._clock = clock
        self._release = release
        self._waiting: list[_Claimant] = []
        self._tasks = TaskSet()

    async def claim(self, store: Store, demand: Demand, wait: float) -> list[Lease]:
        claimant = _Claimant(demand, asyncio.get_running_loop().create_future())
        try:
            await store.write(partial(self._offer, claimant, wait > 0))
            async with asyncio.timeout(wait if wait > 0 else None):
                return await asyncio.shield(claimant.future)
        except TimeoutError:
            if claimant not in self._waiting:
                # Served by a commit that is still under way: its outcome is the answer.
                claimant.gave_up = True
                return await asyncio.shield(claimant.future)
            return []
        except asyncio.CancelledError:
            claimant.gave_up = True
            claimant.future.add_done_callback(self._give_back)
            raise
        finally:
            self._withdraw(claimant)

    def serve(self, tx: Transaction) -> None:
        """Lease to waiting claimants in the very transaction that queued the job: one commit, not two."""
        for claimant in list(self._waiting):
            leases = self._queue.take(tx, claimant.demand, self._clock.now())
            if leases:
                self._waiting.remove(claimant)
                tx.undo.append(partial(self._wait_again, claimant))
                tx.then.append(partial(claimant.future.set_result, leases))

    def _offer(self, claimant: _Claimant, may_wait: bool, tx: Transaction) -> None:
        """Serve *claimant*, or line it up in this very transaction: a job queued by the next operation finds it."""
        if claimant.gave_up:
            return
        leases = self._queue.take(tx, claimant.demand, self._clock.now())
        if leases or not may_wait:
            tx.then.append(partial(claimant.future.set_result, leases))
        else:
            self._waiting.append(claimant)
            tx.undo.append(partial(self._withdraw, claimant))

    def _withdraw(self, claimant: _Claimant) -> None:
        if claimant in self._waiting:
            self._waiting.remove(claimant)

    def _wait_again(self, claimant: _Claimant) -> None:
        """The commit that served it failed."""
        if claimant.gave_up:
            claimant.future.set_result([])
        else:
            self._waiting.append(claimant)

    def _give_back(self, served: asyncio.Future[list[Lease]]) -> None:
        """Leases for a claimant that was cancelled while the commit that served it was under way."""
        if not served.cancelled() and (leases := served.result()):
            self._tasks.spawn(self._release([Release(lease.key) for lease in leases]))
