"""Jobs and leases as the scripts answer with them. The fields of a job's hash are named in lua/lib.lua."""

from __future__ import annotations

import msgspec

from penstock.brokers.record import Details, prefix, result_expired, stored_job
from penstock.brokers.redis.scripts import LeasedJob, Record
from penstock.core.events import Ended
from penstock.core.job import Job
from penstock.core.ports import Lease

_details = msgspec.msgpack.Decoder(Details)
_ended = msgspec.msgpack.Decoder(Ended)


def pairs(flat: list[bytes]) -> zip[tuple[bytes, bytes]]:
    """Names and values of a hash, which come in turn."""
    return zip(flat[::2], flat[1::2], strict=True)


def job_of(record: Record, position: int = 0) -> Job:
    """The job, at *position* in the queue (0: not in it). Raises `ExpiredResult` where its request is gone."""
    if not record.details:
        raise result_expired()
    row = dict(pairs(record.fields))

    def time(name: bytes) -> float | None:
        return float(row[name]) if name in row else None

    return stored_job(
        _details.decode(record.details),
        _ended.decode(row[b"en"]) if b"en" in row else None,
        id=row[b"id"].decode(),
        tenant=row[b"t"].decode(),
        user=row[b"u"].decode() or None,
        priority=int(row[b"p"]),
        idempotency_key=row[b"ik"].decode() if b"ik" in row else None,
        fingerprint=row[b"fp"],
        deadline_at=time(b"dl"),
        created_at=float(row[b"ca"]),
        status=row[b"s"].decode(),
        attempt=int(row[b"a"]),
        queue_position=position or None,
        tokens=int(row[b"h"]),
        prompt_tokens=int(row[b"pt"]) if b"pt" in row else None,
        cached_tokens=int(row.get(b"ct", 0)),
        reasoning_tokens=int(row.get(b"rt", 0)),
        started_at=time(b"sa"),
        first_token_at=time(b"fa"),
        ended_at=time(b"ea"),
        retries=int(row.get(b"re", 0)),
        crashes=int(row.get(b"cr", 0)),
        suspects=int(row.get(b"su", 0)),
    )


def readers_of(record: Record) -> list[str]:
    """The processes that follow the job's log."""
    joined = dict(pairs(record.fields)).get(b"rs", b"").decode()
    return [reader for reader in joined.split(",") if reader]


def lease_of(leased: LeasedJob) -> Lease:
    return Lease(job_of(leased.record), leased.attempt, *prefix(leased.log))
