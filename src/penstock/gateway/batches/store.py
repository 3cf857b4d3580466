"""Batches: what is kept of each, and what makes a file the input of one.

::

    root/<tenant>/batches/batch_…/batch.json     `Batch`, replaced as a whole; only who runs it writes it
                                  cancel         that somebody asked to cancel it: when. Anybody writes it
                                  input.jsonl    the input, whatever becomes of the file it came from
                                  output.jsonl   results as they come, later the content of a file; so are
                                  errors.jsonl   the lines that failed
    root/<tenant>/runner                         whoever has the lock on it runs the tenant's batches

The lock is `flock`'s: the kernel lets go of it when its holder dies, however it dies. Functions here block; the event
loop calls them in threads. Times are seconds since the epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import Literal

import msgspec

from penstock.core.errors import InvalidRequest, NotFound
from penstock.gateway.batches.input import LineError
from penstock.gateway.files.disk import disk_errors, link, remove, replace_file, sync
from penstock.gateway.files.store import FileStore, StoredFile, new_id, page

#: Seconds for which a batch may run: OpenAI's ``completion_window`` "24h".
WINDOW = 86400.0

Outcome = Literal["completed", "expired", "cancelled"]
State = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelled"]
BatchStatus = Literal[State, "cancelling"]
ENDED = frozenset({"failed", "completed", "expired", "cancelled"})


class Batch(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is known of a batch. ``moments`` are the times at which it entered its states, by their names."""

    id: str
    endpoint: str
    input_file_id: str
    created_at: float
    expires_at: float
    metadata: dict[str, str] | None = None
    output_ttl: float | None = None
    state: State = "validating"
    moments: dict[str, float] = {}
    outcome: Outcome | None = None
    """What it becomes when its files are complete."""
    model: str | None = None
    errors: list[LineError] = []
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    submitted: int = 0
    """Lines behind this one have no jobs yet."""
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def status(self) -> BatchStatus:
        """As OpenAI says it."""
        return "cancelling" if "cancelling" in self.moments and not self.ended else self.state

    def enter(self, state: State, now: float) -> None:
        self.state = state
        self.moments[state] = now


class BatchStore:
    """The batches of all tenants, beside their files."""

    def __init__(self, files: FileStore) -> None:
        self.files = files
        self.clock = files.clock

    def folder_of(self, tenant: str, id: str) -> Path:
        return self.files.folder(tenant, "batches") / id

    def create(
        self,
        tenant: str,
        endpoint: str,
        source: StoredFile,
        *,
        metadata: dict[str, str] | None = None,
        output_ttl: float | None = None,
    ) -> Batch:
        """A new batch of the file *source*; durable, and there for every runner, when this returns."""
        now = self.clock.now()
        batch = Batch(
            id=new_id("batch_", now),
            endpoint=endpoint,
            input_file_id=source.id,
            created_at=now,
            expires_at=now + WINDOW,
            metadata=metadata,
            output_ttl=output_ttl,
        )
        with disk_errors():
            folder = self.files.folder(tenant, "tmp") / batch.id
            folder.mkdir(mode=0o700)
            try:
                link(self.files.path(tenant, source.id), folder / "input.jsonl")
                replace_file(folder / "batch.json", msgspec.json.encode(batch))
                folder.rename(place := self.folder_of(tenant, batch.id))
            except FileNotFoundError:  # deleted in this moment
                remove(folder)
                raise NotFound(f"There is no file {source.id!r}.", param="input_file_id") from None
            except BaseException:
                remove(folder)
                raise
            sync(place.parent)
        return batch

    def get(self, tenant: str, id: str) -> Batch:
        """Raises `NotFound`."""
        if re.fullmatch(r"batch_[0-9a-f]{32}", id):
            place = self.folder_of(tenant, id)
            with contextlib.suppress(FileNotFoundError), disk_errors():
                batch = msgspec.json.decode((place / "batch.json").read_bytes(), type=Batch)
                if not batch.ended and (at := self._cancelled_at(place)) is not None:
                    batch.moments["cancelling"] = at
                return batch
        raise NotFound(f"There is no batch {id[:64]!r}.", param="batch_id")

    def ids(self, tenant: str) -> list[str]:
        with disk_errors():
            return os.listdir(self.files.folder(tenant, "batches"))

    def list(self, tenant: str, *, after: str | None = None, limit: int) -> tuple[list[Batch], bool]:
        """The newest first, beyond the id *after*; and whether there are more."""
        found: list[Batch] = []
        for id in page(iter(self.ids(tenant)), after, newest_first=True):
            with contextlib.suppress(NotFound):  # dropped a moment ago
                found.append(self.get(tenant, id))
            if len(found) > limit:
                break
        return found[:limit], len(found) > limit

    def save(self, tenant: str, batch: Batch) -> None:
        """Raises `OSError`."""
        replace_file(self.folder_of(tenant, batch.id) / "batch.json", msgspec.json.encode(batch))

    def cancel(self, tenant: str, id: str) -> Batch:
        """Ask whoever runs it to stop. Raises `NotFound`, and `InvalidRequest` for one that has ended otherwise."""
        batch = self.get(tenant, id)
        if batch.ended and batch.state != "cancelled":
            raise InvalidRequest(f"A batch that is {batch.state} cannot be cancelled.", param="batch_id")
        if batch.status != "cancelling" and not batch.ended:
            now = self.clock.now()
            with disk_errors():
                replace_file(self.folder_of(tenant, id) / "cancel", msgspec.json.encode(now))
            batch.moments["cancelling"] = now
        return batch

    def _cancelled_at(self, place: Path) -> float | None:
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode((place / "cancel").read_bytes(), type=float)
        return None

    def lock(self, tenant: str) -> int | None:
        """The right to run the tenant's batches, as a descriptor to close; None while somebody else has it."""
        descriptor = os.open(
            self.files.folder(tenant, "batches").parent / "runner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        return descriptor

    def clean(self, tenant: str, batch: Batch) -> None:
        """Of a batch that has ended, only what is told of it has to be kept."""
        for name in ("input.jsonl", "output.jsonl", "errors.jsonl"):
            (self.folder_of(tenant, batch.id) / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Drop batches that ended as long ago as files are kept. Harmless anywhere, any number of times."""
        for tenant in self.files.tenants():
            for id in self.ids(tenant):
                with contextlib.suppress(NotFound, FileNotFoundError):
                    batch = self.get(tenant, id)
                    if not batch.ended:
                        continue
                    self.clean(tenant, batch)  # whoever ran it may have died before
                    if batch.moments[batch.state] + self.files.ttl < self.clock.now():
                        grave = self.files.folder(tenant, "tmp") / f"{id}.gone"
                        self.folder_of(tenant, id).rename(grave)
                        remove(grave)
