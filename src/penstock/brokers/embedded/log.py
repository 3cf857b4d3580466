"""The logs of jobs: in memory those of jobs that have not ended, on the disk everything that is committed."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from penstock.brokers.embedded.rows import JobRow, end_of, find
from penstock.brokers.embedded.store import Store, Transaction
from penstock.brokers.live import LiveLog
from penstock.brokers.record import LoggedPrefix, prefix, rewound, unknown
from penstock.core.events import Ended, Event, Tokens

#: Tokens after which a replay waits for its reader to take them: nobody's slowness fills the memory.
READ_AT_ONCE = 4096

_encode = msgspec.msgpack.Encoder().encode
_tokens = msgspec.msgpack.Decoder(Tokens)


class Run(NamedTuple):
    """New tokens of a job. ``reasoning_tokens``: how many of all up to the last of these are thoughts."""

    job: str
    seq: int
    tokens: Tokens
    reasoning_tokens: int


class Logs:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._live: dict[str, LiveLog] = {}

    # ------------------------------------------------------------------------------------ writing

    def begin(self, tx: Transaction, job: str, tenant: str) -> None:
        self._live[job] = LiveLog(tenant)

        def undo() -> None:
            self._live.pop(job, None)

        tx.undo.append(undo)

    def resume(self, job: str, tenant: str, head: int) -> None:
        """The log of a job that an earlier process left unfinished."""
        self._live[job] = LiveLog(tenant, head)

    def write(self, tx: Transaction, runs: Sequence[Run], at: float) -> None:
        tx.conn.executemany(
            "INSERT INTO log (job, pos, n, at, tokens, reasoning_tokens) VALUES (?,?,?,?,?,?)",
            [
                (run.seq, run.tokens.position, len(run.tokens.ids), at, _encode(run.tokens), run.reasoning_tokens)
                for run in runs
            ],
        )

    def publish(self, runs: Iterable[Run]) -> None:
        """Readers get *runs* now; to be called once they are on the disk."""
        for run in runs:
            self._live[run.job].publish(run.tokens)

    def close(self, job: str, ended: Ended) -> None:
        """What readers get last; to be called once it is on the disk."""
        self._live.pop(job).publish(ended)

    # ------------------------------------------------------------------------------------ reading

    async def tail(self, tenant: str, job: str, after: int) -> AsyncGenerator[Event]:
        """As the broker's verb."""
        live = self._live.get(job)
        if live is None or live.tenant != tenant:
            async for event in self._replay(tenant, job, after):
                yield event
            return
        if after > live.head:
            raise rewound(after, live.head)
        if after < live.base:
            async for event in self._replay(tenant, job, after, live.base):
                yield event
            after = live.base
        async for event in live.follow(after):
            yield event

    async def _replay(self, tenant: str, job: str, after: int, until: int | None = None) -> AsyncGenerator[Event]:
        """What is on the disk beyond *after*: up to the position *until*, or all of a job that has ended."""
        while events := await self._store.read(partial(_read_log, tenant, job, after, until)):
            for i, event in enumerate(events, 1):
                yield event
                if i % 32 == 0:
                    await asyncio.sleep(0)  # a long replay must not hold up everybody else
            last = events[-1]
            if isinstance(last, Ended) or last.last == until:
                return
            after = last.last


def logged(conn: sqlite3.Connection, seq: int) -> LoggedPrefix:
    """What a later attempt continues from."""
    return prefix(blob for (blob,) in conn.execute("SELECT tokens FROM log WHERE job = ? ORDER BY pos", (seq,)))


def _read_log(tenant: str, job: str, after: int, until: int | None, conn: sqlite3.Connection) -> Sequence[Event]:
    """The next part of a log beyond *after*: up to *until*, or (None) to the end of a job that has ended."""
    row = find(conn, tenant, job)
    if until is not None:
        return _read_runs(conn, row, after, until)
    ended = end_of(row)
    if ended is None:  # cannot be: jobs that have not ended are live
        raise unknown()
    if after > ended.position:
        raise rewound(after, ended.position)
    if after == ended.position:
        return []
    runs = _read_runs(conn, row, after, ended.position)
    whole = not runs or runs[-1].last == ended.position - 1
    return [*runs, ended] if whole else runs


def _read_runs(conn: sqlite3.Connection, row: JobRow, after: int, until: int) -> list[Tokens]:
    """The next runs beyond *after*, `READ_AT_ONCE` tokens at most: a run that is longer comes in parts."""
    runs: list[Tokens] = []
    last = after + READ_AT_ONCE
    for (blob,) in conn.execute(
        "SELECT tokens FROM log WHERE job = :job AND pos <= :until AND pos + n - 1 > :after AND pos >= "
        "coalesce((SELECT max(pos) FROM log WHERE job = :job AND pos <= :after), 0) ORDER BY pos",
        {"job": row.seq, "until": until, "after": after},
    ):
        runs.append(run := _tokens.decode(blob).after(after).up_to(last))
        if run.last == last:
            break
    return runs
