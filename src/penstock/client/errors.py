"""What can fail besides the errors that a server answers, and how to read those."""

from __future__ import annotations

import contextlib
import email.utils
import time

import httpx
import msgspec

from penstock.core.errors import ErrorInfo, PenstockError, error_from_info
from penstock.core.foreign import Malformed, decode

#: Statuses that a later attempt may cure: overloaded, restarting, a proxy without its server.
RETRYABLE = frozenset({408, 429, 502, 503, 504})


class Unreachable(PenstockError):
    """The server cannot be reached, or went away and did not come back within *give_up* seconds."""

    status = 503
    code = "unreachable"


class ProtocolError(PenstockError):
    """What answers is no Penstock server, or its log has a gap, a repeat or a stale attempt."""

    status = 502
    code = "protocol_error"


class ErrorBody(msgspec.Struct):
    """A failure as any server may answer it: a proxy's often has fewer fields than `penstock.api.ErrorBody`."""

    error: ErrorInfo


class Retryable(Exception):
    """A failure that another attempt may cure, on its way to the loop that makes it."""

    def __init__(self, failure: PenstockError) -> None:
        self.failure = failure


def failure_of(response: httpx.Response, body: bytes) -> PenstockError:
    try:
        failure = error_from_info(decode(body, ErrorBody).error)
    except Malformed:
        failure = PenstockError(f"{response.url} answered {response.status_code} {response.reason_phrase}.")
    failure.status = response.status_code
    failure.retry_after = retry_after(response.headers)
    return failure


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds to wait, from ``retry-after-ms``, or ``Retry-After`` as seconds or as a date."""
    with contextlib.suppress(ValueError):
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" in headers:
            return max(0.0, float(headers["retry-after"]))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    return None
