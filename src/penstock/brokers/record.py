"""What every broker stores and answers alike: a job's details, how jobs end, cursors."""

from __future__ import annotations

import base64

import msgspec

from penstock.core.errors import ErrorInfo, InvalidRequest, LogRewound
from penstock.core.job import Job, OnDisconnect, Request

#: A worker that has not claimed or appended for so many lease times is not counted as alive.
WORKER_TTL = 3
#: Ids stay known as expired for this long after their retention.
TOMBSTONE_TTL = 24 * 3600.0

EXPIRED = ErrorInfo("The job's deadline passed before it was finished.", "server_error", None, "expired")
CANCELLED = ErrorInfo("The job was cancelled.", "invalid_request_error", None, "cancelled")
POISONED = ErrorInfo(
    "The engine died each time it ran this job, so it was quarantined. Other jobs are not affected.",
    "server_error",
    None,
    "poisoned",
)


class Details(msgspec.Struct, array_like=True):
    """What of a job never takes part in a query.

    Stored as an array: a new field goes to the end and has a default, which is what older jobs have.
    """

    request: Request
    request_id: str | None
    metadata: dict[str, str]
    on_disconnect: OnDisconnect
    view: bytes = b""
    keep: float | None = None
    trace: str | None = None

    @classmethod
    def of(cls, job: Job) -> Details:
        return cls(job.request, job.request_id, job.metadata, job.on_disconnect, job.view, job.keep, job.trace)


def rewound(after: int, head: int) -> LogRewound:
    return LogRewound(f"You ask for what comes after position {after}, but the log ends at {head}.", param="after")


def encode_cursor(seq: int) -> str:
    return base64.urlsafe_b64encode(f"seq:{seq}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """The seq before which a page begins. Raises `InvalidRequest` for what no list answered with."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        kind, _, seq = text.partition(":")
        if kind != "seq":
            raise ValueError(kind)
        return min(int(seq), 2**63 - 1)
    except ValueError as error:
        raise InvalidRequest("This cursor is not one that a list answered with.", param="cursor") from error
