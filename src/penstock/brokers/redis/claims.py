"""The claims of this process' workers, over all shards: whom to ask first, who waits, what is given back."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

import msgspec

from penstock.brokers.record import EXPIRED
from penstock.brokers.redis import scripts
from penstock.brokers.redis.rows import lease_of
from penstock.brokers.redis.shard import Shard
from penstock.core.aio import TaskSet, wait_for_event
from penstock.core.errors import BrokerUnavailable
from penstock.core.ports import Lease, Release, WorkerInfo

#: Seconds that a claim waits for a wake-up before it looks again by itself.
CLAIM_POLL = 1.0
#: Seconds that claims under way get when the broker is closed, and the release of what they bring.
CLOSE_TIMEOUT = 2.0
#: How often, at least, a worker that claims from many shards says on the first one that it is alive.
REGISTER_INTERVAL = 1.0

_pack = msgspec.msgpack.Encoder().encode

_EXPIRED = _pack(EXPIRED)


class Claims:
    """*release* gives back what nobody waits for any more. *inbox* names this process."""

    def __init__(
        self, shards: Sequence[Shard], inbox: str, release: Callable[[Sequence[Release]], Coroutine[Any, Any, None]]
    ) -> None:
        self._shards = shards
        self._inbox = inbox
        self._release = release
        self._rotation = itertools.count()
        self._worker_numbers: dict[str, int] = {}
        self._waiting: dict[int, list[asyncio.Event]] = defaultdict(list)
        self._registered: dict[str, float] = {}
        """When each worker was last registered, by the loop's clock."""
        self._held: dict[str, int] = {}
        """The shard where a job waits for more of a claimant's slots."""
        self._tasks = TaskSet()

    async def close(self) -> None:
        """Wait a little for the claims under way, so that they are given back."""
        await self._tasks.join(CLOSE_TIMEOUT)
        await self._tasks.aclose()

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        """As the broker's verb; *limit* is positive, and there are models."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        number = self._worker_numbers.setdefault(worker.id, len(self._worker_numbers))
        notified = asyncio.Event()
        registration = _pack(worker)
        # Suspects first: they were there before, and they wait in queues of their own.
        names = [*(f"{name}\0suspects" for name in models if worker.takes_suspects), *models]
        self._waiting[number].append(notified)
        try:
            while True:
                left = min(CLAIM_POLL, until - loop.time())
                claim = scripts.Claim(
                    request="",  # each shard gets one of its own
                    worker=worker.id,
                    registration=registration,
                    models=names,
                    limit=limit,
                    reserve=worker.reserve,
                    slots=max(worker.slots, limit),
                    claimant=f"{self._inbox}/{number}",
                    running=max(0, worker.slots - limit) if left > 0 else None,
                    expired=_EXPIRED,
                )
                notified.clear()
                leases = await self._uncancelled(self._take(worker.id, claim))
                if leases or left <= 0:
                    return leases
                await wait_for_event(notified, left)
        finally:
            self._waiting[number].remove(notified)

    async def _take(self, worker: str, claim: scripts.Claim) -> list[Lease]:
        """Claim from one shard after the other, each time beginning with the next, until enough jobs are leased.

        Where a job waits for more slots than are left, nothing is claimed behind it, and the next claim begins there:
        the jobs of other shards would take what it waits for, again and again.
        """
        leases: list[Lease] = []
        free, answered, failure = claim.limit, False, None
        first = self._held.pop(claim.claimant, None)
        if first is None:
            first = next(self._rotation)
        now = asyncio.get_running_loop().time()
        for i in range(len(self._shards)):
            shard = self._shards[(first + i) % len(self._shards)]
            if not shard.commands.up.is_set() and any(other.commands.up.is_set() for other in self._shards):
                continue  # its jobs wait until it is back; the others' don't
            registers = shard.number == 0
            if registers:
                self._registered[worker] = now
            rest = msgspec.structs.replace(
                claim,
                request=secrets.token_hex(8),
                worker=worker if registers else None,
                limit=free,
                running=None if leases else claim.running,
            )
            try:
                claimed = await shard.run(rest)
                answered = True
            except BrokerUnavailable as error:
                failure = error
                continue
            leases += (new := [lease_of(each) for each in claimed.leases])
            free -= sum(lease.job.request.slots(claim.slots) for lease in new)
            if claimed.held:
                self._held[claim.claimant] = shard.number
            if claimed.held or free <= 0:
                break
        if failure is not None and not answered:
            raise failure
        if self._registered.get(worker, 0.0) < now - REGISTER_INTERVAL:
            self._registered[worker] = now
            self._shards[0].post(scripts.Register(worker=worker, registration=claim.registration))
        return leases

    def notify(self, shard: int, worker: int, model: str) -> None:
        """There may be a job for *model* in *shard*, and *worker* was the one to be woken."""
        if not self._waiting[worker]:
            self._shards[shard].post(scripts.Notify(model=model))  # it no longer waits: the next one
        for notified in self._waiting[worker]:
            notified.set()

    async def _uncancelled(self, claim: Coroutine[Any, Any, list[Lease]]) -> list[Lease]:
        """The leases of *claim*; if the caller is cancelled meanwhile, they are given back when they come."""
        task = self._tasks.spawn(claim)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._give_back)
            raise

    def _give_back(self, claim: asyncio.Future[list[Lease]]) -> None:
        if not claim.cancelled() and claim.exception() is None and claim.result():
            self._tasks.spawn(self._release([Release(lease.key) for lease in claim.result()]))
