"""Spans and events on their way to who listens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from tests.support.telemetry import Recorder

from penstock.core.errors import NotFound
from penstock.core.telemetry import Fact, NoTelemetry, Telemetry
from penstock.observability.telemetry import Ended, Publisher


class Broken:
    def span(self, span: Ended) -> None:
        raise RuntimeError("no disk")

    def event(self, name: str, facts: Mapping[str, Fact]) -> None:
        raise RuntimeError("no disk")


def test_a_span_is_told_when_it_ends_with_all_that_was_noted() -> None:
    told = Recorder()
    with Publisher(told).span("broker.claim", worker="w") as span:
        span.note(jobs=2)
        span.link("one")
        span.link(None)
        span.link("two")
        assert told.spans == []
    (ended,) = told.spans
    assert (ended.name, ended.facts, ended.links) == ("broker.claim", {"worker": "w", "jobs": 2}, ("one", "two"))
    assert ended.error is None
    assert ended.seconds >= 0


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NotFound("There is no such job."), "not_found"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (asyncio.CancelledError(), None),
        (GeneratorExit(), None),
    ],
    ids=["ours", "a fault", "cancelled", "a reader that left"],
)
def test_an_error_goes_through_and_is_named(error: BaseException, told: str | None) -> None:
    recorder = Recorder()
    with pytest.raises(type(error)), Publisher(recorder).span("broker.get"):
        raise error
    assert [span.error for span in recorder.spans] == [told]


def test_who_listens_badly_hurts_nobody() -> None:
    told = Recorder()
    telemetry = Publisher(Broken(), told)
    telemetry.event("engine.loaded", model="m")
    with telemetry.span("broker.get"):
        pass
    assert told.events == [("engine.loaded", {"model": "m"})]
    assert [span.name for span in told.spans] == ["broker.get"]


@pytest.mark.parametrize("telemetry", [NoTelemetry(), Publisher()])
def test_nobody_has_to_listen(telemetry: Telemetry) -> None:
    telemetry.event("engine.loaded")
    with telemetry.span("broker.get", job="j") as span:
        span.note(more=1)
        span.link("trace")
    with pytest.raises(KeyError), telemetry.span("broker.get"):
        raise KeyError
