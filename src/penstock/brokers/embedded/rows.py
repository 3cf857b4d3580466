"""Rows of jobs, by name. The tables are drawn in schema.sql."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from penstock.brokers.record import Details, decode_cursor, encode_cursor, result_expired, stored_job, unknown
from penstock.core.events import Ended
from penstock.core.job import Job, Status
from penstock.core.ports import PAGE_BYTES, Page, Query

_details = msgspec.msgpack.Decoder(Details)
_ended = msgspec.msgpack.Decoder(Ended)


class JobRow(NamedTuple):
    seq: int
    id: str
    tenant: str
    user: str | None
    model: str
    priority: int
    status: str
    head: int
    ready: int
    attempt: int
    retries: int
    crashes: int
    suspects: int
    estimate: int
    prompt_tokens: int | None
    cached_tokens: int
    created_at: float
    started_at: float | None
    ended_at: float | None
    deadline_at: float | None
    idempotency_key: str | None
    fingerprint: bytes
    details: bytes
    ended: bytes | None


_COLUMNS = ", ".join(JobRow._fields)


def select(conn: sqlite3.Connection, where: str, *values: object) -> Iterator[JobRow]:
    """The rows of jobs for which the SQL *where* (and what follows it) holds, with *values* for its question marks."""
    return map(JobRow._make, conn.execute(f"SELECT {_COLUMNS} FROM jobs WHERE {where}", values))


def find(conn: sqlite3.Connection, tenant: str, job: str) -> JobRow:
    """Raises `NotFound`, or `ExpiredResult` for a job whose retention is over."""
    row = next(select(conn, "id = ? AND tenant = ?", job, tenant), None)
    if row is not None:
        return row
    if conn.execute("SELECT 1 FROM tombstones WHERE id = ? AND tenant = ?", (job, tenant)).fetchone():
        raise result_expired()
    raise unknown()


def end_of(row: JobRow) -> Ended | None:
    """The terminal event; None where the job has not ended."""
    return _ended.decode(row.ended) if row.ended is not None else None


def job_of(
    row: JobRow,
    tokens: int = 0,
    reasoning_tokens: int = 0,
    first_token_at: float | None = None,
    queue_position: int | None = None,
) -> Job:
    """The job, with what its row does not have."""
    return stored_job(
        _details.decode(row.details),
        end_of(row),
        id=row.id,
        tenant=row.tenant,
        user=row.user,
        priority=row.priority,
        idempotency_key=row.idempotency_key,
        fingerprint=row.fingerprint,
        deadline_at=row.deadline_at,
        created_at=row.created_at,
        status=row.status,
        attempt=row.attempt,
        queue_position=queue_position,
        tokens=tokens,
        reasoning_tokens=reasoning_tokens,
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        started_at=row.started_at,
        first_token_at=first_token_at,
        ended_at=row.ended_at,
        retries=row.retries,
        crashes=row.crashes,
        suspects=row.suspects,
    )


def read_job(conn: sqlite3.Connection, row: JobRow) -> Job:
    """The job with what is derived: the length of its log and the thoughts in it, its first token's time, its place in
    the queue."""
    head, thoughts, first_token_at = conn.execute(
        "SELECT coalesce(max(pos + n - 1), 0), coalesce(max(reasoning_tokens), 0), min(at) FROM log WHERE job = ?",
        (row.seq,),
    ).fetchone()
    position = None
    if row.status == Status.QUEUED:
        position = queue_position(conn, row.tenant, row.model, row.priority, row.head, row.seq)
    return job_of(row, head, thoughts, first_token_at, position)


def queue_position(conn: sqlite3.Connection, tenant: str, model: str, priority: int, head: int, seq: int) -> int:
    """1 for the next job. An estimate, as every fair queue's: other tenants take turns with this one.

    Counts the classes above, the tenant's own jobs ahead, and of every other tenant at most as many plus one.
    """
    (own,) = conn.execute(
        "SELECT count(*) FROM jobs WHERE status = 'queued' AND ready = 1 AND model = ? AND priority = ? AND tenant = ? "
        "AND (head > ? OR (head = ? AND seq < ?))",
        (model, priority, tenant, head, head, seq),
    ).fetchone()
    (ahead,) = conn.execute(
        "SELECT coalesce(sum(CASE WHEN priority < ? THEN queued ELSE min(queued, ?) END), 0) FROM lanes "
        "WHERE model = ? AND queued > 0 AND (priority < ? OR (priority = ? AND tenant <> ?))",
        (priority, own + 1, model, priority, priority, tenant),
    ).fetchone()
    return 1 + int(own) + int(ahead)


def list_jobs(query: Query, conn: sqlite3.Connection) -> Page:
    conditions: dict[str, object] = {"tenant = ?": query.tenant}
    if query.user is not None:
        conditions["user = ?"] = query.user
    if query.model is not None:
        conditions["model = ?"] = query.model
    if query.idempotency_key is not None:
        conditions["idempotency_key = ?"] = query.idempotency_key
    if query.cursor is not None:
        conditions["seq < ?"] = decode_cursor(query.cursor)
    where, values = [*conditions], [*conditions.values()]
    if query.status:
        where.append(f"status IN ({','.join('?' * len(query.status))})")
        values += query.status
    rows: list[JobRow] = []
    size, more = 0, False
    for row in select(conn, f"{' AND '.join(where)} ORDER BY seq DESC LIMIT ?", *values, query.limit + 1):
        if more := len(rows) == query.limit or size > PAGE_BYTES:
            break
        rows.append(row)
        size += len(row.details)
    return Page([read_job(conn, row) for row in rows], encode_cursor(rows[-1].seq) if more else None)
