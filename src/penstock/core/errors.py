"""The one exception tree. Every failure a user can meet is one of these; each knows its HTTP status.

PenstockError
├── InvalidRequest              400  the request is malformed or out of range
│   ├── Unsupported             400  a field that the model's engine cannot honour
│   ├── ContextLengthExceeded   400  the prompt leaves no room in the model's context
│   └── PreviousResponseNotFound 400 there is no such response to continue
├── InvalidApiKey               401
├── Forbidden                   403
├── NotFound                    404
│   ├── ModelNotFound           404
│   └── ExpiredResult           404  the job existed; its retention is over
├── LogRewound                  409  a reader asks for a position beyond the log's head
├── RequestTooLarge             413
├── UnsupportedEncoding         415
├── IdempotencyMismatch         422  same key, different body
├── RateLimited                 429
│   └── Overloaded              429  the queue is full
├── NoWorker                    503
│   └── NoVLLMWorker            503  a route that only vLLM serves
├── BrokerUnavailable           503  the store cannot take or give data right now
├── InsufficientStorage         507  the store is full
└── EngineError                 500  (in a job) the engine failed
    ├── ModelLoadError          500
    ├── EngineDied              500  the engine process is gone; its jobs run again
    └── EngineTimeout           504
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=False):
    """The wire form of a failure: what HTTP bodies, logs and terminal events carry.

    ``message`` says what happened and what to do; ``type`` is the family a client switches on;
    ``param`` names the offending request field; ``code`` is the stable identifier (SPEC section 7).
    """

    message: str
    type: str = "server_error"
    param: str | None = None
    code: str | None = None
    tokens: int | UnsetType = UNSET
    """Tokens of a prompt that is too long, at least."""
    limit: int | UnsetType = UNSET
    """Tokens that the model's context holds. Each dialect tells both in its own words, which clients look for."""


class PenstockError(Exception):
    """Root of the tree. ``retry_after`` (seconds) becomes ``Retry-After`` where set. An engine's failure of a sequence
    that is ``retryable`` is tried again with backoff."""

    status: int = 500
    code: str = "internal_error"
    type: str = "server_error"
    retryable: bool = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def info(self) -> ErrorInfo:
        return ErrorInfo(message=self.message, type=self.type, param=self.param, code=self.code)


class InvalidRequest(PenstockError):
    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class Unsupported(InvalidRequest):
    code = "unsupported"


class ContextLengthExceeded(InvalidRequest):
    """The prompt leaves no room in the model's context. ``tokens`` and ``limit`` as in `ErrorInfo`, where known."""

    code = "context_length_exceeded"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        tokens: int | UnsetType = UNSET,
        limit: int | UnsetType = UNSET,
    ) -> None:
        super().__init__(message, param=param, retry_after=retry_after)
        self.tokens = tokens
        self.limit = limit

    @classmethod
    def of(
        cls, param: str, tokens: int, limit: int, *, characters: int | None = None, index: int | None = None
    ) -> ContextLengthExceeded:
        """For the field *param*: ``messages``, a ``prompt``, or an ``input`` (*index*: which one).

        The message has OpenAI's old and new words, by which clients recognise the error (LiteLLM and aider by the
        first, LangChain by the last). *characters*: the input's length where nobody counted its tokens exactly.
        """
        what = f"{param} {index}" if index is not None else f"your {param}"
        if characters is not None:
            said = f"{what} of {characters} characters is at least {tokens} tokens. Please reduce its length."
        elif param == "messages":
            said = (
                f"your messages resulted in {tokens} tokens. Please reduce the length of the messages: the reply needs "
                "at least one."
            )
        elif param == "prompt":
            said = (
                f"you requested {tokens + 1} tokens ({tokens} in the prompt, at least 1 for the completion). Please "
                "reduce the length of the prompt."
            )
        else:
            said = f"{what} resulted in {tokens} tokens. Please cut it into pieces."
        message = f"This model's maximum context length is {limit} tokens. However, {said}"
        message += f" (Input tokens exceed the configured limit of {limit} tokens.)"
        return cls(message, param=param, tokens=tokens, limit=limit)

    @property
    def info(self) -> ErrorInfo:
        return msgspec.structs.replace(super().info, tokens=self.tokens, limit=self.limit)


class PreviousResponseNotFound(InvalidRequest):
    code = "previous_response_not_found"


class InvalidApiKey(PenstockError):
    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class Forbidden(PenstockError):
    status = 403
    code = "forbidden"
    type = "permission_error"


class NotFound(PenstockError):
    status = 404
    code = "not_found"
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"


class ExpiredResult(NotFound):
    code = "expired_result"


class LogRewound(PenstockError):
    status = 409
    code = "log_rewound"
    type = "invalid_request_error"


class RequestTooLarge(PenstockError):
    status = 413
    code = "request_too_large"
    type = "invalid_request_error"


class UnsupportedEncoding(PenstockError):
    status = 415
    code = "unsupported_encoding"
    type = "invalid_request_error"


class IdempotencyMismatch(PenstockError):
    status = 422
    code = "idempotency_mismatch"
    type = "invalid_request_error"

    def __init__(
        self,
        message: str = "This idempotency key was used with a different request body. Use a new key for a new request.",
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)


class RateLimited(PenstockError):
    status = 429
    code = "rate_limited"
    type = "rate_limit_error"


class Overloaded(RateLimited):
    code = "overloaded"


class NoWorker(PenstockError):
    status = 503
    code = "no_worker"


class NoVLLMWorker(NoWorker):
    code = "no_vllm_worker"


class BrokerUnavailable(PenstockError):
    status = 503
    code = "broker_unavailable"


class InsufficientStorage(PenstockError):
    status = 507
    code = "insufficient_storage"


class EngineError(PenstockError):
    """The engine failed on a sequence."""

    code = "engine_error"


class ModelLoadError(EngineError):
    code = "model_load_error"


class EngineDied(EngineError):
    retryable = True


class EngineTimeout(EngineError):
    status = 504
    code = "timeout"
    retryable = True


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that stopped a task group; its other tasks were cancelled because of it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _tree(root: type[PenstockError]) -> list[type[PenstockError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


#: HTTP status of every code, for failures that come back as data (a job's terminal event).
STATUS_OF_CODE: dict[str, int] = {
    **{cls.code: cls.status for cls in reversed(_tree(PenstockError))},
    "poisoned": 500,
    "cancelled": 499,
    "expired": 504,
}


def error_from_info(info: ErrorInfo) -> PenstockError:
    """Rebuild an exception from its wire form (a job's error, a server's error body)."""
    for cls in _tree(PenstockError):
        if cls is ContextLengthExceeded and cls.code == info.code:
            return ContextLengthExceeded(info.message, param=info.param, tokens=info.tokens, limit=info.limit)
        if cls.code == info.code and cls is not PenstockError:
            return cls(info.message, param=info.param)
    error = PenstockError(info.message, param=info.param)
    error.code = info.code or PenstockError.code
    error.type = info.type
    error.status = STATUS_OF_CODE.get(error.code, 500)
    return error
