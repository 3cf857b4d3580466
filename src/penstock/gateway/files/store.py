"""Files of tenants in a directory: what they upload, and what their batches write.

::

    root/<tenant>/files/file-…         the content
    root/<tenant>/files/file-….json    `StoredFile`; a file exists if, and only if, this does
    root/<tenant>/batches/…            see batches/store.py
    root/<tenant>/tmp/…                what is on its way in or out

Any number of processes may share the directory: everything that others see appears with one rename, and is on the disk
before. Functions here block; the event loop calls them in threads. Times are seconds since the epoch.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

import msgspec

from penstock.core.errors import InsufficientStorage, NotFound, RequestTooLarge
from penstock.core.ports import Clock, SystemClock
from penstock.gateway.files.disk import disk_errors, link, remove, replace_file

T = TypeVar("T")

#: How long a part of an upload may be without a write before it is taken for what a dead process left, in seconds.
ABANDONED = 3600.0

_ID = re.compile(r"(file-|batch_)[0-9a-f]{32}")


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file. ``bytes`` is its size."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: float
    expires_at: float | None = None


class FileStore:
    """The files of all tenants under *root*.

    *max_file*: bytes of one upload; *max_bytes*: of everything that a tenant has here when an upload begins (0: no
    limit); *ttl*: seconds that a file is kept which does not say how long.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_file: int = 200 << 20,
        max_bytes: int = 0,
        ttl: float = 30 * 86400.0,
        clock: Clock | None = None,
    ) -> None:
        self.root = root
        self.max_file = max_file
        self.max_bytes = max_bytes
        self.ttl = ttl
        self.clock = clock or SystemClock()

    def folder(self, tenant: str, kind: str) -> Path:
        """Where the tenant has its ``files``, ``batches`` or ``tmp``; it is made on first use."""
        path = self.root / _folder_name(tenant) / kind
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts lie in it
        return path

    def tenants(self) -> list[str]:
        return sorted(tenant for name in _names(self.root) if _folder_name(tenant := unquote(name)) == name)

    # ------------------------------------------------------------------------------------ in

    @contextlib.contextmanager
    def upload(self, tenant: str) -> Iterator[Upload]:
        """A file that is on its way in. What is not kept when the block ends leaves nothing behind."""
        with disk_errors():
            room = self.max_bytes - self.used(tenant) if self.max_bytes else self.max_file
            if room <= 0:
                raise InsufficientStorage(
                    f"The files take {self.max_bytes} bytes, which is all that there may be: delete some first."
                )
            upload = Upload(self, tenant, self.folder(tenant, "tmp") / ("upload-" + secrets.token_hex(16)), room)
        try:
            yield upload
        finally:
            upload.close()

    def publish(self, tenant: str, source: Path, file: StoredFile) -> None:
        """Make *source*, which is on the disk, the content of *file*. Harmless when it is done twice."""
        folder = self.folder(tenant, "files")
        if not (folder / f"{file.id}.json").exists():
            link(source, folder / file.id)
            self._write_record(folder, file)

    def _write_record(self, folder: Path, file: StoredFile) -> None:
        replace_file(folder / f"{file.id}.json", msgspec.json.encode(file))

    # ------------------------------------------------------------------------------------ out

    def get(self, tenant: str, id: str) -> StoredFile:
        """Raises `NotFound`."""
        if _ID.fullmatch(id):
            with contextlib.suppress(FileNotFoundError), disk_errors():
                raw = (self.folder(tenant, "files") / f"{id}.json").read_bytes()
                file = msgspec.json.decode(raw, type=StoredFile)
                if file.expires_at is None or file.expires_at > self.clock.now():
                    return file
        raise NotFound(f"There is no file {id[:64]!r}.", param="file_id")

    def path(self, tenant: str, id: str) -> Path:
        """Where the content of a file is that `get` gave."""
        return self.folder(tenant, "files") / id

    def list(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int,
        newest_first: bool = True,
    ) -> tuple[list[StoredFile], bool]:
        """Files in order of their creation, beyond the id *after*; and whether there are more."""
        with disk_errors():
            names = (name.removesuffix(".json") for name in _names(self.folder(tenant, "files")))
            found: list[StoredFile] = []
            for id in page(names, after, newest_first):
                with contextlib.suppress(NotFound):  # deleted a moment ago, or expired
                    file = self.get(tenant, id)
                    if purpose is None or file.purpose == purpose:
                        found.append(file)
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    def delete(self, tenant: str, id: str) -> None:
        """Raises `NotFound`. Whoever reads the content goes on."""
        self.get(tenant, id)
        self._drop(self.folder(tenant, "files"), id)

    def used(self, tenant: str) -> int:
        """Bytes of everything that the tenant has here."""
        sizes: dict[int, int] = {}  # by inode: a batch has its input under a name of its own
        for parent, _, names in os.walk(self.folder(tenant, "files").parent):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found = (Path(parent) / name).stat()
                    sizes[found.st_ino] = found.st_size
        return sum(sizes.values())

    # ------------------------------------------------------------------------------------ retention

    def sweep(self) -> int:
        """Drop what has expired, and what dead processes left. Harmless anywhere, any number of times."""
        dropped = 0
        for tenant in self.tenants():
            folder = self.folder(tenant, "files")
            names = set(_names(folder))
            for name in names:
                id = name.removesuffix(".json")
                if name.endswith(".json"):
                    try:
                        self.get(tenant, id)
                    except NotFound:
                        self._drop(folder, id)
                        dropped += 1
                elif f"{name}.json" not in names and _abandoned(folder / name):
                    (folder / name).unlink(missing_ok=True)
            for name in _names(tmp := self.folder(tenant, "tmp")):
                if _abandoned(tmp / name):
                    remove(tmp / name)
        return dropped

    def _drop(self, folder: Path, id: str) -> None:
        with disk_errors():
            (folder / f"{id}.json").unlink(missing_ok=True)
            (folder / id).unlink(missing_ok=True)


class Upload:
    """The bytes of a file as they come; *room* of them at most. Made by `FileStore.upload`."""

    def __init__(self, store: FileStore, tenant: str, path: Path, room: int) -> None:
        self._store = store
        self._tenant = tenant
        self._path = path
        self._room = room
        self._file = path.open("xb")
        self.size = 0

    def write(self, data: bytes) -> None:
        """Raises `RequestTooLarge` and `InsufficientStorage`."""
        self.size += len(data)
        if self.size > self._store.max_file:
            raise RequestTooLarge(f"The file is larger than {self._store.max_file} bytes.", param="file")
        if self.size > self._room:
            raise InsufficientStorage(
                f"The files may take {self._store.max_bytes} bytes in all: delete some first.", param="file"
            )
        with disk_errors():
            self._file.write(data)

    def keep(self, filename: str, purpose: str, ttl: float | None = None) -> StoredFile:
        """It is complete: durable, and there for everybody, when this returns. *ttl*: seconds; None: the store's."""
        now = self._store.clock.now()
        file = StoredFile(
            id=new_id("file-", now),
            filename=filename,
            purpose=purpose,
            bytes=self.size,
            created_at=now,
            expires_at=now + (self._store.ttl if ttl is None else ttl),
        )
        with disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            folder = self._store.folder(self._tenant, "files")
            self._path.rename(folder / file.id)
            try:
                self._store._write_record(folder, file)
            except OSError:
                self._store._drop(folder, file.id)
                raise
        return file

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed is not wanted any more
            self._file.close()
        self._path.unlink(missing_ok=True)


def new_id(prefix: str, now: float) -> str:
    """An id that cannot be guessed; ids sort as they were made, to the millisecond (as those of UUIDs version 7)."""
    return f"{prefix}{int(now * 1000):012x}{secrets.token_hex(10)}"


def page(ids: Iterator[str], after: str | None, newest_first: bool) -> list[str]:
    """*ids* in order, each once, beyond *after*."""
    ordered = sorted(filter(_ID.fullmatch, set(ids)), reverse=newest_first)
    if after is None:
        return ordered
    return [id for id in ordered if (id < after if newest_first else id > after)]


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def _folder_name(tenant: str) -> str:
    return quote(tenant, safe="").replace(".", "%2E")


def _abandoned(path: Path) -> bool:
    """By the disk's clock: was it last written long ago?"""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > ABANDONED
    return False
