"""Phases of tokens and what usage says of them: kept by the log, counted once, the same for every reader."""

from __future__ import annotations

from penstock.core.events import Event, Phase, TokenPhase, Tokens
from penstock.core.job import Job, Request, Status, Usage
from penstock.core.ports import Append, Finish, Lease, Verdict
from penstock.testing.broker.driver import ERROR, Contract, Driver, ended
from penstock.testing.oracle import check_log, check_views, tokens_of

TEXT, THOUGHT, TOOL = Phase.TEXT, Phase.REASONING, Phase.TOOL
#: A token that ends a thought and begins the text.
BORDER: TokenPhase = [(THOUGHT, 2), (TEXT, 1)]

#: A reply that thinks, writes, and calls: the texts of its tokens and their phases, in three runs.
RUNS: list[tuple[list[str], list[TokenPhase] | None]] = [
    (["", "We ", "ok."], [THOUGHT, THOUGHT, BORDER]),
    ([" So", " then"], None),
    (['{"name": "f", "arguments": {', '"x": 1}', "}\n"], [TOOL, TOOL, TOOL]),
]
PHASES: list[TokenPhase] = [phase for texts, phases in RUNS for phase in phases or [TEXT] * len(texts)]
THOUGHTS = 3


def phases_of(events: list[Event]) -> list[TokenPhase | None]:
    return [token.phase for token in tokens_of(events)]


class PhaseContract(Contract):
    async def write_reply(self, d: Driver, lease: Lease, runs: int = 3, finish: Finish | None = None) -> None:
        """The first *runs* of the reply, as a worker writes them."""
        position = 1
        for number, (texts, phases) in enumerate(RUNS[:runs], 1):
            append = Append(
                lease.key,
                position,
                list(range(position, position + len(texts))),
                texts,
                prompt_tokens=9 if number == 1 else None,
                finish=finish if number == runs else None,
                phases=phases,
                reasoning_tokens=THOUGHTS,
                cached_tokens=4 if number == 1 else 0,
            )
            assert await d.send(append) is Verdict.OK
            position += len(texts)

    async def test_a_log_keeps_the_phase_of_each_token(self, d: Driver) -> None:
        lease = await d.start()
        reader = d.reader(lease)
        await self.write_reply(d, lease, finish=Finish(("tool_calls",)))
        live, stored = await reader, await d.log(lease)
        assert phases_of(live) == phases_of(stored) == PHASES
        check_log(stored)
        check_views([live, stored])
        await d.crash()
        assert phases_of(await d.log(lease)) == PHASES

    async def test_a_view_that_begins_within_a_run_has_its_phases(self, d: Driver) -> None:
        lease = await d.start()
        await self.write_reply(d, lease)
        for after in range(len(PHASES)):
            assert phases_of(await d.head(lease, len(PHASES), after)) == PHASES[after:]
        await d.finish(lease)
        for after in range(len(PHASES)):
            assert phases_of(await d.log(lease, after)) == PHASES[after:]

    async def test_a_run_of_text_says_nothing_of_phases(self, d: Driver) -> None:
        """The common case costs nothing."""
        lease = await d.start()
        await d.write(lease, 1, 2)
        await d.write(lease, 3)
        await d.finish(lease)
        assert {event.phases is None for event in await d.log(lease) if isinstance(event, Tokens)} == {True}

    async def test_the_next_attempt_is_given_the_phases_so_far(self, d: Driver) -> None:
        lease = await d.start()
        await self.write_reply(d, lease)
        await d.lose_leases()
        again = await d.next()
        assert again.phases == PHASES
        assert again.job.reasoning_tokens == THOUGHTS
        plain = await d.start()
        await d.write(plain, 1, 2)
        await d.release(plain)
        assert (await d.next()).phases is None

    async def test_phases_of_the_new_part_of_an_overlapping_append_count(self, d: Driver) -> None:
        lease = await d.start()
        await d.write(lease, 1, 2, 3, phases=[THOUGHT, THOUGHT, TEXT], reasoning_tokens=2)
        await d.write(lease, 3, 4, 5, at=3, phases=[TEXT, THOUGHT, TEXT], reasoning_tokens=3)
        assert (await d.get(lease)).reasoning_tokens == 3
        await d.release(lease)
        again = await d.next()
        assert again.phases == [THOUGHT, THOUGHT, TEXT, THOUGHT, TEXT]
        await d.finish(again, reasoning_tokens=3)
        log = await d.log(again)
        check_log(log)
        assert phases_of(log) == again.phases
        assert ended(log).usage.reasoning_tokens == 3

    async def test_a_repeated_append_counts_once(self, d: Driver) -> None:
        lease = await d.start()
        first = d.append(lease, 1, 2, phases=[THOUGHT, TEXT], reasoning_tokens=1, prompt_tokens=9, cached_tokens=4)
        assert await d.send(first) is Verdict.OK
        assert await d.write(lease, 3, phases=[THOUGHT], reasoning_tokens=2) is Verdict.OK
        assert await d.send(first) is Verdict.OK
        assert (await d.get(lease)).usage == Usage(9, 3, 2, 4)
        await d.finish(lease, reasoning_tokens=2)
        assert ended(await d.log(lease)).usage == (await d.get(lease)).usage == Usage(9, 3, 2, 4)

    async def test_an_append_that_is_refused_counts_nothing(self, d: Driver) -> None:
        old = await d.start()
        await d.write(old, 1, phases=[THOUGHT], reasoning_tokens=1, prompt_tokens=9, cached_tokens=4)
        await d.lose_leases()
        new = await d.next()
        fields = {"phases": [THOUGHT], "reasoning_tokens": 7, "prompt_tokens": 8, "cached_tokens": 8}
        assert await d.write(old, 666, at=2, **fields) is Verdict.LOST
        assert await d.write(new, 666, at=5, **fields) is Verdict.LOST
        assert (await d.get(new)).usage == Usage(9, 1, 1, 4)

    async def test_what_was_cached_is_what_the_first_attempt_told(self, d: Driver) -> None:
        """A later attempt finds more in the cache: what the earlier one computed."""
        lease = await d.start()
        await d.write(lease, 1, prompt_tokens=9, cached_tokens=0)
        await d.lose_leases()
        lease = await d.next()
        await d.finish(lease, 2, prompt_tokens=9, cached_tokens=8)
        assert (await d.get(lease)).usage == ended(await d.log(lease)).usage == Usage(9, 2, 0, 0)

    async def test_every_end_tells_what_was_used(self, d: Driver) -> None:
        """However and wherever a job ends, its usage is that of its log: also after a restart."""
        used = Usage(9, 5, THOUGHTS, 4)

        async def begun(deadline_at: float | None = None) -> Lease:
            lease = await d.start(deadline_at=deadline_at)
            await self.write_reply(d, lease, runs=2)
            return lease

        async def told(lease: Lease, status: Status) -> None:
            job, end = await d.get(lease), ended(await d.log(lease))
            assert (job.status, job.usage) == (end.status, end.usage) == (status, used)
            check_log(await d.log(lease))

        running, waiting, late, late_waiting, failing = [
            await begun(),
            await begun(),
            await begun(deadline_at=d.harness.clock.now() + 3.0),
            await begun(deadline_at=d.harness.clock.now() + 3.0),
            await begun(),
        ]
        await d.release(waiting)
        await d.release(late_waiting)
        assert (await d.cancel(waiting)).usage == used
        await d.cancel(running)
        await d.send(d.append(failing, finish=Finish(error=ERROR), reasoning_tokens=THOUGHTS))
        await d.pass_time(4.0)
        ends = [
            (running, Status.CANCELLED),
            (waiting, Status.CANCELLED),
            (late, Status.EXPIRED),
            (late_waiting, Status.EXPIRED),
            (failing, Status.FAILED),
        ]
        for lease, status in ends:
            await told(lease, status)
        await d.crash()
        for lease, status in ends:
            await told(lease, status)

    async def test_counts_go_on_after_a_restart(self, d: Driver) -> None:
        lease = await d.start()
        await self.write_reply(d, lease, runs=2)
        await d.crash()
        await d.lose_leases()
        assert (await d.get(lease)).usage == Usage(9, 5, THOUGHTS, 4)
        lease = await d.next()
        assert (lease.phases, lease.job.usage) == (PHASES[:5], Usage(9, 5, THOUGHTS, 4))
        await d.finish(lease, 6, phases=[THOUGHT], reasoning_tokens=THOUGHTS + 1, cached_tokens=9)
        assert ended(await d.log(lease)).usage == Usage(9, 6, THOUGHTS + 1, 4)

    async def test_phases_belong_to_choices(self, d: Driver) -> None:
        lease = await d.start(request=Request(model="m", prompt="x", n=2))
        await d.write(lease, 1, 2, 3, choices=[0, 1, 0], phases=[THOUGHT, TEXT, TEXT], reasoning_tokens=1)
        await d.write(lease, 4, choices=[1])
        await d.release(lease)
        again = await d.next()
        assert (again.choices, again.phases) == ([0, 1, 0, 1], [THOUGHT, TEXT, TEXT, TEXT])

    async def test_a_listed_job_has_its_counts(self, d: Driver) -> None:
        lease = await d.start()
        await self.write_reply(d, lease, finish=Finish(("tool_calls",)))
        listed: list[Job] = await d.jobs()
        assert [job.usage for job in listed] == [Usage(9, len(PHASES), THOUGHTS, 4)]
