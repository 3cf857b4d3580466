"""Whatever dies: every client that resumes sees positions 1..n once, attempts never decreasing, exactly one end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import httpx
import psutil
import pytest

from penstock.testing.oracle import check_log
from tests.chaos.harness import Outcome, Plan, Storm
from tests.chaos.target import Embedded
from tests.support.api import check_error, ended, poll, running, submit, until
from tests.support.server import PATIENCE, Server
from tests.support.sse import Stream, open_stream


def client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False)


def check(outcome: Outcome, *, interrupted: int) -> None:
    assert not outcome.problems, "\n".join(outcome.problems[:20])
    assert outcome.statuses == {"completed": outcome.streams}, outcome
    # A storm that hit nothing proves nothing.
    assert outcome.interrupted >= interrupted, outcome


class TestStorms:
    # Slow enough that readers on a busy machine see the moment of a fault while its streams still run.
    async def test_kill_9_of_the_server(self, make_server: Callable[..., Server], seed: int) -> None:
        plan = Plan(seed, streams=25, tokens=100, faults=["kill"] * 2)
        outcome = await Storm(Embedded(make_server(rate=40)), plan).run()
        check(outcome, interrupted=12)
        assert outcome.faults["kill"] >= 1
        assert outcome.reconnects >= 25

    async def test_kill_9_of_the_engine(self, make_server: Callable[..., Server], seed: int) -> None:
        """Nothing else is restarted: connections stay open over it."""
        plan = Plan(seed, streams=25, tokens=100, faults=["engine"] * 2, drops=0)
        server = make_server(rate=40)
        pid = server.pid
        outcome = await Storm(Embedded(server), plan).run()
        check(outcome, interrupted=12)
        assert outcome.reconnects == 0
        assert server.pid == pid

    @pytest.mark.long
    async def test_a_stopped_engine_is_found_by_the_watchdog(
        self, make_server: Callable[..., Server], seed: int
    ) -> None:
        plan = Plan(seed, streams=30, tokens=100, faults=["hang"])
        outcome = await Storm(Embedded(make_server(rate=40, settings={"hang_timeout": 2})), plan).run()
        check(outcome, interrupted=10)

    @pytest.mark.long
    async def test_everything_at_once(self, make_server: Callable[..., Server], seed: int) -> None:
        plan = Plan(seed, streams=40, tokens=150, faults=["engine", "kill", "hang", "kill", "engine"], drops=2)
        outcome = await Storm(Embedded(make_server(rate=60, settings={"hang_timeout": 2})), plan).run()
        check(outcome, interrupted=20)

    @pytest.mark.long
    async def test_a_full_engine_with_a_queue_behind_it(self, make_server: Callable[..., Server], seed: int) -> None:
        """Queued jobs survive as running ones do, and the order of the queue stays."""
        plan = Plan(seed, streams=40, tokens=40, faults=["kill", "engine", "kill"])
        outcome = await Storm(Embedded(make_server(rate=200, options={"slots": 8})), plan).run()
        check(outcome, interrupted=4)


class TestSubmits:
    async def test_every_acknowledged_submit_survives_kill_9(
        self, make_server: Callable[..., Server], seed: int
    ) -> None:
        """Submits race the kill; what was acknowledged is there after the restart, and its key finds it."""
        server = make_server(rate=20, options={"slots": 4})
        acknowledged: dict[str, str] = {}

        async def flood(number: int) -> None:
            async with client(server) as http:
                try:
                    for n in range(10_000):
                        key = f"{number}-{n}"
                        body = {"prompt": key, "max_tokens": 1}
                        reply = await http.post("/v1/jobs", json=body, headers={"idempotency-key": key})
                        if reply.status_code == 202:
                            acknowledged[key] = reply.json()["id"]
                except httpx.TransportError:
                    return

        flooding = [asyncio.create_task(flood(number)) for number in range(8)]
        await poll(_value(acknowledged), lambda known: len(known) > 100)
        await asyncio.to_thread(server.kill9)
        await asyncio.gather(*flooding)
        await asyncio.to_thread(server.restart)
        async with client(server) as http:
            for key, job in list(acknowledged.items())[-150:]:
                reply = await http.post(
                    "/v1/jobs", json={"prompt": key, "max_tokens": 1}, headers={"idempotency-key": key}
                )
                assert reply.json()["id"] == job
                assert (await http.get(f"/v1/jobs/{job}")).status_code == 200


def _value(known: dict[str, str]) -> Callable[[], object]:
    async def look() -> dict[str, str]:
        return known

    return look


class TestPoison:
    @pytest.mark.parametrize("kind", ["crash", pytest.param("hang", marks=pytest.mark.long)])
    async def test_a_job_that_takes_its_engine_down_is_quarantined_and_its_neighbours_complete(
        self, make_server: Callable[..., Server], kind: str
    ) -> None:
        """A hung engine is found by the watchdog only: fewer neighbours make fewer deaths to wait for."""
        neighbours = 20 if kind == "crash" else 3
        server = make_server(rate=100, options={kind: "BELLADONNA"}, settings={"hang_timeout": 2})
        async with client(server) as http:
            others = [await submit(http, max_tokens=150) for _ in range(neighbours)]
            for job in others:
                await running(http, job)
            poison = await submit(http, prompt="some BELLADONNA please")
            view = await ended(http, poison, 100)
            assert view["status"] == "failed"
            assert view["error"]["code"] == "poisoned"
            for job in others:
                async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
                    events = await stream.rest()
                check_log(events, job=job)
                assert (await ended(http, job))["status"] == "completed"
            # It stays out, over a restart too, and the server is well.
            await asyncio.to_thread(server.kill9)
            await asyncio.to_thread(server.restart)
            assert (await ended(http, poison))["error"]["code"] == "poisoned"
            assert (await ended(http, await submit(http)))["status"] == "completed"

    async def test_a_poison_alone_dies_twice_at_most(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=0, options={"crash": "BELLADONNA"})
        async with client(server) as http:
            view = await ended(http, await submit(http, prompt="BELLADONNA"))
            assert view["error"]["code"] == "poisoned"
            assert (await ended(http, await submit(http)))["status"] == "completed"
        assert sum(line["event"] == "engine_died" for line in server.log_lines()) == 2

    async def test_a_curable_failure_is_tried_again_and_then_fails(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=100, options={"fail": "HICCUP"}, settings={"max_attempts": 2})
        async with client(server) as http:
            neighbour = await submit(http, max_tokens=100)
            view = await ended(http, await submit(http, prompt="HICCUP"))
            assert view["status"] == "failed"
            assert view["error"]["code"] == "engine_error"
            assert view["attempt"] == 3
            assert (await ended(http, neighbour))["attempt"] == 1
            assert server.engine_pids(), "the engine was not restarted for that"


class TestDisk:
    async def test_a_full_disk_refuses_new_work_and_recovers(self, make_server: Callable[..., Server]) -> None:
        """The limit on file sizes stands in for the disk: no write beyond it succeeds, until it is lifted."""
        server = make_server(rate=50)
        async with client(server) as http:
            done = await submit(http, max_tokens=30)
            await ended(http, done)
            live = await submit(http, max_tokens=120)
            async with await open_stream(f"{server.url}/v1/jobs/{live}/events") as stream:
                events = await stream.take(5)
                process = psutil.Process(server.pid)
                before = process.rlimit(psutil.RLIMIT_FSIZE)
                process.rlimit(psutil.RLIMIT_FSIZE, (1, before[1]))
                reply = await poll(
                    lambda: http.post("/v1/jobs", json={"prompt": "x", "max_tokens": 1}),
                    lambda reply: reply.status_code != 202,
                )
                check_error(reply, 503, "broker_unavailable")
                check_error(await http.post("/v1/generate", json={"prompt": "x"}), 503, "broker_unavailable")
                # Reading goes on.
                assert (await http.get(f"/v1/jobs/{done}")).json()["status"] == "completed"
                assert (await http.get("/v1/jobs")).status_code == 200
                assert (await http.get("/healthz")).status_code == 200
                async with await open_stream(f"{server.url}/v1/jobs/{done}/events") as other:
                    check_log(await other.rest(), job=done)
                process.rlimit(psutil.RLIMIT_FSIZE, before)
                await poll(
                    lambda: http.post("/v1/jobs", json={"prompt": "x", "max_tokens": 1}),
                    lambda reply: reply.status_code == 202,
                )
                # What the engine made meanwhile was kept: nothing is missing, nothing came twice.
                events += await stream.rest()
            tokens = check_log(events, job=live)
            assert len(tokens) == 120
            assert (await ended(http, live))["status"] == "completed"


class TestReaders:
    async def test_a_reader_that_takes_nothing_disturbs_nobody(self, make_server: Callable[..., Server]) -> None:
        """Its socket is full and stays so: the others get everything, and it is dropped, and can resume."""
        server = make_server(rate=0, settings={"send_deadline": 1})
        async with client(server) as http:
            big = await submit(http, max_tokens=50_000)
            await ended(http, big)
            # A replay of 6 MB into each of thirty sockets that nobody reads: it waits in the store, not in memory.
            before = psutil.Process(server.pid).memory_info().rss
            stuck = [await open_stream(f"{server.url}/v1/jobs/{big}/events", limit=1024) for _ in range(30)]
            for stream in stuck:
                stream.answer._writer.transport.pause_reading()  # type: ignore[attr-defined]

            async def other(number: int) -> None:
                job = await submit(http, max_tokens=200)
                async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
                    check_log(await stream.rest(), job=job)

            await asyncio.gather(*(other(number) for number in range(20)))
            assert psutil.Process(server.pid).memory_info().rss - before < 64 << 20
            await poll(lambda: http.get("/metrics"), lambda reply: "llm_sse_connections 0.0" in reply.text)
            for stream in stuck[3:]:
                await stream.__aexit__(None, None, None)
            for stream in stuck[:3]:
                stream.answer._writer.transport.resume_reading()  # type: ignore[attr-defined]
                events = await stream.rest()
                assert stream.torn
                async with await open_stream(
                    f"{server.url}/v1/jobs/{big}/events", after=events[-1].id if events else None
                ) as again:
                    events += await again.rest()
                assert len(check_log(events, job=big)) == 50_000
                await stream.__aexit__(None, None, None)

    async def test_two_hundred_idle_streams(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=100, settings={"heartbeat": 0.5})
        async with client(server) as http:
            streams: list[Stream] = []
            for number in range(200):
                streams.append(await open_stream(f"{server.url}/v1/events?user_id=idle-{number}"))
            jobs = {number: await submit(http, user_id=f"idle-{number}", max_tokens=20) for number in range(0, 200, 40)}

            async def first_ping(stream: Stream) -> None:
                while b": ping\n" not in stream.raw:
                    assert await stream.more()

            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(first_ping(stream) for n, stream in enumerate(streams) if n not in jobs))
                for number, job in jobs.items():
                    events = await streams[number].take(21)
                    assert {event.data["job_id"] for event in events} == {job}
                    assert events[-1].event == "job_complete"
            for stream in streams:
                await stream.__aexit__(None, None, None)
            await poll(lambda: http.get("/metrics"), lambda reply: "llm_sse_connections 0.0" in reply.text)

    async def test_clients_that_come_and_go_leave_nothing_behind(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50, settings={"disconnect_grace": 0.1})
        async with client(server) as http:
            body = {"prompt": "x", "max_tokens": 100_000, "stream": True}

            async def visit(number: int) -> str:
                async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body) as stream:
                    await stream.take(1 + number % 3)
                    return stream.headers["x-penstock-job"]

            jobs = await asyncio.gather(*(visit(number) for number in range(60)))
            for job in jobs:
                assert (await ended(http, job))["status"] == "cancelled"
            await poll(lambda: http.get("/health"), lambda reply: reply.json()["queue"]["jobs"]["running"] == 0)
            # The engine has stopped working for them too: all its slots are free for this one.
            assert (await until(http, await submit(http, max_tokens=5), lambda view: view["ended_at"]))["attempt"] == 1
            assert server.terminate() == 0
        assert "Traceback" not in server.output() + server.errors()


class TestStoppedServer:
    async def test_a_server_that_slept_longer_than_its_leases_goes_on(self, make_server: Callable[..., Server]) -> None:
        """A laptop's lid: leases run out on the clock, but nobody else could have taken them."""
        server = make_server(rate=50, settings={"lease_ttl": 1, "hang_timeout": 30})
        async with client(server) as http:
            job = await submit(http, max_tokens=120)
            async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
                events = await stream.take(10)
                server.signal(signal.SIGSTOP)
                await asyncio.sleep(1.5)
                server.signal(signal.SIGCONT)
                events += await stream.rest()
            check_log(events, job=job)
            assert events[-1].event == "done"
