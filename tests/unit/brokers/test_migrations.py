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
from penstock.core.events import Phase
from penstock.core.job import Job, Request, Status, Usage, new_job_id
from penstock.core.ports import Append, WorkerInfo


def schema_of(version: int) -> str:
    """The tables as the version of so many migrations had them."""
    schema = resources.files("penstock.brokers.embedded").joinpath("schema.sql").read_text()
    if version < 2:
        schema = re.sub(r"^  (cached|reasoning)_tokens .*\n", "", schema, flags=re.MULTILINE)
        assert "cached_tokens" not in schema
        assert "reasoning_tokens" not in schema
    if version < 1:
        schema = re.sub(r"^  keep .*\n|^CREATE INDEX IF NOT EXISTS jobs_kept.*\n", "", schema, flags=re.MULTILINE)
        schema = schema.replace(" AND keep IS NULL", "")
        assert "keep" not in schema
    return schema


@pytest.mark.parametrize("version", range(len(MIGRATIONS)))
async def test_an_older_database_gets_what_it_lacks(tmp_path: Path, version: int) -> None:
    with closing(sqlite3.connect(tmp_path / "penstock.db")) as conn:
        conn.executescript(schema_of(version))
        conn.execute(f"PRAGMA user_version = {version}")
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
        [lease] = await broker.claim(WorkerInfo(id="w", slots=1), ["m"], 1, 0)
        await broker.append([Append(lease.key, 1, [1], ["x"], None, None, 9, None, [Phase.REASONING], 1, 4)])
        assert (await broker.get("t", job.id)).usage == Usage(9, 1, 1, 4)
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
