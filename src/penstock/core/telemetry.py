"""What the running system tells of itself: spans that last, events that happen. Who listens is decided in `wiring`.

Facts are keyword arguments. Where OpenTelemetry has a name for one it is that (``**{"gen_ai.request.model": name}``);
``trace`` is the `TraceContext` of what a span or an event belongs to, as text.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

#: What is known of a span or an event.
Fact = str | int | float | bool | None


class Span(Protocol):
    """Something that goes on while the context lasts. An exception that leaves it is a fact of it."""

    def note(self, **facts: Fact) -> None:
        """Facts that were not known when it began."""
        ...

    def link(self, trace: str | None) -> None:
        """It is done for *trace* too: one claim leases many jobs."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Telemetry(Protocol):
    """Two methods, called from every room; neither blocks nor raises."""

    def span(self, name: str, /, **facts: Fact) -> Span:
        """*name* (e.g. ``broker.append``) begins, and ends with the context."""
        ...

    def event(self, name: str, /, **facts: Fact) -> None:
        """*name* (e.g. ``engine.loaded``) has happened."""
        ...


class _NoSpan:
    def note(self, **facts: Fact) -> None:
        pass

    def link(self, trace: str | None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


_NO_SPAN = _NoSpan()


class NoTelemetry:
    """Where nobody listens."""

    def span(self, name: str, /, **facts: Fact) -> Span:
        return _NO_SPAN

    def event(self, name: str, /, **facts: Fact) -> None:
        pass
