"""The queue: who comes next, what is leased, and how many jobs there are.

The order is that of the Virtual Token Counter ("Fairness in Serving Large Language Models", OSDI '24). A tenant's jobs
of one model and class that can be claimed are a ready queue; the table of these is called ``lanes``.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial

import msgspec

from penstock.brokers.embedded.log import logged
from penstock.brokers.embedded.rows import JobRow, job_of, select
from penstock.brokers.embedded.store import Transaction
from penstock.brokers.record import queue_is_full, tenant_is_full
from penstock.core.events import count_reasoning
from penstock.core.job import Priority, Status
from penstock.core.ports import Lease, QueuePolicy


class Running(msgspec.Struct):
    """A leased job. The lease itself lives in memory: it means nothing to a later process."""

    seq: int
    tenant: str
    attempt: int
    head: int
    lease_until: float
    deadline_at: float | None
    prompt_tokens: int | None
    estimate: int
    cached_tokens: int
    reasoning_tokens: int


class Demand(msgspec.Struct, frozen=True):
    """What a claim asks for: see `Broker.claim`."""

    models: Collection[str]
    limit: int
    slots: int
    reserve: int


class DrainRate:
    """How many jobs end, by the last minute, or by the part of it in which any did (five seconds at least)."""

    def __init__(self) -> None:
        self._ends: Counter[int] = Counter()

    def count(self, now: float) -> None:
        self._ends[int(now)] += 1

    def per_second(self, now: float) -> float:
        second = int(now)
        for old in [each for each in self._ends if each <= second - 60]:
            del self._ends[old]
        return sum(self._ends.values()) / max(5, second - min(self._ends, default=second) + 1)


class FairQueue:
    """*expire* ends a job whose deadline has passed when its turn comes."""

    def __init__(self, policy: QueuePolicy, expire: Callable[[Transaction, JobRow], None]) -> None:
        self._policy = policy
        self._expire = expire
        self.counts: Counter[Status] = Counter()
        """Jobs by status."""
        self.running: dict[str, Running] = {}
        self.drain = DrainRate()

    def admit(self, conn: sqlite3.Connection, tenant: str, now: float) -> None:
        """Refuse (`Overloaded`) what the queue's bounds do not allow."""
        policy, queued = self._policy, self.counts[Status.QUEUED]
        if policy.max_queued and queued >= policy.max_queued:
            raise queue_is_full(queued, self.drain.per_second(now))
        if policy.max_queued_per_tenant:
            row = conn.execute("SELECT queued FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
            own = row[0] if row is not None else 0
            if own >= policy.max_queued_per_tenant:
                raise tenant_is_full(own, self.drain.per_second(now))

    def count(self, tx: Transaction, old: Status | None, new: Status | None) -> None:
        """A job was *old* (None: nothing yet) and is *new* (None: gone)."""

        def move(old: Status | None, new: Status | None) -> None:
            if old is not None:
                self.counts[old] -= 1
            if new is not None:
                self.counts[new] += 1

        move(old, new)
        tx.undo.append(partial(move, new, old))

    # ------------------------------------------------------------------------------------ in and out

    def enter(
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
            self._enter_ready(tx, tenant, model, priority, counter, served)

    def _enter_ready(
        self, tx: Transaction, tenant: str, model: str, priority: int, counter: float, served: int
    ) -> None:
        tx.conn.execute(
            "INSERT INTO lanes (model, priority, tenant, queued, counter, served) VALUES (?,?,?,1,?,?) "
            "ON CONFLICT (tenant, model, priority) DO UPDATE SET queued = queued + 1",
            (model, priority, tenant, counter, served),
        )
        tx.queue_grew = True

    def leave(self, tx: Transaction, tenant: str, model: str, priority: int, *, ready: bool = True) -> None:
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

    def requeue(
        self, tx: Transaction, seq: int, tenant: str, model: str, priority: int, not_before: float | None = None
    ) -> None:
        """From running back to the head of its tenant's queue."""
        ready = not_before is None
        tx.conn.execute(
            "UPDATE jobs SET status = 'queued', head = 1, ready = ?, not_before = ? WHERE seq = ?",
            (ready, not_before, seq),
        )
        tx.conn.execute("UPDATE tenants SET running = running - 1 WHERE tenant = ?", (tenant,))
        self.enter(tx, tenant, model, priority, arriving=False, ready=ready)
        self.count(tx, Status.RUNNING, Status.QUEUED)

    def wake_delayed(self, tx: Transaction, now: float, limit: int) -> int:
        """Let retries be claimed whose delay is over, *limit* at most; how many."""
        conn = tx.conn
        rows = conn.execute(
            "SELECT seq, tenant, model, priority FROM jobs WHERE status = 'queued' AND ready = 0 AND not_before <= ? "
            "LIMIT ?",
            (now, limit),
        ).fetchall()
        for seq, tenant, model, priority in rows:
            conn.execute("UPDATE jobs SET ready = 1, not_before = NULL WHERE seq = ?", (seq,))
            counter, served = conn.execute("SELECT counter, served FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
            self._enter_ready(tx, tenant, model, priority, counter, served)
        return len(rows)

    def charge(self, conn: sqlite3.Connection, tenant: str, cost: float) -> None:
        weight = self._policy.weights.get(tenant, 1.0)
        conn.execute("UPDATE tenants SET counter = counter + ? WHERE tenant = ?", (cost / weight, tenant))

    # ------------------------------------------------------------------------------------ leases

    def take(self, tx: Transaction, demand: Demand, now: float) -> list[Lease]:
        """Lease the next jobs that *demand* may have."""
        conn, policy, models, free = tx.conn, self._policy, demand.models, demand.limit
        leases: list[Lease] = []
        # 0 is no cap: an absurdly high one keeps the query simple.
        cap = policy.max_running_per_tenant or 2**62
        next_queue = (
            "SELECT model, priority, lanes.tenant FROM lanes JOIN tenants USING (tenant) "
            f"WHERE lanes.queued > 0 AND model IN ({','.join('?' * len(models))}) AND priority <= ? "
            "AND tenants.running < ? ORDER BY priority, lanes.counter, lanes.served LIMIT 1"
        )
        next_job = (
            "status = 'queued' AND ready = 1 AND model = ? AND priority = ? AND tenant = ? "
            "ORDER BY head DESC, seq LIMIT 1"
        )
        while free > 0:
            lowest = Priority.BATCH if free > demand.reserve else Priority.NORMAL
            found = conn.execute(next_queue, (*models, lowest, cap)).fetchone()
            if found is None:
                break
            row = next(select(conn, next_job, *found))
            if row.deadline_at is not None and row.deadline_at <= now:
                self._expire(tx, row)
                continue
            attempt = row.attempt + 1
            ids, texts, choices, phases = logged(conn, row.seq) if attempt > 1 else ([], [], None, None)
            thoughts = count_reasoning(phases)
            job = msgspec.structs.replace(
                job_of(row, len(ids), thoughts),
                status=Status.RUNNING,
                attempt=attempt,
                started_at=row.started_at or now,
            )
            reserve = demand.reserve if row.priority == Priority.BATCH else 0
            if job.request.slots(demand.slots - reserve) > free - reserve:
                break  # it is waited for: what would overtake it now, others would tomorrow
            free -= job.request.slots(demand.slots)
            self.leave(tx, row.tenant, row.model, row.priority)
            conn.execute(
                "UPDATE jobs SET status = 'running', attempt = ?, started_at = coalesce(started_at, ?) WHERE seq = ?",
                (attempt, now, row.seq),
            )
            # Input is charged once; what later attempts redo is not the tenant's doing.
            cost = policy.input_cost * row.estimate / policy.weights.get(row.tenant, 1.0) if attempt == 1 else 0.0
            conn.execute(
                "UPDATE tenants SET running = running + 1, counter = counter + ?, "
                "served = (SELECT coalesce(max(served), 0) + 1 FROM tenants) WHERE tenant = ?",
                (cost, row.tenant),
            )
            self.count(tx, Status.QUEUED, Status.RUNNING)
            lease_until = now + policy.lease_ttl
            self.running[row.id] = Running(
                row.seq,
                row.tenant,
                attempt,
                len(ids),
                lease_until,
                row.deadline_at,
                row.prompt_tokens,
                row.estimate,
                row.cached_tokens,
                thoughts,
            )
            tx.undo.append(partial(_pop, self.running, row.id))
            leases.append(Lease(job, attempt, ids, texts, choices, phases))
        return leases

    def drop_lease(self, tx: Transaction, job: str) -> Running:
        running = self.running.pop(job)
        tx.undo.append(partial(self.running.__setitem__, job, running))
        return running


def _pop(running: dict[str, Running], job: str) -> None:
    running.pop(job, None)
