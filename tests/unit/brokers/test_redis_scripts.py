"""The transitions as scripts, on a real redis-server: run twice, replayed late, and judged by what the keys say."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import resources
from typing import Any

import msgspec
import pytest
import redis
from tests.support.redis import RedisServer
from tests.support.redis_store import BOOKKEEPING, CONSTANT, Store, differences, dump, problems

from penstock.brokers.redis import RedisBroker, RedisOptions, scripts
from penstock.brokers.redis.scripts import SHA, SOURCES
from penstock.core.errors import ErrorInfo, ExpiredResult, NotFound, Overloaded
from penstock.core.job import Job, Priority, Request, Status, new_job_id
from penstock.core.ports import Append, Finish, Lease, QueuePolicy, Release, WorkerInfo
from penstock.testing.clock import ManualClock

WORKER = WorkerInfo(id="w", takes_suspects=True)
FAULT = ErrorInfo("No.", "server_error", None, "engine_error")
#: Names that a careless key would confuse: separators, another's length prefix, text beyond ASCII.
TENANTS = ["acme", "a:b", "5:acme", "größe, 1"]
MODELS = ["m", "1:m", "org/m:v2"]
USERS = [None, "u", "u:1"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Without a file: here it is about what the scripts do, not about what is left of it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"), {"appendonly": "no"})
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with contextlib.closing(server.client()) as client:
        client.flushall()
        yield client


class Shelf:
    """One shard of a real server, its clock, and brokers on it."""

    def __init__(self, server: RedisServer, client: redis.Redis) -> None:
        self._url = server.url
        self.client = client
        self.clock = ManualClock()
        self.base = "{q:0}:"
        self._open: list[RedisBroker] = []

    async def broker(self, **policy: Any) -> RedisBroker:
        policy = {"max_queued": 0, "max_queued_per_tenant": 0, **policy}
        options = RedisOptions(durability="fast", prefix="q", timeout=10.0)
        broker = RedisBroker(self._url, options, policy=QueuePolicy(**policy), clock=self.clock)
        self._open.append(broker)
        await broker.open()
        return broker

    async def close(self) -> None:
        for broker in self._open:
            await broker.close()

    def dump(self, without: tuple[bytes, ...] = ()) -> Store:
        return dump(self.client, self.base, without)

    def problems(self, max_running: int = 0) -> list[str]:
        return problems(self.dump(), max_running=max_running)


@pytest.fixture
async def store(server: RedisServer, client: redis.Redis) -> AsyncIterator[Shelf]:
    store = Shelf(server, client)
    yield store
    await store.close()


msgpack = msgspec.msgpack.encode


def job(tenant: str = "acme", model: str = "m", size: int = 4, **fields: Any) -> Job:
    return Job(
        id=new_job_id(),
        tenant=tenant,
        request=Request(model=model, prompt_ids=tuple(range(size))),
        fingerprint=b"print",
        **fields,
    )


def tokens(lease: Lease, position: int, count: int = 1, **fields: Any) -> Append:
    return Append(lease.key, position, list(range(count)), ["t"] * count, **fields)


class Walk:
    """Random verbs of several workers and gateways over one store, each broker a process."""

    def __init__(self, store: Shelf, brokers: list[RedisBroker], seed: int) -> None:
        self.random = random.Random(seed)
        self.store = store
        self.brokers = brokers
        self.jobs: list[Job] = []
        self.leases: list[tuple[Lease, int]] = []
        """What workers believe to hold, and the position they would write next. Zombies among them."""
        self.done: dict[str, int] = {}

    @property
    def broker(self) -> RedisBroker:
        return self.random.choice(self.brokers)

    async def step(self) -> None:
        verb = self.random.choices(
            [
                self.submit,
                self.claim,
                self.append,
                self.release,
                self.cancel,
                self.forget,
                self.sweep,
                self.wait,
                self.read,
            ],
            [22, 18, 30, 8, 3, 2, 8, 8, 3],
        )[0]
        await verb()
        self.done[verb.__name__] = self.done.get(verb.__name__, 0) + 1

    async def submit(self) -> None:
        pick = self.random
        fields: dict[str, Any] = {"user": pick.choice(USERS), "priority": pick.choice(list(Priority))}
        if pick.random() < 0.2:
            fields["deadline_at"] = self.store.clock.now() + pick.uniform(-1, 30)
        if pick.random() < 0.2:
            fields["idempotency_key"] = pick.choice(["k", "k:2"])
        if pick.random() < 0.2:
            fields["retain_for"] = pick.choice([5.0, 60.0])
        new = job(pick.choice(TENANTS), pick.choice(MODELS), pick.choice([1, 4, 300]), **fields)
        with contextlib.suppress(Overloaded):
            self.jobs.append(await self.broker.submit(new))
        self.jobs = self.jobs[-60:]

    async def claim(self) -> None:
        models = self.random.sample(MODELS, self.random.randint(1, 3))
        leases = await self.broker.claim(WORKER, models, self.random.randint(0, 4), 0)
        self.leases += [(lease, len(lease.ids) + 1) for lease in leases]

    async def append(self) -> None:
        pick, batch, kept = self.random, [], []
        for lease, position in self.leases:
            if pick.random() < 0.5:
                kept.append((lease, position))
                continue
            at = max(1, position + pick.choice([0, 0, 0, 0, 0, -1, 1]))
            count = pick.choice([0, 1, 1, 3])
            finish = pick.choice([None] * 6 + [Finish(("stop",)), Finish(error=FAULT)])
            batch.append(tokens(lease, at, count, finish=finish, prompt_tokens=pick.choice([None, 4, 40])))
            kept.append((lease, max(position, at + count)))
        verdicts = await self.broker.append(batch) if batch else {}
        gone = {job for job, verdict in verdicts.items() if verdict != "ok"}
        # Some workers go on all the same.
        self.leases = [(lease, at) for lease, at in kept if lease.job.id not in gone or pick.random() < 0.3][-40:]

    async def release(self) -> None:
        if not self.leases:
            return
        pick = self.random
        lease, position = pick.choice(self.leases)
        beside, retry, delay = pick.choice(
            [(None, None, 0.0), (1, None, 0.0), (5, None, 0.0), (None, FAULT, 0.0), (None, FAULT, 2.0)]
        )
        await self.broker.release([Release(lease.key, crashed_beside=beside, retry=retry, delay=delay)])
        if pick.random() < 0.7:
            self.leases.remove((lease, position))

    async def cancel(self) -> None:
        if self.jobs:
            chosen = self.random.choice(self.jobs)
            with contextlib.suppress(NotFound):
                await self.broker.cancel(chosen.tenant, chosen.id)

    async def forget(self) -> None:
        if self.jobs:
            chosen = self.random.choice(self.jobs)
            await self.broker.forget(chosen.tenant, chosen.id)

    async def sweep(self) -> None:
        await self.broker.sweep()

    async def wait(self) -> None:
        for _ in range(self.random.choice([1, 2, 8])):
            self.store.clock.advance(0.25)
            await self.broker.tick()
        if self.random.random() < 0.2:
            self.store.clock.advance(self.random.choice([20.0, -0.5, -10.0]))

    async def read(self) -> None:
        if self.jobs:
            chosen = self.random.choice(self.jobs)
            inbox = self.random.choice([None, b"one", b"two"])
            read = scripts.Read(tenant=chosen.tenant, id=chosen.id, after=0, max_runs=10, inbox=inbox)
            with contextlib.suppress(NotFound):
                await self.broker._shards[0].run(read)


class TestTheStore:
    """After any history, every counter and index is what the jobs say."""

    @pytest.mark.parametrize(("seed", "max_running"), [(1, 0), (2, 0), (3, 1), (4, 2)])
    async def test_counters_and_indexes_agree_with_the_jobs(self, store: Shelf, seed: int, max_running: int) -> None:
        policy = {"max_running_per_tenant": max_running, "result_ttl": 30.0, "max_losses": 3, "max_attempts": 2}
        walk = Walk(store, [await store.broker(**policy) for _ in range(2)], seed)
        for number in range(900):
            await walk.step()
            if number % 15 == 0:
                found = store.problems(max_running)
                assert not found, (number, found)
        assert store.problems(max_running) == []
        ended = {job[b"s"] for key, job in store.dump().items() if key.startswith(b"job:")}
        assert len(ended) >= 3, "the walk is too tame"

    async def test_nothing_is_left_of_jobs_whose_retention_is_over(self, store: Shelf) -> None:
        """Five rounds of everything: each leaves what the one before left."""
        broker = await store.broker(result_ttl=20.0, max_running_per_tenant=2, max_losses=2)
        walk = Walk(store, [broker], 7)
        left: list[set[bytes]] = []
        for _ in range(5):
            for _ in range(150):
                await walk.step()
            while True:  # whatever is still open is worked off
                for _ in range(8):
                    store.clock.advance(0.25)
                    await broker.sweep()
                leases = await broker.claim(WORKER, MODELS, 50, 0)
                await broker.append([tokens(lease, len(lease.ids) + 1, finish=Finish(("stop",))) for lease in leases])
                depth = store.dump()
                if not depth.get(b"leases") and not depth.get(b"depth"):
                    break
            store.clock.advance(1000.0)
            while await broker.sweep():
                pass
            assert store.problems(2) == []
            store.client.delete(*store.client.keys("{q:0}:gone:*"), "{q:0}:nothing")
            left.append({key for key in store.dump((b"idle:", b"reply:", b"tenant:")) if key != b"meta"})
            walk.jobs.clear()
            walk.leases.clear()
        assert all(keys <= CONSTANT for keys in left), left
        assert len(store.dump()[b"ends"]) <= 130
        for key in store.client.scan_iter(match="*"):
            assert key.startswith(b"{q:0}:")
            if key[len(store.base) :] not in CONSTANT:
                assert 0 < store.client.ttl(key) <= 2 * 86400, key

    async def test_a_tombstone_has_its_day(self, store: Shelf) -> None:
        broker = await store.broker(result_ttl=20.0)
        kept = await broker.submit(job())
        await broker.cancel("acme", kept.id)
        store.clock.advance(21.0)
        await broker.sweep()
        with pytest.raises(ExpiredResult):
            await broker.get("acme", kept.id)
        assert 86000 < store.client.ttl(f"{{q:0}}:gone:{kept.id}") <= 86400

    async def test_what_is_big_goes_by_itself_where_nobody_sweeps(self, store: Shelf) -> None:
        broker = await store.broker(result_ttl=20.0)
        kept = await broker.submit(job())
        [lease] = await broker.claim(WORKER, ["m"], 1, 0)
        await broker.append([tokens(lease, 1, finish=Finish(("stop",)))])
        for name in ("log", "req"):
            assert 3600 < store.client.ttl(f"{{q:0}}:{name}:{kept.id}") <= 3600 + 40
        store.client.delete(f"{{q:0}}:log:{kept.id}", f"{{q:0}}:req:{kept.id}")
        with pytest.raises(ExpiredResult):
            await broker.get("acme", kept.id)


class Twice:
    """Has a broker send each of its commands again, as after a lost reply, and compares the store before and after."""

    def __init__(self, store: Shelf, broker: RedisBroker) -> None:
        self.store = store
        self.sent: dict[str, int] = {}
        self.found: list[str] = []
        self.said: list[tuple[str, list[Any]]] = []
        commands = broker._shards[0].commands
        self._call: Callable[..., Any] = commands.call
        commands.call = self.call  # type: ignore[method-assign]

    async def call(self, command: Any) -> Any:
        if command[0] != "EVALSHA":
            return await self._call(command)
        script = next(name for name, sha in SHA.items() if sha == command[1])
        self.said.append((script, list(command)))
        first = await self._call(command)
        once = self.store.dump(BOOKKEEPING)
        second = await self._call(command)
        twice = self.store.dump(BOOKKEEPING)
        self.found += [f"{script}: {each}" for each in differences(once, twice)]
        if script == "claim" and first[0][0]:
            # The same jobs, under the same attempts.
            (leases, _), (again, _) = first[0], second[0]
            if [lease[:1] + lease[1][0] for lease in leases] != [lease[:1] + lease[1][0] for lease in again]:
                self.found.append(f"claim: {first} then {second}")
        elif script == "append" and first != second and b"expired" not in first[0]:
            self.found.append(f"append: {first} then {second}")
        self.sent[script] = self.sent.get(script, 0) + 1
        return second


class TestSentAgain:
    """A command whose reply was lost is sent again, so each must do nothing the second time."""

    @pytest.mark.parametrize(("seed", "max_running"), [(11, 0), (12, 2)])
    async def test_every_script_at_every_stage(self, store: Shelf, seed: int, max_running: int) -> None:
        policy = {"max_running_per_tenant": max_running, "result_ttl": 30.0, "max_losses": 3, "max_attempts": 2}
        broker = await store.broker(**policy)
        twice = Twice(store, broker)
        walk = Walk(store, [broker], seed)
        for _ in range(250):
            await walk.step()
            assert twice.found == []
        assert store.problems(max_running) == []
        shard = broker._shards[0]
        open_ = [
            chosen.id for chosen in walk.jobs if store.client.hget(f"{store.base}job:{chosen.id}", "s") == b"queued"
        ]
        last = walk.jobs[-1]
        with contextlib.suppress(NotFound):
            await shard.run(scripts.Read(tenant=last.tenant, id=last.id, after=0, max_runs=10, inbox=b"inbox"))
        await shard.run(scripts.Follow(inbox=b"inbox", ids=open_, left=[]))
        await shard.run(scripts.Follow(inbox=b"inbox", ids=open_[1:], left=open_[:1]))
        await shard.run(scripts.Enter(run_id="another server", can_lose=True, shards=1))
        assert twice.found == []
        assert set(SHA) - set(twice.sent) <= {"get", "list", "stats"}  # which only read

    @pytest.mark.parametrize("seed", [21, 22, 23])
    async def test_long_after_others_went_on(self, store: Shelf, seed: int) -> None:
        """Whatever happened between a command and its repetition: that does nothing but renew its own lease."""
        policy = {"result_ttl": 1e6, "max_losses": 3, "max_attempts": 2}
        broker = await store.broker(**policy)
        twice = Twice(store, broker)
        walk = Walk(store, [broker], seed)
        replayed = 0
        for _ in range(200):
            await walk.step()
            script, command = walk.random.choice(twice.said[-30:])
            if script not in ("append", "release", "submit", "cancel", "claim"):
                continue
            if script == "claim" and not store.client.exists(f"{store.base}reply:{command[6]}"):
                continue  # it gave nothing: asking again may give something, to the one who asks
            before = store.dump((*BOOKKEEPING, b"leases"))
            command[4] = repr(store.clock.now())
            await twice._call(command)
            if script == "append":  # it may find that a deadline has passed, as any other would
                await broker.sweep()
                continue
            changed = differences(before, store.dump((*BOOKKEEPING, b"leases")))
            assert not changed, (script, changed)
            replayed += 1
        assert replayed > 40
        assert store.problems() == []

    async def test_a_claim_sent_again_gives_what_is_still_held(self, store: Shelf) -> None:
        broker = await store.broker()
        other = await store.broker()
        for _ in range(3):
            await broker.submit(job())
        twice = Twice(store, broker)
        kept, lost, ended = await broker.claim(WORKER, ["m"], 3, 0)
        script, command = twice.said[-1]
        assert script == "claim"
        await other.release([Release(lost.key)])
        [again] = await other.claim(WORKER, ["m"], 1, 0)
        assert (again.job.id, again.attempt) == (lost.job.id, 2)
        await other.append([tokens(kept, 1, 2), tokens(ended, 1, finish=Finish(("stop",)))])
        ((leases, _), _) = await twice._call(command)
        assert [
            (attempt, dict(zip(record[0][::2], record[0][1::2], strict=True))[b"id"]) for attempt, record, _ in leases
        ] == [(1, kept.job.id.encode())]
        assert store.problems() == []

    async def test_a_late_end_does_not_come_back_to_life(self, store: Shelf) -> None:
        """The finish of an attempt that was lost meanwhile, sent again while its successor writes."""
        broker, other = await store.broker(), await store.broker()
        await broker.submit(job())
        twice = Twice(store, broker)
        [lease] = await broker.claim(WORKER, ["m"], 1, 0)
        await broker.append([tokens(lease, 1, 3)])
        _, late = twice.said[-1]
        for _ in range(24):
            store.clock.advance(0.25)
            await other.tick()
        await other.sweep()
        [successor] = await other.claim(WORKER, ["m"], 1, 0)
        await other.append([tokens(successor, 4, 2)])
        before = store.dump(BOOKKEEPING)
        late[4] = repr(store.clock.now())
        assert (await twice._call(late))[0] == [b"lost"]
        assert differences(before, store.dump(BOOKKEEPING)) == []


class TestFairness:
    async def test_a_prompt_that_was_estimated_too_high_costs_no_turn(self, store: Shelf) -> None:
        """Counters fall when the worker's count corrects the estimate; the order of service follows at once."""
        broker = await store.broker()
        for _ in range(3):
            await broker.submit(job("long", size=4000))
        for _ in range(60):
            await broker.submit(job("short", size=10))
        served: list[str] = []
        for _ in range(20):
            leases = await broker.claim(WORKER, ["m"], 2, 0)
            served += [lease.job.tenant for lease in leases]
            await broker.append([tokens(lease, 1, prompt_tokens=10, finish=Finish(("stop",))) for lease in leases])
        assert served.count("long") == 3, served

    async def test_a_correction_reaches_lanes_of_other_models(self, store: Shelf) -> None:
        broker = await store.broker()
        await broker.submit(job("long", size=4000))
        await broker.submit(job("long", "1:m", size=1))
        for _ in range(5):
            await broker.submit(job("short", "1:m", size=10))
        [lease] = await broker.claim(WORKER, ["m"], 1, 0)
        [first] = await broker.claim(WORKER, ["1:m"], 1, 0)
        assert first.job.tenant == "short"  # the estimate counts as long as nobody knows better
        await broker.append([tokens(lease, 1, prompt_tokens=1)])
        [second] = await broker.claim(WORKER, ["1:m"], 1, 0)
        assert second.job.tenant == "long"

    async def test_input_is_charged_once_whatever_attempts_it_takes(self, store: Shelf) -> None:
        broker = await store.broker()
        await broker.submit(job(size=300))
        for _ in range(4):
            [lease] = await broker.claim(WORKER, ["m"], 1, 0)
            await broker.append([tokens(lease, 1, prompt_tokens=200)])
            await broker.release([Release(lease.key)])
        assert float(store.dump()[b"tenant:acme"][b"c"]) == 200 + 2

    async def test_ties_go_round(self, store: Shelf) -> None:
        """Among equals nobody is asked twice before everybody was asked once, however many there are."""
        broker = await store.broker(input_cost=0.0)
        names = [f"t{number:02}" for number in range(12)]
        for name in names:
            for _ in range(2):
                await broker.submit(job(name))
        served = [lease.job.tenant for lease in await broker.claim(WORKER, ["m"], 24, 0)]
        assert sorted(served[:12]) == names
        assert served[12:] == served[:12]


class TestLosses:
    async def test_a_job_that_loses_lease_after_lease_is_quarantined(self, store: Shelf) -> None:
        broker = await store.broker(max_losses=2, lease_ttl=0.5)
        doomed = await broker.submit(job())
        for attempt in (1, 2, 3):
            [lease] = await broker.claim(WORKER, ["m"], 1, 0)
            assert lease.attempt == attempt
            for _ in range(3):
                store.clock.advance(0.25)
                await broker.tick()
            await broker.sweep()
        ended = await broker.get("acme", doomed.id)
        assert ended.status is Status.FAILED
        assert ended.error is not None
        assert ended.error.code == "poisoned"
        assert (await broker.stats()).leases_lost == 2
        assert store.problems() == []


class TestCaps:
    async def test_a_process_without_the_cap_frees_what_another_parked(self, store: Shelf) -> None:
        """Gateways cancel and sweep too, perhaps with another configuration; and caps are taken back."""
        capped, free = await store.broker(max_running_per_tenant=1), await store.broker()
        for _ in range(3):
            await capped.submit(job())
        [first] = await capped.claim(WORKER, ["m"], 3, 0)
        await free.cancel("acme", first.job.id)
        assert store.problems(1) == []
        [second] = await capped.claim(WORKER, ["m"], 3, 0)
        await free.append([tokens(second, 1, finish=Finish(("stop",)))])
        assert len(await free.claim(WORKER, ["m"], 3, 0)) == 1

    async def test_what_is_parked_can_be_cancelled_and_expires(self, store: Shelf) -> None:
        broker = await store.broker(max_running_per_tenant=1)
        running = await broker.submit(job())
        parked = [await broker.submit(job()), await broker.submit(job(deadline_at=store.clock.now() + 5))]
        assert len(await broker.claim(WORKER, ["m"], 3, 0)) == 1
        await broker.cancel("acme", parked[0].id)
        store.clock.advance(6)
        await broker.sweep()
        assert (await broker.get("acme", parked[1].id)).status is Status.EXPIRED
        assert store.problems(1) == []
        await broker.cancel("acme", running.id)
        assert store.problems(1) == []

    async def test_bytes_of_a_tenant_are_bounded_and_come_free(self, store: Shelf) -> None:
        broker = await store.broker(max_bytes_per_tenant=20_000, result_ttl=20.0)
        kept = await broker.submit(job())
        [lease] = await broker.claim(WORKER, ["m"], 1, 0)
        await broker.append([Append(lease.key, 1, [1] * 100, ["x" * 300] * 100)])
        with pytest.raises(Overloaded) as caught:
            await broker.submit(job())
        assert caught.value.retry_after
        await broker.submit(job("other"))
        # What runs goes on and ends, though it grows beyond.
        assert (await broker.append([tokens(lease, 101, finish=Finish(("stop",)))]))[kept.id] == "ok"
        store.clock.advance(21.0)
        await broker.sweep()
        await broker.submit(job())
        assert store.problems() == []


class TestScripts:
    def test_only_a_submit_is_refused_when_redis_is_full(self) -> None:
        assert {name for name, source in SOURCES.items() if b"allow-oom" not in source} == {"submit"}

    def test_every_key_has_the_shards_tag(self) -> None:
        """Whatever a script touches begins with `base`, which is KEYS[1]: a cluster keeps it in one slot."""
        for name, source in SOURCES.items():
            for call in re.findall(rb'call\("[A-Z]+", "[^"]*"', source):
                raise AssertionError(f"{name}: {call!r} names a key without its tag")
            assert source.count(b"KEYS[") == 2, name  # in the comment, and once

    def test_no_script_takes_the_time_from_elsewhere(self) -> None:
        for name, source in SOURCES.items():
            assert source.count(b'call("TIME")') == 1, name
            assert b"os.time" not in source
            assert b"math.random" not in source


FILES = {script.name: script for script in scripts.Script.__subclasses__()}


class TestArguments:
    """What a script is given has a name on both sides, and no number on either."""

    @staticmethod
    def source(name: str) -> str:
        return (resources.files("penstock.brokers.redis") / "lua" / f"{name}.lua").read_text()

    def test_every_file_is_a_script(self) -> None:
        files = {path.name for path in (resources.files("penstock.brokers.redis") / "lua").iterdir()}
        assert files == {f"{name}.lua" for name in FILES} | {"lib.lua"}

    def test_scripts_know_no_numbers(self) -> None:
        for name in (*FILES, "lib"):
            assert "ARGV" not in self.source(name), name

    @pytest.mark.parametrize("name", FILES)
    def test_every_argument_is_used(self, name: str) -> None:
        code = re.sub("--.*", "", self.source(name))
        assert [field for field in FILES[name].__struct_fields__ if not re.search(rf"\b{field}\b", code)] == []

    def test_every_kind_of_argument_arrives_as_what_it_is(self, client: redis.Redis) -> None:
        class Kinds(scripts.Script[None]):
            text: str
            blob: bytes
            number: int
            real: float
            yes: bool
            no: bool
            some: list[str]
            given: float | None
            missing: float | None
            no_text: str | None
            blobs: scripts.Blobs

        prelude, Kinds.encoders = scripts.arguments(Kinds)
        Kinds.has_blobs = True
        given = Kinds(
            text="",
            blob=b"\xff",
            number=2**53,
            real=0.1,
            yes=True,
            no=False,
            some=["a", "b"],
            given=1e-7,
            missing=None,
            no_text=None,
            blobs=[b"x", b"y"],
        )
        body = """
            return { text, blob, string.format("%.0f", number), string.format("%.17g", real), tostring(yes),
                     tostring(no), some[2], string.format("%.17g", given), tostring(missing), tostring(no_text),
                     blobs(2), tostring(blobs(3)) }"""
        answer = client.eval("\n".join((*prelude, body)), 0, "", "", *given.words())
        assert answer == [
            b"", b"\xff", b"9007199254740992", b"0.10000000000000001", b"true",
            b"false", b"b", b"9.9999999999999995e-08", b"nil", b"nil", b"y", b"nil",
        ]  # fmt: skip
