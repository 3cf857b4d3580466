"""The client against real servers that are killed, stopped and started again under its streams."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock import AsyncClient, Client
from penstock.client import End, Submitted, Token, Unreachable
from penstock.core.errors import LogRewound, ModelNotFound, NotFound, Unsupported
from penstock.core.job import Status
from tests.support.server import PATIENCE, Server, wait_for

MakeServer = Callable[..., Server]


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def check(events: list[Token | End], count: int) -> None:
    """Positions 1…count once each, attempts never decreasing, every text as its attempt wrote it, one end."""
    *tokens, end = events
    assert isinstance(end, End)
    assert (end.status, end.position, end.finish_reason) == (Status.COMPLETED, count + 1, "length")
    attempt = 1
    for position, each in enumerate(tokens, 1):
        assert isinstance(each, Token)
        assert each.position == position
        assert each.attempt >= attempt
        attempt = each.attempt
        assert each.text == f"{position}@{attempt} "


# ---------------------------------------------------------------------------------------------- a server that runs


def test_the_life_of_a_job(client: Client) -> None:
    job = client.submit("one two three", max_tokens=5, user_id="ada", metadata={"k": "v"})
    assert job.id.startswith("job_")
    check(list(client.stream(job)), 5)
    assert [event.position for event in client.stream(job, after=3)] == [4, 5, 6]
    assert list(client.stream(job, after=6)) == []
    with pytest.raises(LogRewound):
        list(client.stream(job, after=7))
    view = client.job(job)
    assert (view.status, view.user_id, view.metadata, view.tokens) == (Status.COMPLETED, "ada", {"k": "v"}, 5)
    assert view.result is not None
    assert view.result.text == "1@1 2@1 3@1 4@1 5@1 "
    assert view.timings is not None
    assert (view.timings.prompt_tokens, view.timings.completion_tokens) == (3, 5)
    result = client.result(job)
    assert (result.text, result.usage.prompt_tokens, result.finish_reason) == (view.result.text, 3, "length")


def test_in_one_call(client: Client) -> None:
    assert client.generate("Hi", max_tokens=2).text == "1@1 2@1 "
    assert client.chat("Hi", max_tokens=1).text == "1@1 "
    assert [each.text for each in client.generate_stream([1, 2, 3], max_tokens=2)] == ["1@1 ", "2@1 "]
    assert len(client.generate("Hi", max_tokens=2, n=3).texts) == 3


def test_about_the_server(client: Client) -> None:
    models = client.models()
    assert [model.id for model in models] == ["synthetic", "paced", "crawl"]
    assert {model.state for model in models} == {"ready"}
    assert client.health()["status"] == "ok"


def test_errors_are_the_cores(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        client.submit("Hi", model="nobody")
    with pytest.raises(Unsupported) as caught:
        client.submit("Hi", seed=1)
    assert caught.value.param == "seed"
    for call in (client.job, client.cancel, client.result):
        with pytest.raises(NotFound):
            call("job_0")


def test_a_key_makes_one_job(client: Client) -> None:
    first, second = (client.submit("Hi", idempotency_key="the-same", max_tokens=2) for _ in range(2))
    assert first.id == second.id
    assert client.submit("Hi", max_tokens=2).id != client.submit("Hi", max_tokens=2).id


def test_jobs_are_listed_over_pages(client: Client) -> None:
    made = [client.submit("Hi", max_tokens=1, user_id="pages").id for _ in range(5)]
    for job in made:
        client.result(job)
    listed = list(client.jobs(user_id="pages"))
    assert [view.id for view in listed] == made[::-1]
    assert [view.id for view in client.jobs(user_id="pages", limit=2)] == made[:-3:-1]
    assert list(client.jobs(user_id="pages", status=["failed"])) == []


def test_cancelling_ends_the_stream(client: Client) -> None:
    job = client.submit("Hi", model="crawl", max_tokens=1000)
    stream = client.stream(job)
    assert next(stream).position == 1
    assert client.cancel(job).status is Status.CANCELLED
    *_, end = stream
    assert isinstance(end, End)
    assert (end.status, end.error is not None and end.error.code) == (Status.CANCELLED, "cancelled")


def test_leaving_generate_stream_cancels_its_job(client: Client) -> None:
    for _ in client.generate_stream("Hi", model="paced", max_tokens=1000, user_id="leaver"):
        break
    [view] = client.jobs(user_id="leaver")
    assert view.status is Status.CANCELLED


async def test_the_asynchronous_client_runs_many_streams_at_once(server: Server) -> None:
    async with AsyncClient(server.url) as client:

        async def one() -> None:
            job = await client.submit("Hi", max_tokens=20)
            check([event async for event in client.stream(job)], 20)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(100):
                tasks.create_task(one())
        assert (await client.chat("Hi", max_tokens=1)).text == "1@1 "
        assert [view.id async for view in client.jobs(limit=1)]


# ---------------------------------------------------------------------------------------------- a server that dies


def test_streams_survive_kill_9_and_a_restart(make_server: MakeServer) -> None:
    server = make_server(rate=100)
    received = threading.Semaphore(0)
    with Client(server.url, give_up=PATIENCE) as client:

        def follow(job: Submitted) -> list[Token | End]:
            events = []
            for event in client.stream(job):
                events.append(event)
                received.release()
            return events

        jobs = [client.submit("Hi", max_tokens=300) for _ in range(8)]
        with ThreadPoolExecutor(len(jobs)) as pool:
            following = [pool.submit(follow, job) for job in jobs]
            for _ in range(2):
                for _ in range(len(jobs) * 20):
                    assert received.acquire(timeout=PATIENCE)
                server.kill9()
                time.sleep(random.uniform(0, 0.5))
                server.restart()
            for each in following:
                events = each.result(PATIENCE)
                check(events, 300)
                assert events[-2].attempt > 1  # type: ignore[union-attr]


async def test_asynchronous_streams_survive_a_drain_and_a_restart(make_server: MakeServer) -> None:
    server = make_server(rate=100, settings={"drain_timeout": 0.2})
    async with AsyncClient(server.url, give_up=PATIENCE) as client:
        started = asyncio.Semaphore(0)

        async def follow() -> list[Token | End]:
            job = await client.submit("Hi", max_tokens=300)
            events = []
            async for event in client.stream(job):
                events.append(event)
                started.release()
            return events

        following = [asyncio.create_task(follow()) for _ in range(8)]
        for _ in range(100):
            await asyncio.wait_for(started.acquire(), PATIENCE)
        assert await asyncio.to_thread(server.terminate) == 0
        await asyncio.to_thread(server.restart)
        for each in following:
            check(await asyncio.wait_for(each, PATIENCE), 300)


def test_a_stream_goes_on_when_the_engine_dies(make_server: MakeServer) -> None:
    server = make_server(rate=100)
    with Client(server.url) as client:
        stream = client.stream(client.submit("Hi", max_tokens=200))
        events = [next(stream) for _ in range(20)]
        os.kill(server.engine_pid(), signal.SIGKILL)
        check([*events, *stream], 200)


def test_a_submit_waits_for_a_server_that_is_about_to_come(make_server: MakeServer) -> None:
    server = make_server(start=False, rate=0)
    with Client(server.url, give_up=PATIENCE) as client, ThreadPoolExecutor(1) as pool:
        result = pool.submit(client.generate, "Hi", max_tokens=3)
        time.sleep(0.3)
        server.start()
        assert result.result(PATIENCE).text == "1@1 2@1 3@1 "
        assert len(list(client.jobs())) == 1


def test_a_server_that_does_not_come_back_is_given_up(make_server: MakeServer) -> None:
    server = make_server(rate=50)
    with Client(server.url, give_up=2.0) as client:
        job = client.submit("Hi", max_tokens=1000)
        stream = client.stream(job)
        events = [next(stream) for _ in range(10)]
        server.kill9()
        with pytest.raises(Unreachable):
            events.extend(stream)
        # Nothing is lost by giving up: a later stream continues where this one ended.
        server.restart()
        wait_for(lambda: client.job(job).tokens > events[-1].position, "new tokens")
        following = client.stream(job, after=events[-1].position)
        assert next(following).position == events[-1].position + 1
        following.close()
        client.cancel(job)
