"""One file over HTTP, whole or not at all: resumed after a cut, of the size and SHA-256 that it has to have."""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from penstock.models.errors import NoRoom, PullError

#: Told how much of a file is here.
Progress = Callable[[float], None]

#: The disk, the user's share of it, or what a file may have, is used up.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: How often a broken connection is tried again if less than this many bytes came over it, and the seconds before that.
ATTEMPTS = 3
WORTH = 1 << 20
PAUSE = 0.5


def fetch(
    client: httpx.Client,
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str,
    progress: Progress = lambda fraction: None,
    auth: httpx.Auth | None = None,
) -> None:
    """Download *url* to *target*. What is interrupted leaves ``target.part``, and goes on from there next time.

    Raises `PullError`, `NoRoom`.
    """
    part = target.with_name(target.name + ".part")
    failures = 0
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_room(target.parent, size - _size(part))
        while (have := _size(part)) < size:
            progress(have / size)
            broken = _download(client, url, part, size, auth, progress)
            if broken is None:
                continue
            failures = 1 if _size(part) >= have + WORTH else failures + 1
            if failures > ATTEMPTS:
                raise PullError(f"{broken}; {_size(part) / 1e6:.0f} of {size / 1e6:.0f} MB are kept for the next try")
            time.sleep(PAUSE * failures)
        check_hash(part, sha256)
        part.replace(target)
    progress(1.0)


def _download(
    client: httpx.Client, url: str, part: Path, size: int, auth: httpx.Auth | None, progress: Progress
) -> str | None:
    """Go on with *part*, over one connection. None when it came to its end, else what broke it."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    host = httpx.URL(url).host
    try:
        with client.stream("GET", url, headers=headers, auth=auth or httpx.USE_CLIENT_DEFAULT) as answer:
            if answer.status_code >= 500 or answer.status_code in (408, 429):
                return f"{host} answers {answer.status_code}"
            resumed = answer.status_code == 206 and answer.headers.get("content-range", "").startswith(f"bytes {have}-")
            if answer.status_code != 200 and not resumed:
                part.unlink(missing_ok=True)  # whatever is there does not fit what the server has
                raise PullError(f"{host} answers {answer.status_code}")
            with part.open("ab" if resumed else "wb") as file:
                got = have if resumed else 0
                told = got * 100 // size  # percent
                for data in answer.iter_bytes():  # as it comes: what is here when it breaks is kept
                    file.write(data)
                    got += len(data)
                    if got > size:
                        break
                    if got * 100 // size > told:
                        told = got * 100 // size
                        progress(got / size)
    except httpx.TransportError as error:
        return f"the connection to {host} broke ({error or type(error).__name__})"
    if got > size:
        part.unlink(missing_ok=True)
        raise PullError(f"{host} sends more than the {size} bytes that the file has")
    return None if got == size else f"{host} ended the file early"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def check_hash(file: Path, sha256: str) -> None:
    """Remove *file* and raise `PullError` where it is another one."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        file.unlink()
        raise PullError(
            f"what came has the SHA-256 {found[:16]}… instead of {sha256[:16]}…: it was damaged or changed on the way, "
            "and is removed"
        )


def check_room(folder: Path, needed: int) -> None:
    """Raise `NoRoom` where *needed* bytes more don't fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise no_room(folder, f"{needed / 1e6:.0f} MB more are needed, {free / 1e6:.0f} MB are free")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the disk says into `NoRoom` or `PullError`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_room(folder, error.strerror) from error
        raise PullError(f"{folder} cannot be written: {error}") from error


def no_room(folder: Path, why: str | None) -> NoRoom:
    return NoRoom(f"There is no room in {folder}: {why}. Free some, or set PENSTOCK_CACHE to a folder on another disk.")
