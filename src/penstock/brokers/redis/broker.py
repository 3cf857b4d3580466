"""The Redis broker. Every verb is one script (``lua/``) on the shard of its job; what a shard is, see shard.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import zlib
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from penstock.brokers.record import (
    CANCELLED,
    EXPIRED,
    POISONED,
    TOMBSTONE_TTL,
    WORKER_TTL,
    Details,
    decode_cursor,
    encode_cursor,
)
from penstock.brokers.redis.link import Address
from penstock.brokers.redis.options import RedisOptions
from penstock.brokers.redis.server import Tier, fields
from penstock.brokers.redis.shard import Shard, lost, missing
from penstock.core.errors import (
    BrokerUnavailable,
    ExpiredResult,
    IdempotencyMismatch,
    InsufficientStorage,
    Overloaded,
)
from penstock.core.events import Ended, Event, Tokens
from penstock.core.job import Job, Priority, Status, new_job_id
from penstock.core.ports import (
    PAGE_BYTES,
    Append,
    Clock,
    Lease,
    Page,
    Query,
    QueuePolicy,
    QueueStats,
    Release,
    SystemClock,
    Verdict,
    WorkerInfo,
)
from penstock.core.telemetry import NoTelemetry, Telemetry

#: Seconds that a claim waits for a wake-up before it looks again by itself.
CLAIM_POLL = 1.0
#: Seconds that calls under way get when the broker is closed.
CLOSE_TIMEOUT = 1.0
#: Seconds before a stream asks again a Redis that refused.
PAUSE = 0.1
#: How often, at least, a worker that claims from many shards says on the first one that it is alive.
REGISTER_INTERVAL = 1.0
#: Jobs that one sweep changes of each kind, and that one script looks at for a list.
SWEEP_LIMIT = 200
LIST_SCAN = 1000
#: Part of Redis' memory beyond which no job is taken any more: the rest is for those that run.
FULL = 0.9

_pack = msgspec.msgpack.Encoder().encode
_details = msgspec.msgpack.Decoder(Details)
_ended = msgspec.msgpack.Decoder(Ended)
_tokens = msgspec.msgpack.Decoder(Tokens)
_worker = msgspec.msgpack.Decoder(WorkerInfo)

T = TypeVar("T")
Leased = TypeVar("Leased", Append, Release)

#: A method below is called `list`, as its port is.
Rows = list[Any]

_EXPIRED, _CANCELLED, _POISONED = _pack(EXPIRED), _pack(CANCELLED), _pack(POISONED)


@dataclass(frozen=True, slots=True)
class _Claim:
    """What ``claim.lua`` is asked; by default that the worker is registered and gets nothing."""

    worker: str
    registration: bytes
    names: Sequence[str] = ()
    limit: int = 0
    reserve: int = 0
    slots: int = 0
    claimant: str = ""
    load: int | str = ""

    def arguments(self) -> list[bytes | str | int | float]:
        return [
            secrets.token_hex(8),
            self.worker,
            self.registration,
            _pack(self.names),
            self.limit,
            self.claimant,
            self.load,
            _EXPIRED,
            self.reserve,
            self.slots,
        ]


class RedisBroker:
    """`penstock.core.ports.Broker` over the Redis (or Valkey) at *url*, for any number of processes.

    *url*: ``redis://``, ``rediss://`` (TLS) or ``unix://``; several, separated by commas, are seeds of one cluster.
    *clock*: the time, for tests; by default it is the server's.
    """

    kind = "redis"

    def __init__(
        self,
        url: str,
        options: RedisOptions | None = None,
        *,
        policy: QueuePolicy | None = None,
        clock: Clock | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        options = options or RedisOptions()
        self._policy = policy or QueuePolicy()
        self._clock = clock or SystemClock()
        self._tier = Tier(options.durability, options.replicas if options.durability == "replicated" else 0)
        self._inbox_id = secrets.token_hex(4)
        self._shards = [
            Shard(
                Address(url, f"{{{options.prefix}:{number}}}"),
                number=number,
                shards=options.shards,
                prefix=options.prefix,
                inbox_id=self._inbox_id,
                policy=self._policy,
                tier=self._tier,
                clock=clock,
                timeout=options.timeout,
                telemetry=telemetry or NoTelemetry(),
                on_ring=lambda worker, model, number=number: self._rung(number, worker, model),  # type: ignore[misc]
                on_arrival=self._arrived,
            )
            for number in range(options.shards)
        ]
        self._rotation = itertools.count()
        self._worker_numbers: dict[str, int] = {}
        self._waiting: dict[int, list[asyncio.Event]] = defaultdict(list)
        self._registered: dict[str, float] = {}
        self._held: dict[str, int] = {}
        """The shard where a job waits for more of a claimant's slots."""
        self._arrivals: dict[bytes, list[asyncio.Queue[str]]] = defaultdict(list)
        self._subscribing: set[asyncio.Future[None]] = set()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._full = False

    @property
    def durability(self) -> str:
        return self._tier.description

    async def open(self) -> None:
        """Connect. Raises `InvalidRequest` when the server does not keep what the tier promises (the message says what
        to set), `BrokerUnavailable` when it does not answer."""
        try:
            for shard in self._shards:
                await shard.open()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Disconnect, once claims that nobody waits for any more have been given back."""
        for _ in range(2):  # a claim, then its release
            if self._tasks:
                await asyncio.wait(list(self._tasks), timeout=CLOSE_TIMEOUT)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(shard.close() for shard in self._shards))

    def _shard(self, job: str) -> Shard:
        return self._shards[zlib.crc32(job.encode()) % len(self._shards)]

    def _home(self, tenant: str, idempotency_key: str) -> Shard:
        """Where the job is that was submitted under this key, if there is one."""
        return self._shard(f"{tenant}\0{idempotency_key}")

    def _by_shard(self, leased: Sequence[Leased]) -> Iterable[tuple[Shard, Sequence[Leased]]]:
        parts: dict[Shard, list[Leased]] = defaultdict(list)
        for each in leased:
            parts[self._shard(each.lease.job)].append(each)
        return parts.items()

    # ------------------------------------------------------------------------------------ submit

    async def submit(self, job: Job) -> Job:
        await self._settled()
        if job.idempotency_key is not None and len(self._shards) > 1:
            job = self._placed_by_key(job)
        policy, shards = self._policy, len(self._shards)
        request = _pack(Details.of(job))
        kind, *rest = await self._shard(job.id).run(
            "submit",
            job.id,
            job.tenant,
            job.user or "",
            job.request.model,
            int(job.priority),
            job.request.estimated_prompt_tokens,
            "" if job.deadline_at is None else repr(job.deadline_at),
            repr(self._clock.now()),
            job.idempotency_key or "",
            job.fingerprint,
            repr(policy.weights.get(job.tenant, 1.0)),
            request,
            -(-policy.max_queued // shards),
            -(-policy.max_queued_per_tenant // shards),
            -(-policy.max_bytes_per_tenant // shards),
            int(self._full),
            "" if job.keep is None else repr(job.keep),
            job.request.n,
        )
        if kind == b"new":
            created_at, position = rest
            return msgspec.structs.replace(
                job, status=Status.QUEUED, created_at=float(created_at), queue_position=position
            )
        if kind == b"old":
            return self._job(rest[0], rest[1])
        if kind == b"mismatch":
            raise IdempotencyMismatch
        raise self._overloaded(kind, *rest)

    def _placed_by_key(self, job: Job) -> Job:
        """*job* under an id in the shard that its idempotency key belongs to: the second submit must find the first."""
        assert job.idempotency_key is not None
        home = self._home(job.tenant, job.idempotency_key)
        while self._shard(job.id) is not home:
            job = msgspec.structs.replace(job, id=new_job_id())
        return job

    def _overloaded(self, kind: bytes, count: int, ended: int) -> Overloaded | InsufficientStorage:
        """*ended*: jobs that end a minute, for an honest guess at when there is room."""
        if kind == b"memory":
            return InsufficientStorage(
                "Redis is nearly full, so no new jobs are taken. Wait for results to expire, or raise its maxmemory.",
                retry_after=10.0,
            )
        retry_after = min(60.0, max(1.0, (count // 10 or 1) * 60 / ended)) if ended else 5.0
        if kind == b"bytes":
            return Overloaded(
                f"Your requests and results take {count} bytes, the most one tenant may store. Let some expire.",
                retry_after=10.0,
            )
        if kind == b"full":
            return Overloaded(f"The queue is full ({count} jobs). Try again later.", retry_after=retry_after)
        return Overloaded(
            f"You have {count} jobs waiting, the most one tenant may have. Try again later.", retry_after=retry_after
        )

    # ------------------------------------------------------------------------------------ claim

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        loop = asyncio.get_running_loop()
        registration = _pack(worker)
        # Suspects first: they were there before, and they wait in lanes of their own.
        names = [*(f"{name}\0suspects" for name in models if worker.takes_suspects), *models]
        if limit <= 0 or not names:
            await self._shards[0].run("claim", *_Claim(worker.id, registration).arguments())
            return []
        until = loop.time() + wait
        number, bell = self._worker_numbers.setdefault(worker.id, len(self._worker_numbers)), asyncio.Event()
        self._waiting[number].append(bell)
        try:
            while True:
                left = min(CLAIM_POLL, until - loop.time())
                claim = _Claim(
                    worker.id,
                    registration,
                    names,
                    limit,
                    reserve=worker.reserve,
                    slots=max(worker.slots, limit),
                    claimant=f"{self._inbox_id}/{number}",
                    load=max(0, worker.slots - limit) if left > 0 else "",
                )
                bell.clear()
                leases = await self._uncancelled(self._take(claim))
                if leases or left <= 0:
                    return leases
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await bell.wait()
        finally:
            self._waiting[number].remove(bell)

    async def _take(self, claim: _Claim) -> list[Lease]:
        """Claim from one shard after the other, each time beginning with the next, until enough jobs are leased.

        Where a job waits for more slots than are left, nothing is claimed behind it, and the next claim begins there:
        the jobs of other shards would take what it waits for, again and again.
        """
        leases: list[Lease] = []
        free, answered, failure = claim.limit, False, None
        first = self._held.pop(claim.claimant, None)
        if first is None:
            first = next(self._rotation)
        now = asyncio.get_running_loop().time()
        for i in range(len(self._shards)):
            shard = self._shards[(first + i) % len(self._shards)]
            if not shard.link.up.is_set() and any(other.link.up.is_set() for other in self._shards):
                continue  # its jobs wait until it is back; the others' don't
            registers = shard.number == 0
            if registers:
                self._registered[claim.worker] = now
            rest = replace(
                claim,
                worker=claim.worker if registers else "",
                limit=free,
                load="" if leases else claim.load,
            )
            try:
                found, held = await shard.run("claim", *rest.arguments())
                answered = True
            except BrokerUnavailable as error:
                failure = error
                continue
            leases += (new := [_lease(*each) for each in found])
            free -= sum(lease.job.request.slots(claim.slots) for lease in new)
            if held:
                self._held[claim.claimant] = shard.number
            if held or free <= 0:
                break
        if failure is not None and not answered:
            raise failure
        if self._registered.get(claim.worker, 0.0) < now - REGISTER_INTERVAL:
            self._registered[claim.worker] = now
            self._shards[0].post("claim", *_Claim(claim.worker, claim.registration).arguments())
        return leases

    async def _uncancelled(self, claim: Coroutine[Any, Any, list[Lease]]) -> list[Lease]:
        """The leases of *claim*; if the caller is cancelled meanwhile, they are given back when they come."""
        task = self._spawn(claim)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._give_back)
            raise

    def _give_back(self, claim: asyncio.Future[list[Lease]]) -> None:
        if not claim.cancelled() and claim.exception() is None and claim.result():
            releases = [Release(lease.key) for lease in claim.result()]
            self._spawn(self.release(releases))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _rung(self, shard: int, worker: int, model: str) -> None:
        if not self._waiting[worker]:
            self._shards[shard].post("ring", model)  # it no longer waits: the next one
        for bell in self._waiting[worker]:
            bell.set()

    # ------------------------------------------------------------------------------------ append

    async def append(self, appends: Sequence[Append]) -> dict[str, Verdict]:
        if len(self._shards) == 1 and appends:
            return await self._append(self._shards[0], appends)
        parts = await asyncio.gather(*(self._append(shard, part) for shard, part in self._by_shard(appends)))
        return {job: verdict for part in parts for job, verdict in part.items()}

    async def _append(self, shard: Shard, appends: Sequence[Append]) -> dict[str, Verdict]:
        blobs: list[bytes] = []

        def argument(value: object) -> int:
            """The number under which the script finds *value* (ARGV counts from 1; the blobs begin at 5)."""
            blobs.append(_pack(value))
            return 4 + len(blobs)

        rows = []
        for append in appends:
            lease, finish = append.lease, append.finish
            row: list[object] = [
                lease.job, lease.tenant, lease.attempt, append.position, len(append.ids),
                append.prompt_tokens if append.prompt_tokens is not None else False,
                False, False, False, False, False,
            ]  # fmt: skip
            if append.ids:
                row[6] = argument(
                    Tokens(append.position, lease.attempt, append.ids, append.texts, append.choices, append.logprobs)
                )
            if finish is not None:
                row[7] = str(Status.COMPLETED if finish.error is None else Status.FAILED)
                row[8] = argument(finish.finish_reasons)
                if finish.error is not None:
                    row[9] = argument(finish.error)
                if finish.stops:
                    row[10] = argument(finish.stops)
            rows.append(row)
        words = await shard.run("append", _pack(rows), _EXPIRED, *blobs)
        return {append.lease.job: Verdict(word.decode()) for append, word in zip(appends, words, strict=True)}

    # ------------------------------------------------------------------------------------ release, cancel, sweep

    async def release(self, releases: Sequence[Release]) -> None:
        await asyncio.gather(*(self._release(shard, part) for shard, part in self._by_shard(releases)))

    async def _release(self, shard: Shard, releases: Sequence[Release]) -> None:
        rows, errors = [], []
        for release in releases:
            lease = release.lease
            retry: int | bool = False
            if release.retry is not None:
                errors.append(_pack(release.retry))
                retry = 4 + len(errors)
            beside = False if release.crashed_beside is None else release.crashed_beside
            rows.append([lease.job, lease.tenant, lease.attempt, beside, retry, release.delay])
        await shard.run("release", _pack(rows), _POISONED, *errors)

    async def cancel(self, tenant: str, job: str) -> Job:
        return self._found(await self._shard(job).run("cancel", tenant, job, _CANCELLED))

    async def forget(self, tenant: str, job: str) -> None:
        await self._shard(job).run("forget", tenant, job, _CANCELLED)

    async def sweep(self) -> int:
        arguments = (SWEEP_LIMIT, _EXPIRED, _POISONED, self._horizon, int(TOMBSTONE_TTL))
        return sum(await asyncio.gather(*(shard.run("sweep", *arguments) for shard in self._shards)))

    async def tick(self) -> None:
        """Let the store look at the clock, and nothing else (every script does)."""
        await asyncio.gather(*(shard.run("ring", "") for shard in self._shards))

    @property
    def _horizon(self) -> float:
        return WORKER_TTL * max(self._policy.lease_ttl, 2.0)

    # ------------------------------------------------------------------------------------ reading

    async def tail(self, tenant: str, job: str, after: int = 0) -> AsyncGenerator[Event]:
        shard = self._shard(job)
        followed = shard.follow(tenant, job, after)
        try:
            events, is_open, floor, more = await self._patiently(shard, tenant, job, after, follow=True)
            if 0 <= floor < after:
                # What lies beyond was written anew since Redis lost its end; a position cannot say which of the two
                # its reader has seen.
                raise lost(after, floor)
            if is_open and after >= followed.base:
                for event in events:
                    followed.offer(event)
                if more:
                    shard.catch_up(job, followed)
            else:
                # Before what this process follows: read up to there. Ended: there is nothing to follow.
                until = followed.base if is_open else 2**62
                while after < until:
                    for i, event in enumerate(events, 1):
                        yield event
                        after = event.last if isinstance(event, Tokens) else event.position
                        if i % 32 == 0:
                            await asyncio.sleep(0)  # a long replay must not hold up everybody else
                    if not more or (events and isinstance(events[-1], Ended)):
                        break
                    events, _, _, more = await self._patiently(shard, tenant, job, after)
                if not is_open or (events and isinstance(events[-1], Ended)):
                    return
            async for event in followed.follow(after):
                yield event
        finally:
            shard.leave(job, followed)

    @staticmethod
    async def _patiently(
        shard: Shard, tenant: str, job: str, after: int, *, follow: bool = False
    ) -> tuple[Sequence[Event], bool, int, bool]:
        """A stream outlives a Redis that is away: it reads on when that is back."""
        while True:
            try:
                return await shard.read(tenant, job, after, follow=follow)
            except BrokerUnavailable:
                await asyncio.sleep(PAUSE)
                await shard.link.up.wait()

    def arrivals(self, tenant: str, user: str) -> AsyncGenerator[str]:
        feed: asyncio.Queue[str] = asyncio.Queue()
        name = f"arrivals:{len(tenant.encode())}:{tenant}:{user}".encode()
        self._arrivals[name].append(feed)  # now, not at the first step of the iterator
        for shard in self._shards:
            confirmed = shard.inbox.subscribe(shard.base + name)
            if not confirmed.done():
                self._subscribing.add(confirmed)
                confirmed.add_done_callback(self._subscribing.discard)
        return self._arriving(name, feed)

    async def _arriving(self, name: bytes, feed: asyncio.Queue[str]) -> AsyncGenerator[str]:
        try:
            while True:
                yield await feed.get()
        finally:
            feeds = self._arrivals[name]
            feeds.remove(feed)
            if not feeds:
                del self._arrivals[name]
                for shard in self._shards:
                    shard.inbox.unsubscribe(shard.base + name)

    def _arrived(self, channel: bytes, job: str) -> None:
        for feed in self._arrivals.get(channel.partition(b":")[2].partition(b"}:")[2], ()):
            feed.put_nowait(job)

    async def _settled(self) -> None:
        """Whoever has begun to listen is heard: what is submitted or listed from now on cannot fall between the two."""
        if self._subscribing:
            await asyncio.wait(list(self._subscribing), timeout=CLAIM_POLL)

    async def get(self, tenant: str, job: str) -> Job:
        return self._found(await self._shard(job).run("get", tenant, job))

    def _found(self, answer: Sequence[Any]) -> Job:
        if answer[0] != b"job":
            raise missing(answer[0])
        return self._job(answer[1], answer[2])

    def _job(self, record: Sequence[Any], position: int) -> Job:
        """A job as this process shows it: its own readers are not the store's to count."""
        job, readers = _job(record, position)
        others = [reader for reader in readers.split(",") if reader and reader != self._inbox_id]
        return msgspec.structs.replace(job, readers=len(others)) if others else job

    async def list(self, query: Query) -> Page:
        await self._settled()
        before = "+inf" if query.cursor is None else str(decode_cursor(query.cursor))
        key = query.idempotency_key
        shards = self._shards if key is None else [self._home(query.tenant, key)]
        pages = await asyncio.gather(*(self._list(shard, query, before) for shard in shards))
        # Nothing is known of a shard beyond where its page ends: what others have there comes with the next one, too.
        until = max(end for _, end in pages)
        found = sorted((row for rows, _ in pages for row in rows if int(row[2]) >= until), key=lambda row: -int(row[2]))
        jobs = found[: query.limit]
        return Page(
            [self._job(record, position) for record, position, _ in jobs],
            encode_cursor(int(jobs[-1][2])) if len(found) > query.limit or until else None,
        )

    async def _list(self, shard: Shard, query: Query, before: str) -> tuple[Rows, int]:
        """The newest jobs of one shard: one more than asked for, which tells whether there are any, or fewer that are
        large. And the seq of the last one, if there may be more.
        """
        statuses = _pack([str(status) for status in query.status])
        found: Rows = []
        room = PAGE_BYTES // len(self._shards)
        while before and len(found) <= query.limit and room > 0:
            rows, next_before = await shard.run(
                "list", query.tenant, query.user or "", statuses, query.model or "", before,
                query.limit + 1 - len(found), LIST_SCAN, query.idempotency_key or "", room,
            )  # fmt: skip
            found += rows
            room -= sum(len(record[1]) for record, _, _ in rows)
            before = next_before.decode()
        return found, int(before or 0)

    async def stats(self) -> QueueStats:
        answers = await asyncio.gather(*(shard.run("stats", self._horizon) for shard in self._shards))
        await self._look_at_memory()
        counts: Counter[Status] = Counter(dict.fromkeys(Status, 0))
        depth: Counter[tuple[str, Priority]] = Counter()
        workers: dict[str, WorkerInfo] = {}
        ended = lost_leases = 0
        for shard_counts, shard_depth, shard_workers, ends, lost_here, now in answers:
            for name, count in _pairs(shard_counts):
                counts[Status(name.decode())] += int(count)
            for name, count in _pairs(shard_depth):
                priority, _, model = name.decode().partition(":")
                depth[model, Priority(int(priority))] += int(count)
            for blob, silent in shard_workers:
                worker = _worker.decode(blob)
                workers[worker.id] = msgspec.structs.replace(worker, seen_at=float(now) - float(silent))
            ended += ends
            lost_leases += lost_here
        return QueueStats(
            depth=dict(depth),
            jobs=dict(counts),
            workers=list(workers.values()),
            drain_rate=ended / 60,
            leases_lost=lost_leases,
            durability=self.durability,
            now=max(float(now) for *_, now in answers),
        )

    async def _look_at_memory(self) -> None:
        full = False
        for shard in self._shards:
            memory = fields(await shard.link.call(["INFO", "memory"]))
            limit = int(memory.get("maxmemory", 0))
            full = full or (limit > 0 and int(memory["used_memory"]) > FULL * limit)
        self._full = full


# ---------------------------------------------------------------------------------------------- rows


def _pairs(flat: list[bytes]) -> zip[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _job(record: Sequence[Any], position: int = 0) -> tuple[Job, str]:
    """A job from its hash and its request (see lua/lib.lua for the fields), and who follows it."""
    row = dict(_pairs(record[0]))
    if not record[1]:
        raise ExpiredResult("This job ended, and its result has expired.")
    details = _details.decode(record[1])
    ended = _ended.decode(row[b"en"]) if b"en" in row else None

    def time(name: bytes) -> float | None:
        return float(row[name]) if name in row else None

    job = Job(
        id=row[b"id"].decode(),
        tenant=row[b"t"].decode(),
        request=details.request,
        user=row[b"u"].decode() or None,
        priority=Priority(int(row[b"p"])),
        idempotency_key=row[b"ik"].decode() if b"ik" in row else None,
        fingerprint=row[b"fp"],
        request_id=details.request_id,
        metadata=details.metadata,
        on_disconnect=details.on_disconnect,
        deadline_at=time(b"dl"),
        view=details.view,
        keep=details.keep,
        trace=details.trace,
        created_at=float(row[b"ca"]),
        status=Status(row[b"s"].decode()),
        attempt=int(row[b"a"]),
        queue_position=position or None,
        tokens=int(row[b"h"]),
        prompt_tokens=int(row[b"pt"]) if b"pt" in row else None,
        started_at=time(b"sa"),
        first_token_at=time(b"fa"),
        ended_at=time(b"ea"),
        finish_reasons=ended.finish_reasons if ended else (),
        error=ended.error if ended else None,
        retries=int(row.get(b"re", 0)),
        crashes=int(row.get(b"cr", 0)),
        suspects=int(row.get(b"su", 0)),
    )
    return job, row.get(b"rs", b"").decode()


def _lease(attempt: int, record: list[Any], log: list[bytes]) -> Lease:
    """A lease with the log so far: overlapping runs count once, as for every reader."""
    ids: list[int] = []
    texts: list[str] = []
    choices: list[int] = []
    multiple = False
    for blob in log:
        run = _tokens.decode(blob).after(len(ids))
        ids += run.ids
        texts += run.texts
        choices += run.choices or [0] * len(run.ids)
        multiple = multiple or run.choices is not None
    return Lease(_job(record)[0], attempt, ids, texts, choices if multiple else None)
