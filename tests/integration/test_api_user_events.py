"""All of a user's jobs over one stream (SPEC 3): nothing lost, nothing twice, nobody else's."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest

from penstock.testing.oracle import Token, check_log
from tests.support.api import check_error, ended, running, submit
from tests.support.server import PATIENCE, Server
from tests.support.sse import Event, Parser, Stream, open_stream


def unique() -> str:
    return f"u-{uuid.uuid4().hex[:12]}"


def url(server: Server, user: str) -> str:
    return f"{server.url}/v1/events?user_id={user}"


def check_jobs(events: Iterable[Event], expected: dict[str, int], *, attempt: int = 1) -> None:
    """Every expected job: its tokens once and in order, then ``job_complete`` once; and no other job."""
    tokens: dict[str, list[Token]] = defaultdict(list)
    ends: dict[str, dict[str, Any]] = {}
    for event in events:
        data = event.data
        job = data["job_id"]
        if event.event == "token":
            assert job not in ends, f"a token of {job} after its end"
            tokens[job].append(Token(data["position"], data["token_id"], data["token"], data["attempt"]))
        else:
            assert event.event == "job_complete"
            assert job not in ends, f"{job} ended twice"
            ends[job] = data
    assert set(ends) == set(expected)
    for job, count in expected.items():
        check_log(tokens[job], complete=False)
        assert len(tokens[job]) == count
        assert ends[job]["usage"]["completion_tokens"] == count


async def collect(stream: Stream, jobs: int) -> list[Event]:
    """Events until so many jobs are complete."""
    events: list[Event] = []
    while sum(event.event == "job_complete" for event in events) < jobs:
        events += await stream.take(1)
    return events


async def test_several_jobs_over_one_stream(server: Server, http: httpx.AsyncClient) -> None:
    user = unique()
    before = await submit(http, model="paced", user_id=user, max_tokens=20)
    await running(http, before)
    async with await open_stream(url(server, user)) as stream:
        assert stream.status == 200
        expected = {before: 20}
        for tokens in (1, 7, 12):
            expected[await submit(http, model="paced", user_id=user, max_tokens=tokens)] = tokens
        expected[await submit(http, user_id=user, max_tokens=500)] = 500
        check_jobs(await collect(stream, 5), expected)
    assert stream.raw.isascii()
    assert stream.parser.empty_blocks == 0


async def test_an_end_tells_how(server: Server, http: httpx.AsyncClient) -> None:
    user = unique()
    async with await open_stream(url(server, user)) as stream:
        done = await submit(http, user_id=user, max_tokens=1)
        ends = {event.data["job_id"]: event.data for event in await collect(stream, 1)}
        cancelled = await submit(http, model="paced", user_id=user, max_tokens=100_000)
        await stream.take(1)
        await http.post(f"/v1/jobs/{cancelled}/cancel")
        ends |= {event.data["job_id"]: event.data for event in await collect(stream, 1)}
    assert ends[done]["status"] == "completed"
    assert ends[done]["finish_reason"] == "length"
    assert ends[done]["error"] is None
    assert ends[cancelled]["status"] == "cancelled"
    assert ends[cancelled]["error"]["code"] == "cancelled"


async def test_other_users_jobs_never(server: Server, http: httpx.AsyncClient) -> None:
    one, two = unique(), unique()
    async with await open_stream(url(server, one)) as first, await open_stream(url(server, two)) as second:
        mine = {await submit(http, user_id=one, max_tokens=30): 30 for _ in range(5)}
        theirs = {await submit(http, user_id=two, max_tokens=20): 20 for _ in range(5)}
        await submit(http, max_tokens=5)  # nobody's
        await submit(http, user_id=one + "x", max_tokens=5)
        check_jobs(await collect(first, 5), mine)
        check_jobs(await collect(second, 5), theirs)


async def test_two_streams_of_one_user_see_the_same(server: Server, http: httpx.AsyncClient) -> None:
    user = unique()
    async with await open_stream(url(server, user)) as first, await open_stream(url(server, user)) as second:
        jobs = {await submit(http, user_id=user, model="paced", max_tokens=10): 10 for _ in range(3)}
        check_jobs(await collect(first, 3), jobs)
        check_jobs(await collect(second, 3), jobs)


@pytest.mark.parametrize("by", ["header", "query"])
async def test_a_reader_that_drops_all_the_time_sees_everything_once(
    server: Server, http: httpx.AsyncClient, by: str
) -> None:
    """Leave after a random number of events and come back with the last id, while jobs begin, run and end."""
    dice = random.Random(7)
    user = unique()
    sizes = [dice.choice([1, 3, 10, 40]) for _ in range(12)]
    total = sum(sizes) + len(sizes)
    expected: dict[str, int] = {}

    async def submit_all() -> None:
        for number, tokens in enumerate(sizes):
            model = "paced" if number % 3 else "synthetic"
            expected[await submit(http, model=model, user_id=user, max_tokens=tokens)] = tokens
            await asyncio.sleep(0.05)

    events: list[Event] = []
    cursor: str | None = None
    submitting: asyncio.Task[None] | None = None
    while len(events) < total:
        target = f"{url(server, user)}&after={cursor}" if by == "query" and cursor else url(server, user)
        async with await open_stream(target, after=cursor if by == "header" else None) as stream:
            submitting = submitting or asyncio.create_task(submit_all())
            events += await stream.take(min(dice.randrange(1, 12), total - len(events)))
            cursor = events[-1].id
    assert submitting is not None
    await submitting
    check_jobs(events, expected)


async def test_a_connection_cut_at_any_byte_loses_and_repeats_nothing(server: Server, http: httpx.AsyncClient) -> None:
    """The events that a browser has dispatched before the cut, and those after the resume with its last id."""
    user = unique()
    async with await open_stream(url(server, user)) as stream:
        jobs = {await submit(http, user_id=user, max_tokens=6): 6 for _ in range(2)}
        await collect(stream, 2)
        raw = stream.raw
    for cut in sorted({0, *(match for match in range(len(raw)) if raw[match : match + 2] == b"\n\n")}):
        parser = Parser()
        seen = parser.feed(raw[: cut + 2])
        if parser.last_event_id is None:
            continue  # nothing was told yet to come back to
        expected = 14 - len(seen)
        async with await open_stream(url(server, user), after=parser.last_event_id) as stream:
            seen += await stream.take(expected) if expected else []
        check_jobs(seen, jobs)


async def test_what_ended_while_away_is_told_on_return(server: Server, http: httpx.AsyncClient) -> None:
    user = unique()
    async with await open_stream(url(server, user)) as stream:
        first = await submit(http, user_id=user, max_tokens=2)
        events = await collect(stream, 1)
        cursor = stream.parser.last_event_id
    away = {await submit(http, user_id=user, max_tokens=3): 3 for _ in range(3)}
    for job in away:
        await ended(http, job)
    async with await open_stream(url(server, user), after=cursor) as stream:
        check_jobs(events + await collect(stream, 3), {first: 2, **away})


async def test_a_cursor_survives_kill_9_of_the_server(make_server: Callable[..., Server]) -> None:
    server = make_server(rate=50)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        async with await open_stream(url(server, "u")) as stream:
            expected = {await submit(http, user_id="u", max_tokens=tokens): tokens for tokens in (2, 60, 80)}
            events = await collect(stream, 1)
            events += await stream.take(10)
            server.kill9()
            events += await stream.rest()
        server.restart()
        async with await open_stream(url(server, "u"), after=events[-1].id) as stream:
            events += await collect(stream, 2)
    check_jobs(events, expected)
    assert max(event.data["attempt"] for event in events if event.event == "token") == 2


async def test_what_ended_before_the_first_connection_is_never_told(server: Server, http: httpx.AsyncClient) -> None:
    """Also not after a resume: the cursor remembers that these were over."""
    user = unique()
    running_one = await submit(http, model="paced", user_id=user, max_tokens=100_000)
    await running(http, running_one)
    for _ in range(3):
        await ended(http, await submit(http, user_id=user, max_tokens=2))
    async with await open_stream(url(server, user)) as stream:
        seen = await stream.take(5)
        cursor = seen[-1].id
    async with await open_stream(url(server, user), after=cursor) as stream:
        seen += await stream.take(20)
        await http.post(f"/v1/jobs/{running_one}/cancel")
        seen += await collect(stream, 1)
    assert {event.data["job_id"] for event in seen} == {running_one}


async def test_a_hundred_and_fifty_jobs_keep_the_cursor_small(server: Server, http: httpx.AsyncClient) -> None:
    """Ended jobs are forgotten by the cursor: it must still fit into a header (8 KiB at most proxies)."""
    user = unique()
    expected: dict[str, int] = {}
    async with await open_stream(url(server, user)) as stream:
        submitting = [asyncio.create_task(submit(http, user_id=user, max_tokens=2)) for _ in range(150)]
        events = await collect(stream, 150)
        for task in submitting:
            expected[await task] = 2
        cursor = stream.parser.last_event_id
    check_jobs(events, expected)
    assert cursor is not None
    assert len(cursor) < 8000
    async with await open_stream(url(server, user), after=cursor) as stream:
        late = await submit(http, user_id=user, max_tokens=2)
        check_jobs(await collect(stream, 1), {late: 2})


@pytest.mark.parametrize("cursor", ["12", "AAAA", "not a cursor", "é".encode().decode("latin-1"), "k" * 4000])
async def test_a_foreign_cursor_is_refused(server: Server, http: httpx.AsyncClient, cursor: str) -> None:
    reply = await http.get("/v1/events", params={"user_id": "x", "after": cursor})
    check_error(reply, 400, "invalid_request", "after")


async def test_somebody_elses_cursor_shows_nobody_elses_jobs(server: Server, http: httpx.AsyncClient) -> None:
    """A cursor names jobs; it must not be a way to read them as another user."""
    one, two = unique(), unique()
    async with await open_stream(url(server, one)) as stream:
        secret = await submit(http, model="paced", user_id=one, max_tokens=100_000)
        await stream.take(3)
        cursor = stream.parser.last_event_id
    async with await open_stream(url(server, two), after=cursor) as stream:
        mine = await submit(http, user_id=two, max_tokens=2)
        events = await collect(stream, 1)
    assert {event.data["job_id"] for event in events} == {mine}
    await http.post(f"/v1/jobs/{secret}/cancel")


@pytest.mark.parametrize("query", ["", "?user_id=", "?user=x"])
async def test_it_must_say_whose(http: httpx.AsyncClient, query: str) -> None:
    check_error(await http.get(f"/v1/events{query}"), 400, "invalid_request", "user_id")
