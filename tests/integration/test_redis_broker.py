"""The Redis broker against real servers that are restarted, stopped, filled, misconfigured, truncated and replaced.

What any broker promises is in the contract (tests/contract/test_redis_broker.py), what its scripts do to the keys in
tests/unit/brokers/test_redis_scripts.py. Here it is about what lies between: connections, news, durability, time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from penstock.brokers.redis import RedisBroker, RedisOptions, connection
from penstock.brokers.redis.server import Server, Tier
from penstock.core.errors import (
    BrokerUnavailable,
    InsufficientStorage,
    InvalidRequest,
    LogRewound,
    NotFound,
    PenstockError,
)
from penstock.core.events import Event, Tokens
from penstock.core.job import Job, Request, Status, new_job_id
from penstock.core.ports import Append, Clock, Finish, Lease, Query, QueuePolicy, Release, Verdict, WorkerInfo
from penstock.testing.clock import ManualClock
from penstock.testing.oracle import check_log, check_views, tokens_of
from tests.support.proxy import Proxy, Words
from tests.support.redis import RedisCluster, RedisServer
from tests.support.redis_store import dump, problems
from tests.support.server import wait_for

PATIENCE = 20.0
WORKER = WorkerInfo(id="w")
STOP = Finish(("stop",))
OpenBroker = Callable[..., Awaitable[RedisBroker]]


# --------------------------------------------------------------------------------------------- parts


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for every test that leaves it as it was; each has a prefix of its own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """A server of the test's own: ``make_redis(appendfsync="no")``."""
    servers: list[RedisServer] = []

    def make(**config: str) -> RedisServer:
        settings = {name.replace("_", "-"): value for name, value in config.items()}
        server = RedisServer(tmp_path_factory.mktemp("redis"), settings)
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
async def proxies() -> AsyncIterator[Callable[[RedisServer], Awaitable[Proxy]]]:
    started: list[Proxy] = []

    async def make(server: RedisServer) -> Proxy:
        started.append(await Proxy(server.port).start())
        return started[-1]

    yield make
    for proxy in started:
        await proxy.close()


_prefixes = itertools.count()


@pytest.fixture
async def connect() -> AsyncIterator[OpenBroker]:
    """An open broker, closed with the test. All of one test share a prefix, and so a queue."""
    prefix = f"i{next(_prefixes)}"
    brokers: list[RedisBroker] = []

    async def make(
        url: str, *, policy: dict[str, Any] | None = None, clock: Clock | None = None, **options: Any
    ) -> RedisBroker:
        options = {"prefix": prefix, "timeout": PATIENCE, **options}
        broker = RedisBroker(url, RedisOptions(**options), policy=QueuePolicy(**policy or {}), clock=clock)
        brokers.append(broker)
        await broker.open()
        return broker

    yield make
    async with asyncio.timeout(PATIENCE):
        for broker in brokers:
            await broker.close()


def job(tenant: str = "acme", **fields: Any) -> Job:
    return Job(id=new_job_id(), tenant=tenant, request=Request(model="m", prompt_ids=(1, 2)), **fields)


def tokens(lease: Lease, position: int, count: int = 1, text: str = "t", **fields: Any) -> Append:
    """Tokens whose ids tell their positions, whoever writes them."""
    return Append(lease.key, position, list(range(position, position + count)), [text] * count, **fields)


async def claim(broker: RedisBroker, limit: int = 1, wait: float = PATIENCE) -> list[Lease]:
    return await broker.claim(WORKER, ["m"], limit, wait)


class Reader:
    """Follows one job in the background."""

    def __init__(self, broker: RedisBroker, job: Job, after: int = 0) -> None:
        self.events: list[Event] = []
        self.failure: PenstockError | None = None
        self._seen = asyncio.Event()
        self.task = asyncio.create_task(self._read(broker, job, after))

    async def _read(self, broker: RedisBroker, job: Job, after: int) -> None:
        events = broker.tail(job.tenant, job.id, after)
        try:
            async for event in events:
                self.events.append(event)
                self._seen.set()
        except PenstockError as error:
            self.failure = error
        finally:
            await events.aclose()  # type: ignore[attr-defined]
            self._seen.set()

    @property
    def last(self) -> int:
        return max((token.position for token in tokens_of(self.events)), default=0)

    async def until(self, position: int) -> None:
        """It has seen the token at *position* (or has ended)."""
        async with asyncio.timeout(PATIENCE):
            while self.last < position and not self.task.done():
                self._seen.clear()
                await self._seen.wait()

    async def end(self) -> list[Event]:
        async with asyncio.timeout(PATIENCE):
            await self.task
        return self.events

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.01)


async def store(server: RedisServer, broker: RedisBroker) -> dict[bytes, Any]:
    with contextlib.closing(server.client()) as client:
        return dump(client, broker._shards[0].base.decode())


class Workload:
    """Jobs that are submitted, generated token by token and read, all at once, until all have ended."""

    def __init__(self, gateway: RedisBroker, workers: list[RedisBroker], jobs: int = 12, length: int = 12) -> None:
        self.gateway = gateway
        self.workers = workers
        self.length = length
        self.jobs = [job(f"t{number % 3}") for number in range(jobs)]
        self.readers: list[Reader] = []
        self.written = 0

    async def _insist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await call()
            except BrokerUnavailable:
                await asyncio.sleep(0.05)

    async def run(self, fault: Callable[[Workload], Coroutine[Any, Any, None]]) -> None:
        async with asyncio.timeout(PATIENCE):
            working = [asyncio.create_task(self._work(worker)) for worker in self.workers]
            sweeping = asyncio.create_task(self._sweep())
            failing = asyncio.create_task(fault(self))
            try:
                for each in self.jobs:
                    await self._insist(lambda each=each: self.gateway.submit(each))
                    self.readers.append(Reader(self.gateway, each))
                await failing
                for reader in self.readers:
                    await reader.task
            finally:
                for task in (*working, sweeping, failing):
                    task.cancel()
                await asyncio.gather(*working, sweeping, failing, return_exceptions=True)

    async def _sweep(self) -> None:
        while True:
            await self._insist(self.gateway.sweep)
            await asyncio.sleep(0.1)

    async def _work(self, broker: RedisBroker) -> None:
        running: dict[str, tuple[Lease, int]] = {}
        while True:
            free = 4 - len(running)
            if free:
                wait = 0.0 if running else 0.2
                for lease in await self._insist(lambda free=free, wait=wait: claim(broker, free, wait)):
                    running[lease.job.id] = (lease, len(lease.ids) + 1)
            batch = [
                tokens(lease, position, finish=STOP if position >= self.length else None)
                for lease, position in running.values()
            ]
            verdicts = await self._insist(lambda batch=batch: broker.append(batch)) if batch else {}
            self.written += len(batch)
            for append in batch:
                name = append.lease.job
                if verdicts[name] is not Verdict.OK or append.finish:
                    del running[name]
                else:
                    running[name] = (running[name][0], append.position + 1)
            await asyncio.sleep(0.01)

    async def check(self) -> None:
        """Everything that was acknowledged is there once, and every reader saw it."""
        for each, reader in zip(self.jobs, self.readers, strict=True):
            assert reader.failure is None, reader.failure
            log = [event async for event in self.gateway.tail(each.tenant, each.id)]
            assert [token.id for token in check_log(log)] == list(range(1, self.length + 1))
            check_log(reader.events)
            check_views([log, reader.events])
            assert (await self.gateway.get(each.tenant, each.id)).status is Status.COMPLETED
        assert (await self.gateway.stats()).jobs[Status.COMPLETED] == len(self.jobs)


# --------------------------------------------------------------------------------------------- connections


class TestLostReplies:
    async def test_what_was_done_once_is_not_done_twice(
        self, shared: RedisServer, proxies: Any, connect: OpenBroker
    ) -> None:
        """Replies are lost all the time, leases never: so each job runs exactly once, under its first attempt."""
        pick, lost = random.Random(5), 0
        gates = [await proxies(shared) for _ in range(3)]
        policy = {"lease_ttl": 60.0}
        gateway, *workers = [await connect(gate.url, policy=policy) for gate in gates]

        async def lose(workload: Workload) -> None:
            nonlocal lost
            while not (workload.readers and all(reader.task.done() for reader in workload.readers)):
                gate = pick.choice(gates)
                losing = gate.lose_reply(lambda words: words[0] == b"EVALSHA")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await losing
                        lost += 1

        workload = Workload(gateway, workers, jobs=15, length=40)
        await workload.run(lose)
        await workload.check()
        assert lost > 5
        for each in workload.jobs:
            assert (await gateway.get(each.tenant, each.id)).attempt == 1
        assert (await gateway.stats()).leases_lost == 0
        assert problems(await store(shared, gateway)) == []

    @pytest.mark.parametrize("verb", ["submit", "claim", "append", "release", "cancel"])
    async def test_the_answer_is_that_of_the_first_time(
        self, shared: RedisServer, proxies: Any, connect: OpenBroker, verb: str
    ) -> None:
        gate = await proxies(shared)
        broker = await connect(gate.url)

        def is_script(words: Words) -> bool:
            return words[0] == b"EVALSHA" and words[1].decode() == script_sha(verb)

        first = job(deadline_at=None, idempotency_key="k", fingerprint=b"f")
        async with asyncio.timeout(PATIENCE):
            losing = gate.lose_reply(is_script) if verb == "submit" else None
            submitted = await broker.submit(first)
            assert (submitted.id, submitted.status, submitted.queue_position) == (first.id, Status.QUEUED, 1)
            losing = gate.lose_reply(is_script) if verb == "claim" else losing
            [lease] = await claim(broker)
            assert lease.attempt == 1
            losing = gate.lose_reply(is_script) if verb == "append" else losing
            assert await broker.append([tokens(lease, 1, 3)]) == {first.id: "ok"}
            losing = gate.lose_reply(is_script) if verb == "release" else losing
            await broker.release([Release(lease.key)])
            losing = gate.lose_reply(is_script) if verb == "cancel" else losing
            assert (await broker.cancel("acme", first.id)).status is Status.CANCELLED
            assert losing is not None
            await losing
        assert (await broker.get("acme", first.id)).tokens == 3
        assert problems(await store(shared, broker)) == []


def script_sha(script: str) -> str:
    from penstock.brokers.redis.scripts import SHA

    return SHA[script]


class TestFaults:
    """Nothing is lost, nothing comes twice, and every reader that was there goes on by itself."""

    @pytest.mark.parametrize(
        "fault", ["kill -9", "stop", "script flush", "kill normal", "kill pubsub", "kill replica and normal"]
    )
    async def test_under_load(
        self, make_redis: Any, connect: OpenBroker, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "REPLY_TIMEOUT", 0.6)
        server = make_redis()
        gateway, *workers = [await connect(server.url, policy={"lease_ttl": 1.0}) for _ in range(3)]

        async def break_it(workload: Workload) -> None:
            for number in range(1, 4):
                await eventually(lambda number=number: workload.written > 20 * number)
                with contextlib.closing(server.client()) as client:
                    match fault:
                        case "kill -9":
                            await asyncio.to_thread(server.restart)
                        case "stop":
                            server.signal(signal.SIGSTOP)
                            await asyncio.sleep(1.0)
                            server.signal(signal.SIGCONT)
                        case "script flush":
                            client.execute_command("SCRIPT FLUSH")
                        case "kill normal":
                            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
                        case "kill pubsub":
                            client.execute_command("CLIENT KILL TYPE pubsub")
                        case _:
                            client.execute_command("CLIENT KILL TYPE pubsub")
                            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")

        workload = Workload(gateway, workers)
        await workload.run(break_it)
        await workload.check()
        assert problems(await store(server, gateway)) == []

    async def test_a_redis_that_is_away_is_told_in_time_and_found_again(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        server = make_redis()
        broker = await connect(server.url, timeout=1.0)
        queued = await broker.submit(job())
        reader = Reader(broker, queued)
        await asyncio.to_thread(server.kill9)
        for call in (broker.submit(job()), broker.get("acme", queued.id), broker.stats(), broker.sweep()):
            with pytest.raises(BrokerUnavailable) as caught:
                async with asyncio.timeout(PATIENCE):
                    await call
            assert caught.value.retry_after
        for _ in range(5):
            calls = [broker.submit(job()) for _ in range(50)]
            assert all(
                isinstance(each, BrokerUnavailable) for each in await asyncio.gather(*calls, return_exceptions=True)
            )
        # What nobody waits for any more takes no memory, however long it lasts.
        assert len(broker._shards[0].commands._queue) < 50
        await asyncio.to_thread(server.start)
        await eventually(lambda: broker._shards[0].commands.up.is_set() and broker._shards[0].subscriber.up.is_set())
        [lease] = await claim(broker)
        assert lease.job.id == queued.id
        await broker.append([tokens(lease, 1, finish=STOP)])
        check_log(await reader.end())

    async def test_a_tail_that_begins_while_redis_is_away(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        broker = await connect(server.url, timeout=0.2)
        queued = await broker.submit(job())
        await asyncio.to_thread(server.kill9)
        reader = Reader(broker, queued)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.start)
        await eventually(lambda: broker._shards[0].commands.up.is_set())
        [lease] = await claim(broker)
        await broker.append([tokens(lease, 1, finish=STOP)])
        check_log(await reader.end())


# --------------------------------------------------------------------------------------------- the server


class TestTheServerIsAsked:
    @pytest.mark.parametrize(
        ("setting", "bad", "good", "durability", "hint"),
        [
            ("appendfsync", "everysec", "always", "strict", "CONFIG SET appendfsync always"),
            ("appendfsync", "no", "always", "strict", "CONFIG SET appendfsync always"),
            ("no-appendfsync-on-rewrite", "yes", "no", "strict", "CONFIG SET no-appendfsync-on-rewrite no"),
            ("appendonly", "no", "yes", "strict", "CONFIG SET appendonly yes"),
            ("maxmemory-policy", "allkeys-lru", "noeviction", "strict", "CONFIG SET maxmemory-policy noeviction"),
            ("maxmemory-policy", "volatile-ttl", "noeviction", "fast", "CONFIG SET maxmemory-policy noeviction"),
            ("databases", "16", "16", "replicated", "needs 1 replicas, and this Redis has 0"),
        ],
    )
    async def test_a_server_that_keeps_less_than_promised_is_refused(
        self, shared: RedisServer, connect: OpenBroker, setting: str, bad: str, good: str, durability: str, hint: str
    ) -> None:
        with contextlib.closing(shared.client()) as client:
            if bad != good:
                client.config_set(setting, bad)
            try:
                with pytest.raises(InvalidRequest, match=hint):
                    await connect(shared.url, durability=durability)
            finally:
                if bad != good:
                    client.config_set(setting, good)
        if bad != good:
            await connect(shared.url, durability=durability)

    async def test_a_server_that_was_reconfigured_is_noticed_at_the_next_connection(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        server = make_redis()
        broker = await connect(server.url, timeout=0.5)
        with contextlib.closing(server.client()) as client:
            client.config_set("appendfsync", "everysec")
            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
            with pytest.raises(BrokerUnavailable, match="appendfsync always"):
                await broker.submit(job())
            client.config_set("appendfsync", "always")
        await eventually(lambda: broker._shards[0].commands.up.is_set())
        await broker.submit(job())

    async def test_a_user_who_may_not_ask_for_the_configuration(self, shared: RedisServer, connect: OpenBroker) -> None:
        with contextlib.closing(shared.client()) as client:
            client.acl_setuser("limited", enabled=True, passwords=["+pa55word"], keys=["*"], channels=["*"],
                               categories=["+@all"], commands=["-config"])  # fmt: skip
        url = shared.url.replace("redis://", "redis://limited:pa55word@")
        with pytest.raises(InvalidRequest, match="CONFIG GET appendfsync") as caught:
            await connect(url)
        assert "pa55word" not in str(caught.value)
        broker = await connect(url, durability="fast")
        await broker.submit(job())

    @pytest.mark.parametrize("user", ["", "limited2"])
    async def test_a_wrong_password_is_told_and_never_shown(
        self, shared: RedisServer, connect: OpenBroker, user: str
    ) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await connect(shared.url.replace("redis://", f"redis://{user}:s3cret@"), durability="fast")
        assert "s3cret" not in str(caught.value)
        assert "password" in str(caught.value)

    async def test_a_password_is_in_no_message_of_an_outage(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis(requirepass="s3cret")
        broker = await connect(server.url.replace("redis://", "redis://:s3cret@"), timeout=1.0)
        await broker.submit(job())
        await asyncio.to_thread(server.kill9)
        with pytest.raises(BrokerUnavailable) as caught:
            await broker.submit(job())
        assert "s3cret" not in f"{caught.value} {caught.value!r}"

    async def test_nobody_listens(self, connect: OpenBroker) -> None:
        with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1"):
            async with asyncio.timeout(PATIENCE):
                await connect("redis://:s3cret@127.0.0.1:1/0", timeout=0.5)

    async def test_another_number_of_shards(self, shared: RedisServer, connect: OpenBroker) -> None:
        await connect(shared.url)
        with pytest.raises(InvalidRequest, match="1 shards; this one is set to 2"):
            await connect(shared.url, shards=2, timeout=1.0)


async def fill(broker: RedisBroker, jobs: list[Job], *, look: bool) -> InsufficientStorage:
    """Submit until there is no room; with *look*, the broker looks at the memory all the time, as a gateway does."""
    try:
        for each in jobs:
            await broker.submit(each)
            if look:
                await broker.stats()
    except InsufficientStorage as error:
        return error
    raise AssertionError("there is room for everything")


class TestMemory:
    async def test_a_full_redis_takes_no_job_and_finishes_what_it_has(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        server = make_redis(appendfsync="no")
        broker = await connect(server.url, durability="fast", policy={"result_ttl": 0.5, "max_queued_per_tenant": 0})
        with contextlib.closing(server.client()) as client:
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory", used + 5_000_000)
            client.config_set("client-output-buffer-limit", "pubsub 0 0 0")
            running = await broker.submit(job())
            [lease] = await claim(broker)
            big = [job(metadata={str(number): "x" * 2500 for number in range(16)}) for _ in range(200)]
            assert (await fill(broker, big, look=True)).retry_after
            room = client.info("memory")
            assert room["used_memory"] < room["maxmemory"], "refused before it was full"
            # Another process has not looked yet, and fills it to the brim.
            other = await connect(server.url, durability="fast")
            filling = [job(metadata=each.metadata) for each in big]
            await fill(other, filling, look=False)
            # What runs goes on; what waits can be cancelled; nothing of it is refused.
            for position in range(1, 200):
                assert (await broker.append([tokens(lease, position, text="x" * 2000)])) == {running.id: "ok"}
            assert (await broker.append([tokens(lease, 200, finish=STOP)])) == {running.id: "ok"}
            check_log(await Reader(broker, running).end())
            for each in [*big, *filling]:
                with contextlib.suppress(NotFound):
                    await broker.cancel("acme", each.id)
            assert client.info("memory")["used_memory"] > client.info("memory")["maxmemory"]
            # Retention makes room, without anybody's doing.
            async with asyncio.timeout(PATIENCE):
                while True:
                    await broker.sweep()
                    await broker.stats()
                    with contextlib.suppress(InsufficientStorage):
                        await broker.submit(job())
                        break
                    await asyncio.sleep(0.1)

    async def test_a_duplicate_needs_no_room(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        broker = await connect(server.url)
        first = await broker.submit(job(idempotency_key="k", fingerprint=b"f"))
        with contextlib.closing(server.client()) as client:
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] / 0.95))
        await broker.stats()
        assert (await broker.submit(job(idempotency_key="k", fingerprint=b"f"))).id == first.id
        with pytest.raises(InsufficientStorage):
            await broker.submit(job())


# --------------------------------------------------------------------------------------------- time


class TestTime:
    @pytest.mark.parametrize("how", ["stop", "kill"])
    async def test_an_outage_expires_no_live_lease(self, make_redis: Any, connect: OpenBroker, how: str) -> None:
        server = make_redis()
        policy = {"lease_ttl": 0.6}
        worker, sweeper = await connect(server.url, policy=policy), await connect(server.url, policy=policy)
        await worker.submit(job())
        [lease] = await claim(worker)
        if how == "stop":
            server.signal(signal.SIGSTOP)
            await asyncio.sleep(1.8)
            server.signal(signal.SIGCONT)
        else:
            await asyncio.to_thread(server.restart, 1.8)
        for _ in range(2):
            await sweeper.sweep()
        assert (await worker.append([tokens(lease, 1)])) == {lease.job.id: "ok"}
        assert (await worker.stats()).leases_lost == 0

    async def test_a_dead_worker_is_noticed_where_redis_was_never_away(
        self, shared: RedisServer, connect: OpenBroker
    ) -> None:
        broker = await connect(shared.url, policy={"lease_ttl": 0.6})
        await broker.submit(job())
        [lease] = await claim(broker)
        async with asyncio.timeout(PATIENCE):
            while (await broker.stats()).leases_lost == 0:
                await broker.sweep()
                await asyncio.sleep(0.1)
        assert [again.attempt for again in await claim(broker)] == [lease.attempt + 1]

    @pytest.mark.parametrize("step", [3600.0, -3600.0])
    async def test_a_clock_that_is_set_expires_nothing_but_deadlines(
        self, shared: RedisServer, connect: OpenBroker, step: float
    ) -> None:
        clock = ManualClock()
        broker = await connect(shared.url, clock=clock, policy={"result_ttl": 7200.0})
        ended = await broker.submit(job())
        [lease] = await claim(broker)
        await broker.append([tokens(lease, 1, finish=STOP)])
        held, due = await broker.submit(job()), await broker.submit(job(deadline_at=clock.now() + 60))
        [lease, _] = await claim(broker, 2)
        later = [await broker.submit(job()) for _ in range(2)]
        clock.advance(step)
        later += [await broker.submit(job()) for _ in range(2)]
        await broker.sweep()
        assert (await broker.get("acme", ended.id)).status is Status.COMPLETED
        assert (await broker.get("acme", due.id)).status is (Status.EXPIRED if step > 0 else Status.RUNNING)
        assert (await broker.append([tokens(lease, 1)]))[held.id] == "ok"
        # First in, first out, whatever the clock says.
        assert [lease.job.id for lease in await claim(broker, 4)] == [each.id for each in later]
        assert problems(await store(shared, broker)) == []


# --------------------------------------------------------------------------------------------- a lost end


class Ledger:
    """A server whose append-only file can be cut back to an earlier moment, as a crash in the tier ``fast`` would."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self._size = 0

    @property
    def _file(self) -> Path:
        [file] = (self.server.folder / "appendonlydir").glob("*.incr.aof")
        return file

    def mark(self) -> None:
        """What is written now survives."""
        self._size = self._file.stat().st_size

    async def lose(self) -> None:
        """kill -9, everything since `mark` is gone, up again."""

        def cut() -> None:
            self.server.kill9()
            with self._file.open("r+b") as file:
                file.truncate(self._size)
            self.server.start()

        await asyncio.to_thread(cut)


@pytest.fixture
def ledger(make_redis: Any) -> Ledger:
    return Ledger(make_redis())


class TestALostEnd:
    """Tier ``fast``: Redis may lose its last seconds. No reader is ever given a mixture, and no zombie writes."""

    async def test_a_reader_that_had_seen_more_is_told(self, ledger: Ledger, connect: OpenBroker) -> None:
        broker = await connect(ledger.server.url, durability="fast")
        queued = await broker.submit(job())
        reader = Reader(broker, queued)
        [lease] = await claim(broker)
        await broker.append([tokens(lease, 1, 5)])
        await reader.until(5)
        ledger.mark()
        await broker.append([tokens(lease, 6, 5)])
        await reader.until(10)
        await ledger.lose()
        check_log(await reader.end(), complete=False)
        assert isinstance(reader.failure, LogRewound)
        with pytest.raises(LogRewound):
            await anext(aiter(broker.tail("acme", queued.id, 10)))

    async def test_even_if_the_log_has_grown_past_it_meanwhile(
        self, ledger: Ledger, connect: OpenBroker, proxies: Any
    ) -> None:
        """The gateway is away until the job was claimed anew and its log is longer than what the gateway has."""
        gate = await proxies(ledger.server)
        policy = {"lease_ttl": 0.5}
        gateway = await connect(gate.url, durability="fast", policy=policy)
        worker = await connect(ledger.server.url, durability="fast", policy=policy)
        queued = await gateway.submit(job())
        seen_more, seen_less = Reader(gateway, queued), Reader(gateway, await gateway.submit(job()))
        first, second = await claim(worker, 2)
        await worker.append([tokens(first, 1, 5), tokens(second, 1, 5)])
        await seen_more.until(5)
        await seen_less.until(5)
        ledger.mark()
        await worker.append([tokens(first, 6, 5)])
        await seen_more.until(10)
        await gate.refuse()
        gate.drop()
        await ledger.lose()
        async with asyncio.timeout(PATIENCE):
            leases: list[Lease] = []
            while len(leases) < 2:
                await worker.sweep()
                leases += await claim(worker, 2, 0.1)
        again = {lease.job.id: lease for lease in leases}
        assert all(lease.attempt > 1000 and lease.ids == [1, 2, 3, 4, 5] for lease in leases)
        for lease in leases:
            await worker.append([Append(lease.key, 6, [99] * 20, ["other"] * 20)])
        await gate.accept()
        await seen_more.end()
        assert isinstance(seen_more.failure, LogRewound)
        assert [token.id for token in check_log(seen_more.events, complete=False)] == list(range(1, 11))
        # Who had seen nothing of what was lost simply goes on.
        await worker.append([tokens(again[second.job.id], 26, finish=STOP)])
        assert [token.id for token in check_log(await seen_less.end())] == [1, 2, 3, 4, 5, *[99] * 20, 26]

    async def test_attempts_never_repeat(self, ledger: Ledger, connect: OpenBroker) -> None:
        broker = await connect(ledger.server.url, durability="fast", policy={"lease_ttl": 0.5})
        await broker.submit(job())
        [first] = await claim(broker)
        ledger.mark()
        await broker.release([Release(first.key)])
        [forgotten] = await claim(broker)
        assert forgotten.attempt == 2
        await ledger.lose()
        async with asyncio.timeout(PATIENCE):
            while not (leases := await claim(broker, 1, 0.1)):
                await broker.sweep()
        [lease] = leases
        assert lease.attempt > forgotten.attempt
        for zombie in (first, forgotten):
            assert (await broker.append([tokens(zombie, 1)])) == {zombie.job.id: "lost"}
        assert (await broker.append([tokens(lease, 1, finish=STOP)])) == {lease.job.id: "ok"}

    async def test_a_lost_submit_is_unknown(self, ledger: Ledger, connect: OpenBroker) -> None:
        broker = await connect(ledger.server.url, durability="fast")
        kept = await broker.submit(job())
        ledger.mark()
        lost = await broker.submit(job())
        reader = Reader(broker, lost)
        await asyncio.sleep(0.1)
        await ledger.lose()
        await reader.end()
        assert isinstance(reader.failure, NotFound)
        with pytest.raises(NotFound):
            await broker.get("acme", lost.id)
        assert (await broker.get("acme", kept.id)).status is Status.QUEUED

    @pytest.mark.parametrize("when", ["queued", "running", "requeued"])
    async def test_where_nothing_was_lost_nobody_is_told_so(
        self, ledger: Ledger, connect: OpenBroker, when: str
    ) -> None:
        broker = await connect(ledger.server.url, durability="fast")
        queued = await broker.submit(job())
        readers = [Reader(broker, queued), Reader(broker, queued)]
        if when != "queued":
            [lease] = await claim(broker)
            await broker.append([tokens(lease, 1, 3)])
            await readers[0].until(3)
        await asyncio.to_thread(ledger.server.restart)
        await eventually(lambda: broker._shards[0].commands.up.is_set() and broker._shards[0].subscriber.up.is_set())
        position = 1 if when == "queued" else 4
        if when == "requeued":
            await broker.release([Release(lease.key)])
        if when != "running":
            [lease] = await claim(broker)
        await asyncio.sleep(1.2)  # the look that follows a restart is over; the next one comes within a second
        for number in range(12):
            await broker.append([tokens(lease, position + number)])
            await asyncio.sleep(0.1)
        await broker.append([tokens(lease, position + 12, finish=STOP)])
        for reader in readers:
            check_log(await reader.end())
            assert reader.failure is None


class TestReplicated:
    @pytest.mark.parametrize(
        ("version", "commands"), [((7, 0), ["WAIT"]), ((7, 2), ["WAIT", "WAITAOF"]), ((9, 1), ["WAIT", "WAITAOF"])]
    )
    def test_what_a_replica_is_asked(self, version: tuple[int, ...], commands: list[str]) -> None:
        waiting = Server(version, "run").waiting(Tier("replicated", 2))
        assert [command[0] for command in waiting] == commands
        assert all(2 in command for command in waiting)
        assert Server(version, "run").waiting(Tier("strict")) == []

    async def test_what_is_acknowledged_survives_the_master(
        self, make_redis: Any, connect: OpenBroker, proxies: Any
    ) -> None:
        master = make_redis()
        replica = make_redis(replicaof=f"127.0.0.1 {master.port}")
        with contextlib.closing(master.client()) as client:
            wait_for(lambda: client.info("replication")["connected_slaves"] == 1, "the replica")
            wait_for(lambda: client.info("replication")["slave0"]["state"] == "online", "the replica")
        gate = await proxies(master)
        broker = await connect(gate.url, durability="replicated", replicas=1, timeout=3.0)
        assert "replicated" in (await broker.stats()).durability
        kept = await broker.submit(job())
        with contextlib.closing(replica.client()) as client:
            assert client.exists(f"{broker._shards[0].base.decode()}job:{kept.id}")
        reader = Reader(broker, kept)
        [lease] = await claim(broker)
        for position in range(1, 31):
            assert (await broker.append([tokens(lease, position)])) == {kept.id: "ok"}
        await reader.until(30)

        # Without its replica it promises nothing, so it acknowledges nothing; what is tried again counts once.
        replica.signal(signal.SIGSTOP)
        with pytest.raises(BrokerUnavailable, match="replicas"):
            await broker.submit(job(idempotency_key="k", fingerprint=b"f"))
        with pytest.raises(BrokerUnavailable, match="replicas"):
            await broker.append([tokens(lease, 31, 2)])
        assert reader.last == 30, "delivered before it was safe"
        replica.signal(signal.SIGCONT)
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(BrokerUnavailable):
                    again = await broker.submit(job(idempotency_key="k", fingerprint=b"f"))
                    break
        assert {each.id for each in (await broker.list(Query(tenant="acme"))).jobs} == {kept.id, again.id}
        assert (await broker.append([tokens(lease, 31, 2)])) == {kept.id: "ok"}
        await reader.until(32)

        # The master is gone for good: the replica is promoted and gets one of its own.
        master.kill9()
        with contextlib.closing(replica.client()) as client:
            client.execute_command("REPLICAOF NO ONE")
            second = make_redis(replicaof=f"127.0.0.1 {replica.port}")
            wait_for(lambda: client.info("replication").get("slave0", {}).get("state") == "online", "the new replica")
        gate.upstream = replica.port
        gate.drop()
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(BrokerUnavailable):
                    verdicts = await broker.append([tokens(lease, 33, 3, finish=STOP)])
                    break
        assert verdicts == {kept.id: "ok"}
        assert [token.id for token in check_log(await reader.end())] == list(range(1, 36))
        assert (await broker.get("acme", again.id)).status is Status.QUEUED
        assert problems(await store(second, broker)) == []

    async def test_a_write_does_not_wait_for_the_replicas_regular_report(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        """A server with WAITAOF is told of a replica's file once a second, unless it asks when that is written."""
        master = make_redis()
        make_redis(replicaof=f"127.0.0.1 {master.port}")
        _connected(master, 1)
        broker = await connect(master.url, durability="replicated", replicas=1)
        kept = await broker.submit(job())
        [lease] = await claim(broker)
        async with asyncio.timeout(PATIENCE):  # each would take a second
            for position in range(1, 201):
                assert (await broker.append([tokens(lease, position)])) == {kept.id: "ok"}

    async def test_replicas_that_sync_once_a_second_are_waited_for(self, make_redis: Any, connect: OpenBroker) -> None:
        master = make_redis(appendfsync="everysec")
        make_redis(replicaof=f"127.0.0.1 {master.port}", appendfsync="everysec")
        _connected(master, 1)
        broker = await connect(master.url, durability="replicated", replicas=1)
        with structlog.testing.capture_logs() as logs:
            jobs = [await broker.submit(job()) for _ in range(3)]
        assert len({each.id for each in jobs}) == 3
        assert [each for each in logs if each["event"] == "redis_lost"] == []

    async def test_the_start_waits_for_a_replica_that_has_just_joined(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        """It is connected, and confirms nothing before it has its copy."""
        master = make_redis(repl_diskless_sync="yes", repl_diskless_sync_delay="2")
        replica = make_redis(replicaof=f"127.0.0.1 {master.port}")
        _connected(master, 1)
        broker = await connect(master.url, durability="replicated", replicas=1)
        kept = await broker.submit(job())
        assert _has(replica, broker, kept)

    @pytest.mark.parametrize("replicas", [1, 2])
    async def test_a_start_without_confirmation_ends_and_says_what_it_waits_for(
        self, make_redis: Any, connect: OpenBroker, replicas: int
    ) -> None:
        master = make_redis()
        servers = [make_redis(replicaof=f"127.0.0.1 {master.port}") for _ in range(replicas)]
        _connected(master, replicas, state="online")
        servers[-1].signal(signal.SIGSTOP)
        with pytest.raises(BrokerUnavailable, match=f"waiting for replicas, only {replicas - 1} of {replicas} have"):
            await connect(master.url, durability="replicated", replicas=replicas, timeout=4.0)
        servers[-1].signal(signal.SIGCONT)
        await (await connect(master.url, durability="replicated", replicas=replicas)).submit(job())

    async def test_a_replica_that_joins_later_costs_a_pause_which_is_told(
        self, make_redis: Any, connect: OpenBroker
    ) -> None:
        """Nothing is refused, nothing counts twice: what is asked meanwhile is answered when the newcomer has it."""
        master = make_redis(repl_diskless_sync="yes", repl_diskless_sync_delay="0")
        first = make_redis(replicaof=f"127.0.0.1 {master.port}")
        _connected(master, 1, state="online")
        broker = await connect(master.url, durability="replicated", replicas=1)
        running = await broker.submit(job())
        [lease] = await claim(broker)
        reader = Reader(broker, running)
        await broker.append([tokens(lease, 1)])
        with contextlib.closing(master.client()) as client:
            client.config_set("repl-diskless-sync-delay", "2")
        first.kill9()
        second = make_redis(replicaof=f"127.0.0.1 {master.port}")
        _connected(master, 1)
        with structlog.testing.capture_logs() as logs:
            verdicts, kept = await asyncio.gather(
                broker.append([tokens(lease, 2, 2)]), broker.submit(job(idempotency_key="k", fingerprint=b"f"))
            )
            await eventually(lambda: any(each["event"] == "redis_found" for each in logs))
        [told] = [each["error"] for each in logs if each["event"] == "redis_lost"]
        assert "waiting for replicas, only 0 of 1 have received" in told
        assert verdicts == {running.id: "ok"}
        assert _has(second, broker, kept)
        assert (await broker.submit(job(idempotency_key="k", fingerprint=b"f"))).id == kept.id
        await broker.append([tokens(lease, 4, finish=STOP)])
        assert [token.id for token in check_log(await reader.end())] == [1, 2, 3, 4]
        assert problems(await store(master, broker)) == []


def _connected(master: RedisServer, count: int, state: str = "") -> None:
    """Wait until *count* replicas are connected, each in *state*."""

    def there() -> bool:
        info = client.info("replication")
        return info["connected_slaves"] == count and all(
            state in ("", info[f"slave{number}"]["state"]) for number in range(count)
        )

    with contextlib.closing(master.client()) as client:
        wait_for(there, f"{count} replicas")


def _has(server: RedisServer, broker: RedisBroker, kept: Job) -> bool:
    with contextlib.closing(server.client()) as client:
        return bool(client.exists(f"{broker._shards[0].base.decode()}job:{kept.id}"))


# --------------------------------------------------------------------------------------------- news


class TestNews:
    async def test_one_message_a_step_and_process(self, shared: RedisServer, connect: OpenBroker) -> None:
        worker, *gateways = [await connect(shared.url) for _ in range(3)]
        jobs = [await worker.submit(job()) for _ in range(4)]
        leases = await claim(worker, 4)
        readers = [Reader(gateway, each) for gateway in gateways for each in jobs for _ in range(3)]
        await worker.append([tokens(lease, 1) for lease in leases])
        for reader in readers:
            await reader.until(1)
        with contextlib.closing(shared.client()) as client:
            client.config_resetstat()
            for position in range(2, 12):
                await worker.append([tokens(lease, position) for lease in leases])
            for reader in readers:
                await reader.until(11)
            assert client.info("commandstats")["cmdstat_spublish"]["calls"] == 10 * len(gateways)
            # Who has left is not written to any more.
            for reader in readers:
                await reader.leave()
            names = [f"{worker._shards[0].base.decode()}job:{each.id}" for each in jobs]
            await eventually(lambda: not any(client.hget(name, "rs") for name in names))
            client.config_resetstat()
            await worker.append([tokens(lease, 12) for lease in leases])
            assert "cmdstat_spublish" not in client.info("commandstats")

    async def test_a_process_that_died_is_forgotten(self, shared: RedisServer, connect: OpenBroker) -> None:
        worker, gateway = await connect(shared.url), await connect(shared.url)
        queued = await worker.submit(job())
        reader = Reader(gateway, queued)
        [lease] = await claim(worker)
        await worker.append([tokens(lease, 1)])
        await reader.until(1)
        await gateway.close()
        with contextlib.closing(shared.client()) as client:
            for position in itertools.count(2):  # Redis sees a closed connection when it comes to it
                await worker.append([tokens(lease, position)])
                if not client.hget(f"{worker._shards[0].base.decode()}job:{queued.id}", "rs"):
                    break
                assert position < 1000
                await asyncio.sleep(0.01)
        await reader.leave()

    async def test_messages_that_were_lost_are_repaired(self, shared: RedisServer, connect: OpenBroker) -> None:
        """The registration is gone, as after a message of an older self that came late: the next look puts it right."""
        worker, gateway = await connect(shared.url), await connect(shared.url)
        queued = await worker.submit(job())
        reader = Reader(gateway, queued)
        [lease] = await claim(worker)
        await worker.append([tokens(lease, 1)])
        await reader.until(1)
        with contextlib.closing(shared.client()) as client:
            for position in range(2, 5):
                client.hdel(f"{worker._shards[0].base.decode()}job:{queued.id}", "rs")
                await worker.append([tokens(lease, position)])
                await reader.until(position)
            client.hdel(f"{worker._shards[0].base.decode()}job:{queued.id}", "rs")
        await worker.append([tokens(lease, 5, finish=STOP)])
        check_log(await reader.end())

    async def test_a_subscriber_that_redis_kicks_out_loses_nothing(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis(client_output_buffer_limit="pubsub 1024 0 0")
        worker, gateway = await connect(server.url), await connect(server.url)
        queued = await worker.submit(job())
        reader = Reader(gateway, queued)
        [lease] = await claim(worker)
        for position in range(1, 5):
            await worker.append([tokens(lease, position, text="x" * 100_000)])
            await reader.until(position)
        await worker.append([tokens(lease, 5, finish=STOP)])
        check_log(await reader.end())

    async def test_a_waiting_claim_is_woken(self, shared: RedisServer, connect: OpenBroker, monkeypatch: Any) -> None:
        """Not by its poll: that one comes too late here."""
        monkeypatch.setattr("penstock.brokers.redis.claims.CLAIM_POLL", 2 * PATIENCE)
        worker, gateway = await connect(shared.url), await connect(shared.url)
        async with asyncio.timeout(PATIENCE):
            for _ in range(3):
                waiting = asyncio.create_task(claim(worker, 1, 2 * PATIENCE))
                await asyncio.sleep(0.1)
                queued = await gateway.submit(job())
                [lease] = await waiting
                assert lease.job.id == queued.id
            # A wake-up for a claimant that has gone is passed on to the next.
            gone, waiting = [
                asyncio.create_task(worker.claim(WorkerInfo(id=name), ["m"], 1, 2 * PATIENCE)) for name in ("a", "b")
            ]
            await asyncio.sleep(0.1)
            gone.cancel()
            await asyncio.wait([gone])
            queued = await gateway.submit(job())
            assert [lease.job.id for lease in await waiting] == [queued.id]

    async def test_a_second_reader_beside_one_that_was_told_of_a_lost_end(
        self, ledger: Ledger, connect: OpenBroker
    ) -> None:
        """The first one does not take it in (a slow client): the second must not hear of what it was never given."""
        broker = await connect(ledger.server.url, durability="fast")
        queued = await broker.submit(job())
        [lease] = await claim(broker)
        ledger.mark()
        await broker.append([tokens(lease, 1, 5)])
        slow = broker.tail("acme", queued.id)
        assert isinstance(await anext(slow), Tokens)
        await ledger.lose()
        await eventually(lambda: broker._shards[0].commands.up.is_set())
        await asyncio.sleep(1.2)
        fresh = Reader(broker, queued)
        await asyncio.sleep(0.1)
        assert fresh.failure is None
        await fresh.leave()
        with pytest.raises(LogRewound):
            await anext(slow)


# --------------------------------------------------------------------------------------------- clusters


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"), {"cluster-require-full-coverage": "no"})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class TestCluster:
    async def test_a_slot_that_moves_takes_its_readers_along(
        self, cluster: RedisCluster, connect: OpenBroker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("penstock.brokers.redis.claims.CLAIM_POLL", 2 * PATIENCE)
        broker = await connect(cluster.url)
        queued = await broker.submit(job())
        reader = Reader(broker, queued)
        [lease] = await claim(broker)
        await broker.append([tokens(lease, 1)])
        await reader.until(1)
        await asyncio.to_thread(move_slot, cluster, broker._shards[0]._address._slot)
        await broker.append([tokens(lease, 2)])
        await reader.until(2)
        # Whoever listens does so where the keys are now: woken, not by polling.
        await eventually(lambda: broker._shards[0].subscriber.up.is_set())
        waiting = asyncio.create_task(claim(broker, 1, 2 * PATIENCE))
        await asyncio.sleep(0.5)
        other = await connect(cluster.url)
        second = await other.submit(job())
        async with asyncio.timeout(5):
            assert [lease.job.id for lease in await waiting] == [second.id]
        await broker.append([tokens(lease, 3, finish=STOP)])
        check_log(await reader.end())

    async def test_a_shard_that_is_away_takes_no_lease_with_it(
        self, cluster: RedisCluster, connect: OpenBroker
    ) -> None:
        """What the other shards gave is given to the worker; nothing is leased to nobody."""
        broker = await connect(cluster.url, shards=3, timeout=1.0)
        watcher = await connect(cluster.url, shards=3)
        jobs = [await broker.submit(job()) for _ in range(24)]
        away = cluster.nodes[owner_of(cluster, broker._shards[0]._address._slot)]
        there = [each for each in jobs if owner_node(cluster, broker, each) is not away]
        away.signal(signal.SIGSTOP)
        leases: list[Lease] = []
        try:
            async with asyncio.timeout(PATIENCE):
                while len(leases) < len(there):
                    with contextlib.suppress(BrokerUnavailable):
                        leases += await claim(broker, 24, 0.0)
                    running = [each for each in there if (await watcher.get("acme", each.id)).status == "running"]
                    assert len(running) == len(leases), "leased to nobody"
        finally:
            away.signal(signal.SIGCONT)
        assert {lease.job.id for lease in leases} >= {each.id for each in there}


def owner_of(cluster: RedisCluster, slot: int) -> int:
    with contextlib.closing(cluster.nodes[0].client()) as client:
        for first, last, primary, *_ in client.execute_command("CLUSTER SLOTS"):
            if first <= slot <= last:
                return next(number for number, node in enumerate(cluster.nodes) if node.port == primary[1])
    raise AssertionError(slot)


def owner_node(cluster: RedisCluster, broker: RedisBroker, job: Job) -> RedisServer:
    return cluster.nodes[owner_of(cluster, broker._shard(job.id)._address._slot)]


def move_slot(cluster: RedisCluster, slot: int) -> None:
    """From the node that has it to another, keys and all."""
    number = owner_of(cluster, slot)
    source, target = cluster.nodes[number], cluster.nodes[(number + 1) % 3]
    with contextlib.closing(source.client()) as old, contextlib.closing(target.client()) as new:
        ids = [client.execute_command("CLUSTER MYID") for client in (old, new)]
        new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
        old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
        keys = old.execute_command("CLUSTER GETKEYSINSLOT", slot, 10_000)
        old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in cluster.nodes:
            with contextlib.closing(node.client()) as client:
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])


# --------------------------------------------------------------------------------------------- asyncio


class TestClosing:
    async def test_no_task_and_no_connection_is_left(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        with contextlib.closing(server.client()) as client:
            before, connections = asyncio.all_tasks(), len(client.client_list())
            broker = await connect(server.url)
            queued = await broker.submit(job(user="u"))
            arrivals = broker.arrivals("acme", "u")
            reader = Reader(broker, queued)
            waiting = asyncio.create_task(broker.claim(WORKER, ["other"], 1, PATIENCE))
            await asyncio.sleep(0.1)
            waiting.cancel()
            await reader.leave()
            await asyncio.wait([waiting])
            await arrivals.aclose()  # type: ignore[attr-defined]
            await broker.close()
            await eventually(lambda: asyncio.all_tasks() == before)
            await eventually(lambda: len(client.client_list()) == connections)

    async def test_at_the_moment_when_the_connection_breaks(self, shared: RedisServer, connect: OpenBroker) -> None:
        """A cancellation may meet a failure in a task group, or a write in asyncio.wait_for, and be lost there."""
        pick = random.Random(3)
        with contextlib.closing(shared.client()) as client:
            for number in range(40):
                broker = await connect(shared.url)
                client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
                if number % 2:
                    client.execute_command("CLIENT KILL TYPE pubsub")
                await asyncio.sleep(pick.uniform(0, 0.06) if number % 3 else 0)
                async with asyncio.timeout(5):
                    await broker.close()

    async def test_whoever_waits_is_answered_at_once(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        broker = await connect(server.url)
        server.signal(signal.SIGSTOP)
        calls = [asyncio.create_task(broker.submit(job())) for _ in range(20)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(PATIENCE / 2):
            await broker.close()
            done = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(each, BrokerUnavailable) for each in done)

    async def test_a_claim_that_was_cancelled_leaves_no_lease(self, shared: RedisServer, connect: OpenBroker) -> None:
        """As a worker does that is told to stop: the claim is cancelled, the broker closed, at any moment."""
        gateway, pick = await connect(shared.url), random.Random(1)
        for _ in range(25):
            worker = await connect(shared.url)
            waiting = asyncio.create_task(claim(worker))
            await asyncio.sleep(0.01)
            submitting = asyncio.create_task(gateway.submit(job()))
            await asyncio.sleep(pick.uniform(0, 0.002))
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gateway.release([Release(lease.key) for lease in await waiting])
            await worker.close()
            queued = await submitting
            assert (await gateway.get("acme", queued.id)).status is Status.QUEUED
            await gateway.cancel("acme", queued.id)
        assert (await gateway.stats()).leases_lost == 0

    async def test_a_claim_that_was_cancelled_while_redis_is_away(self, make_redis: Any, connect: OpenBroker) -> None:
        server = make_redis()
        broker = await connect(server.url, timeout=0.3)
        await broker.submit(job())
        server.signal(signal.SIGSTOP)
        waiting = asyncio.create_task(claim(broker))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.sleep(0.4)
        server.signal(signal.SIGCONT)
        assert problems(await store(server, broker)) == []

    async def test_a_submit_that_was_cancelled_is_all_or_nothing(
        self, shared: RedisServer, connect: OpenBroker
    ) -> None:
        broker = await connect(shared.url)
        for number in range(20):
            submitting = asyncio.create_task(broker.submit(job()))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            submitting.cancel()
            await asyncio.wait([submitting])
        await broker.stats()
        assert problems(await store(shared, broker)) == []
