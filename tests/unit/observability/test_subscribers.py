"""What metrics and logs make of events and spans."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from penstock.observability.logs import EventLog, configure
from penstock.observability.metrics import Metrics
from penstock.observability.telemetry import Publisher

ENGINE = {"model": "m", "engine": "upstream"}
REPLICA = {**ENGINE, "replica": "http://one:8000"}


class TestMetrics:
    def test_loads_that_came_to_an_end(self) -> None:
        metrics = Metrics()
        telemetry = Publisher(metrics)
        with telemetry.span("engine.load", model="m"):
            pass
        with pytest.raises(OSError, match="no such file"), telemetry.span("engine.load", model="m"):
            raise OSError("no such file")
        assert metrics.registry.get_sample_value("penstock_engine_load_seconds_count", {"model": "m"}) == 1

    def test_deaths(self) -> None:
        metrics = Metrics()
        for _ in range(2):
            Publisher(metrics).event("engine.died", error="killed", **ENGINE)
        assert metrics.registry.get_sample_value("penstock_engine_deaths_total", {"model": "m"}) == 2

    def test_replicas_that_go_and_come_back(self) -> None:
        metrics = Metrics()
        found = []
        for name in ("replica.down", "replica.up", "replica.resting", "replica.back"):
            Publisher(metrics).event(name, **REPLICA)
            labels = {"model": "m", "replica": "http://one:8000"}
            found.append(metrics.registry.get_sample_value("penstock_replica_up", labels))
        assert found == [0, 1, 0, 1]

    def test_what_it_does_not_know_costs_nothing(self) -> None:
        metrics = Metrics()
        before = metrics.render()[0].splitlines()
        Publisher(metrics).event("engine.sang", **ENGINE)
        with Publisher(metrics).span("engine.song"):
            pass
        families = [line for line in before if not line.startswith(b"llm_process_")]
        assert families == [line for line in metrics.render()[0].splitlines() if not line.startswith(b"llm_process_")]


class TestEventLog:
    @pytest.fixture
    def lines(self, tmp_path: Path) -> Iterator[Path]:
        """The log of a server that logs everything; afterwards logging is as it was."""
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        root.handlers.clear()
        configure("debug", "json", tmp_path)
        yield tmp_path / "app.log"
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()

    @pytest.mark.parametrize(
        ("name", "facts", "level"),
        [
            ("replica.up", {}, "info"),
            ("replica.down", {"error": "it is gone"}, "warning"),
            ("engine.died", {"error": "killed"}, "debug"),
            ("job.attempt", {"outcome": "lost"}, "debug"),
        ],
    )
    def test_an_event_is_a_line(self, lines: Path, name: str, facts: dict[str, str], level: str) -> None:
        Publisher(EventLog()).event(name, model="m", **facts)
        (line,) = [json.loads(line) for line in lines.read_text().splitlines()]
        assert {key: line[key] for key in ("event", "level", "model", *facts)} == {
            "event": name,
            "level": level,
            "model": "m",
            **facts,
        }
