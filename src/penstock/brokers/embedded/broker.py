"""The embedded broker's transitions. The tables are drawn in schema.sql, the commit discipline in store.py."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Collection, Sequence
from functools import partial
from pathlib import Path

import msgspec

from penstock.brokers.embedded.claims import Claims
from penstock.brokers.embedded.log import Logs, Run
from penstock.brokers.embedded.queue import Demand, FairQueue, Running
from penstock.brokers.embedded.rows import JobRow, end_of, find, list_jobs, queue_position, read_job, select
from penstock.brokers.embedded.store import Store, Transaction
from penstock.brokers.record import CANCELLED, EXPIRED, POISONED, TOMBSTONE_TTL, Details, max_silence
from penstock.core.errors import ErrorInfo, IdempotencyMismatch, NotFound
from penstock.core.events import Ended, Event
from penstock.core.job import Job, Priority, Status, Usage
from penstock.core.ports import (
    Append,
    Clock,
    Lease,
    LeaseKey,
    Page,
    Query,
    QueuePolicy,
    QueueStats,
    Release,
    SystemClock,
    Verdict,
    WorkerInfo,
)
from penstock.core.telemetry import Telemetry

#: Rows that one sweep changes at most, so that it never holds the writer for long.
SWEEP_LIMIT = 500

_encode = msgspec.msgpack.Encoder().encode


class EmbeddedBroker:
    """`penstock.core.ports.Broker` over SQLite in *path* (a directory), for one process.

    Durability: SQLite WAL with ``synchronous=FULL``; a submit is acknowledged and a token delivered after COMMIT.
    """

    kind = "embedded"
    durability = "strict (SQLite WAL, synchronous=FULL)"

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock | None = None,
        policy: QueuePolicy | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._policy = policy or QueuePolicy()
        self._queue = FairQueue(self._policy, self._expire)
        self._claims = Claims(self._queue, self._clock, self.release)
        self._store = Store(Path(path), before_commit=self._claims.serve, telemetry=telemetry)
        self._logs = Logs(self._store)
        self._losses: Counter[str] = Counter()
        """Leases that ran out on each job."""
        self._arrivals: dict[tuple[str, str], list[asyncio.Queue[str]]] = defaultdict(list)
        self._workers: dict[str, WorkerInfo] = {}
        self._leases_lost = 0

    async def open(self) -> None:
        """Open the store and take up what an earlier process left: its running jobs go to the head of the queue."""
        await self._store.open()
        await self._store.write(self._recover)

    async def close(self) -> None:
        await self._store.close()

    def _recover(self, tx: Transaction) -> None:
        for status, count in tx.conn.execute("SELECT status, count(*) FROM jobs GROUP BY status"):
            self._queue.counts[Status(status)] = count
        rows = tx.conn.execute(
            "SELECT jobs.seq, id, tenant, status, coalesce(max(pos + n - 1), 0), model, priority "
            "FROM jobs LEFT JOIN log ON log.job = jobs.seq WHERE ended_at IS NULL GROUP BY jobs.seq"
        ).fetchall()
        for seq, job, tenant, status, head, model, priority in rows:
            self._logs.resume(job, tenant, head)
            if status == Status.RUNNING:
                self._queue.requeue(tx, seq, tenant, model, priority)

    # ------------------------------------------------------------------------------------ submit

    async def submit(self, job: Job) -> Job:
        return await self._store.write(partial(self._submit, job))

    def _submit(self, job: Job, tx: Transaction) -> Job:
        if job.idempotency_key is not None:
            row = next(select(tx.conn, "tenant = ? AND idempotency_key = ?", job.tenant, job.idempotency_key), None)
            if row is not None:
                if row.fingerprint != job.fingerprint:
                    raise IdempotencyMismatch
                return read_job(tx.conn, row)
        now = self._clock.now()
        self._queue.admit(tx.conn, job.tenant, now)
        cursor = tx.conn.execute(
            "INSERT INTO jobs (id, tenant, user, model, priority, status, estimate, created_at, deadline_at, "
            "idempotency_key, fingerprint, keep, details) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                job.id,
                job.tenant,
                job.user,
                job.request.model,
                job.priority,
                Status.QUEUED,
                job.request.estimated_prompt_tokens,
                now,
                job.deadline_at,
                job.idempotency_key,
                job.fingerprint,
                job.retain_for,
                _encode(Details.of(job)),
            ),
        )
        self._queue.enter(tx, job.tenant, job.request.model, job.priority, arriving=True)
        self._queue.count(tx, None, Status.QUEUED)
        self._logs.begin(tx, job.id, job.tenant)
        if job.user is not None and (feeds := self._arrivals.get((job.tenant, job.user))):
            tx.then.extend(partial(feed.put_nowait, job.id) for feed in feeds)
        seq = cursor.lastrowid
        assert seq is not None
        position = queue_position(tx.conn, job.tenant, job.request.model, job.priority, 0, seq)
        return msgspec.structs.replace(job, status=Status.QUEUED, created_at=now, queue_position=position)

    # ------------------------------------------------------------------------------------ claim

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        await self.register(worker)
        if limit <= 0 or not models:
            return []
        demand = Demand(models, limit, max(worker.slots, limit), worker.reserve)
        return await self._claims.claim(self._store, demand, wait)

    async def register(self, worker: WorkerInfo) -> None:
        self._workers[worker.id] = msgspec.structs.replace(worker, seen_at=self._clock.now())

    # ------------------------------------------------------------------------------------ append

    async def append(self, appends: Sequence[Append]) -> dict[str, Verdict]:
        return await self._store.write(partial(self._append, appends))

    def _append(self, appends: Sequence[Append], tx: Transaction) -> dict[str, Verdict]:
        now = self._clock.now()
        lease_until = now + self._policy.lease_ttl
        verdicts: dict[str, Verdict] = {}
        runs: list[Run] = []
        heads: list[tuple[Running, int, int]] = []
        charges: dict[str, float] = defaultdict(float)
        tx.then.append(partial(self._logs.publish, runs))  # first: before the end of any of these jobs
        tx.undo.append(partial(_restore_heads, heads))
        for append in appends:
            lease = append.lease
            running = self._held(lease)
            if running is None:
                verdicts[lease.job] = self._why_fenced(tx.conn, append)
                continue
            if running.deadline_at is not None and running.deadline_at <= now:
                verdicts[lease.job] = Verdict.EXPIRED
                self._end_running(tx, running, lease.job, Status.EXPIRED, error=EXPIRED)
                continue
            if append.position > running.head + 1:
                verdicts[lease.job] = Verdict.LOST  # a gap: this worker's view of the log is wrong
                continue
            running.lease_until = lease_until
            verdicts[lease.job] = Verdict.OK
            if append.prompt_tokens is not None and running.prompt_tokens is None:
                self._set_prompt_tokens(tx, running, append.prompt_tokens, append.cached_tokens)
                charges[running.tenant] += self._policy.input_cost * (append.prompt_tokens - running.estimate)
            fresh = len(append.ids) - (running.head - append.position + 1)
            if append.ids and fresh > 0:
                tokens = append.run.after(running.head)
                heads.append((running, running.head, running.reasoning_tokens))
                running.head = tokens.last
                running.reasoning_tokens = max(running.reasoning_tokens, append.reasoning_tokens)
                runs.append(Run(lease.job, running.seq, tokens, running.reasoning_tokens))
                charges[running.tenant] += self._policy.output_cost * fresh
            if append.finish is not None:
                finish = append.finish
                status = Status.COMPLETED if finish.error is None else Status.FAILED
                self._end_running(tx, running, lease.job, status, finish.finish_reasons, finish.error, finish.stops)
        self._logs.write(tx, runs, now)
        for tenant, cost in charges.items():
            if cost:
                self._queue.charge(tx.conn, tenant, cost)
        return verdicts

    def _set_prompt_tokens(self, tx: Transaction, running: Running, prompt_tokens: int, cached_tokens: int) -> None:
        tx.conn.execute(
            "UPDATE jobs SET prompt_tokens = ?, cached_tokens = ? WHERE seq = ?",
            (prompt_tokens, cached_tokens, running.seq),
        )
        running.prompt_tokens, running.cached_tokens = prompt_tokens, cached_tokens

        def undo() -> None:
            running.prompt_tokens, running.cached_tokens = None, 0

        tx.undo.append(undo)

    def _held(self, lease: LeaseKey) -> Running | None:
        """The running job whose lease this is, unless it is another's by now."""
        running = self._queue.running.get(lease.job)
        if running is None or running.attempt != lease.attempt or running.tenant != lease.tenant:
            return None
        return running

    def _why_fenced(self, conn: sqlite3.Connection, append: Append) -> Verdict:
        lease = append.lease
        row = next(select(conn, "id = ? AND tenant = ?", lease.job, lease.tenant), None)
        if row is None or row.attempt != lease.attempt:
            return Verdict.LOST
        if row.status in (Status.CANCELLED, Status.EXPIRED):
            return Verdict(row.status)
        ended = end_of(row)
        # Its own last append, sent again, is fine; anything beyond the log was never written.
        known = ended is not None and append.position + len(append.ids) <= ended.position
        return Verdict.OK if known else Verdict.LOST

    # ------------------------------------------------------------------------------------ the end of a job

    def _end_running(
        self,
        tx: Transaction,
        running: Running,
        job: str,
        status: Status,
        finish_reasons: tuple[str, ...] = (),
        error: ErrorInfo | None = None,
        stops: tuple[str | None, ...] = (),
    ) -> None:
        self._queue.drop_lease(tx, job)
        tx.conn.execute("UPDATE tenants SET running = running - 1 WHERE tenant = ?", (running.tenant,))
        tx.queue_grew = tx.queue_grew or self._policy.max_running_per_tenant > 0
        self._queue.count(tx, Status.RUNNING, status)
        usage = Usage(running.prompt_tokens or 0, running.head, running.reasoning_tokens, running.cached_tokens)
        ended = Ended(running.head + 1, running.attempt, status, finish_reasons, usage, error, stops)
        self._close_log(tx, running.seq, job, ended)

    def _end_queued(self, tx: Transaction, row: JobRow, status: Status, error: ErrorInfo) -> None:
        job = read_job(tx.conn, row)
        self._queue.leave(tx, row.tenant, row.model, row.priority, ready=bool(row.ready))
        self._queue.count(tx, Status.QUEUED, status)
        self._close_log(tx, row.seq, row.id, Ended(job.tokens + 1, job.attempt, status, (), job.usage, error))

    def _expire(self, tx: Transaction, row: JobRow) -> None:
        self._end_queued(tx, row, Status.EXPIRED, EXPIRED)

    def _close_log(self, tx: Transaction, seq: int, job: str, ended: Ended) -> None:
        now = self._clock.now()
        tx.conn.execute(
            "UPDATE jobs SET status = ?, ended_at = ?, ended = ? WHERE seq = ?",
            (ended.status, now, _encode(ended), seq),
        )

        def then() -> None:
            self._queue.drain.count(now)
            self._losses.pop(job, None)
            self._logs.close(job, ended)

        tx.then.append(then)

    # ------------------------------------------------------------------------------------ release, cancel, sweep

    async def release(self, releases: Sequence[Release]) -> None:
        await self._store.write(partial(self._release, releases))

    def _release(self, releases: Sequence[Release], tx: Transaction) -> None:
        for release in releases:
            lease = release.lease
            running = self._held(lease)
            if running is None:
                continue
            (model, priority, retries, crashes, deaths_alone, suspects) = tx.conn.execute(
                "SELECT model, priority, retries, crashes, deaths_alone, suspects FROM jobs WHERE seq = ?",
                (running.seq,),
            ).fetchone()
            if release.crashed_beside is not None:
                crashes += 1
                deaths_alone += release.crashed_beside <= 1
                if deaths_alone >= 2:
                    self._end_running(tx, running, lease.job, Status.FAILED, error=POISONED)
                    continue
                suspects = max(1, release.crashed_beside // 2)
            if release.retry is not None:
                retries += 1
                if retries > self._policy.max_attempts:
                    self._end_running(tx, running, lease.job, Status.FAILED, error=release.retry)
                    continue
            tx.conn.execute(
                "UPDATE jobs SET retries = ?, crashes = ?, deaths_alone = ?, suspects = ? WHERE seq = ?",
                (retries, crashes, deaths_alone, suspects, running.seq),
            )
            self._queue.drop_lease(tx, lease.job)
            not_before = self._clock.now() + release.delay if release.delay > 0 else None
            self._queue.requeue(tx, running.seq, running.tenant, model, priority, not_before)

    async def cancel(self, tenant: str, job: str) -> Job:
        return await self._store.write(partial(self._cancel, tenant, job))

    def _cancel(self, tenant: str, job: str, tx: Transaction) -> Job:
        row = find(tx.conn, tenant, job)
        status = Status(row.status)
        if not status.terminal:
            if status is Status.RUNNING:
                self._end_running(tx, self._queue.running[job], job, Status.CANCELLED, error=CANCELLED)
            else:
                self._end_queued(tx, row, Status.CANCELLED, CANCELLED)
            row = find(tx.conn, tenant, job)
        return read_job(tx.conn, row)

    async def forget(self, tenant: str, job: str) -> None:
        await self._store.write(partial(self._forget, tenant, job))

    def _forget(self, tenant: str, job: str, tx: Transaction) -> None:
        with contextlib.suppress(NotFound):
            ended = self._cancel(tenant, job, tx)
            (seq,) = tx.conn.execute("SELECT seq FROM jobs WHERE id = ?", (job,)).fetchone()
            self._drop(tx, [(seq, ended.status)])

    async def sweep(self) -> int:
        return await self._store.write(self._sweep)

    def _sweep(self, tx: Transaction) -> int:
        conn, now = tx.conn, self._clock.now()
        touched = 0
        for job, running in list(self._queue.running.items()):
            if running.deadline_at is not None and running.deadline_at <= now:
                self._end_running(tx, running, job, Status.EXPIRED, error=EXPIRED)
                touched += 1
            elif running.lease_until <= now:
                self._lose_lease(tx, job, running)
                touched += 1
        late = [*select(conn, "ended_at IS NULL AND deadline_at <= ? AND status = 'queued' LIMIT ?", now, SWEEP_LIMIT)]
        for row in late:
            self._expire(tx, row)
        touched += len(late) + self._queue.wake_delayed(tx, now, SWEEP_LIMIT)
        touched += self._drop_old(tx, now)
        horizon = now - max_silence(self._policy)
        self._workers = {id: worker for id, worker in self._workers.items() if worker.seen_at > horizon}
        return touched

    def _lose_lease(self, tx: Transaction, job: str, running: Running) -> None:
        losses = self._losses[job] + 1
        if losses > self._policy.max_losses:
            self._end_running(tx, running, job, Status.FAILED, error=POISONED)
            return
        (model, priority) = tx.conn.execute("SELECT model, priority FROM jobs WHERE seq = ?", (running.seq,)).fetchone()
        self._queue.drop_lease(tx, job)
        self._queue.requeue(tx, running.seq, running.tenant, model, priority)

        def then() -> None:
            self._leases_lost += 1
            self._losses[job] = losses

        tx.then.append(then)

    def _drop_old(self, tx: Transaction, now: float) -> int:
        conn = tx.conn
        old = conn.execute(
            "SELECT seq, status, id, tenant FROM jobs WHERE ended_at <= ? AND keep IS NULL "
            "UNION ALL SELECT seq, status, id, tenant FROM jobs WHERE ended_at + keep <= ? LIMIT ?",
            (now - self._policy.result_ttl, now, SWEEP_LIMIT),
        ).fetchall()
        self._drop(tx, [(seq, Status(status)) for seq, status, *_ in old])
        conn.executemany("INSERT OR REPLACE INTO tombstones VALUES (?,?,?)", [(row[2], row[3], now) for row in old])
        conn.execute("DELETE FROM tombstones WHERE at <= ?", (now - TOMBSTONE_TTL,))
        return len(old)

    def _drop(self, tx: Transaction, ended: Sequence[tuple[int, Status]]) -> None:
        """Remove everything of jobs that have ended, given as (seq, status)."""
        tx.conn.executemany("DELETE FROM log WHERE job = ?", [(seq,) for seq, _ in ended])
        tx.conn.executemany("DELETE FROM jobs WHERE seq = ?", [(seq,) for seq, _ in ended])
        for _, status in ended:
            self._queue.count(tx, status, None)

    # ------------------------------------------------------------------------------------ reading

    def tail(self, tenant: str, job: str, after: int = 0) -> AsyncGenerator[Event]:
        return self._logs.tail(tenant, job, after)

    def arrivals(self, tenant: str, user: str) -> AsyncGenerator[str]:
        feed: asyncio.Queue[str] = asyncio.Queue()
        self._arrivals[tenant, user].append(feed)  # now, not at the first step of the iterator
        return self._hear(tenant, user, feed)

    async def _hear(self, tenant: str, user: str, feed: asyncio.Queue[str]) -> AsyncGenerator[str]:
        try:
            while True:
                yield await feed.get()
        finally:
            feeds = self._arrivals[tenant, user]
            feeds.remove(feed)
            if not feeds:
                del self._arrivals[tenant, user]

    async def get(self, tenant: str, job: str) -> Job:
        return await self._store.read(lambda conn: read_job(conn, find(conn, tenant, job)))

    async def list(self, query: Query) -> Page:
        return await self._store.read(partial(list_jobs, query))

    async def stats(self) -> QueueStats:
        def depth(conn: sqlite3.Connection) -> dict[tuple[str, Priority], int]:
            rows = conn.execute(
                "SELECT model, priority, count(*) FROM jobs WHERE status = 'queued' AND ended_at IS NULL "
                "GROUP BY model, priority"
            )
            return {(model, Priority(priority)): count for model, priority, count in rows}

        return QueueStats(
            depth=await self._store.read(depth),
            jobs={status: self._queue.counts[status] for status in Status},
            workers=list(self._workers.values()),
            drain_rate=self._queue.drain.per_second(self._clock.now()),
            leases_lost=self._leases_lost,
            durability=self.durability,
            now=self._clock.now(),
        )


def _restore_heads(heads: Sequence[tuple[Running, int, int]]) -> None:
    for running, head, reasoning_tokens in reversed(heads):
        running.head, running.reasoning_tokens = head, reasoning_tokens
