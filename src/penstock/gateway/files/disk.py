"""A disk that others share and that may be full: errors in our words, and changes that are whole or not there.

Functions here block; the event loop calls them by `in_thread`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from penstock.core.errors import BrokerUnavailable, InsufficientStorage, PenstockError

T = TypeVar("T")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """In a thread, and to its end even if this is cancelled: nothing may still be written when a lock is let go of."""
    doing = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        if not doing.cancelled():
            doing.exception()
        raise


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk is `InsufficientStorage`, one that cannot be used `BrokerUnavailable`; not found is not found."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_error(error) from error


def storage_error(error: OSError) -> PenstockError:
    if error.errno in _FULL:
        return InsufficientStorage("There is no space left for files. What was there before is unharmed.")
    return BrokerUnavailable(f"The directory of files cannot be used now: {error.strerror}.", retry_after=5.0)


def replace_file(path: Path, data: bytes) -> None:
    """Replace *path*: whoever looks sees the old or the new, and after a power cut it is the new."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with fresh.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


def link(source: Path, target: Path) -> None:
    """*target* has the content of *source* from now on, whatever becomes of that name; durable when it returns."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}:
            raise
        shutil.copyfile(source, target)  # a file system without links
        sync(target)
    os.utime(target)  # not abandoned, however long ago it was written
    sync(target.parent)


def sync(path: Path) -> None:
    """Put a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class AppendOnlyFile:
    """An append-only file of JSON lines. What a crash tore off its end is cut away when it is opened.

    *each* is given every line that is there, and raises `ValueError` (as msgspec does) for one that is none: only what
    came before it was acknowledged.
    """

    def __init__(self, path: Path, each: Callable[[bytes], None]) -> None:
        self._file = path.open("a+b")
        self.size = 0
        try:
            self._file.seek(0)
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                try:
                    each(line)
                except ValueError:
                    break
                self.size += len(line)
            self._cut()
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: list[bytes]) -> None:
        """Durable when it returns; where that fails (`OSError`) the log is as it was."""
        data = b"".join(lines)
        if not data:
            return
        try:
            if self._file.closed:
                self._reopen()
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._reopen()
            raise
        self.size += len(data)

    def _reopen(self) -> None:
        """Forget what the buffer holds, and what of it reached the file."""
        path = self._file.name
        with contextlib.suppress(OSError):
            self._file.close()
        self._file = open(path, "a+b")  # noqa: SIM115
        self._cut()

    def _cut(self) -> None:
        self._file.truncate(self.size)
        os.fsync(self._file.fileno())
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()
