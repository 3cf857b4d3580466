"""The worker: claim → generate → append.

Three loops over one table of active leases. `_claim_loop` fills free slots; `_engine_loop` turns each engine step
into one append (durable before anyone sees it) and restarts an engine that died; `_heartbeat_loop` keeps the leases
of jobs that have produced nothing lately. The verdict of every append says which jobs to drop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import socket
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import structlog

from penstock.core.aio import Backoff, run_until
from penstock.core.errors import BrokerUnavailable, EngineDied, ModelLoadError
from penstock.core.events import count_reasoning
from penstock.core.ports import (
    Append,
    Broker,
    Clock,
    Engine,
    Finish,
    Lease,
    Output,
    Release,
    SystemClock,
    Verdict,
    WorkerInfo,
)

log = structlog.get_logger("penstock.worker")

#: New tokens after which a suspect of an engine's death is cleared (a resumed job meets its poison at once: it
#: continues where it died) — unless it was there at this many deaths.
TRIAL_TOKENS = 16
TRIAL_CRASHES = 3
#: Seconds that a claim waits when only slots are free that batch jobs may not have, and when not all are: what it asks
#: for is decided as it begins, and a job of many choices may wait for those that come free meanwhile.
RESERVED_WAIT = 0.05
PARTIAL_WAIT = 0.25
#: How often a worker that is never idle takes suspects all the same, in seconds.
SUSPECTS_INTERVAL = 10.0
#: Pauses before a job is tried again whose failure a retry may cure.
RETRIES = Backoff(0.5, 30.0)


class _Active:
    """A lease whose job is in the engine."""

    __slots__ = ("appended", "fresh", "lease", "position", "reasoning_tokens", "trial")

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.position = len(lease.ids) + 1
        self.reasoning_tokens = count_reasoning(lease.phases)
        self.fresh = 0
        self.trial = lease.job.suspects > 0
        self.appended = True

    def append(self, output: Output, finish: Finish | None) -> Append:
        """What the log gets of *output*."""
        self.reasoning_tokens += count_reasoning(output.phases)
        append = Append(
            self.lease.key,
            self.position,
            output.ids,
            output.texts,
            output.choices,
            output.logprobs,
            output.prompt_tokens,
            finish,
            output.phases,
            self.reasoning_tokens,
            output.cached_tokens,
        )
        self.position += len(output.ids)
        self.fresh += len(output.ids)
        self.appended = True
        return append

    def cleared(self) -> bool:
        return self.fresh >= TRIAL_TOKENS and self.lease.job.crashes < TRIAL_CRASHES


class Worker:
    """Runs jobs of one engine. ``run`` returns after `stop`, when everything is appended or given back.

    *batch_reserve*: the share of the engine's slots (rounded down) that jobs of the batch class leave free.
    """

    def __init__(
        self,
        broker: Broker,
        engine: Engine,
        *,
        lease_ttl: float = 5.0,
        drain_timeout: float = 5.0,
        claim_wait: float = 1.0,
        batch_reserve: float = 0.0,
        restart_backoff: float = 0.2,
        on_ready: Callable[[], None] = lambda: None,
        about: WorkerInfo | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.about = about or WorkerInfo(id=new_worker_id())
        """What to say of it beyond what it knows itself."""
        self._batch_reserve = batch_reserve
        self._broker = broker
        self._engine = engine
        self._lease_ttl = lease_ttl
        self._drain_timeout = drain_timeout
        self._claim_wait = claim_wait
        self._restart_backoff = restart_backoff
        self._on_ready = on_ready
        self._clock = clock or SystemClock()
        self.used_at = self._clock.now()
        """When it last had work."""
        self._active: dict[int, _Active] = {}
        self._pending: deque[Lease] = deque()
        self._claim: asyncio.Future[list[Lease]] | None = None
        self._next_key = 0
        self._state = "loading"
        self._leaving = "draining"
        self._suspects_at = 0.0
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        """Set whenever a slot became free, the engine came up, or the worker is to stop."""

    @property
    def info(self) -> WorkerInfo:
        slots = self._engine.slots
        reserve = int(slots * self._batch_reserve)
        return msgspec.structs.replace(
            self.about, models=self._engine.models, slots=slots, state=self._state, reserve=reserve
        )

    @property
    def busy(self) -> bool:
        """Has it jobs?"""
        return bool(self._active or self._pending)

    def stop(self, state: str = "draining") -> None:
        """Finish or give back what runs, as *state*, and end."""
        self._leaving = state
        self._stopping.set()
        self._changed.set()

    async def run(self) -> None:
        """Load the model and work until `stop`. Raises `ModelLoadError` when the model cannot be loaded at all."""
        try:
            if not await run_until(self._stopping, self._engine.start()):
                return
            self._state = "ready"
            self._on_ready()
            async with asyncio.TaskGroup() as tasks:
                claiming = tasks.create_task(self._claim_loop(), name="worker: claim")
                others = [
                    tasks.create_task(self._engine_loop(), name="worker: engine"),
                    tasks.create_task(self._heartbeat_loop(), name="worker: heartbeat"),
                ]
                await self._stopping.wait()
                claiming.cancel()  # first, or it would claim again what the drain gives back
                await asyncio.wait([claiming])
                await self._drain()
                for task in others:
                    task.cancel()
        finally:
            await self._engine.close()

    async def _drain(self) -> None:
        """Let running jobs finish for a while, then hand the rest back: they go on elsewhere, or after a restart."""
        self._state = self._leaving
        await self._admit()  # gives back what has not begun
        try:
            async with asyncio.timeout(self._drain_timeout):
                while self._active or self._pending:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            leases = [active.lease for active in self._active.values()]
            self._active.clear()
            await self._release([Release(lease.key) for lease in [*leases, *self._pending]])

    # ------------------------------------------------------------------------------------ claim

    async def _claim_loop(self) -> None:
        while not self._stopping.is_set():
            self._changed.clear()
            if self._free_slots() <= 0 or self._pending or self._trials() or self._state != "ready":
                await self._changed.wait()
                continue
            try:
                leases = await self._claim_leases()
            except BrokerUnavailable as error:
                log.warning("claim_failed", error=error.message)
                await asyncio.sleep(random.uniform(0.1, 1.0))
                continue
            suspects = [lease for lease in leases if lease.job.suspects]
            self._pending.extend(suspects or leases)
            if suspects and len(suspects) < len(leases):
                # They want the engine for themselves: whoever came with them is better off elsewhere, or later.
                await self._release([Release(lease.key) for lease in leases if not lease.job.suspects])
            await self._admit()

    async def _claim_leases(self) -> list[Lease]:
        """Ask for jobs for the free slots. Empty if the engine dies meanwhile: the broker gives back what is late."""
        models = [model.name for model in self._engine.models]
        info = msgspec.structs.replace(self.info, takes_suspects=self._takes_suspects())
        free = self._free_slots()
        # A claim that leaves batch jobs alone must not wait for long: with the next free slot it could take one.
        longest = RESERVED_WAIT if free <= info.reserve else PARTIAL_WAIT if self.busy else self._claim_wait
        wait = min(self._claim_wait, longest)
        self._claim = asyncio.ensure_future(self._broker.claim(info, models, free, wait))
        try:
            await asyncio.wait([self._claim])
        except asyncio.CancelledError:
            if not self._claim.cancel() and not self._claim.cancelled() and not self._claim.exception():
                self._pending.extend(self._claim.result())  # it was served just now: the drain gives them back
            raise
        return [] if self._claim.cancelled() else self._claim.result()

    def _free_slots(self) -> int:
        return self._engine.slots - sum(active.lease.job.request.n for active in self._active.values())

    async def _admit(self) -> None:
        """Move pending leases into the engine. Suspects of an engine's death run only among themselves, and few."""
        if self._state != "ready" and self._pending:
            leases, self._pending = list(self._pending), deque()
            await self._release([Release(lease.key) for lease in leases])
            return
        while self._pending and self._may_join(self._pending[0]):
            lease = self._pending.popleft()
            self._next_key += 1
            self.used_at = self._clock.now()
            self._active[self._next_key] = _Active(lease)
            self._engine.add(self._next_key, lease)

    def _takes_suspects(self) -> bool:
        """Here they would wait until everybody else has ended: better a worker that has nothing to do, as the one whose
        engine died. Where none is, one that is never idle makes room for them now and then."""
        now = self._clock.now()
        if self._has_bystanders() and now < self._suspects_at:
            return False
        self._suspects_at = now + SUSPECTS_INTERVAL
        return True

    def _trials(self) -> list[_Active]:
        return [active for active in self._active.values() if active.trial]

    def _may_join(self, lease: Lease) -> bool:
        trials = self._trials()
        if lease.job.suspects == 0:
            return not trials
        group = [lease, *(active.lease for active in trials)]
        smallest = min(each.job.suspects for each in group)
        if smallest == 1 and any(each.job.crashes > 1 for each in group):
            return not self._active  # really alone, or its death would prove nothing
        return not self._has_bystanders() and len(trials) < smallest

    def _has_bystanders(self) -> bool:
        """Does a job run here that was in no engine's death? Suspects that were cleared may run beside others."""
        return any(active.lease.job.suspects == 0 for active in self._active.values())

    # ------------------------------------------------------------------------------------ generate → append

    async def _engine_loop(self) -> None:
        while True:
            try:
                outputs = await self._engine.step()
            except EngineDied as error:
                await self._handle_engine_death(error)
                continue
            await self._log_outputs(outputs)

    async def _log_outputs(self, outputs: Sequence[Output]) -> None:
        """One append for everything the engine produced, then drop what ended or was refused."""
        appends: list[Append] = []
        retries: list[Release] = []
        key_of: dict[str, int] = {}
        for output in outputs:
            active = self._active.get(output.key)
            if active is None:
                continue  # dropped while its last output was under way
            lease = active.lease.key
            key_of[lease.job] = output.key
            finish = output.finish
            if finish is not None and finish.error is not None and output.retryable:
                retries.append(Release(lease, retry=finish.error, delay=RETRIES.after(active.lease.job.retries + 1)))
                finish = None
            appends.append(active.append(output, finish))
            if active.trial and active.cleared():
                active.trial = False
                self._changed.set()
        if not appends:
            return
        self.used_at = self._clock.now()
        verdicts = await self._append(appends)
        if retries:
            await self._release(retries)
        self._apply_verdicts(verdicts, key_of)
        ended = [append.lease.job for append in appends if append.finish is not None]
        for job in [*ended, *(release.lease.job for release in retries)]:
            self._active.pop(key_of[job], None)
        self._changed.set()
        if self._pending:
            await self._admit()

    def _apply_verdicts(self, verdicts: dict[str, Verdict], key_of: dict[str, int]) -> None:
        """Drop the jobs that are to go on no more, or not here."""
        for job, key in key_of.items():
            verdict = verdicts.get(job, Verdict.OK)
            if verdict is not Verdict.OK and self._active.pop(key, None) is not None:
                log.info("job_dropped", job_id=job, verdict=verdict.value)
                self._engine.abort(key)

    async def _append(self, appends: Sequence[Append]) -> dict[str, Verdict]:
        """Append, however long the broker is away: the tokens are kept, and the engine waits behind them."""
        backoff = Backoff(0.05, 2.0, jitter=0.5)
        while True:
            try:
                return await self._broker.append(appends)
            except BrokerUnavailable as error:
                pause = backoff.next()
                log.warning("append_failed", error=error.message, retry_in=pause)
                await asyncio.sleep(pause)

    async def _release(self, releases: Sequence[Release]) -> None:
        try:
            await self._broker.release(releases)
        except BrokerUnavailable as error:
            log.warning("release_failed", error=error.message)  # the leases run out by themselves

    # ------------------------------------------------------------------------------------ heartbeat, death

    async def _heartbeat_loop(self) -> None:
        """Keep the leases of jobs that wait here, or had nothing to append lately."""
        while True:
            await asyncio.sleep(self._lease_ttl / 4)
            quiet = {active.lease.job.id: key for key, active in self._active.items() if not active.appended}
            waiting = [lease.key for lease in self._pending]
            leases = [*(self._active[key].lease.key for key in quiet.values()), *waiting]
            for active in self._active.values():
                active.appended = False
            try:
                await self._register()
                verdicts = await self._broker.append([Append(lease, 0) for lease in leases])
            except BrokerUnavailable:
                continue
            lost = {lease for lease in waiting if verdicts.get(lease.job, Verdict.OK) is not Verdict.OK}
            self._pending = deque(lease for lease in self._pending if lease.key not in lost)
            self._apply_verdicts(verdicts, quiet)
            self._changed.set()
            await self._admit()

    async def _register(self) -> None:
        """Say that we are alive, and in which state, while there is no slot to claim for."""
        with contextlib.suppress(BrokerUnavailable):
            await self._broker.register(self.info)

    async def _handle_engine_death(self, error: EngineDied) -> None:
        """Give every job back as a suspect (of those on trial and those cleared: the ones on trial), and start a new
        engine, with growing pauses while that fails."""
        blamed = {active.lease.job.id for active in self._trials() or self._active.values()}
        beside = len(blamed) if len(blamed) == len(self._active) else max(2, len(blamed))  # cleared is not absolved
        leases = [active.lease for active in self._active.values()]
        log.error("engine_died", error=error.message, jobs=len(leases))
        self._active.clear()
        self._state = "restarting" if not self._stopping.is_set() else self._leaving
        if self._claim is not None:
            self._claim.cancel()
        await self._release(
            [Release(lease.key, crashed_beside=beside if lease.job.id in blamed else None) for lease in leases]
        )
        self._changed.set()
        await self._register()
        backoff = Backoff(self._restart_backoff, 30.0)
        while True:
            try:
                await self._engine.start()
                break
            except ModelLoadError as failure:
                pause = backoff.next()
                log.error("engine_restart_failed", error=failure.message, retry_in=pause)
                await asyncio.sleep(pause)
        log.info("engine_restarted")
        if not self._stopping.is_set():
            self._state = "ready"
        await self._register()
        self._changed.set()


def new_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
