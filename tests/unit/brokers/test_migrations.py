"""A data directory that an earlier version wrote is taken over, and one of a later version is left alone."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from importlib import resources
from pathlib import Path

import pytest

from penstock.brokers.embedded import EmbeddedBroker
from penstock.brokers.embedded.store import MIGRATIONS
from penstock.core.errors import BrokerUnavailable
from penstock.core.job import Job, Request, Status, new_job_id


async def test_a_database_without_keep_gets_it(tmp_path: Path) -> None:
    schema = resources.files("penstock.brokers.embedded").joinpath("schema.sql").read_text()
    first = re.sub(r"^  keep .*\n|^CREATE INDEX IF NOT EXISTS jobs_kept.*\n", "", schema, flags=re.MULTILINE)
    first = first.replace(" AND keep IS NULL", "")
    assert "keep" not in first
    with closing(sqlite3.connect(tmp_path / "penstock.db")) as conn:
        conn.executescript(first)
        conn.execute(
            "INSERT INTO jobs (id, tenant, model, priority, status, estimate, created_at, fingerprint, details) "
            "VALUES ('old', 't', 'm', 1, 'cancelled', 1, 0, x'', x'')"
        )
        conn.commit()
    broker = EmbeddedBroker(tmp_path)
    await broker.open()
    try:
        job = Job(id=new_job_id(), tenant="t", request=Request(model="m", prompt="x"), retain_for=5.0)
        await broker.submit(job)
        assert (await broker.get("t", job.id)).retain_for == 5.0
        assert (await broker.stats()).jobs[Status.CANCELLED] == 1
    finally:
        await broker.close()
    with closing(sqlite3.connect(tmp_path / "penstock.db")) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


async def test_a_later_versions_database_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "penstock.db")) as conn:
        conn.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(BrokerUnavailable, match="later version"):
        await EmbeddedBroker(tmp_path).open()
