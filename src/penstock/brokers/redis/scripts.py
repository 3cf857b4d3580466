"""The transitions as Lua scripts, one file each in ``lua/``: each is atomic, and harmless when it is run twice.

A script is a struct here. Its fields are what the file is given, as locals of the same names, and `parse` makes of the
reply what the script answers. In Lua an argument that is None is nil, a list is a table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_args, get_type_hints

import msgspec

from penstock.brokers.record import result_expired, unknown
from penstock.brokers.redis.connection import Word
from penstock.core.errors import NotFound
from penstock.core.ports import QueuePolicy

Answer = TypeVar("Answer")

#: Arguments in any number, the last of a script: ``blobs(n)`` is the nth of them in Lua, counted from 1.
Blobs = Sequence[bytes]

#: From a value to the word that is sent of it.
Encoder = Callable[[Any], Word]

_pack = msgspec.msgpack.Encoder().encode


# ---------------------------------------------------------------------------------------------- what they answer


class Record(NamedTuple):
    """A job as it is stored: its hash (names and values in turn; see lua/lib.lua), and its request."""

    fields: list[bytes]
    details: bytes


class Found(NamedTuple):
    record: Record
    position: int
    """In the queue; 0 where it is not in it."""


class Created(NamedTuple):
    created_at: float
    position: int


class Refused(NamedTuple):
    """``why``: memory, full, tenant, bytes, or mismatch. ``amount``: jobs that wait, or bytes that are stored."""

    why: str
    amount: int = 0
    ends_a_minute: int = 0


class LeasedJob(NamedTuple):
    attempt: int
    record: Record
    log: list[bytes]


class Claimed(NamedTuple):
    leases: list[LeasedJob]
    held: bool
    """Does a job wait for more slots than are left?"""


class Head(NamedTuple):
    """How the log of a job stands; its head is -1 where the job is gone.

    ``claimed_in``: the epoch of its last claim. ``floor``: the head when it was claimed in a new epoch, or -1.
    """

    head: int
    status: bytes = b""
    claimed_in: int = 0
    floor: int = -1


class Heads(NamedTuple):
    epoch: int
    heads: list[Head]


class LogPage(NamedTuple):
    """A part of a log: ``runs`` are (t for tokens or e for the end, blob) each. The rest as in `Head`."""

    head: int
    status: bytes
    epoch: int
    floor: int
    runs: list[tuple[bytes, bytes]]


class Beyond(NamedTuple):
    """What was asked for lies beyond the log's head."""

    head: int


class Listed(NamedTuple):
    record: Record
    position: int
    seq: int


class Listing(NamedTuple):
    jobs: list[Listed]
    before: str
    """The seq before which the next page begins; empty at the end."""


class Registration(NamedTuple):
    """What a worker said of itself, and how many seconds ago."""

    worker: bytes
    silent: float


class Snapshot(NamedTuple):
    """``counts`` and ``depth`` are names and numbers in turn."""

    counts: list[bytes]
    depth: list[bytes]
    workers: list[Registration]
    ends_a_minute: int
    leases_lost: int
    now: float


class Entered(NamedTuple):
    epoch: int
    shards: int


def _found(reply: Any) -> Found:
    kind, *rest = reply
    if kind != b"job":
        raise missing(kind)
    return Found(Record(*rest[0]), rest[1])


def missing(kind: bytes) -> NotFound:
    return result_expired() if kind == b"expired" else unknown()


# ---------------------------------------------------------------------------------------------- what they are given


class Script(msgspec.Struct, Generic[Answer], kw_only=True):
    """A call of the script whose file has its class's name."""

    name: ClassVar[str]
    only_reads: ClassVar[bool] = False
    """It changes nothing that has to be durable."""
    encoders: ClassVar[dict[int, Encoder]]

    has_blobs: ClassVar[bool] = False
    """The last field is `Blobs`."""

    def parse(self, reply: Any) -> Answer:
        """What the script answers, of its reply."""
        raise NotImplementedError

    def words(self) -> list[Word]:
        """Its arguments, as they are sent."""
        words: list[Any] = [*msgspec.structs.astuple(self)]
        for number, encode in self.encoders.items():
            words[number] = encode(words[number])
        if self.has_blobs:
            words += words.pop()
        return words


class Enter(Script[Entered]):
    """A process (re)connects."""

    run_id: str
    """Of the server."""
    can_lose: bool
    """Can a crash of the server lose writes, in this tier?"""
    shards: int

    def parse(self, reply: Any) -> Entered:
        return Entered(*map(int, reply))


class Submit(Script[Created | Found | Refused]):
    """Store a job and queue it. Sent twice (the same id), it answers the job that is there."""

    id: str
    tenant: str
    user: str
    """Empty: none."""
    model: str
    priority: int
    estimate: int
    """Prompt tokens, about."""
    deadline: float | None
    caller_now: float
    """The clock by which the deadline was set."""
    key: str | None
    """Of idempotency."""
    fingerprint: bytes
    weight: float
    details: bytes
    max_queued: int
    max_queued_per_tenant: int
    max_bytes_per_tenant: int
    memory_full: bool
    retain_for: float | None
    """Seconds for which it is kept after its end; None: as the policy says."""
    choices: int

    def parse(self, reply: Any) -> Created | Found | Refused:
        kind, *rest = reply
        if kind == b"new":
            return Created(float(rest[0]), rest[1])
        if kind == b"old":
            return Found(Record(*rest[0]), rest[1])
        return Refused(kind.decode(), *rest)


class Register(Script[None]):
    """A worker says that it is alive."""

    worker: str
    registration: bytes
    """What it says of itself."""

    def parse(self, reply: Any) -> None:
        return None


class Claim(Script[Claimed]):
    """Lease jobs that fill up to *limit* slots. Sent twice (the same request), it answers the same leases."""

    request: str
    worker: str | None
    """None: it is registered elsewhere."""
    registration: bytes
    models: list[str]
    """And MODEL\\0suspects where it may run those."""
    limit: int
    reserve: int
    """How much of the limit jobs of the batch class leave."""
    slots: int
    """All that the worker has."""
    claimant: str
    """The process' inbox / the number of the worker in it."""
    running: int | None
    """How many jobs the worker runs; None: it does not wait."""
    expired: bytes
    """The error of a job whose deadline has passed."""

    def parse(self, reply: Any) -> Claimed:
        leases = [LeasedJob(attempt, Record(*record), log) for attempt, record, log in reply[0]]
        return Claimed(leases, bool(reply[1]))


class AppendRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """An append. ``run``, ``reasons``, ``error`` and ``stops`` are numbers of blobs."""

    job: str
    tenant: str
    attempt: int
    position: int
    count: int = 0
    """Of tokens."""
    prompt_tokens: int | None = None
    run: int | None = None
    status: str | None = None
    """The one in which it ends."""
    reasons: int | None = None
    error: int | None = None
    stops: int | None = None
    reasoning_tokens: int = 0
    cached_tokens: int = 0


class Append(Script[list[bytes]]):
    """One engine step of all running jobs of a worker; a verdict for each."""

    appends: list[AppendRow]
    expired: bytes
    blobs: Blobs
    """Runs, reasons, errors and stop strings, in msgpack."""

    def parse(self, reply: Any) -> list[bytes]:
        verdicts: list[bytes] = reply
        return verdicts


class ReleaseRow(msgspec.Struct, frozen=True, omit_defaults=True):
    job: str
    tenant: str
    attempt: int
    delay: float
    crashed_beside: int | None = None
    retry: int | None = None
    """The number of the blob with the error to retry after."""


class Release(Script[None]):
    """Give leases back."""

    releases: list[ReleaseRow]
    poisoned: bytes
    blobs: Blobs
    """Errors."""

    def parse(self, reply: Any) -> None:
        return None


class Cancel(Script[Found]):
    """End a job now if it has not ended."""

    tenant: str
    id: str
    cancelled: bytes

    def parse(self, reply: Any) -> Found:
        return _found(reply)


class Forget(Script[None]):
    """Drop a job now, whatever its state; nothing where there is none."""

    tenant: str
    id: str
    cancelled: bytes

    def parse(self, reply: Any) -> None:
        return None


class Get(Script[Found]):
    only_reads = True

    tenant: str
    id: str

    def parse(self, reply: Any) -> Found:
        return _found(reply)


class Read(Script[LogPage | Beyond]):
    """A part of a log, and its news from now on. Raises `NotFound` or `ExpiredResult`."""

    only_reads = True

    tenant: str
    id: str
    after: int
    max_runs: int
    inbox: bytes | None
    """Of the process that follows it, if it does."""

    def parse(self, reply: Any) -> LogPage | Beyond:
        kind, *rest = reply
        if kind == b"rewound":
            return Beyond(rest[0])
        if kind != b"log":
            raise missing(kind)
        head, status, epoch, floor, runs = rest
        return LogPage(head, status, int(epoch), int(floor), runs)


class Follow(Script[Heads]):
    """How the jobs stand that a process follows, and that it goes on following them."""

    only_reads = True

    inbox: bytes
    ids: list[str]
    left: list[str]
    """Those that it no longer follows."""

    def parse(self, reply: Any) -> Heads:
        epoch, heads = reply
        return Heads(int(epoch), [Head(head[0], *head[1:2], *map(int, head[2:])) for head in heads])


class List(Script[Listing]):
    """A page of a tenant's jobs, newest first. It may be shorter than *limit* though there is more."""

    only_reads = True

    tenant: str
    user: str | None
    statuses: list[str]
    """None: all."""
    model: str | None
    before: str
    """The seq before which it begins; ``+inf``: the newest."""
    limit: int
    max_looks: int
    """Jobs to look at."""
    key: str | None
    """At most the job that was submitted under this idempotency key."""
    room: int
    """Bytes of requests that are enough."""

    def parse(self, reply: Any) -> Listing:
        jobs, before = reply
        return Listing([Listed(Record(*record), position, int(seq)) for record, position, seq in jobs], before.decode())


class Stats(Script[Snapshot]):
    only_reads = True

    max_silence: float
    """Seconds after which a worker counts as dead."""

    def parse(self, reply: Any) -> Snapshot:
        counts, depth, workers, ends_a_minute, leases_lost, now = reply
        registrations = [Registration(worker, float(silent)) for worker, silent in workers]
        return Snapshot(counts, depth, registrations, ends_a_minute, leases_lost, float(now))


class Notify(Script[None]):
    """Wake a claimant for *model*: the one that was woken no longer waits."""

    model: str

    def parse(self, reply: Any) -> None:
        return None


class Sweep(Script[int]):
    """Requeue jobs with dead leases, expire deadlines, wake delayed retries, drop what retention ended; how many jobs
    it touched."""

    limit: int
    """How many of each, at most."""
    expired: bytes
    poisoned: bytes
    max_silence: float
    tombstone_ttl: int
    """Seconds that ids stay known as expired."""

    def parse(self, reply: Any) -> int:
        return int(reply)


class Policy(msgspec.Struct, frozen=True, array_like=True):
    """What every script is told; in Lua the names are in capitals."""

    lease_ttl: float
    result_ttl: float
    max_attempts: int
    max_losses: int
    input_cost: float
    output_cost: float
    max_running: int
    defer: bool
    """The caller delivers, once replicas have what is delivered."""
    shard: int
    shards: int

    @classmethod
    def of(cls, policy: QueuePolicy, *, defer: bool, shard: int, shards: int) -> Policy:
        return cls(
            policy.lease_ttl, policy.result_ttl, policy.max_attempts, policy.max_losses, policy.input_cost,
            policy.output_cost, policy.max_running_per_tenant, defer, shard, shards,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- how they are given it

#: Before every script's own arguments: the time (nothing: Redis' own), and the policy.
_COMMON = (
    "local CLOCK = tonumber(ARGV[1])",
    f"local {', '.join(field.upper() for field in Policy.__struct_fields__)} = unpack(cmsgpack.unpack(ARGV[2]))",
)


def _argument(name: str, hint: Any, number: int) -> tuple[str, Encoder | None]:
    """How Lua gets argument *number*, and what is sent of it (None: itself)."""
    given = f"ARGV[{number}]"
    if hint == Blobs:
        return f"local function {name}(number) return ARGV[{number - 1} + number] end", None
    kinds = set(get_args(hint)) if type(None) in get_args(hint) else {hint}
    optional = type(None) in kinds
    [kind] = kinds - {type(None)}
    encode: Encoder | None = _or_nothing if optional else None
    if kind in (int, float):
        local = f"tonumber({given})"  # of nothing it is nil
    elif kind is bool:
        local, encode = f'{given} == "1"', int
    elif kind in (str, bytes):
        local = f'{given} ~= "" and {given} or nil' if optional else given
    else:
        local, encode = f"cmsgpack.unpack({given})", _pack
    return f"local {name} = {local}", encode


def _or_nothing(value: Word | None) -> Word:
    return b"" if value is None else value


def arguments(script: type[Script[Any]]) -> tuple[list[str], dict[int, Encoder]]:
    """The lines of Lua that make locals of what a script is given, and which of it are encoded how."""
    hints = get_type_hints(script)
    own = [_argument(name, hints[name], number) for number, name in enumerate(script.__struct_fields__, 3)]
    return [local for local, _ in own], {i: encode for i, (_, encode) in enumerate(own) if encode is not None}


def _prepare(script: type[Script[Any]]) -> bytes:
    """The whole source of a script. Every one may run when Redis is full, but the one that adds a job: what runs must
    be able to end."""
    script.name = re.sub(r"(?<=.)(?=[A-Z])", "_", script.__name__).lower()
    prelude, script.encoders = arguments(script)
    script.has_blobs = "blobs" in script.__struct_fields__
    folder = resources.files(__package__) / "lua"
    parts = (
        "#!lua" if script is Submit else "#!lua flags=allow-oom",
        *_COMMON,
        (folder / "lib.lua").read_text(),
        *prelude,
        (folder / f"{script.name}.lua").read_text(),
    )
    return "\n".join(parts).encode()


SOURCES: dict[str, bytes] = {source.name: text for source in Script.__subclasses__() for text in [_prepare(source)]}
SHA: dict[str, str] = {name: hashlib.sha1(source).hexdigest() for name, source in SOURCES.items()}
