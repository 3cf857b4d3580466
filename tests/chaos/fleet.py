"""A fleet as a storm's target: two gateways, three workers, and Redis, with a bad network between each of them and it.

Faults (`FAULTS`), each on a victim drawn from the seed; what is killed is started again, as a supervisor would:

- ``gateway-kill``, ``worker-kill``, ``engine-kill``, ``redis-kill``: kill -9; Redis comes back from its AOF
- ``gateway-stop``, ``worker-stop``, ``engine-stop``, ``redis-stop``: SIGSTOP; a worker for three times its lease, while
  its engine goes on: the zombie writer; an engine until the watchdog finds it
- ``gateway-drain``, ``worker-drain``: SIGTERM, exit code 0
- ``gateway-NET``, ``worker-NET``: its connections to Redis; NET as `tests.support.proxy` has them: ``drop``,
  ``refuse``, ``delay``, ``stall``, ``blackhole``, ``lost-reply`` (of a script drawn from those that it calls),
  ``flaky`` (for seconds, one reply after the other is lost, whatever it is)
- ``engine-kill-lost-reply``: an engine dies, and the reply to the release of its leases is lost
- ``redis-clock``, ``gateway-clock``, ``worker-clock``: the wall clock jumps to an hour before or after the true time,
  or back to it

``clients`` is the storm's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import httpx

from penstock.brokers.redis.scripts import SHA
from tests.chaos.target import Strike, exited, hurt_engine
from tests.support.clock import SteppedClock, can_step
from tests.support.fleet import GatewayProcess, WorkerProcess
from tests.support.proxy import Proxy, Words
from tests.support.redis import RedisCluster, RedisServer
from tests.support.server import PATIENCE, Process

PROCESSES = (
    "gateway-kill", "worker-kill", "engine-kill", "redis-kill",
    "gateway-stop", "worker-stop", "engine-stop", "redis-stop",
    "gateway-drain", "worker-drain",
)  # fmt: skip
NETWORK = tuple(
    f"{who}-{what}"
    for who in ("gateway", "worker")
    for what in ("drop", "refuse", "delay", "stall", "blackhole", "lost-reply", "flaky")
)
CLOCKS = ("redis-clock", "gateway-clock", "worker-clock")
FAULTS = (*PROCESSES, *NETWORK, "engine-kill-lost-reply", *(CLOCKS if can_step() else ()), "clients")
#: What there is without a proxy and clocks: over a cluster, whose nodes tell their own addresses.
CLUSTER_FAULTS = (*PROCESSES, "clients")

#: Keys that may be left when every job has ended (their results are kept).
AT_REST = frozenset(
    {"clock", "meta", "job", "req", "log", "key", "tenant", "list", "user", "counts", "ended", "ends", "workers",
     "alive", "idle", "called", "reply", "gone"}
)  # fmt: skip


class Member:
    """One process of the fleet, its network and its clock."""

    def __init__(self, name: str, process: Process, proxy: Proxy | None) -> None:
        self.name = name
        self.process = process
        self.proxy = proxy
        self.clock: SteppedClock | None = None
        self.life = asyncio.Lock()
        """Held while it is being killed, stopped or started: what it is then is no surprise."""
        self.network = asyncio.Lock()


class Fleet:
    """Everything below *folder*. *models*: as `WorkerProcess`'s. *lease_ttl* is short, and *rate* paced: a zombie must
    get the chance to write."""

    def __init__(
        self,
        folder: Path,
        *,
        gateways: int = 2,
        workers: int = 3,
        nodes: int = 1,
        models: Sequence[Any] | None = None,
        rate: float = 150,
        slots: int = 64,
        lease_ttl: float = 2.0,
        settings: Mapping[str, object] | None = None,
        worker_settings: Mapping[str, object] | None = None,
        clocks: bool = False,
    ) -> None:
        self.lease_ttl = lease_ttl
        self.cluster = RedisCluster(folder / "redis") if nodes > 1 else None
        self.nodes = self.cluster.nodes if self.cluster else [RedisServer(folder / "redis")]
        self.redis_lives = [asyncio.Lock() for _ in self.nodes]
        self.redis_clock: SteppedClock | None = None
        shared = {
            "lease_ttl": lease_ttl, "drain_timeout": 0.3, "hang_timeout": 2, "load_timeout": 10,
            "result_ttl": 86400, "shards": 1 if nodes == 1 else nodes, **(settings or {}),
        }  # fmt: skip
        working = {**shared, **(worker_settings or {})}

        def gateway(name: str, url: str) -> Process:
            return GatewayProcess(folder / name, url, settings=shared)

        def worker(name: str, url: str) -> Process:
            return WorkerProcess(
                folder / name, url, models=models, rate=rate, options={"slots": slots}, settings=working
            )

        self.gateways = [self._member(f"gateway{n}", gateway) for n in range(gateways)]
        self.workers = [self._member(f"worker{n}", worker) for n in range(workers)]
        if clocks:
            self._add_clocks(folder / "clocks")
        self.respawns = 0
        """Starts that failed because Redis was away, and were tried again."""
        self.missed = Counter[str]()
        """Faults that found nothing to hit (a script whose reply was to be lost was not called)."""
        self._problems: list[str] = []
        self._threads = ThreadPoolExecutor(16, "fleet")

    def _member(self, name: str, make: Callable[[str, str], Process]) -> Member:
        if self.cluster is not None:
            return Member(name, make(name, self.cluster.url), None)
        proxy = Proxy(self.nodes[0].port)
        return Member(name, make(name, proxy.url), proxy)

    def _add_clocks(self, folder: Path) -> None:
        self.redis_clock = SteppedClock(folder, "redis")
        self.nodes[0].extra_env = self.redis_clock.environment
        for member in self.members:
            member.clock = SteppedClock(folder, member.name)
            member.process.extra_env = member.clock.environment

    @property
    def members(self) -> list[Member]:
        return [*self.gateways, *self.workers]

    @property
    def urls(self) -> Sequence[str]:
        return [gateway.process.url for gateway in self.gateways]

    # ------------------------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        try:
            await self._in_thread((self.cluster or self.nodes[0]).start)
            for member in self.members:
                if member.proxy is not None:
                    await member.proxy.start()
            async with asyncio.TaskGroup() as tasks:
                for member in self.members:
                    tasks.create_task(self._in_thread(member.process.start))
            await self._wait_served()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        # What was cancelled while it waited for a thread may start something yet.
        await asyncio.to_thread(self._threads.shutdown)
        for member in self.members:
            await asyncio.to_thread(member.process.stop)
            if member.proxy is not None:
                await member.proxy.close()
        for node in self.nodes:
            await asyncio.to_thread(node.stop)

    async def _in_thread(self, do: Callable[[], Any]) -> Any:
        """Starting and ending processes blocks. (Threads of our own: the loop's are too few for a fleet.)"""
        return await asyncio.get_running_loop().run_in_executor(self._threads, do)

    async def _wait_served(self) -> None:
        """Until every gateway knows of a worker."""
        async with asyncio.timeout(PATIENCE):
            while any(reply.status_code != 200 for reply in await self._get("/readyz")):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def _revive(self, member: Member) -> None:
        """Start it until it stays, as a supervisor would: it may give up while Redis is away."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                await self._in_thread(member.process.start)
                return
            except RuntimeError as error:
                self.respawns += 1
                if time.monotonic() > until:
                    self._problems.append(f"{member.name} does not start any more: {error}")
                    return
                await asyncio.sleep(0.2)

    # ------------------------------------------------------------------------------------ faults

    async def strike(self, fault: str, dice: random.Random) -> Strike:
        who, _, what = fault.partition("-")
        if who == "redis":
            return await self._strike_redis(what, dice)
        member = dice.choice(self.gateways if who == "gateway" else self.workers)
        if what in ("kill", "stop", "drain", "kill-lost-reply"):
            async with member.life:
                at = time.monotonic()
                await getattr(self, f"_{who}_{what.replace('-', '_')}")(member, dice)
        elif what == "clock":
            at = time.monotonic()
            _jump(member.clock, dice)
        else:
            assert member.proxy is not None
            async with member.network:
                at = time.monotonic()
                await self._bad_network(member.proxy, what, dice, who)
        return Strike(fault, member.name, at, time.monotonic() if who == "gateway" else at)

    async def _strike_redis(self, what: str, dice: random.Random) -> Strike:
        number = dice.randrange(len(self.nodes))
        node = self.nodes[number]
        pause = dice.uniform(0, 2)
        async with self.redis_lives[number]:
            at = time.monotonic()
            if what == "kill":
                await self._in_thread(node.kill9)
                await asyncio.sleep(pause)
                await self._in_thread(node.start)
            elif what == "stop":
                node.signal(signal.SIGSTOP)
                await asyncio.sleep(pause * 2 * self.lease_ttl)
                node.signal(signal.SIGCONT)
            else:
                _jump(self.redis_clock, dice)
        return Strike(f"redis-{what}", f"redis {number}", at, time.monotonic())

    async def _kill(self, member: Member, dice: random.Random) -> None:
        await self._in_thread(member.process.kill9)
        await self._revive(member)

    _gateway_kill = _worker_kill = _kill

    async def _drain(self, member: Member, dice: random.Random) -> None:
        try:
            code = await self._in_thread(member.process.terminate)
        except Exception as error:
            self._problems.append(f"{member.name} did not end after SIGTERM: {error}")
            return
        if code != 0:
            self._problems.append(f"{member.name} exited with {code} after SIGTERM")
        await self._revive(member)

    _gateway_drain = _worker_drain = _drain

    async def _gateway_stop(self, member: Member, dice: random.Random) -> None:
        await self._stop(member, dice.uniform(0.5, 4))

    async def _worker_stop(self, member: Member, dice: random.Random) -> None:
        await self._stop(member, 3 * self.lease_ttl)

    async def _stop(self, member: Member, seconds: float) -> None:
        member.process.signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        member.process.signal(signal.SIGCONT)

    async def _engine_kill(self, member: Member, dice: random.Random) -> None:
        await self._hurt_engine(member, signal.SIGKILL)

    async def _engine_stop(self, member: Member, dice: random.Random) -> None:
        await self._hurt_engine(member, signal.SIGSTOP)

    async def _hurt_engine(self, member: Member, number: int) -> None:
        if problem := await hurt_engine(member.process, number):
            self._problems.append(f"{member.name}: {problem}")

    async def _engine_kill_lost_reply(self, member: Member, dice: random.Random) -> None:
        assert member.proxy is not None
        async with member.network, self._losing(member.proxy, "engine-kill-lost-reply", calls("release")):
            await self._engine_kill(member, dice)

    async def _bad_network(self, proxy: Proxy, what: str, dice: random.Random, who: str) -> None:
        if what == "drop":
            for _ in range(dice.randint(1, 4)):
                proxy.drop()
                await asyncio.sleep(dice.uniform(0, 0.1))
        elif what == "refuse":
            await proxy.refuse()
            proxy.drop()
            await asyncio.sleep(dice.uniform(0.2, 4))
        elif what == "delay":
            proxy.delay(dice.uniform(0.02, 0.3))
            await asyncio.sleep(dice.uniform(1, 3))
        elif what == "stall":
            proxy.stall()
            await asyncio.sleep(dice.uniform(0.5, 3 * self.lease_ttl))
        elif what == "blackhole":
            proxy.blackhole()
            await asyncio.sleep(dice.uniform(0.5, 3 * self.lease_ttl))
        elif what == "flaky":
            until = time.monotonic() + dice.uniform(1, 4)
            while time.monotonic() < until:
                proxy.lose_reply(lambda words: words[0] == b"EVALSHA")
                await asyncio.sleep(dice.uniform(0.02, 0.5))
        else:
            kind = dice.choice(sorted(REPLIES[who]))
            async with self._losing(proxy, f"{who}-lost-reply of {kind}", *REPLIES[who][kind]):
                pass
        await proxy.heal()

    @contextlib.asynccontextmanager
    async def _losing(self, proxy: Proxy, name: str, *which: Any) -> AsyncIterator[None]:
        """The first reply of that kind, from now to three seconds after the block, is lost."""
        lost = proxy.lose_reply(*which)
        try:
            yield
            async with asyncio.timeout(3):
                await lost
        except TimeoutError:
            self.missed[name] += 1
        finally:
            lost.cancel()

    # ------------------------------------------------------------------------------------ at rest

    def fallen(self) -> list[str]:
        return [
            *self._problems,
            *(
                each
                for member in self.members
                if not member.life.locked()
                for each in exited(member.process, member.name)
            ),
        ]

    async def leftovers(self) -> list[str]:
        return [
            *await self._wait_for_none(self._unfinished, "the queue is not empty"),
            *await self._wait_for_none(self._readers, "a gateway still counts readers"),
            *await self._wait_for_none(self._keys, "keys are left"),
            *self._tracebacks(),
        ]

    async def _wait_for_none(self, look: Callable[[], Awaitable[Sequence[Any]]], what: str) -> list[str]:
        until = time.monotonic() + 20
        while seen := await look():
            if time.monotonic() > until:
                return [f"{what}: {seen}"]
            await asyncio.sleep(0.05)
        return []

    async def _get(self, path: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as http:
            return [await http.get(url + path) for url in self.urls]

    async def _unfinished(self) -> list[Any]:
        queues = [reply.json().get("queue", "no queue") for reply in await self._get("/health")]
        return [
            queue
            for queue in queues
            if queue == "no queue" or queue["queued"] or queue["jobs"].get("running") or queue["jobs"].get("queued")
        ]

    async def _readers(self) -> list[str]:
        lines = [line for reply in await self._get("/metrics") for line in reply.text.splitlines()]
        return [line for line in lines if line.startswith("llm_sse_connections") and not line.endswith(" 0.0")]

    async def _keys(self) -> list[bytes]:
        """Keys that an empty queue has no use for, and ended jobs that somebody still follows."""
        found = []
        for node in self.nodes:
            with contextlib.closing(node.client()) as client:
                for key in client.scan_iter(count=1000):
                    kind = key.partition(b"}:")[2].partition(b":")[0].decode()
                    if kind not in AT_REST or (kind == "job" and client.hexists(key, "rs")):
                        found.append(key)
        return found

    def _tracebacks(self) -> list[str]:
        """No fault is a reason to lose one's head."""
        found = []
        for member in self.members:
            text = member.process.errors() + member.process.output()
            if (at := text.find("Traceback")) >= 0:
                found.append(f"{member.name} printed a traceback: …{text[max(0, at - 200) : at + 3000]}")
        return found

    async def leases_lost(self) -> int:
        """How many leases ran out."""
        return int((await self._get("/health"))[0].json()["queue"]["leases_lost"])

    def zombies(self) -> int:
        """Jobs that a worker dropped because another attempt had taken them: writes that the fence refused."""
        return sum(
            line.get("event") == "job_dropped" and line.get("verdict") == "lost"
            for member in self.workers
            for line in member.process.log_lines()
        )


def calls(script: str) -> Callable[[Words], bool]:
    sha = SHA[script].encode()
    return lambda words: words[0] == b"EVALSHA" and words[1] == sha


def _closes(words: Words) -> bool:
    return calls("append")(words) and any(b"completed" in word for word in words)


def _is_big(reply: bytes) -> bool:
    return len(reply) > 200


#: What a process's lost reply may be a reply to: (request, reply) conditions.
REPLIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "gateway": {
        "submit": (calls("submit"),),
        "read": (calls("read"),),
        "follow": (calls("follow"),),
        "cancel": (calls("cancel"),),
    },
    "worker": {
        "append": (calls("append"),),
        "finish": (_closes,),
        "claim": (calls("claim"), _is_big),
        "sweep": (calls("sweep"),),
    },
}


def _jump(clock: SteppedClock | None, dice: random.Random) -> None:
    assert clock is not None
    clock.step(dice.choice([offset for offset in (-3600, 0, 3600) if offset != clock.offset]))
