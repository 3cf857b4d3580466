"""SQLite under the embedded broker: one writer connection with group commit, one reader connection, one process.

Operations are plain functions over a `Transaction`. They run on the event loop (a few statements against the page
cache: microseconds, and no convoy for the interpreter lock between two threads); only COMMIT, which waits for the
disk, runs in a thread. Whatever is asked for meanwhile forms the next batch, so a slow disk makes larger commits
instead of a longer queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

from penstock.core.errors import BrokerUnavailable, PenstockError
from penstock.core.telemetry import NoTelemetry, Telemetry

T = TypeVar("T")

#: What brings an older database up to date, in this order; its ``user_version`` counts those it has had.
MIGRATIONS = (
    "DROP INDEX IF EXISTS jobs_retention; ALTER TABLE jobs ADD COLUMN keep REAL;",
    "ALTER TABLE jobs ADD COLUMN cached_tokens INTEGER NOT NULL DEFAULT 0; "
    "ALTER TABLE log ADD COLUMN reasoning_tokens INTEGER NOT NULL DEFAULT 0;",
)

#: Operations in one commit at most: bounds how long the loop is held and how much one failure takes along.
MAX_BATCH = 256


class Transaction:
    """Handed to every operation of one batch. Memory that mirrors the store is changed through `undo`/`then`."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn
        self.undo: list[Callable[[], None]] = []
        """Called in reverse order when the batch does not commit."""
        self.then: list[Callable[[], None]] = []
        """Called after COMMIT: whatever others may see happens here."""
        self.queue_grew = False
        """A job became claimable: waiting claimants may be served in this same commit."""


class _Operation(Generic[T]):
    __slots__ = ("future", "run")

    def __init__(self, run: Callable[[Transaction], T], future: asyncio.Future[T]) -> None:
        self.run = run
        self.future = future


class Store:
    """Durable storage in *directory*, owned by this process alone (an exclusive lock file)."""

    def __init__(
        self, directory: Path, before_commit: Callable[[Transaction], None], telemetry: Telemetry | None = None
    ) -> None:
        self._directory = directory
        self._before_commit = before_commit
        self._telemetry = telemetry or NoTelemetry()
        self._operations: deque[_Operation[Any]] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._lock_file: int | None = None

    # ------------------------------------------------------------------------------------ life

    async def open(self) -> None:
        """Lock the directory, open both connections, create the schema. Raises `BrokerUnavailable`."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts lie in it
            self._lock()
            self._writer = self._connect()
            self._set_up()
            self._reader = self._connect()
        except (OSError, sqlite3.Error) as error:
            self._unlock()
            raise BrokerUnavailable(f"Cannot open the data directory {self._directory}: {error}") from error
        except BaseException:
            self._unlock()
            raise
        self._reader.execute("PRAGMA query_only = ON")
        self._commit_thread = ThreadPoolExecutor(1, "penstock-commit")
        self._read_thread = ThreadPoolExecutor(1, "penstock-read")
        self._task = asyncio.create_task(self._write_loop(), name="embedded broker: writer")

    async def close(self) -> None:
        """Commit what is waiting, then let go of everything."""
        if self._task is None:
            return
        self._closing = True
        self._wake.set()
        await self._task
        self._task = None
        self._commit_thread.shutdown()
        self._read_thread.shutdown()
        self._reader.close()
        self._writer.close()
        self._unlock()

    def _connect(self) -> sqlite3.Connection:
        conn = sqlite3.connect(self._directory / "penstock.db", isolation_level=None, check_same_thread=False)
        conn.execute("PRAGMA journal_mode = WAL")
        conn.execute("PRAGMA synchronous = FULL")
        conn.execute("PRAGMA cache_size = -65536")
        conn.execute("PRAGMA wal_autocheckpoint = 8000")
        conn.execute("PRAGMA journal_size_limit = 67108864")
        return conn

    def _set_up(self) -> None:
        """Create the tables, or bring those of an earlier version up to date."""
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise BrokerUnavailable(f"{self._directory} was written by a later version of Penstock. Use that one.")
        exists = self._writer.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone()
        steps = MIGRATIONS[version:] if exists else ()
        schema = resources.files(__package__).joinpath("schema.sql").read_text()
        script = "\n".join((*steps, schema, f"PRAGMA user_version = {len(MIGRATIONS)};"))
        self._writer.executescript(f"BEGIN;\n{script}\nCOMMIT;")

    def _lock(self) -> None:
        path = self._directory / "lock"
        self._lock_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock_file, 32, 0).decode(errors="replace").strip() or "unknown"
            raise BrokerUnavailable(
                f"Another Penstock (pid {owner}) is using {self._directory}. "
                "Stop it, or choose another directory with --data-dir."
            ) from None
        os.truncate(self._lock_file, 0)
        os.pwrite(self._lock_file, str(os.getpid()).encode(), 0)

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    # ------------------------------------------------------------------------------------ use

    async def write(self, run: Callable[[Transaction], T]) -> T:
        """Run an operation in the next batch; its result once that batch is on disk.

        An operation checks first and writes afterwards: one that raises a `PenstockError` must have written nothing.
        A caller that is cancelled does not take its operation back.
        """
        if self._task is None or self._closing:
            raise BrokerUnavailable("The embedded broker is closed.")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._operations.append(_Operation(run, future))
        self._wake.set()
        return await future

    async def read(self, run: Callable[[sqlite3.Connection], T]) -> T:
        """Run a query on the reader connection, in its thread. Sees committed data only."""
        if self._task is None:
            raise BrokerUnavailable("The embedded broker is closed.")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._read_thread, run, self._reader)
        except sqlite3.Error as error:
            raise BrokerUnavailable(f"The embedded broker cannot read its data: {error}") from error

    # ------------------------------------------------------------------------------------ the writer

    async def _write_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._operations:
                batch = [self._operations.popleft() for _ in range(min(len(self._operations), MAX_BATCH))]
                error = await self._commit(batch)
                if error is None:
                    continue
                # One operation may have spoilt it for its neighbours: give each a transaction of its own.
                for operation in batch:
                    if len(batch) > 1:
                        error = await self._commit([operation])
                    if error is not None and not operation.future.done():
                        operation.future.set_exception(_unavailable(error))
            if self._closing:
                return

    async def _commit(self, batch: list[_Operation[Any]]) -> Exception | None:
        """Run and commit *batch*, then resolve its futures. On failure nothing happened, and the cause is returned."""
        conn = self._writer
        tx = Transaction(conn)
        outcomes: list[tuple[asyncio.Future[Any], Any, PenstockError | None]] = []
        try:
            conn.execute("BEGIN IMMEDIATE")
            unchanged = conn.total_changes
            for operation in batch:
                before = conn.total_changes
                try:
                    outcomes.append((operation.future, operation.run(tx), None))
                except PenstockError as error:
                    if conn.total_changes != before:
                        raise
                    outcomes.append((operation.future, None, error))
            if tx.queue_grew:
                self._before_commit(tx)
            if conn.total_changes != unchanged:
                with self._telemetry.span("store.commit", operations=len(batch)):
                    await asyncio.get_running_loop().run_in_executor(self._commit_thread, conn.execute, "COMMIT")
            else:
                conn.execute("COMMIT")
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                conn.execute("ROLLBACK")
            for undo in reversed(tx.undo):
                undo()
            return error
        for then in tx.then:
            then()
        for future, result, failure in outcomes:
            if future.done():
                continue
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
        return None


def _unavailable(error: Exception) -> Exception:
    if isinstance(error, PenstockError):
        return error
    if isinstance(error, sqlite3.Error):
        full = "full" in str(error)
        advice = "The disk is full: free some space; reading goes on." if full else "See the server's log."
        return BrokerUnavailable(f"The embedded broker cannot write: {error}. {advice}", retry_after=5.0)
    return error
