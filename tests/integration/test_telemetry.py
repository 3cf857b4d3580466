"""What brokers over a real server tell of their store."""

from __future__ import annotations

import secrets

from penstock.brokers.redis import RedisBroker, RedisOptions
from penstock.core.job import Job, Request, new_job_id
from penstock.core.ports import Append, Finish, WorkerInfo
from penstock.observability.metrics import Metrics
from penstock.observability.telemetry import Publisher
from tests.support.redis import RedisServer
from tests.support.telemetry import Recorder


async def test_what_redis_makes_durable_is_told_apart_from_what_it_only_reads(redis_server: RedisServer) -> None:
    told, metrics = Recorder(), Metrics()
    options = RedisOptions(prefix=f"t{secrets.token_hex(4)}")
    broker = RedisBroker(redis_server.url, options, telemetry=Publisher(told, metrics))
    await broker.open()
    try:
        job = await broker.submit(Job(id=new_job_id(), tenant="t", request=Request(model="m", prompt="x")))
        (lease,) = await broker.claim(WorkerInfo(id="w", slots=1), ["m"], 1, 0)
        await broker.append([Append(lease.key, 1, [1], ["a"], finish=Finish(("stop",)))])
        await broker.get("t", job.id)
    finally:
        await broker.close()
    written = {span.facts["script"] for span in told.named("store.commit")}
    assert {"submit", "claim", "append"} <= written
    assert {span.facts["script"] for span in told.named("store.read")} == {"get"}
    counted = metrics.registry.get_sample_value("penstock_broker_commit_seconds_count")
    assert counted == len(told.named("store.commit"))
