"""A subscriber that remembers."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.core.telemetry import Fact
from penstock.observability.telemetry import Ended


class Recorder:
    def __init__(self) -> None:
        self.spans: list[Ended] = []
        self.events: list[tuple[str, Mapping[str, Fact]]] = []

    def span(self, span: Ended) -> None:
        self.spans.append(span)

    def event(self, name: str, facts: Mapping[str, Fact]) -> None:
        self.events.append((name, facts))

    def happened(self, name: str) -> list[Mapping[str, Fact]]:
        return [facts for event, facts in self.events if event == name]

    def named(self, name: str) -> list[Ended]:
        return [span for span in self.spans if span.name == name]
