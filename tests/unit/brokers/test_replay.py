"""A log that is read from the disk comes in parts, however it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.brokers.embedded import EmbeddedBroker
from penstock.brokers.embedded.log import READ_AT_ONCE
from penstock.core.events import Ended, Tokens
from penstock.core.job import Job, Request, fingerprint, new_job_id
from penstock.core.ports import Append, Finish, WorkerInfo

LENGTH = 2 * READ_AT_ONCE + 1000


@pytest.mark.parametrize("run", [1000, READ_AT_ONCE, LENGTH])
@pytest.mark.parametrize("after", [0, 7, READ_AT_ONCE - 1, READ_AT_ONCE, LENGTH - 1, LENGTH])
async def test_no_part_is_longer_than_what_is_read_at_once(tmp_path: Path, run: int, after: int) -> None:
    """Runs are as long as the disk made the worker wait: thirty readers of one must not hold it thirty times."""
    broker = EmbeddedBroker(tmp_path)
    await broker.open()
    request = Request(model="m", prompt="x")
    job = Job(id=new_job_id(), tenant="t", user="u", request=request, fingerprint=fingerprint(request))
    await broker.submit(job)
    [lease] = await broker.claim(WorkerInfo(id="w", slots=1), ["m"], 1, 0)
    for begin in range(1, LENGTH + 1, run):
        ids = list(range(begin, min(begin + run, LENGTH + 1)))
        await broker.append([Append(lease.key, begin, ids, [f"{n} " for n in ids], [n % 2 for n in ids])])
    await broker.append([Append(lease.key, LENGTH + 1, finish=Finish.of([("length", None)] * 2))])

    *runs, end = [event async for event in broker.tail("t", job.id, after)]
    await broker.close()
    assert isinstance(end, Ended)
    expected = list(range(after + 1, LENGTH + 1))
    told = [part for part in runs if isinstance(part, Tokens)]
    assert [position for part in told for position in range(part.position, part.last + 1)] == expected
    assert [id for part in told for id in part.ids] == expected
    assert [text for part in told for text in part.texts] == [f"{n} " for n in expected]
    assert [choice for part in told for choice in part.choices or ()] == [n % 2 for n in expected]
    assert max((len(part.ids) for part in told), default=0) <= READ_AT_ONCE
