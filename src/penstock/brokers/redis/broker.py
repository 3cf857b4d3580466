"""The Redis broker. Every verb is one script (``lua/``) on the shard of its job; what a shard is, see shard.py."""

from __future__ import annotations

import asyncio
import secrets
import zlib
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from penstock.brokers.record import (
    CANCELLED,
    EXPIRED,
    POISONED,
    TOMBSTONE_TTL,
    Details,
    decode_cursor,
    encode_cursor,
    max_silence,
    queue_is_full,
    tenant_is_full,
)
from penstock.brokers.redis import scripts
from penstock.brokers.redis.claims import Claims
from penstock.brokers.redis.connection import Address
from penstock.brokers.redis.options import RedisOptions
from penstock.brokers.redis.rows import job_of, pairs, readers_of
from penstock.brokers.redis.server import Tier, fields
from penstock.brokers.redis.shard import LogPart, Shard, lost
from penstock.core.errors import BrokerUnavailable, IdempotencyMismatch, InsufficientStorage, Overloaded
from penstock.core.events import Event, Tokens
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

#: Seconds that a submit or a list waits for the channels that were subscribed to just before.
SUBSCRIBE_TIMEOUT = 1.0
#: Seconds before a stream asks again a Redis that refused.
PAUSE = 0.1
#: Jobs that one sweep changes of each kind, and that one script looks at for a list.
SWEEP_LIMIT = 200
LIST_SCAN = 1000
#: Part of Redis' memory beyond which no job is taken any more: the rest is for those that run.
FULL = 0.9

_pack = msgspec.msgpack.Encoder().encode
_worker = msgspec.msgpack.Decoder(WorkerInfo)

Leased = TypeVar("Leased", Append, Release)

#: A method below is called `list`, as its port is.
Rows = list[scripts.Listed]

_EXPIRED, _CANCELLED, _POISONED = _pack(EXPIRED), _pack(CANCELLED), _pack(POISONED)


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
        self._inbox = secrets.token_hex(4)
        self._shards = [
            Shard(
                Address(url, f"{{{options.prefix}:{number}}}"),
                number=number,
                shards=options.shards,
                prefix=options.prefix,
                inbox=self._inbox,
                policy=self._policy,
                tier=self._tier,
                clock=clock,
                timeout=options.timeout,
                telemetry=telemetry or NoTelemetry(),
                on_notified=partial(self._notified, number),
                on_arrival=self._arrived,
            )
            for number in range(options.shards)
        ]
        self._claims = Claims(self._shards, self._inbox, self.release)
        self._arrivals: dict[bytes, list[asyncio.Queue[str]]] = defaultdict(list)
        self._subscribing: set[asyncio.Future[None]] = set()
        self._memory_full = False

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
        await self._claims.close()
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
        answer = await self._shard(job.id).run(
            scripts.Submit(
                id=job.id,
                tenant=job.tenant,
                user=job.user or "",
                model=job.request.model,
                priority=int(job.priority),
                estimate=job.request.estimated_prompt_tokens,
                deadline=job.deadline_at,
                caller_now=self._clock.now(),
                key=job.idempotency_key,
                fingerprint=job.fingerprint,
                weight=policy.weights.get(job.tenant, 1.0),
                details=_pack(Details.of(job)),
                max_queued=-(-policy.max_queued // shards),
                max_queued_per_tenant=-(-policy.max_queued_per_tenant // shards),
                max_bytes_per_tenant=-(-policy.max_bytes_per_tenant // shards),
                memory_full=self._memory_full,
                retain_for=job.retain_for,
                choices=job.request.n,
            )
        )
        match answer:
            case scripts.Created(created_at, position):
                return msgspec.structs.replace(
                    job, status=Status.QUEUED, created_at=created_at, queue_position=position
                )
            case scripts.Found(record, position):
                return self._shown(record, position)
            case scripts.Refused():
                raise self._refusal(answer)

    def _placed_by_key(self, job: Job) -> Job:
        """*job* under an id in the shard that its idempotency key belongs to: the second submit must find the first."""
        assert job.idempotency_key is not None
        home = self._home(job.tenant, job.idempotency_key)
        while self._shard(job.id) is not home:
            job = msgspec.structs.replace(job, id=new_job_id())
        return job

    @staticmethod
    def _refusal(refused: scripts.Refused) -> IdempotencyMismatch | Overloaded | InsufficientStorage:
        if refused.why == "mismatch":
            return IdempotencyMismatch()
        if refused.why == "memory":
            return InsufficientStorage(
                "Redis is nearly full, so no new jobs are taken. Wait for results to expire, or raise its maxmemory.",
                retry_after=10.0,
            )
        if refused.why == "bytes":
            return Overloaded(
                f"Your requests and results take {refused.amount} bytes, the most one tenant may store. "
                "Let some expire.",
                retry_after=10.0,
            )
        refuse = queue_is_full if refused.why == "full" else tenant_is_full
        return refuse(refused.amount, refused.ends_a_minute / 60)

    # ------------------------------------------------------------------------------------ claim

    async def claim(self, worker: WorkerInfo, models: Collection[str], limit: int, wait: float) -> list[Lease]:
        if limit <= 0 or not models:
            await self.register(worker)
            return []
        return await self._claims.claim(worker, models, limit, wait)

    async def register(self, worker: WorkerInfo) -> None:
        await self._shards[0].run(scripts.Register(worker=worker.id, registration=_pack(worker)))

    def _notified(self, shard: int, worker: int, model: str) -> None:
        self._claims.notify(shard, worker, model)

    # ------------------------------------------------------------------------------------ append

    async def append(self, appends: Sequence[Append]) -> dict[str, Verdict]:
        if len(self._shards) == 1 and appends:
            return await self._append(self._shards[0], appends)
        parts = await asyncio.gather(*(self._append(shard, part) for shard, part in self._by_shard(appends)))
        return {job: verdict for part in parts for job, verdict in part.items()}

    async def _append(self, shard: Shard, appends: Sequence[Append]) -> dict[str, Verdict]:
        blobs: list[bytes] = []

        def blob(value: object) -> int:
            """The number under which the script finds *value*."""
            blobs.append(_pack(value))
            return len(blobs)

        rows = []
        for append in appends:
            lease, finish = append.lease, append.finish
            run = status = reasons = error = stops = None
            if append.ids:
                run = blob(append.run)
            if finish is not None:
                status = Status.COMPLETED if finish.error is None else Status.FAILED
                reasons = blob(finish.finish_reasons)
                error = blob(finish.error) if finish.error is not None else None
                stops = blob(finish.stops) if finish.stops else None
            row = scripts.AppendRow(
                lease.job, lease.tenant, lease.attempt, append.position, len(append.ids), append.prompt_tokens,
                run, status, reasons, error, stops, append.reasoning_tokens, append.cached_tokens,
            )  # fmt: skip
            rows.append(row)
        verdicts = await shard.run(scripts.Append(appends=rows, expired=_EXPIRED, blobs=blobs))
        return {append.lease.job: Verdict(word.decode()) for append, word in zip(appends, verdicts, strict=True)}

    # ------------------------------------------------------------------------------------ release, cancel, sweep

    async def release(self, releases: Sequence[Release]) -> None:
        await asyncio.gather(*(self._release(shard, part) for shard, part in self._by_shard(releases)))

    async def _release(self, shard: Shard, releases: Sequence[Release]) -> None:
        rows, errors = [], []
        for release in releases:
            lease = release.lease
            if release.retry is not None:
                errors.append(_pack(release.retry))
            rows.append(
                scripts.ReleaseRow(
                    lease.job,
                    lease.tenant,
                    lease.attempt,
                    release.delay,
                    release.crashed_beside,
                    len(errors) if release.retry is not None else None,
                )
            )
        await shard.run(scripts.Release(releases=rows, poisoned=_POISONED, blobs=errors))

    async def cancel(self, tenant: str, job: str) -> Job:
        return self._shown(*await self._shard(job).run(scripts.Cancel(tenant=tenant, id=job, cancelled=_CANCELLED)))

    async def forget(self, tenant: str, job: str) -> None:
        await self._shard(job).run(scripts.Forget(tenant=tenant, id=job, cancelled=_CANCELLED))

    async def sweep(self) -> int:
        sweep = scripts.Sweep(
            limit=SWEEP_LIMIT,
            expired=_EXPIRED,
            poisoned=_POISONED,
            max_silence=max_silence(self._policy),
            tombstone_ttl=int(TOMBSTONE_TTL),
        )
        return sum(await asyncio.gather(*(shard.run(sweep) for shard in self._shards)))

    async def tick(self) -> None:
        """Let the store look at the clock, and nothing else (every script does)."""
        await asyncio.gather(*(shard.run(scripts.Notify(model="")) for shard in self._shards))

    # ------------------------------------------------------------------------------------ reading

    async def tail(self, tenant: str, job: str, after: int = 0) -> AsyncGenerator[Event]:
        shard = self._shard(job)
        followed = shard.follow(tenant, job, after)
        try:
            part = await self._patiently(shard, tenant, job, after, follow=True)
            if 0 <= part.floor < after:
                # What lies beyond was written anew since Redis lost its end; a position cannot say which of the two
                # its reader has seen.
                raise lost(after, part.floor)
            if part.open and after >= followed.base:
                for event in part.events:
                    followed.offer(event)
                if part.more:
                    shard.catch_up(job, followed)
            else:
                # Before what this process follows: read up to there. Ended: there is nothing to follow.
                until = followed.base if part.open else 2**62
                is_open = part.open
                while after < until:
                    for i, event in enumerate(part.events, 1):
                        yield event
                        after = event.last if isinstance(event, Tokens) else event.position
                        if i % 32 == 0:
                            await asyncio.sleep(0)  # a long replay must not hold up everybody else
                    if not part.more or part.ends:
                        break
                    part = await self._patiently(shard, tenant, job, after)
                if not is_open or part.ends:
                    return
            async for event in followed.follow(after):
                yield event
        finally:
            shard.leave(job, followed)

    @staticmethod
    async def _patiently(shard: Shard, tenant: str, job: str, after: int, *, follow: bool = False) -> LogPart:
        """A stream outlives a Redis that is away: it reads on when that is back."""
        while True:
            try:
                return await shard.read(tenant, job, after, follow=follow)
            except BrokerUnavailable:
                await asyncio.sleep(PAUSE)
                await shard.commands.up.wait()

    def arrivals(self, tenant: str, user: str) -> AsyncGenerator[str]:
        feed: asyncio.Queue[str] = asyncio.Queue()
        name = f"arrivals:{len(tenant.encode())}:{tenant}:{user}".encode()
        self._arrivals[name].append(feed)  # now, not at the first step of the iterator
        for shard in self._shards:
            confirmed = shard.subscriber.subscribe(shard.base + name)
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
                    shard.subscriber.unsubscribe(shard.base + name)

    def _arrived(self, channel: bytes, job: str) -> None:
        for feed in self._arrivals.get(channel.partition(b":")[2].partition(b"}:")[2], ()):
            feed.put_nowait(job)

    async def _settled(self) -> None:
        """Whoever has begun to listen is heard: what is submitted or listed from now on cannot fall between the two."""
        if self._subscribing:
            await asyncio.wait(list(self._subscribing), timeout=SUBSCRIBE_TIMEOUT)

    async def get(self, tenant: str, job: str) -> Job:
        return self._shown(*await self._shard(job).run(scripts.Get(tenant=tenant, id=job)))

    def _shown(self, record: scripts.Record, position: int) -> Job:
        """A job as this process shows it: its own readers are not the store's to count."""
        job = job_of(record, position)
        others = [reader for reader in readers_of(record) if reader != self._inbox]
        return msgspec.structs.replace(job, readers=len(others)) if others else job

    async def list(self, query: Query) -> Page:
        await self._settled()
        before = "+inf" if query.cursor is None else str(decode_cursor(query.cursor))
        key = query.idempotency_key
        shards = self._shards if key is None else [self._home(query.tenant, key)]
        pages = await asyncio.gather(*(self._list(shard, query, before) for shard in shards))
        # Nothing is known of a shard beyond where its page ends: what others have there comes with the next one, too.
        until = max(end for _, end in pages)
        found = sorted((row for rows, _ in pages for row in rows if row.seq >= until), key=lambda row: -row.seq)
        shown = found[: query.limit]
        return Page(
            [self._shown(row.record, row.position) for row in shown],
            encode_cursor(shown[-1].seq) if len(found) > query.limit or until else None,
        )

    async def _list(self, shard: Shard, query: Query, before: str) -> tuple[Rows, int]:
        """The newest jobs of one shard: one more than asked for, which tells whether there are any, or fewer that are
        large. And the seq of the last one, if there may be more.
        """
        found: Rows = []
        room = PAGE_BYTES // len(self._shards)
        while before and len(found) <= query.limit and room > 0:
            listing = await shard.run(
                scripts.List(
                    tenant=query.tenant,
                    user=query.user,
                    statuses=[*query.status],
                    model=query.model,
                    before=before,
                    limit=query.limit + 1 - len(found),
                    max_looks=LIST_SCAN,
                    key=query.idempotency_key,
                    room=room,
                )
            )
            found += listing.jobs
            room -= sum(len(row.record.details) for row in listing.jobs)
            before = listing.before
        return found, int(before or 0)

    async def stats(self) -> QueueStats:
        stats = scripts.Stats(max_silence=max_silence(self._policy))
        snapshots = await asyncio.gather(*(shard.run(stats) for shard in self._shards))
        await self._look_at_memory()
        counts: Counter[Status] = Counter(dict.fromkeys(Status, 0))
        depth: Counter[tuple[str, Priority]] = Counter()
        workers: dict[str, WorkerInfo] = {}
        for snapshot in snapshots:
            for name, count in pairs(snapshot.counts):
                counts[Status(name.decode())] += int(count)
            for name, count in pairs(snapshot.depth):
                priority, _, model = name.decode().partition(":")
                depth[model, Priority(int(priority))] += int(count)
            for registration in snapshot.workers:
                worker = _worker.decode(registration.worker)
                workers[worker.id] = msgspec.structs.replace(worker, seen_at=snapshot.now - registration.silent)
        return QueueStats(
            depth=dict(depth),
            jobs=dict(counts),
            workers=list(workers.values()),
            drain_rate=sum(snapshot.ends_a_minute for snapshot in snapshots) / 60,
            leases_lost=sum(snapshot.leases_lost for snapshot in snapshots),
            durability=self.durability,
            now=max(snapshot.now for snapshot in snapshots),
        )

    async def _look_at_memory(self) -> None:
        full = False
        for shard in self._shards:
            memory = fields(await shard.commands.call(["INFO", "memory"]))
            limit = int(memory.get("maxmemory", 0))
            full = full or (limit > 0 and int(memory["used_memory"]) > FULL * limit)
        self._memory_full = full
