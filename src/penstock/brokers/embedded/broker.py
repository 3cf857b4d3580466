"""The embedded broker's transitions. The tables are drawn in schema.sql, the commit discipline in store.py."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from penstock.brokers.embedded.store import Store, Transaction
from penstock.brokers.live import LiveLog
from penstock.brokers.record import (
    CANCELLED,
    EXPIRED,
    POISONED,
    TOMBSTONE_TTL,
    WORKER_TTL,
    Details,
    decode_cursor,
    encode_cursor,
    rewound,
)
from penstock.core.errors import ErrorInfo, ExpiredResult, IdempotencyMismatch, NotFound, Overloaded
from penstock.core.events import Ended, Event, Tokens
from penstock.core.job import Job, Priority, Status, Usage
from penstock.core.ports import (
    PAGE_BYTES,
    Append,
    Clock,
    Lease,
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
#: Tokens after which a replay waits for its reader to take them: nobody's slowness fills the memory.
READ_AT_ONCE = 4096


class _Running(msgspec.Struct):
    """A leased job. The lease itself lives in memory: it means nothing to a later process."""

    seq: int
    tenant: str
    attempt: int
    head: int
    lease_until: float
    deadline_at: float | None
    prompt_tokens: int | None
    estimate: int
    losses: int = 0


class _Claimant:
    """A `claim` that waits."""

    def __init__(
        self, models: Collection[str], limit: int, slots: int, reserve: int, future: asyncio.Future[list[Lease]]
    ) -> None:
        self.models = models
        self.limit = limit
        self.slots = slots
        self.reserve = reserve
        self.future = future
        self.gave_up = False


_details = msgspec.msgpack.Decoder(Details)
_tokens = msgspec.msgpack.Decoder(Tokens)
_ended = msgspec.msgpack.Decoder(Ended)
_encode = msgspec.msgpack.Encoder().encode

_COLUMNS = (
    "seq, id, tenant, user, model, priority, status, head, attempt, retries, crashes, suspects, estimate, "
    "prompt_tokens, created_at, started_at, ended_at, deadline_at, idempotency_key, fingerprint, details, ended"
)


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
        self._store = Store(Path(path), before_commit=self._serve_claimants, telemetry=telemetry)
        self._live: dict[str, LiveLog] = {}
        self._running: dict[str, _Running] = {}
        self._losses: Counter[str] = Counter()
        self._claimants: list[_Claimant] = []
        self._arrivals: dict[tuple[str, str], list[asyncio.Queue[str]]] = defaultdict(list)
        self._workers: dict[str, WorkerInfo] = {}
        self._counts: Counter[Status] = Counter()
        self._endings: Counter[int] = Counter()
        self._leases_lost = 0
        self._tasks: set[asyncio.Future[None]] = set()

    async def open(self) -> None:
        """Open the store and take up what an earlier process left: its running jobs go to the head of the queue."""
        await self._store.open()
        await self._store.write(self._recover)

    async def close(self) -> None:
        await self._store.close()

    def _recover(self, tx: Transaction) -> None:
        for status, count in tx.conn.execute("SELECT status, count(*) FROM jobs GROUP BY status"):
            self._counts[Status(status)] = count
        rows = tx.conn.execute(
            "SELECT jobs.seq, id, tenant, status, coalesce(max(pos + n - 1), 0), model, priority "
            "FROM jobs LEFT JOIN log ON log.job = jobs.seq WHERE ended_at IS NULL GROUP BY jobs.seq"
        ).fetchall()
        for seq, job, tenant, status, head, model, priority in rows:
            self._live[job] = LiveLog(tenant, head)
            if status == Status.RUNNING:
                self._requeue(tx, seq, tenant, model, priority)

    # ------------------------------------------------------------------------------------ submit

    async def submit(self, job: Job) -> Job:
        return await self._store.write(partial(self._submit, job))

    def _submit(self, job: Job, tx: Transaction) -> Job:
        if job.idempotency_key is not None:
            row = tx.conn.execute(
                f"SELECT {_COLUMNS} FROM jobs WHERE tenant = ? AND idempotency_key = ?",
                (job.tenant, job.idempotency_key),
            ).fetchone()
            if row is not None:
                if row[19] != job.fingerprint:
                    raise IdempotencyMismatch
                return _read_job(tx.conn, row)
        self._admit(tx.conn, job.tenant)
        now = self._clock.now()
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
                job.keep,
                _encode(Details.of(job)),
            ),
        )
        self._enter_queue(tx, job.tenant, job.request.model, job.priority, arriving=True)
        self._count(tx, None, Status.QUEUED)
        self._live[job.id] = LiveLog(job.tenant)
        tx.undo.append(partial(_pop, self._live, job.id))
        if job.user is not None and (feeds := self._arrivals.get((job.tenant, job.user))):
            tx.then.extend(partial(feed.put_nowait, job.id) for feed in feeds)
        seq = cursor.lastrowid
        assert seq is not None
        position = _queue_position(tx.conn, job.tenant, job.request.model, job.priority, 0, seq)
        return msgspec.structs.replace(job, status=Status.QUEUED, created_at=now, queue_position=position)

    def _admit(self, conn: sqlite3.Connection, tenant: str) -> None:
        """Refuse what the queue's bounds do not allow."""
        policy = self._policy
        if policy.max_queued and self._counts[Status.QUEUED] >= policy.max_queued:
            raise Overloaded(
                f"The queue is full ({policy.max_queued} jobs). Try again later.",
                retry_after=self._retry_after(self._counts[Status.QUEUED] // 10 or 1),
            )
        if policy.max_queued_per_tenant:
            row = conn.execute("SELECT queued FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
            if row is not None and row[0] >= policy.max_queued_per_tenant:
                raise Overloaded(
                    f"You have {row[0]} jobs waiting, the most one tenant may have. Try again later.",
                    retry_after=self._retry_after(row[0] // 10 or 1),
                )

    def _retry_after(self, jobs: int) -> float:
        """Seconds until about *jobs* more have ended, from the drain rate of the last minute."""
        rate = self._drain_rate()
        return min(60.0, max(1.0, jobs / rate)) if rate else 5.0

    # ------------------------------------------------------------------------------------ queue and fairness

    def _enter_queue(
        self, tx: Transaction, tenant: str, model: str, priority: int, *, arriving: bool, ready: bool = True
    ) -> None:
        """Count a job in. A tenant that *arrives* with nothing waiting is lifted (VTC, algorithm 2, lines 6–13)."""
        conn = tx.conn
        row = conn.execute("SELECT counter, served, queued FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
        if row is None:
            conn.execute("INSERT INTO tenants (tenant) VALUES (?)", (tenant,))
            row = (0.0, 0, 0)
        counter, served, queued = row
        if arriving and queued == 0:
            (floor,) = conn.execute("SELECT min(counter) FROM tenants WHERE queued > 0").fetchone()
            if floor is None:
                last = conn.execute(
                    "SELECT counter FROM tenants WHERE tenant = (SELECT value FROM meta WHERE key = 'last_to_leave')"
                ).fetchone()
                floor = last[0] if last else 0.0
            if floor > counter:
                counter = floor
                conn.execute("UPDATE tenants SET counter = ? WHERE tenant = ?", (counter, tenant))
        conn.execute("UPDATE tenants SET queued = queued + 1 WHERE tenant = ?", (tenant,))
        if ready:
            self._enter_lane(tx, tenant, model, priority, counter, served)

    def _enter_lane(self, tx: Transaction, tenant: str, model: str, priority: int, counter: float, served: int) -> None:
        tx.conn.execute(
            "INSERT INTO lanes (model, priority, tenant, queued, counter, served) VALUES (?,?,?,1,?,?) "
            "ON CONFLICT (tenant, model, priority) DO UPDATE SET queued = queued + 1",
            (model, priority, tenant, counter, served),
        )
        tx.queue_grew = True

    def _leave_queue(self, tx: Transaction, tenant: str, model: str, priority: int, *, ready: bool = True) -> None:
        if ready:
            tx.conn.execute(
                "UPDATE lanes SET queued = queued - 1 WHERE tenant = ? AND model = ? AND priority = ?",
                (tenant, model, priority),
            )
        (queued,) = tx.conn.execute(
            "UPDATE tenants SET queued = queued - 1 WHERE tenant = ? RETURNING queued", (tenant,)
        ).fetchone()
        if queued == 0:
            tx.conn.execute("INSERT OR REPLACE INTO meta VALUES ('last_to_leave', ?)", (tenant,))

    def _requeue(
        self,
        tx: Transaction,
        seq: int,
        tenant: str,
        model: str,
        priority: int,
        not_before: float | None = None,
    ) -> None:
        """From running back to the head of its tenant's queue."""
        ready = not_before is None
        tx.conn.execute(
            "UPDATE jobs SET status = 'queued', head = 1, ready = ?, not_before = ? WHERE seq = ?",
            (ready, not_before, seq),
        )
        tx.conn.execute("UPDATE tenants SET running = running - 1 WHERE tenant = ?", (tenant,))
        self._enter_queue(tx, tenant, model, priority, arriving=False, ready=ready)
        self._count(tx, Status.RUNNING, Status.QUEUED)

    def _charge(self, conn: sqlite3.Connection, tenant: str, cost: float) -> None:
        weight = self._policy.weights.get(tenant, 1.0)
        conn.execute("UPDATE tenants SET counter = counter + ? WHERE tenant = ?", (cost / weight, tenant))

    def _count(self, tx: Transaction, old: Status | None, new: Status | None) -> None:
        def move(old: Status | None, new: Status | None) -> None:
            if old is not None:
                self._counts[old] -= 1
            if new is not None:
                self._counts[new] += 1

        move(old, new)
        tx.undo.append(partial(move, new, old))

    # ------------------------------------------------------------------------------------ claim

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        self._workers[worker.id] = msgspec.structs.replace(worker, seen_at=self._clock.now())
        if limit <= 0 or not models:
            return []
        slots = max(worker.slots, limit)
        claimant = _Claimant(models, limit, slots, worker.reserve, asyncio.get_running_loop().create_future())
        try:
            await self._store.write(partial(self._offer, claimant, wait > 0))
            async with asyncio.timeout(wait if wait > 0 else None):
                return await asyncio.shield(claimant.future)
        except TimeoutError:
            if claimant not in self._claimants:
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

    def _withdraw(self, claimant: _Claimant) -> None:
        if claimant in self._claimants:
            self._claimants.remove(claimant)

    def _offer(self, claimant: _Claimant, may_wait: bool, tx: Transaction) -> None:
        """Serve *claimant*, or line it up in this very transaction: a job queued by the next operation finds it."""
        if claimant.gave_up:
            return
        leases = self._take(tx, claimant)
        if leases or not may_wait:
            tx.then.append(partial(claimant.future.set_result, leases))
        else:
            self._claimants.append(claimant)
            tx.undo.append(partial(self._withdraw, claimant))

    def _give_back(self, served: asyncio.Future[list[Lease]]) -> None:
        """Leases for a claimant that was cancelled while the commit that served it was under way."""
        if not served.cancelled() and (leases := served.result()):
            task = asyncio.ensure_future(self.release([Release(lease.key) for lease in leases]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _serve_claimants(self, tx: Transaction) -> None:
        """Lease to waiting claimants in the very transaction that queued the job: one commit, not two."""
        for claimant in list(self._claimants):
            leases = self._take(tx, claimant)
            if leases:
                self._claimants.remove(claimant)
                tx.undo.append(partial(self._claim_again, claimant))
                tx.then.append(partial(claimant.future.set_result, leases))

    def _claim_again(self, claimant: _Claimant) -> None:
        """The commit that served it failed."""
        if claimant.gave_up:
            claimant.future.set_result([])
        else:
            self._claimants.append(claimant)

    def _take(self, tx: Transaction, claimant: _Claimant) -> list[Lease]:
        conn, policy, now = tx.conn, self._policy, self._clock.now()
        models, free = claimant.models, claimant.limit
        leases: list[Lease] = []
        # 0 is no cap: an absurdly high one keeps the query simple.
        cap = policy.max_running_per_tenant or 2**62
        next_lane = (
            "SELECT model, priority, lanes.tenant FROM lanes JOIN tenants USING (tenant) "
            f"WHERE lanes.queued > 0 AND model IN ({','.join('?' * len(models))}) AND priority <= ? "
            "AND tenants.running < ? ORDER BY priority, lanes.counter, lanes.served LIMIT 1"
        )
        next_job = (
            f"SELECT {_COLUMNS} FROM jobs WHERE status = 'queued' AND ready = 1 AND model = ? AND priority = ? "
            "AND tenant = ? ORDER BY head DESC, seq LIMIT 1"
        )
        while free > 0:
            lowest = Priority.BATCH if free > claimant.reserve else Priority.NORMAL
            lane = conn.execute(next_lane, (*models, lowest, cap)).fetchone()
            if lane is None:
                break
            model, priority, tenant = lane
            row = conn.execute(next_job, (model, priority, tenant)).fetchone()
            seq, job_id, attempt, estimate, prompt_tokens, deadline_at = (
                row[0], row[1], row[8] + 1, row[12], row[13], row[17],
            )  # fmt: skip
            if deadline_at is not None and deadline_at <= now:
                self._expire(tx, row)
                continue
            head, log = _logged(conn, seq) if attempt > 1 else (0, ([], [], None))
            job = msgspec.structs.replace(
                _job(row, head, None, None), status=Status.RUNNING, attempt=attempt, started_at=row[15] or now
            )
            reserve = claimant.reserve if priority == Priority.BATCH else 0
            if job.request.slots(claimant.slots - reserve) > free - reserve:
                break  # it is waited for: what would overtake it now, others would tomorrow
            free -= job.request.slots(claimant.slots)
            self._leave_queue(tx, tenant, model, priority)
            conn.execute(
                "UPDATE jobs SET status = 'running', attempt = ?, started_at = coalesce(started_at, ?) WHERE seq = ?",
                (attempt, now, seq),
            )
            # Input is charged once; what later attempts redo is not the tenant's doing.
            cost = policy.input_cost * estimate / policy.weights.get(tenant, 1.0) if attempt == 1 else 0.0
            conn.execute(
                "UPDATE tenants SET running = running + 1, counter = counter + ?, "
                "served = (SELECT coalesce(max(served), 0) + 1 FROM tenants) WHERE tenant = ?",
                (cost, tenant),
            )
            self._count(tx, Status.QUEUED, Status.RUNNING)
            self._running[job_id] = _Running(
                seq, tenant, attempt, head, now + policy.lease_ttl, deadline_at, prompt_tokens, estimate
            )
            tx.undo.append(partial(_pop, self._running, job_id))
            leases.append(Lease(job, attempt, *log))
        return leases

    # ------------------------------------------------------------------------------------ append

    async def append(self, appends: Sequence[Append]) -> dict[str, Verdict]:
        return await self._store.write(partial(self._append, appends))

    def _append(self, appends: Sequence[Append], tx: Transaction) -> dict[str, Verdict]:
        now = self._clock.now()
        lease_until = now + self._policy.lease_ttl
        verdicts: dict[str, Verdict] = {}
        rows: list[tuple[int, int, int, float, bytes]] = []
        published: list[tuple[LiveLog, Event]] = []
        heads: list[tuple[_Running, int]] = []
        charges: dict[str, float] = defaultdict(float)
        tx.then.append(lambda: _publish(published))
        tx.undo.append(lambda: _restore_heads(heads))
        for append in appends:
            lease = append.lease
            running = self._running.get(lease.job)
            if running is None or running.attempt != lease.attempt or running.tenant != lease.tenant:
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
                self._set_prompt_tokens(tx, running, append.prompt_tokens)
                charges[running.tenant] += self._policy.input_cost * (append.prompt_tokens - running.estimate)
            fresh = len(append.ids) - (running.head - append.position + 1)
            if append.ids and fresh > 0:
                tokens = Tokens(
                    append.position, lease.attempt, append.ids, append.texts, append.choices, append.logprobs
                ).after(running.head)
                rows.append((running.seq, tokens.position, fresh, now, _encode(tokens)))
                published.append((self._live[lease.job], tokens))
                heads.append((running, running.head))
                running.head = tokens.last
                charges[running.tenant] += self._policy.output_cost * fresh
            if append.finish is not None:
                finish = append.finish
                status = Status.COMPLETED if finish.error is None else Status.FAILED
                self._end_running(tx, running, lease.job, status, finish.finish_reasons, finish.error, finish.stops)
        tx.conn.executemany("INSERT INTO log (job, pos, n, at, tokens) VALUES (?,?,?,?,?)", rows)
        for tenant, cost in charges.items():
            if cost:
                self._charge(tx.conn, tenant, cost)
        return verdicts

    def _set_prompt_tokens(self, tx: Transaction, running: _Running, prompt_tokens: int) -> None:
        tx.conn.execute("UPDATE jobs SET prompt_tokens = ? WHERE seq = ?", (prompt_tokens, running.seq))
        running.prompt_tokens = prompt_tokens

        def undo() -> None:
            running.prompt_tokens = None

        tx.undo.append(undo)

    def _why_fenced(self, conn: sqlite3.Connection, append: Append) -> Verdict:
        lease = append.lease
        row = conn.execute(
            "SELECT status, attempt, ended FROM jobs WHERE id = ? AND tenant = ?", (lease.job, lease.tenant)
        ).fetchone()
        if row is None or row[1] != lease.attempt:
            return Verdict.LOST
        match Status(row[0]):
            case Status.CANCELLED:
                return Verdict.CANCELLED
            case Status.EXPIRED:
                return Verdict.EXPIRED
            case Status.COMPLETED | Status.FAILED:
                # Its own last append, sent again, is fine; anything beyond the log was never written.
                known = append.position + len(append.ids) <= _ended.decode(row[2]).position
                return Verdict.OK if known else Verdict.LOST
            case _:
                return Verdict.LOST

    # ------------------------------------------------------------------------------------ the end of a job

    def _end_running(
        self,
        tx: Transaction,
        running: _Running,
        job: str,
        status: Status,
        finish_reasons: tuple[str, ...] = (),
        error: ErrorInfo | None = None,
        stops: tuple[str | None, ...] = (),
    ) -> None:
        del self._running[job]
        tx.undo.append(partial(self._running.__setitem__, job, running))
        tx.conn.execute("UPDATE tenants SET running = running - 1 WHERE tenant = ?", (running.tenant,))
        tx.queue_grew = tx.queue_grew or self._policy.max_running_per_tenant > 0
        self._count(tx, Status.RUNNING, status)
        usage = Usage(running.prompt_tokens or 0, running.head)
        ended = Ended(running.head + 1, running.attempt, status, finish_reasons, usage, error, stops)
        self._close_log(tx, running.seq, job, ended)

    def _end_queued(
        self, tx: Transaction, row: sqlite3.Row | tuple[object, ...], status: Status, error: ErrorInfo
    ) -> None:
        job = _read_job(tx.conn, row)
        ready = tx.conn.execute("SELECT ready FROM jobs WHERE seq = ?", (row[0],)).fetchone()[0]
        self._leave_queue(tx, job.tenant, job.request.model, job.priority, ready=bool(ready))
        self._count(tx, Status.QUEUED, status)
        self._close_log(tx, int(str(row[0])), job.id, Ended(job.tokens + 1, job.attempt, status, (), job.usage, error))

    def _expire(self, tx: Transaction, row: tuple[object, ...]) -> None:
        self._end_queued(tx, row, Status.EXPIRED, EXPIRED)

    def _close_log(self, tx: Transaction, seq: int, job: str, ended: Ended) -> None:
        now = self._clock.now()
        tx.conn.execute(
            "UPDATE jobs SET status = ?, ended_at = ?, ended = ? WHERE seq = ?",
            (ended.status, now, _encode(ended), seq),
        )

        def then() -> None:
            self._endings[int(now)] += 1
            self._losses.pop(job, None)
            self._live.pop(job).publish(ended)

        tx.then.append(then)

    # ------------------------------------------------------------------------------------ release, cancel, sweep

    async def release(self, releases: Sequence[Release]) -> None:
        await self._store.write(partial(self._release, releases))

    def _release(self, releases: Sequence[Release], tx: Transaction) -> None:
        for release in releases:
            lease = release.lease
            running = self._running.get(lease.job)
            if running is None or running.attempt != lease.attempt or running.tenant != lease.tenant:
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
            self._drop_lease(tx, lease.job, running)
            not_before = self._clock.now() + release.delay if release.delay > 0 else None
            self._requeue(tx, running.seq, running.tenant, model, priority, not_before)

    def _drop_lease(self, tx: Transaction, job: str, running: _Running) -> None:
        del self._running[job]
        tx.undo.append(partial(self._running.__setitem__, job, running))

    async def cancel(self, tenant: str, job: str) -> Job:
        return await self._store.write(partial(self._cancel, tenant, job))

    def _cancel(self, tenant: str, job: str, tx: Transaction) -> Job:
        row = _find(tx.conn, tenant, job)
        status = Status(str(row[6]))
        if not status.terminal:
            if status is Status.RUNNING:
                self._end_running(tx, self._running[job], job, Status.CANCELLED, error=CANCELLED)
            else:
                self._end_queued(tx, row, Status.CANCELLED, CANCELLED)
            row = _find(tx.conn, tenant, job)
        return _read_job(tx.conn, row)

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
        for job, running in list(self._running.items()):
            if running.deadline_at is not None and running.deadline_at <= now:
                self._end_running(tx, running, job, Status.EXPIRED, error=EXPIRED)
                touched += 1
            elif running.lease_until <= now:
                self._lose_lease(tx, job, running)
                touched += 1
        for row in conn.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE ended_at IS NULL AND deadline_at <= ? AND status = 'queued' LIMIT ?",
            (now, SWEEP_LIMIT),
        ).fetchall():
            self._expire(tx, row)
            touched += 1
        for seq, tenant, model, priority in conn.execute(
            "SELECT seq, tenant, model, priority FROM jobs WHERE status = 'queued' AND ready = 0 AND not_before <= ? "
            "LIMIT ?",
            (now, SWEEP_LIMIT),
        ).fetchall():
            conn.execute("UPDATE jobs SET ready = 1, not_before = NULL WHERE seq = ?", (seq,))
            counter, served = conn.execute("SELECT counter, served FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
            self._enter_lane(tx, tenant, model, priority, counter, served)
            touched += 1
        touched += self._drop_old(tx, now)
        horizon = now - WORKER_TTL * max(self._policy.lease_ttl, 2.0)
        self._workers = {id: worker for id, worker in self._workers.items() if worker.seen_at > horizon}
        return touched

    def _lose_lease(self, tx: Transaction, job: str, running: _Running) -> None:
        losses = self._losses[job] + 1
        if losses > self._policy.max_losses:
            self._end_running(tx, running, job, Status.FAILED, error=POISONED)
            return
        (model, priority) = tx.conn.execute("SELECT model, priority FROM jobs WHERE seq = ?", (running.seq,)).fetchone()
        self._drop_lease(tx, job, running)
        self._requeue(tx, running.seq, running.tenant, model, priority)

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
            self._count(tx, status, None)

    # ------------------------------------------------------------------------------------ reading

    async def tail(self, tenant: str, job: str, after: int = 0) -> AsyncGenerator[Event]:
        live = self._live.get(job)
        if live is None or live.tenant != tenant:
            async for event in self._replay(tenant, job, after):
                yield event
            return
        if after > live.head:
            raise rewound(after, live.head)
        if after < live.base:
            async for event in self._replay(tenant, job, after, live.base):
                yield event
            after = live.base
        async for event in live.follow(after):
            yield event

    async def _replay(self, tenant: str, job: str, after: int, until: int | None = None) -> AsyncGenerator[Event]:
        """What is on the disk beyond *after*: up to the position *until*, or all of a job that has ended."""
        while events := await self._store.read(partial(_read_log, tenant, job, after, until)):
            for i, event in enumerate(events, 1):
                yield event
                if i % 32 == 0:
                    await asyncio.sleep(0)  # a long replay must not hold up everybody else
            last = events[-1]
            if isinstance(last, Ended) or last.last == until:
                return
            after = last.last

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
        return await self._store.read(lambda conn: _read_job(conn, _find(conn, tenant, job)))

    async def list(self, query: Query) -> Page:
        return await self._store.read(partial(_list, query))

    async def stats(self) -> QueueStats:
        def depth(conn: sqlite3.Connection) -> dict[tuple[str, Priority], int]:
            rows = conn.execute(
                "SELECT model, priority, count(*) FROM jobs WHERE status = 'queued' AND ended_at IS NULL "
                "GROUP BY model, priority"
            )
            return {(model, Priority(priority)): count for model, priority, count in rows}

        return QueueStats(
            depth=await self._store.read(depth),
            jobs={status: self._counts[status] for status in Status},
            workers=list(self._workers.values()),
            drain_rate=self._drain_rate(),
            leases_lost=self._leases_lost,
            durability=self.durability,
            now=self._clock.now(),
        )

    def _drain_rate(self) -> float:
        now = int(self._clock.now())
        for second in [second for second in self._endings if second <= now - 60]:
            del self._endings[second]
        return sum(self._endings.values()) / max(5, now - min(self._endings, default=now) + 1)


# ---------------------------------------------------------------------------------------------- rows

_Row = tuple[object, ...]


def _pop(mapping: dict[str, Any], key: str) -> None:
    mapping.pop(key, None)


def _publish(published: Iterable[tuple[LiveLog, Event]]) -> None:
    for live, event in published:
        live.publish(event)


def _restore_heads(heads: Iterable[tuple[_Running, int]]) -> None:
    for running, head in heads:
        running.head = head


def _find(conn: sqlite3.Connection, tenant: str, job: str) -> _Row:
    row: _Row | None = conn.execute(
        f"SELECT {_COLUMNS} FROM jobs WHERE id = ? AND tenant = ?", (job, tenant)
    ).fetchone()
    if row is not None:
        return row
    if conn.execute("SELECT 1 FROM tombstones WHERE id = ? AND tenant = ?", (job, tenant)).fetchone():
        raise ExpiredResult("This job ended, and its result has expired.")
    raise NotFound("No such job.")


def _job(row: Sequence[object], tokens: int, first_token_at: float | None, position: int | None) -> Job:
    (
        _seq, id_, tenant, user, _model, priority, status, _head, attempt, retries, crashes, suspects, _estimate,
        prompt_tokens, created_at, started_at, ended_at, deadline_at, key, fingerprint, details_, ended_,
    ) = row  # fmt: skip
    details = _details.decode(details_)  # type: ignore[arg-type]
    ended = _ended.decode(ended_) if ended_ is not None else None  # type: ignore[arg-type]
    return msgspec.convert(
        {
            "id": id_,
            "tenant": tenant,
            "request": details.request,
            "user": user,
            "priority": priority,
            "idempotency_key": key,
            "fingerprint": fingerprint,
            "request_id": details.request_id,
            "metadata": details.metadata,
            "on_disconnect": details.on_disconnect,
            "deadline_at": deadline_at,
            "view": details.view,
            "keep": details.keep,
            "trace": details.trace,
            "created_at": created_at,
            "status": status,
            "attempt": attempt,
            "queue_position": position,
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "started_at": started_at,
            "first_token_at": first_token_at,
            "ended_at": ended_at,
            "finish_reasons": ended.finish_reasons if ended else (),
            "error": ended.error if ended else None,
            "retries": retries,
            "crashes": crashes,
            "suspects": suspects,
        },
        Job,
    )


def _read_job(conn: sqlite3.Connection, row: Sequence[object]) -> Job:
    """A job with what is derived: the length of its log, its first token's time, its place in the queue."""
    seq = row[0]
    head, first_token_at = conn.execute(
        "SELECT coalesce(max(pos + n - 1), 0), min(at) FROM log WHERE job = ?", (seq,)
    ).fetchone()
    position = None
    if row[6] == Status.QUEUED:
        position = _queue_position(conn, row[2], row[4], row[5], row[7], seq)  # type: ignore[arg-type]
    return _job(row, head, first_token_at, position)


def _queue_position(conn: sqlite3.Connection, tenant: str, model: str, priority: int, head: int, seq: int) -> int:
    """1 for the next job. An estimate, as every fair queue's: other tenants take turns with this one.

    Counts the classes above, the tenant's own jobs ahead, and of every other tenant at most as many plus one.
    """
    own = conn.execute(
        "SELECT count(*) FROM jobs WHERE status = 'queued' AND ready = 1 AND model = ? AND priority = ? AND tenant = ? "
        "AND (head > ? OR (head = ? AND seq < ?))",
        (model, priority, tenant, head, head, seq),
    ).fetchone()[0]
    ahead: int = conn.execute(
        "SELECT coalesce(sum(CASE WHEN priority < ? THEN queued ELSE min(queued, ?) END), 0) FROM lanes "
        "WHERE model = ? AND queued > 0 AND (priority < ? OR (priority = ? AND tenant <> ?))",
        (priority, own + 1, model, priority, priority, tenant),
    ).fetchone()[0]
    return 1 + int(own) + ahead


def _logged(conn: sqlite3.Connection, seq: int) -> tuple[int, tuple[list[int], list[str], list[int] | None]]:
    """The log so far as (head, (ids, texts, choices)): what a later attempt continues from."""
    ids: list[int] = []
    texts: list[str] = []
    choices: list[int] = []
    multiple = False
    for (blob,) in conn.execute("SELECT tokens FROM log WHERE job = ? ORDER BY pos", (seq,)):
        tokens = _tokens.decode(blob)
        ids += tokens.ids
        texts += tokens.texts
        choices += tokens.choices or [0] * len(tokens.ids)
        multiple = multiple or tokens.choices is not None
    return len(ids), (ids, texts, choices if multiple else None)


def _read_log(tenant: str, job: str, after: int, until: int | None, conn: sqlite3.Connection) -> list[Event]:
    """The next part of a log beyond *after*: up to *until*, or (None) to the end of a job that has ended."""
    row = _find(conn, tenant, job)
    if until is not None:
        return [*_read_tokens(conn, row, after, until)]
    if row[21] is None:  # cannot be: jobs that have not ended are live
        raise NotFound("No such job.")
    ended = _ended.decode(row[21])  # type: ignore[arg-type]
    if after > ended.position:
        raise rewound(after, ended.position)
    if after == ended.position:
        return []
    runs = _read_tokens(conn, row, after, ended.position)
    whole = not runs or runs[-1].last == ended.position - 1
    return [*runs, ended] if whole else [*runs]


def _read_tokens(conn: sqlite3.Connection, row: _Row, after: int, until: int) -> list[Tokens]:
    """The next runs beyond *after*, `READ_AT_ONCE` tokens at most: a run that is longer comes in parts."""
    runs: list[Tokens] = []
    last = after + READ_AT_ONCE
    for (blob,) in conn.execute(
        "SELECT tokens FROM log WHERE job = :job AND pos <= :until AND pos + n - 1 > :after AND pos >= "
        "coalesce((SELECT max(pos) FROM log WHERE job = :job AND pos <= :after), 0) ORDER BY pos",
        {"job": row[0], "until": until, "after": after},
    ):
        runs.append(run := _tokens.decode(blob).after(after).up_to(last))
        if run.last == last:
            break
    return runs


def _list(query: Query, conn: sqlite3.Connection) -> Page:
    where, values = ["tenant = ?"], [query.tenant]
    if query.user is not None:
        where.append("user = ?")
        values.append(query.user)
    if query.model is not None:
        where.append("model = ?")
        values.append(query.model)
    if query.idempotency_key is not None:
        where.append("idempotency_key = ?")
        values.append(query.idempotency_key)
    if query.status:
        where.append(f"status IN ({','.join('?' * len(query.status))})")
        values.extend(query.status)
    arguments: list[object] = [*values]
    if query.cursor is not None:
        where.append("seq < ?")
        arguments.append(decode_cursor(query.cursor))
    rows: list[Any] = []
    size, more = 0, False
    for row in conn.execute(
        f"SELECT {_COLUMNS} FROM jobs WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?",
        (*arguments, query.limit + 1),
    ):
        if more := len(rows) == query.limit or size > PAGE_BYTES:
            break
        rows.append(row)
        size += len(row[20])
    return Page([_read_job(conn, row) for row in rows], encode_cursor(rows[-1][0]) if more else None)
