"""Logs: JSON lines on stdout (text on a terminal), and with a directory three rotating files.

Prompts, outputs and keys are never logged.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from penstock.core.telemetry import Fact
from penstock.observability.jobs import JobRecord
from penstock.observability.telemetry import Ended

_FILE_BYTES = 50_000_000
_FILES = 5

_jobs = structlog.get_logger("penstock.job")
_events = structlog.get_logger("penstock.event")

#: Events that are only logged for who looks for them: the worker and its manager say the same in lines of their own.
QUIET = frozenset({"engine.died", "engine.loaded", "engine.restarted", "engine.started", "job.attempt"})


def configure(level: str, format: str, directory: Path | None) -> None:
    """Route structlog and the standard library's logging (uvicorn, libraries) to the same handlers."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    as_json = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
    as_text = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty()),
        ],
    )
    text = format == "console" or (format == "auto" and sys.stdout.isatty())
    stdout = logging.StreamHandler(sys.stdout)
    stdout.setFormatter(as_text if text else as_json)
    handlers: list[logging.Handler] = [stdout]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, least in (("app.log", logging.DEBUG), ("errors.log", logging.ERROR)):
            handler = _rotating(directory / name)
            handler.setLevel(least)
            handler.setFormatter(as_json)
            handlers.append(handler)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for new in handlers:
        root.addHandler(new)
    root.setLevel(level.upper())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class EventLog:
    """Events as lines of the ordinary log, a warning where one has an ``error``; spans are not logged."""

    def span(self, span: Ended) -> None:
        pass

    def event(self, name: str, facts: Mapping[str, Fact]) -> None:
        if name == "job.ended":
            _log_job(JobRecord.of(facts))
        elif name in QUIET:
            _events.debug(name, **facts)
        elif "error" in facts:
            _events.warning(name, **facts)
        else:
            _events.info(name, **facts)


def _log_job(record: JobRecord) -> None:
    _jobs.info(
        "job_ended",
        job_id=record.job,
        tenant=record.tenant,
        request_id=record.request_id,
        model=record.model,
        status=record.status.value,
        error=record.error,
        attempt=record.attempt,
        position=record.completion_tokens,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        reasoning_tokens=record.reasoning_tokens,
        total_time=round(record.total_time, 4),
    )


class RequestLog:
    """``llm_requests.log`` in *directory*: one line a job, made for grep."""

    def __init__(self, directory: Path) -> None:
        self._logger = logging.getLogger("penstock.llm_requests")
        self._logger.propagate = False
        self._logger.setLevel(logging.INFO)
        handler = _rotating(directory / "llm_requests.log")
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._logger.addHandler(handler)

    def span(self, span: Ended) -> None:
        pass

    def event(self, name: str, facts: Mapping[str, Fact]) -> None:
        if name != "job.ended":
            return
        record = JobRecord.of(facts)
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        status = "success" if record.error is None else record.error
        rate = record.completion_tokens / record.processing_time if record.processing_time > 0 else 0.0
        self._logger.info(
            f"[{now}] task_id={record.job} status={status} prompt_tokens={record.prompt_tokens} "
            f"completion_tokens={record.completion_tokens} tokens_per_sec={rate:.2f} "
            f"queue_wait={record.queue_wait or 0:.2f}s processing_time={record.processing_time:.2f}s "
            f"total_time={record.total_time:.2f}s"
        )


def _rotating(path: Path) -> logging.Handler:
    return logging.handlers.RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8")
