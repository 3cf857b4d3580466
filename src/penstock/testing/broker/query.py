"""Get, list, arrivals and stats."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from penstock.core.errors import ExpiredResult, InvalidRequest, NotFound
from penstock.core.job import TERMINAL, TRANSITIONS, Job, Priority, Request, Status, new_job_id
from penstock.core.ports import PAGE_BYTES, Finish, Lease, Query, WorkerInfo
from penstock.testing.broker.driver import BRIEF, ERROR, PATIENCE, Contract, Driver, closing, ids, model
from penstock.testing.broker.harness import total_order
from penstock.testing.oracle import check_log


class QueryContract(Contract):
    async def test_get_of_an_unknown_or_foreign_job_is_not_found(self, d: Driver) -> None:
        job = await d.submit()
        for tenant, name in (("umbrella", job.id), ("acme", new_job_id()), ("", job.id), ("acme", "")):
            with pytest.raises(NotFound) as caught:
                await d.broker.get(tenant, name)
            assert not isinstance(caught.value, ExpiredResult)

    async def test_get_tells_each_step_of_a_life_in_order(self, d: Driver) -> None:
        async def step(job: Job) -> Job:
            await d.harness.advance(1)
            return await d.get(job)

        job = await d.submit(user="ann", metadata={"k": "v"})
        queued = await step(job)
        lease = await d.next()
        running = await step(job)
        await d.write(lease, 1)
        writing = await step(job)
        await d.finish(lease, 2)
        done = await step(job)
        assert [j.status for j in (queued, running, writing, done)] == ["queued", "running", "running", "completed"]
        assert [j.tokens for j in (queued, running, writing, done)] == [0, 0, 1, 2]
        assert running.first_token_at is None
        assert writing.first_token_at is not None
        assert writing.ended_at is None
        times = [done.created_at, done.started_at, done.first_token_at, done.ended_at]
        assert times == pytest.approx([job.created_at + i for i in range(4)])
        for j in (queued, running, writing, done):
            assert (j.user, j.metadata, j.request) == ("ann", {"k": "v"}, job.request)

    async def test_the_first_token_is_timed_once(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        first = (await d.get(lease)).first_token_at
        await d.lose_leases()
        lease = await d.next()
        await d.write(lease, 2)
        assert (await d.get(lease)).first_token_at == first

    async def test_only_legal_transitions_are_seen(self, d: Driver) -> None:
        """An ended job resists every verb."""
        ends: dict[Status, Lease] = {}
        for status in sorted(TERMINAL):
            lease = ends[status] = await d.start(deadline_at=d.harness.clock.now() + 100)
            await d.write(lease, 1)
            if status is Status.COMPLETED:
                await d.finish(lease)
            elif status is Status.FAILED:
                await d.write(lease, finish=Finish(error=ERROR))
            elif status is Status.CANCELLED:
                await d.cancel(lease)
            else:
                await d.harness.advance(101)
                await d.settle()
        for status, lease in ends.items():
            before = await d.get(lease)
            assert before.status is status
            assert TRANSITIONS[status] == frozenset()
            for append in (d.append(lease), d.append(lease, 2), d.append(lease, finish=Finish(("stop",)))):
                await d.send(append)
            for fields in ({}, {"retry": ERROR}, {"crashed_beside": 1}, {"crashed_beside": 1}):
                await d.release(lease, **fields)
            await d.cancel(lease)
            await d.pass_time(200)
            assert await d.get(lease) == before
            assert ids(await d.log(lease)) == [1]
            check_log(await d.log(lease))
        assert await d.claim(5) == []

    async def test_list_is_newest_first(self, d: Driver) -> None:
        jobs = []
        for _ in range(5):
            jobs.append(await d.submit())
            await d.harness.advance(1)
        assert [job.id for job in await d.jobs()] == [job.id for job in reversed(jobs)]

    async def test_list_shows_jobs_as_get_does(self, d: Driver) -> None:
        lease = await d.start(user="ann", metadata={"k": "v"})
        await d.finish(lease, 1)
        assert await d.jobs() == [await d.get(lease)]

    @total_order
    async def test_list_filters(self, d: Driver) -> None:
        ann = await d.submit(user="ann")
        bob = await d.submit(user="bob", name="big")
        none = await d.submit()
        running = await d.next()
        await d.cancel(none)

        async def found(**filters: Any) -> set[str]:
            return {job.id for job in await d.jobs(**filters)}

        assert running.job.id == ann.id
        assert await found(user="ann") == {ann.id}
        assert await found(user="nobody") == set()
        assert await found(model="big") == {bob.id}
        assert await found(status=(Status.RUNNING,)) == {ann.id}
        assert await found(status=(Status.QUEUED, Status.CANCELLED)) == {bob.id, none.id}
        assert await found(user="bob", model="big", status=(Status.QUEUED,)) == {bob.id}
        assert await found(user="bob", model="m") == set()
        assert await found() == {ann.id, bob.id, none.id}

    async def test_a_list_of_one_idempotency_key(self, d: Driver) -> None:
        keyed = await d.submit(user="ann", idempotency_key="k")
        other = await d.submit(user="ann", idempotency_key="l")
        foreign = await d.submit("umbrella", idempotency_key="k")
        await d.submit(user="ann")

        async def found(tenant: str = "acme", **filters: Any) -> list[str]:
            return [job.id for job in await d.jobs(tenant, idempotency_key="k", **filters)]

        assert await found() == await found(user="ann", model="m", status=(Status.QUEUED,), limit=1) == [keyed.id]
        assert await found("umbrella") == [foreign.id]
        assert [job.id for job in await d.jobs(idempotency_key="l")] == [other.id]
        for filters in ({"user": "bob"}, {"model": "big"}, {"status": (Status.RUNNING,)}):
            assert await found(**filters) == []
        assert await d.jobs(idempotency_key="nobody's") == []
        assert (await d.jobs(idempotency_key="k"))[0].fingerprint == keyed.fingerprint
        await d.broker.forget("acme", keyed.id)
        assert await found() == []

    @pytest.mark.parametrize("ticking", [True, False])
    async def test_pages_have_no_gap_and_no_duplicate_while_jobs_arrive(self, d: Driver, ticking: bool) -> None:
        """Also when all jobs were submitted in the same instant."""
        jobs = []
        for _ in range(11):
            jobs.append((await d.submit()).id)
            await d.harness.advance(1.0 if ticking else 0.0)
        seen: list[str] = []
        cursor: str | None = None
        while True:
            page = await d.broker.list(Query(tenant="acme", limit=3, cursor=cursor))
            assert len(page.jobs) <= 3
            seen += [job.id for job in page.jobs]
            cursor = page.cursor
            if cursor is None:
                break
            await d.submit()
        assert len(seen) == len(set(seen))
        assert set(seen) >= set(jobs)
        if d.harness.total_order:
            assert sorted(seen) == sorted(jobs)
        if ticking:
            assert seen == jobs[::-1]

    async def test_a_page_brings_few_large_jobs(self, d: Driver) -> None:
        """A list of all that a tenant has must not be all of it in memory."""
        jobs = [(await d.submit(request=Request(model="m", prompt="x" * (PAGE_BYTES // 8)))).id for _ in range(20)]
        small = await d.submit()
        seen: list[str] = []
        cursor: str | None = None
        while True:
            page = await d.broker.list(Query(tenant="acme", limit=500, cursor=cursor))
            assert sum(len(job.request.prompt or "") for job in page.jobs) <= PAGE_BYTES * 2
            seen += [job.id for job in page.jobs]
            cursor = page.cursor
            if cursor is None:
                break
        assert len(seen) == len(set(seen)) == 21
        assert set(seen) == {*jobs, small.id}

    async def test_pages_of_a_filtered_list_are_complete(self, d: Driver) -> None:
        mine = []
        for i in range(12):
            job = await d.submit(user="ann" if i % 3 == 0 else "bob")
            if i % 3 == 0:
                mine.append(job.id)
        assert sorted(job.id for job in await d.jobs(user="ann", limit=1)) == sorted(mine)

    async def test_list_and_cursor_stay_within_the_tenant(self, d: Driver) -> None:
        for tenant in ("acme", "umbrella"):
            await d.submit_many(4, tenant)
        page = await d.broker.list(Query(tenant="acme", limit=2))
        assert page.cursor is not None
        foreign = await d.broker.list(Query(tenant="umbrella", limit=50, cursor=page.cursor))
        assert {job.tenant for job in foreign.jobs} <= {"umbrella"}
        assert {job.tenant for job in await d.jobs("acme")} == {"acme"}
        assert await d.jobs("nobody") == []

    @pytest.mark.parametrize("cursor", ["x", "'; drop table jobs; --", "🦆", "AAAA", "-1", "1e999"])
    async def test_a_made_up_cursor_is_an_invalid_request_or_harmless(self, d: Driver, cursor: str) -> None:
        """It comes from a client: it must not become a server error."""
        await d.submit()
        try:
            page = await d.broker.list(Query(tenant="acme", cursor=cursor))
        except InvalidRequest:
            return
        assert len(page.jobs) <= 1

    async def test_a_tampered_cursor_is_an_invalid_request_or_harmless(self, d: Driver) -> None:
        await d.submit_many(3)
        cursor = (await d.broker.list(Query(tenant="acme", limit=1))).cursor
        assert cursor is not None
        for end in ("9" * 30, "5" + "OTk5" * 8, "!", "=", "\x00", cursor):
            for tampered in (cursor + end, cursor[:-1] + end, end + cursor, end):
                with contextlib.suppress(InvalidRequest):
                    page = await d.broker.list(Query(tenant="acme", cursor=tampered))
                    assert {job.tenant for job in page.jobs} <= {"acme"}

    async def test_arrivals_tell_a_users_new_jobs_from_the_call_on(self, d: Driver) -> None:
        await d.submit(user="ann")
        async with closing(d.broker.arrivals("acme", "ann")) as arrivals, asyncio.timeout(PATIENCE):
            jobs = [(await d.submit(user="ann")).id for _ in range(3)]
            assert [await anext(arrivals) for _ in range(3)] == jobs

    async def test_arrivals_tell_nothing_of_others(self, d: Driver) -> None:
        async with closing(d.broker.arrivals("acme", "ann")) as arrivals, asyncio.timeout(PATIENCE):
            first = asyncio.ensure_future(anext(arrivals))
            await asyncio.sleep(0.01)
            await d.submit("acme", user="bob")
            await d.submit("umbrella", user="ann")
            await d.submit("acme")
            await asyncio.sleep(BRIEF)
            assert not first.done()
            job = await d.submit("acme", user="ann")
            assert await first == job.id

    async def test_arrivals_reach_every_listener(self, d: Driver) -> None:
        listeners = [d.broker.arrivals("acme", "ann") for _ in range(3)]
        firsts = [asyncio.ensure_future(anext(listener)) for listener in listeners]
        await asyncio.sleep(0.01)
        job = await d.submit(user="ann")
        async with asyncio.timeout(PATIENCE):
            assert await asyncio.gather(*firsts) == [job.id] * 3
        for listener in listeners:
            async with closing(listener):
                pass

    async def test_a_duplicate_submit_is_no_arrival(self, d: Driver) -> None:
        await d.submit(user="ann", idempotency_key="k")
        async with closing(d.broker.arrivals("acme", "ann")) as arrivals, asyncio.timeout(PATIENCE):
            first = asyncio.ensure_future(anext(arrivals))
            await asyncio.sleep(0.01)
            await d.submit(user="ann", idempotency_key="k")
            job = await d.submit(user="ann")
            assert await first == job.id

    async def test_stats_of_an_empty_broker(self, d: Driver) -> None:
        stats = await d.broker.stats()
        assert stats.queued == 0
        assert sum(stats.jobs.values()) == 0
        assert stats.workers == []
        assert stats.durability

    @total_order
    async def test_stats_count_the_depth_by_model_and_priority(self, d: Driver) -> None:
        await d.submit_many(3, "a")
        await d.submit_many(2, "b", priority=Priority.BATCH)
        await d.submit("b", name="big", priority=Priority.INTERACTIVE)
        await d.claim(1)
        depth = {key: count for key, count in (await d.broker.stats()).depth.items() if count}
        assert sum(depth.values()) == 5
        assert depth == {("m", Priority.NORMAL): 2, ("m", Priority.BATCH): 2, ("big", Priority.INTERACTIVE): 1}

    async def test_stats_count_jobs_by_status(self, d: Driver) -> None:
        expiring = await d.submit(deadline_at=d.harness.clock.now() + 1)
        await d.pass_time(2)
        assert (await d.get(expiring)).status is Status.EXPIRED
        await d.finish(await d.start(), 1)
        await d.write(await d.start(), finish=Finish(error=ERROR))
        await d.cancel(await d.start())
        await d.start()
        await d.submit()
        await d.submit()
        counts = {status: count for status, count in (await d.broker.stats()).jobs.items() if count}
        assert counts == {
            Status.QUEUED: 2,
            Status.RUNNING: 1,
            Status.COMPLETED: 1,
            Status.FAILED: 1,
            Status.CANCELLED: 1,
            Status.EXPIRED: 1,
        }
        await d.crash()
        again = {status: count for status, count in (await d.broker.stats()).jobs.items() if count}
        assert sum(again.values()) == 7
        assert {status: again[status] for status in TERMINAL} == {status: counts[status] for status in TERMINAL}

    async def test_stats_tell_the_workers_and_what_they_serve(self, d: Driver) -> None:
        await d.claim(1, worker="w1", models=["m"], slots=8)
        await d.claim(1, worker="w2", models=["m", "big"])
        workers = {worker.id: worker for worker in (await d.broker.stats()).workers}
        assert set(workers) == {"w1", "w2"}
        assert {info.name for info in workers["w2"].models} == {"m", "big"}
        assert workers["w2"].models[0].context_length == 4096
        assert (workers["w1"].state, workers["w1"].slots) == ("ready", 8)

    async def test_stats_tell_a_draining_worker(self, d: Driver) -> None:
        await d.claim(1, worker="w1")
        leaving = WorkerInfo(id="w1", models=(model(),), slots=8, state="draining", seen_at=d.harness.clock.now())
        await d.broker.register(leaving)
        assert [worker.state for worker in (await d.broker.stats()).workers] == ["draining"]

    async def test_stats_tell_the_drain_rate(self, d: Driver) -> None:
        assert (await d.broker.stats()).drain_rate == 0
        for _ in range(6):
            await d.finish(await d.start(), 1)
        assert 6 / 60 < (await d.broker.stats()).drain_rate <= 6 / 5, "by the seconds in which they ended"
        await d.pass_time(300)
        assert (await d.broker.stats()).drain_rate == 0
