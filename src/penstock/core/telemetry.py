"""What the running system tells of itself: spans that last, events that happen. Who listens is decided in `wiring`."""

from __future__ import annotations

import contextlib
from typing import Protocol

#: What is known of a span or an event. Names follow OpenTelemetry's conventions where it has one.
Fact = str | int | float | bool | None


class Span(Protocol):
    """Something that is going on."""

    def note(self, **facts: Fact) -> None:
        """Facts that were not known when it began."""
        ...


class Telemetry(Protocol):
    """Two methods, called from every room; neither blocks nor raises."""

    def span(self, name: str, /, **facts: Fact) -> contextlib.AbstractContextManager[Span]:
        """*name* (e.g. ``broker.append``) goes on while the context lasts. An exception that leaves it is a fact."""
        ...

    def event(self, name: str, /, **facts: Fact) -> None:
        """*name* (e.g. ``engine.loaded``) has happened."""
        ...


class _NoSpan:
    def note(self, **facts: Fact) -> None:
        pass


class NoTelemetry:
    """Where nobody listens."""

    def span(self, name: str, /, **facts: Fact) -> contextlib.AbstractContextManager[Span]:
        return contextlib.nullcontext(_NoSpan())

    def event(self, name: str, /, **facts: Fact) -> None:
        pass
