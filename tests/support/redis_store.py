"""What the Redis broker keeps, read from outside by a plain client: a dump of all its keys, and a judge of them.

The judge recomputes every counter and index from the jobs' hashes, so that a transition which forgets one of them, or
counts twice, is found at once (`problems`). What the keys are is written down in lua/lib.lua.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

import msgspec
import redis

from penstock.core.events import Ended, Tokens

Store = dict[bytes, Any]

#: What says when something was asked, not what was done.
BOOKKEEPING = (b"clock", b"reply:", b"idle:", b"called:", b"alive", b"workers")
#: The only keys that a queue without jobs may keep for ever.
CONSTANT = frozenset({b"clock", b"meta", b"ends", b"alive", b"workers"})

AHEAD = -(2**52)
OPEN = (b"queued", b"running")

_tokens = msgspec.msgpack.Decoder(Tokens)
_ended = msgspec.msgpack.Decoder(Ended)


def dump(client: redis.Redis, base: str, without: Collection[bytes] = ()) -> Store:
    """Every key of a shard (named without its prefix) and its value; but not those that begin with *without*."""
    prefix = base.encode()
    found = client.scan_iter(match=base + "*", count=10_000)
    names = sorted({key for key in found if not key[len(prefix) :].startswith(tuple(without))})
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.type(name)
    kinds = pipe.execute()
    for name, kind in zip(names, kinds, strict=True):
        match kind:
            case b"hash":
                pipe.hgetall(name)
            case b"zset":
                pipe.zrange(name, 0, -1, withscores=True)
            case b"set":
                pipe.smembers(name)
            case b"stream":
                pipe.xrange(name)
            case b"string":
                pipe.get(name)
            case _:
                pipe.ping()  # it expired between the two
    values = pipe.execute()
    return {
        name[len(prefix) :]: dict(value) if kind == b"zset" else value
        for name, kind, value in zip(names, kinds, values, strict=True)
        if kind != b"none"
    }


def differences(before: Store, after: Store) -> list[str]:
    """What differs between two dumps, for people."""
    return [
        f"{name.decode(errors='replace')}: {before.get(name)!r} → {after.get(name)!r}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def problems(store: Store, *, max_running: int = 0) -> list[str]:
    """Where counters and indexes disagree with the jobs."""
    judge = _Judge(store, max_running)
    judge.jobs_and_logs()
    judge.counters()
    judge.queue()
    judge.indexes()
    judge.names()
    return judge.found


def _waits_for(job: dict[bytes, bytes]) -> bytes:
    """Suspects of an engine's death have lanes of their own."""
    return job[b"m"] + (b"\0suspects" if int(job.get(b"su", 0)) else b"")


class _Judge:
    def __init__(self, store: Store, max_running: int) -> None:
        self.store = store
        self.max_running = max_running
        self.jobs = {key[4:]: value for key, value in store.items() if key.startswith(b"job:")}
        self.found: list[str] = []

    def expect(self, what: object, is_: object, should_be: object) -> None:
        if is_ != should_be:
            self.found.append(f"{what!s}: {is_!r}, not {should_be!r}")

    def zset(self, name: bytes) -> dict[bytes, float]:
        return dict(self.store.get(name, {}))

    def numbers(self, name: bytes) -> dict[bytes, float]:
        return {field: float(value) for field, value in self.store.get(name, {}).items()}

    def where(self, **fields: bytes) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return [(id, job) for id, job in self.jobs.items() if all(job[f.encode()] == v for f, v in fields.items())]

    # ------------------------------------------------------------------------------------ jobs

    def jobs_and_logs(self) -> None:
        for id, job in self.jobs.items():
            entries = self.store.get(b"log:" + id, [])
            head, attempt, ends = 0, 0, 0
            for position, fields in entries:
                if b"t" in fields:
                    run = _tokens.decode(fields[b"t"])
                    if run.position > head + 1 or run.last <= head or ends:
                        self.found.append(f"log of {id!r}: a run {run.position}-{run.last} after {head}")
                    if run.attempt < attempt:
                        self.found.append(f"log of {id!r}: attempt {run.attempt} after {attempt}")
                    head, attempt = run.last, run.attempt
                    self.expect(f"log of {id!r}: position", position, b"%d-0" % head)
                else:
                    end, ends = _ended.decode(fields[b"e"]), ends + 1
                    self.expect(f"log of {id!r}: end", (end.position, position), (head + 1, b"%d-0" % (head + 1)))
                    self.expect(f"log of {id!r}: end's status", end.status.value.encode(), job[b"s"])
                    self.expect(f"log of {id!r}: usage", end.usage.completion_tokens, head)
                    self.expect(f"{id!r} en", job.get(b"en"), fields[b"e"])
            self.expect(f"head of {id!r}", int(job[b"h"]), head)
            is_open = job[b"s"] in OPEN
            self.expect(f"ends of {id!r}", ends, 0 if is_open else 1)
            self.expect(f"request of {id!r}", b"req:" + id in self.store, True)
            self.expect(f"end of {id!r}", b"en" in job, not is_open)
            if int(job[b"a"]) < attempt:
                self.found.append(f"{id!r}: attempt {job[b'a']!r} is behind its log's {attempt}")
            if not is_open and job.get(b"rs"):
                self.found.append(f"{id!r} has ended and has readers: {job[b'rs']!r}")
            self.expect(f"tombstone of {id!r}", b"gone:" + id in self.store, False)
        for key in self.store:
            kind, _, id = key.partition(b":")
            if kind in (b"req", b"log") and id not in self.jobs:
                self.found.append(f"{key!r} without its job")

    # ------------------------------------------------------------------------------------ counters

    def counters(self) -> None:
        classes = Counter(job[b"p"] + b":" + job[b"m"] for _, job in self.where(s=b"queued"))
        ready = Counter(job[b"p"] + b":" + _waits_for(job) for _, job in self.where(s=b"queued", rd=b"1"))
        self.expect("counts", self.numbers(b"counts"), dict(Counter(job[b"s"] for job in self.jobs.values())))
        self.expect("depth", self.numbers(b"depth"), dict(classes))
        self.expect("ready", self.numbers(b"ready"), dict(ready))
        tenants = {key[7:] for key in self.store if key.startswith(b"tenant:")} | {j[b"t"] for j in self.jobs.values()}
        for tenant in tenants:
            own = self.numbers(b"tenant:" + tenant)
            self.expect(f"n of {tenant!r}", own.get(b"n", 0), len(self.where(t=tenant, s=b"queued")))
            self.expect(f"r of {tenant!r}", own.get(b"r", 0), len(self.where(t=tenant, s=b"running")))
            stored = sum(int(job[b"by"]) for _, job in self.where(t=tenant))
            self.expect(f"by of {tenant!r}", own.get(b"by", 0), stored)
        for id, job in self.jobs.items():
            runs = sum(len(f[b"t"]) + 32 for _, f in self.store.get(b"log:" + id, []) if b"t" in f)
            self.expect(f"by of {id!r}", int(job[b"by"]), len(self.store.get(b"req:" + id, b"")) + 1024 + runs)

    def counter(self, tenant: bytes) -> float:
        return self.numbers(b"tenant:" + tenant).get(b"c", 0.0)

    # ------------------------------------------------------------------------------------ the queue

    def queue(self) -> None:
        lanes: dict[bytes, dict[bytes, float]] = defaultdict(dict)
        classes: dict[bytes, set[bytes]] = defaultdict(set)
        for id, job in self.where(s=b"queued", rd=b"1"):
            score = float(job[b"q"]) + (AHEAD if job[b"hd"] == b"1" else 0)
            model = _waits_for(job)
            lanes[b"lane:%s:%d:%s:%s" % (job[b"p"], len(model), model, job[b"t"])][id] = score
            classes[job[b"t"]].add(job[b"p"] + b":" + model)
        for name in {*lanes, *(key for key in self.store if key.startswith(b"lane:"))}:
            self.expect(name, self.zset(name), lanes.get(name, {}))
        tenants = {*classes, *(key[8:] for key in self.store if key.startswith(b"classes:"))}
        for tenant in tenants:
            self.expect(f"classes of {tenant!r}", self.store.get(b"classes:" + tenant, set()), classes[tenant])
        parked = {key[7:] for key, value in self.store.items() if key.startswith(b"tenant:") and b"pk" in value}
        for tenant in parked:
            if not self.max_running or len(self.where(t=tenant, s=b"running")) < self.max_running:
                self.found.append(f"{tenant!r} is parked and may run more")
        for class_ in {each for own in classes.values() for each in own} | self._served():
            scores = self.zset(b"lanes:" + class_)
            owners = {tenant for tenant, own in classes.items() if class_ in own}
            if not owners - parked <= set(scores) <= owners:
                self.found.append(f"lanes:{class_!r}: {sorted(scores)}, but {owners} wait there, parked: {parked}")
            for tenant, score in scores.items():
                self._is_lower_bound(f"lanes:{class_!r}", tenant, score)
        waiting = self.zset(b"waiting")
        self.expect("waiting", set(waiting), {job[b"t"] for _, job in self.where(s=b"queued")})
        for tenant, score in waiting.items():
            self._is_lower_bound("waiting", tenant, score)

    def _served(self) -> set[bytes]:
        return {key[6:] for key in self.store if key.startswith(b"lanes:")}

    def _is_lower_bound(self, where: str, tenant: bytes, score: float) -> None:
        if score > self.counter(tenant) + 1e-6:
            self.found.append(f"{where}: {tenant!r} stands at {score}, above its counter {self.counter(tenant)}")

    # ------------------------------------------------------------------------------------ indexes

    def indexes(self) -> None:
        is_open = {id: job for id, job in self.jobs.items() if job[b"s"] in OPEN}
        self.expect("leases", set(self.zset(b"leases")), {id for id, _ in self.where(s=b"running")})
        self.expect("delayed", set(self.zset(b"delayed")), {id for id, _ in self.where(s=b"queued", rd=b"0")})
        self.expect(
            "deadlines", self.zset(b"deadlines"), {id: float(j[b"dl"]) for id, j in is_open.items() if b"dl" in j}
        )
        ends = {id: float(job[b"ea"]) for id, job in self.jobs.items() if id not in is_open}
        dated = self.zset(b"ended")
        self.expect("ended", dated.keys(), ends.keys())
        if dated.keys() == ends.keys():
            # One that is kept for a time of its own is dated by how much that differs from all the others'.
            late = {ends[id] + float(self.jobs[id][b"ke"]) - dated[id] for id in ends if b"ke" in self.jobs[id]}
            self.expect("result_ttl, by which kept jobs are dated", len(late), min(1, len(late)))
            own = {id: end for id, end in ends.items() if b"ke" not in self.jobs[id]}
            self.expect("ended", {id: dated[id] for id in own}, own)
        lists: dict[bytes, dict[bytes, float]] = defaultdict(dict)
        keys: dict[bytes, bytes] = {}
        for id, job in self.jobs.items():
            sized = b"%d:%s:" % (len(job[b"t"]), job[b"t"])
            lists[b"list:" + job[b"t"]][id] = float(job[b"q"])
            if job[b"u"]:
                lists[b"user:" + sized + job[b"u"]][id] = float(job[b"q"])
            if b"ik" in job:
                keys[b"key:" + sized + job[b"ik"]] = id
        for prefix, wanted in ((b"list:", lists), (b"user:", lists), (b"key:", keys)):
            there = {key for key in self.store if key.startswith(prefix)}
            for name in there | {key for key in wanted if key.startswith(prefix)}:
                self.expect(name, self.store.get(name), wanted.get(name))
        sequence = [int(job[b"q"]) for job in self.jobs.values()]
        self.expect("order of arrival", len(set(sequence)), len(sequence))
        if sequence and max(sequence) > int(self.store[b"meta"][b"seq"]):
            self.found.append("a job is newer than the newest")

    def names(self) -> None:
        known = re.compile(
            rb"(clock|meta|waiting|leases|deadlines|delayed|ended|depth|ready|counts|ends|workers|alive|"
            rb"(job|req|log|gone|key|tenant|lane|lanes|classes|list|user|idle|called|reply):.*)",
            re.DOTALL,
        )
        self.found += [f"what is {key!r}?" for key in self.store if not known.fullmatch(key)]
