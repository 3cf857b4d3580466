"""Telemetry to whom it concerns: each subscriber hears of spans when they end, and of events when they happen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import msgspec
import structlog

from penstock.core.errors import PenstockError
from penstock.core.telemetry import Fact, Span

log = structlog.get_logger("penstock.telemetry")


class Ended(msgspec.Struct, frozen=True):
    """A span that is over."""

    name: str
    seconds: float
    facts: Mapping[str, Fact]
    error: str | None = None
    """Our code of the error that ended it, or its type where that is not one of ours."""
    links: tuple[str, ...] = ()
    """Traces that it was done for, besides the one in its facts."""


class Subscriber(Protocol):
    """What it raises is logged and hurts nobody."""

    def span(self, span: Ended) -> None: ...

    def event(self, name: str, facts: Mapping[str, Fact]) -> None: ...


class Publisher:
    """The `Telemetry` that tells *subscribers*."""

    def __init__(self, *subscribers: Subscriber) -> None:
        self._subscribers = subscribers

    def span(self, name: str, /, **facts: Fact) -> Span:
        return _Span(self, name, facts)

    def event(self, name: str, /, **facts: Fact) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber.event(name, facts)
            except Exception:
                log.exception("telemetry_failed", about=name)

    def ended(self, span: Ended) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber.span(span)
            except Exception:
                log.exception("telemetry_failed", about=span.name)


class _Span:
    __slots__ = ("_facts", "_links", "_name", "_publisher", "_started")

    def __init__(self, publisher: Publisher, name: str, facts: dict[str, Fact]) -> None:
        self._publisher = publisher
        self._name = name
        self._facts = facts
        self._links: tuple[str, ...] = ()
        self._started = 0.0

    def note(self, **facts: Fact) -> None:
        self._facts.update(facts)

    def link(self, trace: str | None) -> None:
        if trace is not None:
            self._links += (trace,)

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._started
        self._publisher.ended(Ended(self._name, seconds, self._facts, _named(error), self._links))


def _named(error: BaseException | None) -> str | None:
    if not isinstance(error, Exception):  # who leaves, or is told to, has not failed
        return None
    return error.code if isinstance(error, PenstockError) else type(error).__name__
