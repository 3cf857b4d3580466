"""Failures as Anthropic's clients know them."""

from __future__ import annotations

from msgspec import UNSET
from starlette.responses import Response

from penstock.core.errors import ContextLengthExceeded, ErrorInfo, PenstockError
from penstock.gateway.dialects.anthropic.answers import MessageError, MessageErrorBody
from penstock.gateway.http import Dialect, error_reply

_TYPES = {404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


#: By this the SDK's tool runner knows that it has to go on without a thread.
_NO_THREAD = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def failure(error: ErrorInfo, status: int, request_id: str) -> MessageErrorBody:
    """Ours in an envelope, its ``type`` one of theirs."""
    kind = error.type if error.type != "server_error" else "api_error"
    message = error.message
    if error.code == ContextLengthExceeded.code:  # by these words clients know it
        counted = f"{error.tokens} tokens > {error.limit - 1} maximum" if error.tokens and error.limit else message
        message = f"prompt is too long: {counted}"
    told = MessageError(
        message=message,
        type=_TYPES.get(status, kind),
        param=error.param,
        code=error.code,
        details=_NO_THREAD if error.param == "thread" else UNSET,
    )
    return MessageErrorBody("error", told, request_id)


def _refuse(request_id: str, error: PenstockError, headers: dict[str, str] | None) -> Response:
    headers = {"request-id": request_id, **(headers or {})}
    return error_reply(error, headers, failure(error.info, error.status, request_id))


ANTHROPIC = Dialect(MessageErrorBody, _refuse)
