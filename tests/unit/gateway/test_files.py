"""Files on the disk: nothing half-made is seen, nothing is left over, and a torn log is as long as it was synced."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import InsufficientStorage, NotFound, RequestTooLarge
from penstock.gateway.files.disk import AppendOnlyFile, link
from penstock.gateway.files.store import ABANDONED, FileStore, StoredFile
from penstock.testing.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> FileStore:
    return FileStore(tmp_path / "files", max_file=1000, max_bytes=3000, ttl=100, clock=clock)


def put(store: FileStore, data: bytes = b"{}\n", *, tenant: str = "t", ttl: float | None = None) -> StoredFile:
    with store.upload(tenant) as upload:
        upload.write(data)
        return upload.keep("in.jsonl", "batch", ttl)


def everything(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


class TestFiles:
    def test_what_is_kept_is_there(self, store: FileStore, clock: ManualClock) -> None:
        file = put(store, b"some\nlines\n")
        assert file == StoredFile(
            id=file.id, filename="in.jsonl", purpose="batch", bytes=11, created_at=clock.now(),
            expires_at=clock.now() + 100,
        )  # fmt: skip
        again = FileStore(store.root, clock=clock)  # another process
        assert again.get("t", file.id) == file
        assert again.path("t", file.id).read_bytes() == b"some\nlines\n"

    def test_what_is_not_kept_leaves_nothing(self, store: FileStore) -> None:
        with store.upload("t") as upload:
            upload.write(b"x" * 500)
        with contextlib.suppress(ZeroDivisionError), store.upload("t") as upload:
            upload.write(b"x" * 500)
            raise ZeroDivisionError
        with pytest.raises(RequestTooLarge):
            put(store, b"x" * 1001)
        assert everything(store.root) == []
        assert store.list("t", limit=10) == ([], False)

    def test_pages_in_both_orders(self, store: FileStore, clock: ManualClock) -> None:
        ids = []
        for _ in range(5):
            ids.append(put(store).id)
            clock.advance(0.01)
        for newest_first in (True, False):
            expected = ids[::-1] if newest_first else ids
            seen: list[str] = []
            after, more = None, True
            while more:
                page, more = store.list("t", after=after, limit=2, newest_first=newest_first)
                assert len(page) <= 2
                seen += [file.id for file in page]
                after = seen[-1]
            assert seen == expected
        assert store.list("t", purpose="batch_output", limit=10) == ([], False)
        assert len(store.list("t", purpose="batch", limit=10)[0]) == 5

    def test_a_deleted_file_is_gone_but_not_for_who_reads_it(self, store: FileStore) -> None:
        file = put(store, b"abc")
        with store.path("t", file.id).open("rb") as reading:
            store.delete("t", file.id)
            assert reading.read() == b"abc"
        with pytest.raises(NotFound):
            store.get("t", file.id)
        with pytest.raises(NotFound):
            store.delete("t", file.id)
        assert everything(store.root) == []

    def test_a_file_ends_when_it_says(self, store: FileStore, clock: ManualClock) -> None:
        short, long = put(store, ttl=10), put(store, ttl=1000)
        clock.advance(10)
        with pytest.raises(NotFound):
            store.get("t", short.id)
        assert [file.id for file in store.list("t", limit=10)[0]] == [long.id]
        assert store.sweep() == 1
        assert {path.name for path in everything(store.root)} == {long.id, f"{long.id}.json"}
        assert store.sweep() == 0

    @pytest.mark.parametrize("tenant", ["..", ".", "a/b", "../../x", "ü", "a%2Fb", "a.b"])
    def test_tenants_stay_in_folders_of_their_own(self, store: FileStore, tenant: str) -> None:
        put(store, tenant="a")
        file = put(store, tenant=tenant)
        assert store.path(tenant, file.id).resolve().is_relative_to(store.root.resolve())
        assert store.path(tenant, file.id).parent.parent.parent == store.root
        assert tenant in store.tenants()
        with pytest.raises(NotFound):
            store.get("a", file.id)

    @pytest.mark.parametrize("id", ["", "x", "file-", "../a/files/x", "file-" + "0" * 31 + "/", "file-" + "0" * 32])
    def test_ids_that_are_none(self, store: FileStore, id: str) -> None:
        put(store)
        with pytest.raises(NotFound):
            store.get("t", id)

    def test_a_tenant_has_so_much_space_and_no_more(self, store: FileStore) -> None:
        first = put(store, b"x" * 1000)
        put(store, b"x" * 1000)
        put(store, b"x" * 500)
        with pytest.raises(InsufficientStorage):
            put(store, b"x" * 500)
        put(store, b"x" * 1000, tenant="another")
        store.delete("t", first.id)
        put(store, b"x" * 999)

    def test_a_name_more_for_the_same_bytes_is_counted_once(self, store: FileStore) -> None:
        file = put(store, b"x" * 1000)
        used = store.used("t")
        link(store.path("t", file.id), store.folder("t", "batches") / "input.jsonl")
        assert store.used("t") == used

    def test_a_folder_of_somebody_else_is_no_tenant(self, store: FileStore) -> None:
        (store.root / "lost+found").mkdir(parents=True)
        assert store.tenants() == []
        store.sweep()

    def test_what_dead_processes_left_goes_and_what_is_on_its_way_stays(self, store: FileStore) -> None:
        left = store.folder("t", "tmp") / "upload-1"
        nameless = store.folder("t", "files") / ("file-" + "0" * 32)
        fresh = store.folder("t", "tmp") / "upload-2"
        for path in (left, nameless, fresh):
            path.write_bytes(b"x")
        long_ago = time.time() - ABANDONED - 1
        for path in (left, nameless):
            os.utime(path, (long_ago, long_ago))
        store.sweep()
        assert everything(store.root) == [fresh]

    def test_adopting_twice_is_adopting_once(self, store: FileStore, tmp_path: Path, clock: ManualClock) -> None:
        source = tmp_path / "output.jsonl"
        source.write_bytes(b"abc")
        file = StoredFile(id="file-" + "1" * 32, filename="o", purpose="batch_output", bytes=3, created_at=clock.now())
        link(source, store.folder("t", "files") / file.id)  # as far as a process came that died
        for _ in range(2):
            store.publish("t", source, file)
            assert store.get("t", file.id) == file
            assert store.path("t", file.id).read_bytes() == b"abc"


@contextlib.contextmanager
def a_disk_that_is_full_at(size: int) -> Iterator[None]:
    """No file of this process can become larger: the kernel refuses the write that would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestAFullDisk:
    def test_an_upload_is_refused_and_leaves_nothing(self, tmp_path: Path) -> None:
        store = FileStore(tmp_path / "files")
        for size in (1 << 20, (1 << 20) + 1):  # the last byte goes to the disk with what is kept
            with pytest.raises(InsufficientStorage), a_disk_that_is_full_at(1 << 20):
                put(store, b"x" * (size + 1))
        assert everything(store.root) == []
        assert put(store, b"small").bytes == 5

    def test_a_log_is_as_it_was_and_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        lines = [json.dumps({"n": n, "pad": "x" * 50_000}).encode() + b"\n" for n in range(6)]
        log = AppendOnlyFile(path, json.loads)
        log.append(lines[:2])
        with a_disk_that_is_full_at(200_000), pytest.raises(OSError, match="too large"):
            log.append(lines[2:])
        assert path.read_bytes() == b"".join(lines[:2])
        log.append(lines[2:])
        log.close()
        assert path.read_bytes() == b"".join(lines)


LINES = [json.dumps({"n": n, "text": "line " * (n % 4)}).encode() + b"\n" for n in range(8)]


class TestLineLog:
    @given(cut=st.integers(0, sum(map(len, LINES))), rubbish=st.binary(max_size=40), more=st.integers(0, 3))
    def test_a_torn_end_is_cut_and_nothing_else(self, cut: int, rubbish: bytes, more: int) -> None:
        """Whatever a crash leaves behind what was synced: part of a line, zeros, pages out of order."""
        whole = b"".join(LINES)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            path.write_bytes(whole[:cut] + rubbish)
            seen: list[int] = []

            def each(line: bytes) -> None:
                value = json.loads(line)
                if not isinstance(value, dict) or LINES[value["n"]] != line:
                    raise ValueError("not one of ours")
                seen.append(value["n"])

            log = AppendOnlyFile(path, each)
            intact = whole[:cut].count(b"\n")
            assert seen[:intact] == list(range(intact))
            assert path.read_bytes() == b"".join(LINES[n] for n in seen)
            log.append(LINES[:more])
            log.append([])
            log.close()
            assert path.read_bytes() == b"".join([*(LINES[n] for n in seen), *LINES[:more]])
            assert log.size == path.stat().st_size
