"""How long a result is kept, and what forgets it at once."""

from __future__ import annotations

import pytest

from penstock.core.errors import ExpiredResult, NotFound
from penstock.core.job import Status, new_job_id
from penstock.core.ports import Finish, Verdict
from penstock.testing.broker.driver import ERROR, Contract, Driver, ended, ids


class RetentionContract(Contract):
    async def test_a_result_is_kept_until_its_time_is_over(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.pass_time(d.policy.result_ttl * 0.9)
        assert ids(await d.log(lease)) == [1]
        await d.pass_time(d.policy.result_ttl * 0.2)
        with pytest.raises(ExpiredResult):
            await d.get(lease)
        with pytest.raises(ExpiredResult):
            await d.log(lease)
        assert await d.jobs() == []

    @pytest.mark.parametrize("how", ["cancelled", "failed", "expired"])
    async def test_retention_applies_however_the_job_ended(self, d: Driver, how: str) -> None:
        job = await d.submit(deadline_at=d.harness.clock.now() + 10)
        if how == "cancelled":
            await d.cancel(job)
        elif how == "failed":
            await d.write(await d.next(), finish=Finish(error=ERROR))
        else:
            await d.pass_time(11)
        assert (await d.get(job)).status == how
        await d.pass_time(d.policy.result_ttl * 1.1)
        with pytest.raises(ExpiredResult):
            await d.get(job)

    async def test_retention_counts_from_the_end(self, d: Driver) -> None:
        """A job that waited for longer than the retention is not dropped with its end."""
        job = await d.submit()
        await d.pass_time(d.policy.result_ttl * 2)
        assert (await d.get(job)).status is Status.QUEUED
        lease = await d.next()
        await d.finish(lease, 1)
        await d.settle()
        assert ids(await d.log(lease)) == [1]

    async def test_an_expired_result_cannot_be_cancelled_or_appended_to(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.pass_time(d.policy.result_ttl * 1.1)
        with pytest.raises(NotFound):
            await d.cancel(lease)
        assert await d.write(lease, 2) is Verdict.LOST
        await d.release(lease)
        assert await d.claim(5) == []

    async def test_an_expired_result_tells_a_foreigner_nothing(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.pass_time(d.policy.result_ttl * 1.1)
        with pytest.raises(NotFound) as caught:
            await d.broker.get("umbrella", lease.job.id)
        assert not isinstance(caught.value, ExpiredResult)

    async def test_the_idempotency_key_is_free_again(self, d: Driver) -> None:
        lease = await d.start(idempotency_key="k", body="one")
        await d.finish(lease, 1)
        await d.pass_time(d.policy.result_ttl * 1.1)
        again = await d.submit(idempotency_key="k", body="two")
        assert again.id != lease.job.id
        assert again.status is Status.QUEUED
        assert (await d.submit(idempotency_key="k", body="two")).id == again.id

    async def test_retention_outlives_a_restart(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.crash()
        await d.pass_time(d.policy.result_ttl * 1.1)
        with pytest.raises(ExpiredResult):
            await d.get(lease)

    @pytest.mark.parametrize("factor", [0.5, 3.0])
    async def test_a_job_may_be_kept_for_a_time_of_its_own(self, d: Driver, factor: float) -> None:
        retained = d.policy.result_ttl * factor
        lease = await d.start(retain_for=retained, view=b"of its route")
        other = await d.start()
        await d.finish(lease, 1)
        await d.finish(other, 1)
        await d.pass_time(retained * 0.9)
        found = await d.get(lease)
        assert (found.status, found.retain_for, found.view) == (Status.COMPLETED, retained, b"of its route")
        assert ids(await d.log(lease)) == [1]
        await d.pass_time(retained * 0.2)
        with pytest.raises(ExpiredResult):
            await d.get(lease)
        kept = {job.id for job in await d.jobs()}
        assert kept == ({other.job.id} if factor < 1 else set()), "the others' retention is not touched"

    async def test_the_store_shrinks(self, d: Driver) -> None:
        before = await d.harness.stored_bytes()
        if before is None:
            pytest.skip("this store's size can't be observed")
        for lease in [await d.start() for _ in range(4)]:
            for _ in range(10):
                await d.write(lease, *range(1000))
            await d.finish(lease)
        full = await d.harness.stored_bytes()
        assert full is not None
        await d.pass_time(d.policy.result_ttl * 1.1)
        after = await d.harness.stored_bytes()
        assert after is not None
        assert after - before < (full - before) / 4


class ForgetContract(Contract):
    @pytest.mark.parametrize("state", ["queued", "delayed", "running", "completed", "cancelled"])
    async def test_it_is_gone_whatever_its_state(self, d: Driver, state: str) -> None:
        job = await d.submit(idempotency_key="k", user="ann")
        if state in ("delayed", "running", "completed"):
            lease = await d.next()
            await d.write(lease, 1, 2)
            if state == "delayed":
                await d.release(lease, retry=ERROR, delay=30)
            elif state == "completed":
                await d.finish(lease, 3)
        elif state == "cancelled":
            await d.cancel(job)
        other = await d.submit(idempotency_key="other")
        await d.broker.forget(job.tenant, job.id)
        for asking in (d.get, d.cancel, d.log):
            with pytest.raises(NotFound):
                await asking(job)
        assert [each.id for each in await d.jobs()] == [other.id]
        assert await d.jobs(user="ann") == []
        await d.pass_time(60)
        assert (await d.next()).job.id == other.id
        assert await d.claim(5) == []
        counts = (await d.broker.stats()).jobs
        assert {status: count for status, count in counts.items() if count} == {Status.RUNNING: 1}

    async def test_its_worker_is_fenced(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        await d.broker.forget("acme", lease.job.id)
        assert await d.write(lease, 2) in (Verdict.LOST, Verdict.CANCELLED)
        await d.release(lease)
        await d.lose_leases()
        assert await d.claim(5) == []

    async def test_a_reader_sees_its_end(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        reader = d.reader(lease)
        await d.head(lease, 1)
        await d.broker.forget("acme", lease.job.id)
        events = await reader
        assert ids(events) == [1]
        assert ended(events).status is Status.CANCELLED

    async def test_its_key_is_free_again(self, d: Driver) -> None:
        job = await d.submit(idempotency_key="k", body="one")
        await d.broker.forget("acme", job.id)
        again = await d.submit(idempotency_key="k", body="two")
        assert again.id != job.id
        await d.broker.forget("acme", job.id)
        assert (await d.submit(idempotency_key="k", body="two")).id == again.id

    async def test_it_is_idempotent_and_nobody_elses(self, d: Driver) -> None:
        job = await d.submit()
        await d.broker.forget("umbrella", job.id)
        await d.broker.forget("acme", new_job_id())
        assert (await d.get(job)).status is Status.QUEUED
        await d.broker.forget("acme", job.id)
        await d.broker.forget("acme", job.id)
        with pytest.raises(NotFound):
            await d.get(job)

    async def test_it_is_durable(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1)
        await d.broker.forget("acme", lease.job.id)
        await d.crash()
        with pytest.raises(NotFound):
            await d.get(lease)
        assert await d.jobs() == []
