"""What both brokers store of a job: readable by this version and by the one before."""

from __future__ import annotations

import msgspec

from penstock.brokers.record import Details
from penstock.core.job import Job, Request

JOB = Job(
    id="job_1",
    tenant="acme",
    request=Request(model="m", prompt="x"),
    request_id="req",
    metadata={"a": "b"},
    on_disconnect="cancel",
    view=b"seen",
    retain_for=5.0,
    trace="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)


def test_details_of_before_are_read_with_the_defaults_of_what_came_later() -> None:
    stored = msgspec.msgpack.encode(Details.of(JOB))
    fields = msgspec.msgpack.decode(stored)
    for count in range(4, len(fields)):  # the first version had four
        read = msgspec.msgpack.decode(msgspec.msgpack.encode(fields[:count]), type=Details)
        assert (read.request, read.request_id, read.metadata) == (JOB.request, "req", {"a": "b"})
        assert read.on_disconnect == "cancel"
        assert read.view == (b"seen" if count > 4 else b"")
        assert read.retain_for == (5.0 if count > 5 else None)
        assert read.trace is None


def test_details_of_a_later_version_are_read_without_what_is_unknown() -> None:
    later = [*msgspec.msgpack.decode(msgspec.msgpack.encode(Details.of(JOB))), "new"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(later), type=Details) == Details.of(JOB)
