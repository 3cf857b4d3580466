"""What every broker stores and answers alike: a job's details, how jobs end, what is refused, cursors."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import msgspec

from penstock.core.errors import ErrorInfo, ExpiredResult, InvalidRequest, LogRewound, NotFound, Overloaded
from penstock.core.events import Ended, Phase, TokenPhase, Tokens
from penstock.core.job import Job, OnDisconnect, Request
from penstock.core.ports import QueuePolicy

#: Silence after which a worker is not counted as alive, in lease times.
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
    retain_for: float | None = None
    trace: str | None = None

    @classmethod
    def of(cls, job: Job) -> Details:
        return cls(job.request, job.request_id, job.metadata, job.on_disconnect, job.view, job.retain_for, job.trace)


_tokens = msgspec.msgpack.Decoder(Tokens)


def stored_job(details: Details, ended: Ended | None, **fields: Any) -> Job:
    """The job of *details*, of its terminal event where it has ended, and of what each store keeps in *fields*.

    Values may be as they are stored: a status as its name, a priority as its number.
    """
    fields["request"] = details.request
    fields["request_id"] = details.request_id
    fields["metadata"] = details.metadata
    fields["on_disconnect"] = details.on_disconnect
    fields["view"] = details.view
    fields["retain_for"] = details.retain_for
    fields["trace"] = details.trace
    if ended is not None:
        fields["finish_reasons"] = ended.finish_reasons
        fields["error"] = ended.error
    return msgspec.convert(fields, Job)


#: (ids, texts, choices, phases) of a log so far: what a later attempt continues from.
LoggedPrefix = tuple[list[int], list[str], list[int] | None, list[TokenPhase] | None]


def prefix(runs: Iterable[bytes]) -> LoggedPrefix:
    """What the stored *runs* of a log hold so far.

    Where runs overlap, the first one counts, as for every reader. Choices are None where there was only one, phases
    where all tokens are text.
    """
    ids: list[int] = []
    texts: list[str] = []
    choices: list[int] = []
    phases: list[TokenPhase] = []
    several = other = False
    for blob in runs:
        run = _tokens.decode(blob).after(len(ids))
        ids += run.ids
        texts += run.texts
        choices += run.choices or [0] * len(run.ids)
        phases += run.phases or [Phase.TEXT] * len(run.ids)
        several = several or run.choices is not None
        other = other or run.phases is not None
    return ids, texts, choices if several else None, phases if other else None


def queue_is_full(count: int, drain_rate: float) -> Overloaded:
    """*count* jobs wait in all, and *drain_rate* jobs end a second."""
    return Overloaded(
        f"The queue is full ({count} jobs). Try again later.", retry_after=_until_there_is_room(count, drain_rate)
    )


def tenant_is_full(count: int, drain_rate: float) -> Overloaded:
    """*count* jobs of the tenant wait, and *drain_rate* jobs end a second, whoever's they are."""
    return Overloaded(
        f"You have {count} jobs waiting, the most one tenant may have. Try again later.",
        retry_after=_until_there_is_room(count, drain_rate),
    )


def _until_there_is_room(count: int, drain_rate: float) -> float:
    """Seconds until about a tenth of *count* jobs have ended, within reason."""
    return min(60.0, max(1.0, (count // 10 or 1) / drain_rate)) if drain_rate else 5.0


def unknown() -> NotFound:
    return NotFound("No such job.")


def result_expired() -> ExpiredResult:
    return ExpiredResult("This job ended, and its result has expired.")


def max_silence(policy: QueuePolicy) -> float:
    """Seconds without a claim or an append after which a worker is not counted as alive."""
    return WORKER_TTL * max(policy.lease_ttl, 2.0)


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
