"""Append: fenced, deduplicated, atomic, durable, with a verdict for every job."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.errors import PenstockError
from penstock.core.events import Logprob, Tokens, TopLogprob
from penstock.core.job import Request, Sampling, Status, new_job_id
from penstock.core.ports import Append, Finish, Lease, LeaseKey, Verdict
from penstock.testing.broker.driver import ERROR, Contract, Driver, ended, ids
from penstock.testing.oracle import check_log


class AppendContract(Contract):
    async def test_appended_tokens_are_in_the_log_in_order(self, d: Driver) -> None:
        lease = await d.start()
        assert await d.write(lease, 10, 11) is Verdict.OK
        assert await d.write(lease, 12) is Verdict.OK
        assert await d.finish(lease, 13) is Verdict.OK
        log = await d.log(lease)
        assert [(token.position, token.id, token.text, token.attempt) for token in check_log(log)] == [
            (1, 10, "10 ", 1),
            (2, 11, "11 ", 1),
            (3, 12, "12 ", 1),
            (4, 13, "13 ", 1),
        ]

    async def test_append_keeps_texts_choices_and_logprobs(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=2, sampling=Sampling(logprobs=2)))
        texts = ["", "\u2028\n", "🦆", '"\\\x00']
        logprobs = [None, Logprob(-0.5), Logprob(-1.25, (TopLogprob(7, "a", -1.25), TopLogprob(8, "", -2.5))), None]
        await d.send(Append(lease.key, 1, [1, 2**31, 0, 4], texts, [0, 1, 1, 0], logprobs))
        await d.finish(lease)
        tokens = [event for event in await d.log(lease) if isinstance(event, Tokens)]
        assert [text for event in tokens for text in event.texts] == texts
        assert [choice for event in tokens for choice in event.choices or []] == [0, 1, 1, 0]
        assert [entry for event in tokens for entry in event.logprobs or []] == logprobs
        assert ids(tokens) == [1, 2**31, 0, 4]

    async def test_append_is_durable_once_it_returned(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2, 3)
        await d.crash()
        assert (await d.get(lease)).tokens == 3
        assert ids(await d.head(lease, 3)) == [1, 2, 3]

    async def test_a_finish_is_durable_once_it_returned(self, d: Driver) -> None:
        lease = await d.start()
        await d.finish(lease, 1, 2)
        before = await d.get(lease)
        await d.crash()
        assert await d.get(lease) == before
        check_log(await d.log(lease))

    async def test_an_older_attempt_is_lost_and_writes_nothing(self, d: Driver) -> None:
        old = await d.start()
        await d.write(old, 1)
        await d.lose_leases()
        new = await d.next(worker="w2")
        await d.write(new, 2)
        for zombie in (d.append(old, 666), d.append(old, 666, at=2), d.append(old, at=2), d.append(old, 1, 666, at=1)):
            assert await d.send(zombie) is Verdict.LOST
        assert await d.finish(old, 666) is Verdict.LOST
        assert (await d.get(new)).status is Status.RUNNING
        await d.finish(new, 3)
        assert await d.finish(old, 666) is Verdict.LOST
        assert await d.write(old, 666, at=5) is Verdict.LOST
        assert ids(await d.log(new)) == [1, 2, 3]

    async def test_a_lost_lease_is_lost_before_anyone_else_has_it(self, d: Driver) -> None:
        """The job waits in the queue again: its old worker may not go on writing."""
        lease = await d.start()
        await d.write(lease, 1)
        await d.lose_leases()
        assert await d.write(lease, 666) is Verdict.LOST
        assert await d.write(lease) is Verdict.LOST
        assert await d.finish(lease) is Verdict.LOST
        job = await d.get(lease)
        assert (job.status, job.tokens) == (Status.QUEUED, 1)

    async def test_a_zombies_heartbeat_does_not_renew_its_successors_lease(self, d: Driver) -> None:
        old = await d.start()
        await d.lose_leases()
        new = await d.next(worker="w2")
        await d.pass_time(d.policy.lease_ttl * 0.7)
        await d.write(old)
        await d.pass_time(d.policy.lease_ttl * 0.7)
        assert (await d.get(new)).status is Status.QUEUED

    async def test_an_attempt_that_was_never_given_is_lost(self, d: Driver) -> None:
        job = await d.submit()
        for attempt in (0, 1, 2):
            key = LeaseKey(job.tenant, job.id, attempt)
            assert await d.send(Append(key, 1, [666], ["x"])) is Verdict.LOST
        lease = await d.next()
        for attempt in (0, 2, 99):
            key = LeaseKey(job.tenant, job.id, attempt)
            assert await d.send(Append(key, 1, [666], ["x"], finish=Finish(("stop",)))) is Verdict.LOST
        await d.finish(lease, 1)
        assert ids(await d.log(lease)) == [1]

    async def test_an_append_to_an_unknown_job_is_lost(self, d: Driver) -> None:
        key = LeaseKey("acme", new_job_id(), 1)
        assert await d.broker.append([Append(key, 1, [1], ["x"])]) == {key.job: Verdict.LOST}

    async def test_an_append_under_another_tenant_is_lost(self, d: Driver) -> None:
        lease = await d.start()
        key = LeaseKey("umbrella", lease.job.id, lease.attempt)
        assert await d.send(Append(key, 1, [666], ["x"], finish=Finish(("stop",)))) is Verdict.LOST
        await d.finish(lease, 1)
        assert ids(await d.log(lease)) == [1]

    async def test_the_same_append_twice_writes_once(self, d: Driver) -> None:
        lease = await d.start()
        append = d.append(lease, 10, 11)
        for _ in range(3):
            assert await d.send(append) is Verdict.OK
        assert (await d.get(lease)).tokens == 2
        await d.finish(lease, 12)
        assert ids(await d.log(lease)) == [10, 11, 12]

    async def test_the_same_append_at_the_same_time_writes_once(self, d: Driver) -> None:
        lease = await d.start()
        append = d.append(lease, 10, 11)
        assert set(await asyncio.gather(*(d.send(append) for _ in range(8)))) == {Verdict.OK}
        await d.finish(lease)
        assert ids(await d.log(lease)) == [10, 11]

    async def test_a_finish_sent_twice_ends_once(self, d: Driver) -> None:
        """The reply of the first was lost. Accepted for the second: OK, or LOST (nothing is left to generate)."""
        lease = await d.start()
        append = d.append(lease, 10, finish=Finish(("stop",)), prompt_tokens=4)
        assert await d.send(append) is Verdict.OK
        before = await d.get(lease)
        assert await d.send(append) in {Verdict.OK, Verdict.LOST}
        assert await d.get(lease) == before
        assert ids(await d.log(lease)) == [10]
        check_log(await d.log(lease))

    async def test_what_comes_after_the_end_is_never_acknowledged(self, d: Driver) -> None:
        """OK would say that the tokens are in the log."""
        lease = await d.start()
        await d.finish(lease, 1)
        for late in (d.append(lease, 2, at=2), d.append(lease, 2, at=3), d.append(lease, 1, 2, at=1)):
            assert await d.send(late) is Verdict.LOST
        assert ids(await d.log(lease)) == [1]

    async def test_an_overlapping_append_writes_only_its_new_part(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=2, sampling=Sampling(logprobs=1)))
        await d.write(lease, 10, 11, 12, choices=[0, 1, 0], logprobs=[Logprob(-1.0), Logprob(-2.0), Logprob(-3.0)])
        overlap = d.append(
            lease,
            *(11, 12, 13, 14),
            at=2,
            choices=[1, 0, 1, 1],
            logprobs=[Logprob(-2.0), Logprob(-3.0), Logprob(-4.0), Logprob(-5.0)],
            finish=Finish(("stop", "length")),
        )
        assert await d.send(overlap) is Verdict.OK
        log = await d.log(lease)
        assert [(token.id, token.choice) for token in check_log(log)] == [(10, 0), (11, 1), (12, 0), (13, 1), (14, 1)]
        logprobs = [entry.logprob for e in log if isinstance(e, Tokens) for entry in e.logprobs or [] if entry]
        assert logprobs == [-1.0, -2.0, -3.0, -4.0, -5.0]

    async def test_what_is_logged_is_never_rewritten(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 10, 11)
        await d.write(lease, 98, 99, 12, at=1)
        await d.finish(lease)
        assert ids(await d.log(lease)) == [10, 11, 12]

    async def test_an_append_beyond_the_head_writes_nothing(self, d: Driver) -> None:
        """Accepted: the verdict LOST, or a refusal (`PenstockError` or ValueError)."""
        lease = await d.start()
        await d.write(lease, 10, 11)
        for gap in (d.append(lease, 14, at=4), d.append(lease, 14, at=4, finish=Finish(("stop",)))):
            try:
                verdict = await d.send(gap)
            except (PenstockError, ValueError):
                verdict = Verdict.LOST
            assert verdict is Verdict.LOST
        job = await d.get(lease)
        assert (job.status in {Status.RUNNING, Status.QUEUED}, job.tokens) == (True, 2)
        assert ids(await d.head(lease, 2)) == [10, 11]
        await d.lose_leases()
        lease = await d.next()
        assert lease.ids == [10, 11]
        await d.finish(lease, 12)
        assert ids(await d.log(lease)) == [10, 11, 12]
        check_log(await d.log(lease))

    async def test_a_heartbeat_renews_the_lease(self, d: Driver) -> None:
        lease = await d.start()
        for _ in range(4):
            await d.pass_time(d.policy.lease_ttl * 0.7)
            assert await d.write(lease) is Verdict.OK
        assert (await d.get(lease)).status is Status.RUNNING
        assert await d.finish(lease, 1) is Verdict.OK
        assert ids(await d.log(lease)) == [1]

    async def test_tokens_renew_the_lease(self, d: Driver) -> None:
        lease = await d.start()
        for token in range(4):
            await d.pass_time(d.policy.lease_ttl * 0.7)
            assert await d.write(lease, token) is Verdict.OK
        assert (await d.get(lease)).status is Status.RUNNING

    async def test_a_repeated_append_renews_the_lease(self, d: Driver) -> None:
        lease = await d.start()
        append = d.append(lease, 1)
        for _ in range(4):
            assert await d.send(append) is Verdict.OK
            await d.pass_time(d.policy.lease_ttl * 0.7)
        assert (await d.get(lease)).status is Status.RUNNING

    async def test_a_finish_ends_the_job(self, d: Driver) -> None:
        lease = await d.start(size=5)
        await d.write(lease, 1, 2, prompt_tokens=7)
        await d.harness.advance(2)
        await d.send(d.append(lease, 3, finish=Finish(("length",))))
        job = await d.get(lease)
        assert (job.status, job.finish_reasons, job.error) == (Status.COMPLETED, ("length",), None)
        assert (job.tokens, job.prompt_tokens, job.usage.total_tokens) == (3, 7, 10)
        assert job.ended_at == pytest.approx(d.harness.clock.now())
        end = ended(await d.log(lease))
        assert (end.position, end.attempt, end.status, end.finish_reasons) == (4, 1, Status.COMPLETED, ("length",))
        assert end.usage == job.usage
        assert end.error is None

    async def test_a_finish_stores_a_reason_for_each_choice(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=3))
        reasons = ("stop", "length", "tool_calls")
        await d.write(lease, 1, 2, choices=[0, 2], finish=Finish(reasons))
        assert (await d.get(lease)).finish_reasons == ended(await d.log(lease)).finish_reasons == reasons

    async def test_a_finish_stores_which_stop_string_ended_a_choice(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=2))
        await d.write(lease, 1, 2, choices=[0, 1], finish=Finish.of([("stop", "END"), ("length", None)]))
        end = ended(await d.log(lease))
        assert (end.finish_reasons, end.stop(0), end.stop(1)) == (("stop", "length"), "END", None)
        other = await d.start()
        await d.finish(other)
        end = ended(await d.log(other))
        assert end.stop() is None

    async def test_a_finish_with_an_error_fails_the_job(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        assert await d.write(lease, 2, finish=Finish(error=ERROR)) is Verdict.OK
        job = await d.get(lease)
        assert (job.status, job.error, job.finish_reasons) == (Status.FAILED, ERROR, ())
        end = ended(await d.log(lease))
        assert (end.position, end.status, end.error) == (3, Status.FAILED, ERROR)

    async def test_a_job_may_end_without_a_token(self, d: Driver) -> None:
        lease = await d.start()
        assert await d.finish(lease) is Verdict.OK
        (end,) = await d.log(lease)
        assert (end.position, end.attempt) == (1, 1)

    async def test_the_prompts_length_is_recorded(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, prompt_tokens=12)
        assert (await d.get(lease)).prompt_tokens == 12
        await d.write(lease, 1)
        assert (await d.get(lease)).prompt_tokens == 12, "an append that does not tell must not forget it"
        await d.write(lease, finish=Finish(("stop",)))
        assert ended(await d.log(lease)).usage.prompt_tokens == 12

    async def test_the_prompt_is_counted_once_over_several_attempts(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2, prompt_tokens=12)
        await d.lose_leases()
        lease = await d.next()
        await d.finish(lease, 3, prompt_tokens=12)
        usage = (await d.get(lease)).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (12, 3)

    async def test_one_call_serves_many_jobs_with_a_verdict_each(self, d: Driver) -> None:
        for _ in range(6):
            await d.submit()
        good, stale, gone, done, beat, late = await d.claim(6)
        await d.release(stale)
        again = await d.next()
        await d.cancel(gone)
        verdicts = await d.broker.append(
            [
                d.append(good, 1, 2),
                d.append(stale, 666, at=1),
                d.append(gone, 666),
                d.append(done, 3, finish=Finish(("stop",))),
                d.append(beat),
                Append(LeaseKey("umbrella", late.job.id, 1), 1, [666], ["x"]),
            ]
        )
        assert verdicts == {
            good.job.id: Verdict.OK,
            stale.job.id: Verdict.LOST,
            gone.job.id: Verdict.CANCELLED,
            done.job.id: Verdict.OK,
            beat.job.id: Verdict.OK,
            late.job.id: Verdict.LOST,
        }
        assert again.job.id == stale.job.id
        assert [(await d.get(lease)).tokens for lease in (good, again, gone, done, beat, late)] == [2, 0, 0, 1, 0, 0]
        assert (await d.get(done)).status is Status.COMPLETED

    async def test_two_runs_of_one_job_may_share_a_call(self, d: Driver) -> None:
        lease = await d.start()
        verdicts = await d.broker.append([d.append(lease, 1, 2, at=1), d.append(lease, 3, at=3)])
        assert verdicts == {lease.job.id: Verdict.OK}
        assert ids(await d.head(lease, 3)) == [1, 2, 3]

    async def test_the_same_append_twice_in_one_call_writes_once(self, d: Driver) -> None:
        """And spoils nothing for the other jobs of the call."""
        await d.submit_many(2)
        lease, other = await d.claim(2)
        tokens = d.append(lease, 1, 2)
        last = d.append(lease, 3, at=3, finish=Finish(("stop",)))
        verdicts = await d.broker.append([tokens, tokens, last, last, d.append(other, 9)])
        assert verdicts[other.job.id] is Verdict.OK
        assert verdicts[lease.job.id] in {Verdict.OK, Verdict.LOST}
        log = await d.log(lease)
        check_log(log)
        assert ids(log) == [1, 2, 3]
        assert (await d.get(other)).tokens == 1

    async def test_an_append_of_nothing_is_nothing(self, d: Driver) -> None:
        assert await d.broker.append([]) == {}

    async def test_workers_append_side_by_side(self, d: Driver) -> None:
        await d.submit_many(8)
        leases = await d.claim(8)

        async def work(lease: Lease) -> None:
            for token in range(20):
                assert await d.write(lease, token) is Verdict.OK
            await d.finish(lease)

        await asyncio.gather(*(work(lease) for lease in leases))
        for lease in leases:
            assert ids(await d.log(lease)) == list(range(20))

    async def test_the_attempt_of_each_token_is_kept(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1)
        await d.lose_leases()
        await d.lose_leases()
        lease = await d.next()
        await d.write(lease, 2)
        await d.release(lease)
        lease = await d.next()
        await d.finish(lease, 3)
        assert [token.attempt for token in check_log(await d.log(lease))] == [1, 2, 3]
        assert ended(await d.log(lease)).attempt == 3
