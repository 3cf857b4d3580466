"""The one shape of every failure."""

from __future__ import annotations

from penstock.api.base import WireType
from penstock.core.errors import ErrorInfo


class Error(WireType, frozen=True):
    """What went wrong, and what to do (docs/api.md#errors)."""

    message: str
    type: str
    param: str | None
    """The request field that it is about."""
    code: str | None
    """What a program looks at."""

    @classmethod
    def of(cls, info: ErrorInfo) -> Error:
        return cls(message=info.message, type=info.type, param=info.param, code=info.code)

    @property
    def info(self) -> ErrorInfo:
        return ErrorInfo(self.message, self.type, self.param, self.code)


class ErrorBody(WireType, frozen=True):
    """The one shape of every failure."""

    error: Error

    @classmethod
    def of(cls, info: ErrorInfo) -> ErrorBody:
        return cls(Error.of(info))
