"""Every call of a broker has a duration; what the store makes durable has one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from tests.support.telemetry import Recorder

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.errors import ErrorInfo, NotFound
from penstock.core.events import Event, Phase
from penstock.core.job import Job, Request, Usage, new_job_id
from penstock.core.ports import Append, Broker, Finish, Lease, Query, Release, WorkerInfo
from penstock.core.trace import TraceContext
from penstock.observability.broker import VERBS, observed
from penstock.observability.jobs import JobRecord, JobWatch
from penstock.observability.metrics import Metrics
from penstock.observability.telemetry import Publisher

TRACE = str(TraceContext.new())
WORKER = WorkerInfo(id="w", slots=8)


def new_job(**fields: object) -> Job:
    return Job(id=new_job_id(), tenant="t", request=Request(model="m", prompt="x"), **fields)  # type: ignore[arg-type]


@pytest.fixture
def told() -> Recorder:
    return Recorder()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def watch(tmp_path: Path, told: Recorder, metrics: Metrics) -> AsyncIterator[JobWatch]:
    telemetry = Publisher(told, metrics)
    store = EmbeddedBroker(tmp_path, telemetry=telemetry)
    await store.open()
    yield JobWatch(observed(store, telemetry), telemetry)
    await store.close()


@pytest.fixture
def broker(watch: JobWatch) -> Broker:
    return watch.broker


async def finish(broker: Broker, *, tokens: int = 3) -> Job:
    """A job that a worker ran to its end."""
    job = await broker.submit(new_job())
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    ids = list(range(tokens))
    await broker.append([Append(lease.key, 1, ids, ["a"] * tokens, prompt_tokens=7, finish=Finish(("stop",)))])
    return job


async def test_each_verb_of_the_port_has_spans(broker: Broker, told: Recorder) -> None:
    job = await finish(broker)
    async for _ in broker.tail("t", job.id):
        pass
    async with contextlib.aclosing(cast("AsyncGenerator[str]", broker.arrivals("t", "u"))) as arrivals:
        listening = asyncio.create_task(anext(arrivals))
        while not listening.done():
            await broker.submit(new_job(user="u"))
    leases = await broker.claim(WORKER, ["m"], 1, 0)
    await broker.release([Release(lease.key) for lease in leases])
    await broker.register(WORKER)
    await broker.cancel("t", leases[0].job.id)
    await broker.forget("t", job.id)
    await broker.list(Query(tenant="t"))
    await broker.stats()
    await broker.sweep()
    found = {span.name for span in told.spans if span.name.startswith("broker.")}
    assert found == {f"broker.{verb}" for verb in VERBS}


async def test_arrivals_tell_what_comes_from_the_call_on(broker: Broker) -> None:
    async with contextlib.aclosing(broker.arrivals("t", "u")) as arrivals:
        job = await broker.submit(new_job(user="u"))
        async with asyncio.timeout(10):
            assert await anext(arrivals) == job.id


def test_verbs_are_those_of_the_port() -> None:
    """Whatever the port gets is told of without another line here."""
    asynchronous = {name for name, member in vars(Broker).items() if inspect.iscoroutinefunction(member)}
    assert set(VERBS) >= {*asynchronous, "tail", "arrivals"} - {"open", "close"}


async def test_what_is_no_verb_is_the_brokers_own(broker: Broker) -> None:
    assert broker.durability == EmbeddedBroker.durability  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = broker.another  # type: ignore[attr-defined]


async def test_a_refusal_is_raised_and_told(broker: Broker, told: Recorder) -> None:
    with pytest.raises(NotFound):
        await broker.get("t", "job_that_is_not_there")
    assert [span.error for span in told.named("broker.get")] == ["not_found"]


async def test_a_reader_that_leaves_ends_its_span(broker: Broker, told: Recorder) -> None:
    job = await broker.submit(new_job())
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    await broker.append([Append(lease.key, 1, [1], ["a"])])
    async with contextlib.aclosing(cast("AsyncGenerator[Event]", broker.tail("t", job.id))) as events:
        await anext(events)
        assert told.named("broker.tail") == []
    assert [span.error for span in told.named("broker.tail")] == [None]


async def test_operations_of_one_moment_share_their_commits(broker: Broker, told: Recorder) -> None:
    await asyncio.gather(*(broker.submit(new_job()) for _ in range(50)))
    commits = [span.facts["operations"] for span in told.named("store.commit")]
    assert sum(cast("list[int]", commits)) >= 50
    assert len(commits) <= 5


async def test_verbs_and_commits_are_counted(broker: Broker, metrics: Metrics) -> None:
    await finish(broker)
    counted = metrics.registry.get_sample_value
    assert counted("penstock_broker_verb_seconds_count", {"verb": "submit"}) == 1
    assert counted("penstock_broker_verb_seconds_count", {"verb": "append"}) == 1
    assert counted("penstock_broker_verb_seconds_count", {"verb": "sweep"}) == 0
    assert (counted("penstock_broker_commit_seconds_count") or 0) >= 2
    assert counted("gen_ai_server_request_duration_seconds_count", {"gen_ai_request_model": "m"}) == 1


async def test_the_end_of_a_job_is_an_event_in_opentelemetrys_words(broker: Broker, told: Recorder) -> None:
    job = await finish(broker, tokens=5)
    (facts,) = told.happened("job.ended")
    assert facts["gen_ai.request.model"] == "m"
    assert facts["gen_ai.usage.input_tokens"] == 7
    assert facts["gen_ai.usage.output_tokens"] == 5
    assert facts["error.type"] is None
    record = JobRecord.of(facts)
    assert (record.job, record.status, record.completion_tokens) == (job.id, "completed", 5)
    assert record.facts == facts


async def test_what_was_used_over_all_attempts_is_told_and_counted(
    broker: Broker, told: Recorder, metrics: Metrics
) -> None:
    job = await broker.submit(new_job())
    thought = [Phase.REASONING]
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    first = Append(lease.key, 1, [1], ["a"], prompt_tokens=7, phases=thought, reasoning_tokens=1, cached_tokens=4)
    await broker.append([first])
    await broker.release([Release(lease.key)])
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    second = Append(lease.key, 2, [2], ["b"], prompt_tokens=7, phases=thought, reasoning_tokens=2, cached_tokens=6)
    await broker.append([second])
    await broker.append([Append(lease.key, 3, [3], ["c"], finish=Finish(("stop",)), reasoning_tokens=2)])
    usage = (await broker.get("t", job.id)).usage
    (facts,) = told.happened("job.ended")
    record = JobRecord.of(facts)
    for field in ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"):
        counted = metrics.registry.get_sample_value(f"penstock_{field}_total", {"model": "m"})
        assert counted == getattr(record, field) == getattr(usage, field)
    assert usage == Usage(7, 3, 2, 4)
    assert facts["gen_ai.usage.cache_read.input_tokens"] == 4
    assert facts["gen_ai.usage.reasoning.output_tokens"] == 2


async def test_a_job_that_nobody_ran_ends_once_when_it_is_cancelled(broker: Broker, told: Recorder) -> None:
    job = await broker.submit(new_job())
    for _ in range(2):
        await broker.cancel("t", job.id)
    await broker.forget("t", job.id)
    (facts,) = told.happened("job.ended")
    assert (facts["job"], facts["error.type"]) == (job.id, "cancelled")


async def claimed(broker: Broker, **fields: object) -> Lease:
    await broker.submit(new_job(**fields))
    (lease,) = await broker.claim(WORKER, ["m"], 1, 0)
    return lease


@pytest.mark.parametrize(
    ("release", "outcome"),
    [
        ({}, "released"),
        ({"retry": ErrorInfo("The engine coughed.")}, "retried"),
        ({"crashed_beside": 3}, "crashed"),
    ],
)
async def test_an_attempt_that_is_given_back_is_over(
    broker: Broker, told: Recorder, release: dict[str, Any], outcome: str
) -> None:
    lease = await claimed(broker, trace=TRACE)
    await broker.release([Release(lease.key, **release)])
    (facts,) = told.happened("job.attempt")
    assert (facts["job"], facts["attempt"], facts["outcome"], facts["trace"]) == (lease.job.id, 1, outcome, TRACE)
    assert told.happened("job.ended") == []


async def test_a_job_has_as_many_attempts_as_it_took_and_one_end(
    broker: Broker, told: Recorder, metrics: Metrics
) -> None:
    first = await claimed(broker)
    await broker.append([Append(first.key, 1, [1], ["a"])])
    await broker.release([Release(first.key)])
    (second,) = await broker.claim(WORKER, ["m"], 1, 0)
    await broker.append([Append(first.key, 2, [9], ["?"])])  # late: the lease is not its any more
    await broker.append([Append(second.key, 2, [2], ["b"], finish=Finish(("stop",)))])
    assert [(facts["attempt"], facts["outcome"]) for facts in told.happened("job.attempt")] == [
        (1, "released"),
        (2, "completed"),
    ]
    (facts,) = told.happened("job.ended")
    assert facts["gen_ai.usage.output_tokens"] == 2
    assert metrics.registry.get_sample_value("penstock_attempts_total", {"outcome": "released"}) == 1


async def test_a_lease_that_was_lost_is_told_once(broker: Broker, told: Recorder) -> None:
    lease = await claimed(broker)
    await broker.forget("t", lease.job.id)
    for _ in range(2):
        await broker.append([Append(lease.key, 1, [1], ["a"])])
    assert [facts["outcome"] for facts in told.happened("job.attempt")] == ["lost"]


async def test_spans_and_events_carry_the_jobs_trace(broker: Broker, told: Recorder) -> None:
    lease = await claimed(broker, trace=TRACE)
    await broker.append([Append(lease.key, 1, [1], ["a"], finish=Finish(("stop",)))])
    (submit,), (claim,) = told.named("broker.submit"), told.named("broker.claim")
    assert submit.facts == {"job": lease.job.id, "trace": TRACE}
    assert (claim.facts, claim.links) == ({"jobs": 1}, (TRACE,))
    assert [facts["trace"] for name in ("job.attempt", "job.ended") for facts in told.happened(name)] == [TRACE, TRACE]


async def test_tokens_count_for_each_reader(watch: JobWatch) -> None:
    job = await finish(watch.broker, tokens=4)
    for _ in range(2):
        async for _ in watch.tail("t", job.id):
            pass
    assert watch.tokens_read == 8
