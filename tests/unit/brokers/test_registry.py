"""Which broker an address means, one that somebody else wrote included, and how one is waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from penstock.brokers import registry
from penstock.brokers.embedded import EmbeddedBroker
from penstock.brokers.redis import RedisBroker, RedisOptions
from penstock.brokers.registry import broker_type, open_broker
from penstock.core.errors import BrokerUnavailable, InvalidRequest
from penstock.core.job import Job, Request, new_job_id
from penstock.core.ports import Broker, QueuePolicy
from penstock.core.telemetry import NoTelemetry

OPTIONS = {"durability": "fast", "shards": 2, "prefix": "p", "replicas": 1, "timeout": 1.0}


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("embedded", EmbeddedBroker),
        ("redis://localhost:1/0", RedisBroker),
        ("rediss://localhost:1", RedisBroker),
        ("unix:///nobody.sock", RedisBroker),
    ],
)
def test_the_scheme_says_which_broker(address: str, kind: type[Broker], tmp_path: Path) -> None:
    found = broker_type(address)
    assert isinstance(found.make(address, found.options(), QueuePolicy(), NoTelemetry()), kind)


@pytest.mark.parametrize("address", ["", "http://x", "redis", "embedded://x", "postgres://user:s3cret@host/db"])
def test_an_unknown_scheme_is_told_those_that_are_known(address: str) -> None:
    with pytest.raises(InvalidRequest, match=r"'embedded', or .* redis://, rediss://, unix://") as caught:
        broker_type(address)
    assert "s3cret" not in caught.value.message


async def test_each_broker_gets_its_own_options(tmp_path: Path) -> None:
    broker = await open_broker(
        "embedded", {**OPTIONS, "data_dir": tmp_path}, QueuePolicy(), NoTelemetry(), lambda why, pause: None
    )
    try:
        assert broker.kind == "embedded"
        assert (tmp_path / "broker" / "penstock.db").exists()
    finally:
        await broker.close()


def test_options_are_checked_with_the_broker() -> None:
    with pytest.raises(InvalidRequest, match="prefix"):
        RedisOptions(prefix="a{b}")


async def test_a_store_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    waits: list[str] = []
    options = {"data_dir": tmp_path}
    first = await open_broker("embedded", options, QueuePolicy(), NoTelemetry(), lambda why, pause: waits.append(why))
    try:
        with pytest.raises(BrokerUnavailable, match="Another Penstock"):
            await open_broker("embedded", options, QueuePolicy(), NoTelemetry(), lambda why, pause: waits.append(why))
    finally:
        await first.close()
    assert waits == []


# ---------------------------------------------------------------------------------------------- somebody else's

THIRD_PARTY = """
from pathlib import Path

import msgspec

from penstock.brokers.embedded import EmbeddedBroker
from penstock.brokers.registry import BrokerType
from penstock.core.errors import BrokerUnavailable, InvalidRequest


class Options(msgspec.Struct, frozen=True):
    data_dir: Path = Path()
    timeout: float = 0.0


class Shelf(EmbeddedBroker):
    kind = "shelf"
    away = 2

    async def open(self):
        if Shelf.away:
            Shelf.away -= 1
            raise BrokerUnavailable("The shelf is away.")
        await super().open()


def check(address):
    if address == "shelf://":
        raise InvalidRequest("a shelf has a name")


def make(address, options, policy, telemetry):
    return Shelf(options.data_dir / address.removeprefix("shelf://"), policy=policy, telemetry=telemetry)


BROKER = BrokerType(make=make, options=Options, check=check, remote=True)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with a broker, as an installer leaves it."""
    site = tmp_path / "site"
    info = site / "somebodys_shelf-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-shelf\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[penstock.brokers]\nshelf = somebodys_shelf:BROKER\n")
    (site / "somebodys_shelf.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.usefixtures("installed")
async def test_a_broker_of_somebody_else_is_found_checked_waited_for_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MAX_BACKOFF", 0.01)
    waits: list[tuple[str, float]] = []
    note: Callable[[str, float], None] = lambda why, pause: waits.append((why, pause))  # noqa: E731
    with pytest.raises(InvalidRequest, match="a shelf has a name"):
        broker_type("shelf://")
    broker = await open_broker("shelf://books", {**OPTIONS, "data_dir": tmp_path}, QueuePolicy(), NoTelemetry(), note)
    try:
        assert broker.kind == "shelf"
        assert [why for why, _ in waits] == ["The shelf is away."] * 2
        assert all(0 <= pause <= 0.2 for _, pause in waits)
        job = Job(id=new_job_id(), tenant="t", request=Request(model="m", prompt="x"))
        await broker.submit(job)
        assert (await broker.get("t", job.id)).request == job.request
    finally:
        await broker.close()
    assert (tmp_path / "books").is_dir()


@pytest.mark.usefixtures("installed")
def test_an_unknown_scheme_is_told_of_somebody_elses_broker_too() -> None:
    with pytest.raises(InvalidRequest, match="shelf://"):
        broker_type("nobody://x")


def test_a_types_options_have_defaults() -> None:
    for address in ("embedded", "redis://localhost"):
        assert all(
            field.default is not msgspec.NODEFAULT or field.default_factory is not msgspec.NODEFAULT
            for field in msgspec.structs.fields(broker_type(address).options)
        )
