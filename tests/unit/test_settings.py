"""Where a setting comes from, and what is said about one that does not exist."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from penstock.core.errors import InvalidRequest
from penstock.models.catalogue import FIRST
from penstock.settings import SETTINGS, load_settings, without_passwords


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the environment, and a folder without a file."""
    for name in list(os.environ):
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "penstock.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings()["port"] == 8000
    write("port = 1")
    assert load_settings()["port"] == 1
    monkeypatch.setenv("PENSTOCK_PORT", "2")
    assert load_settings()["port"] == 2
    assert load_settings({"port": 3})["port"] == 3
    assert load_settings({"port": None})["port"] == 2


def test_every_value_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("port = 1\nheartbeat = 5\nlease_ttl = 7")
    monkeypatch.setenv("PENSTOCK_PORT", "2")
    monkeypatch.setenv("PENSTOCK_HEARTBEAT", "6")
    settings = load_settings({"port": 3, "max_body": None})
    assert {name: settings[name] for name in settings.sources} == {"port": 3, "heartbeat": 6.0, "lease_ttl": 7.0}
    assert settings.sources == {"port": "flag", "heartbeat": "PENSTOCK_HEARTBEAT", "lease_ttl": str(path)}
    assert settings["host"] == "127.0.0.1"


def test_what_has_an_operator_to_set_is_in_the_section_of_its_reader() -> None:
    settings = load_settings({"max_queued": 5, "heartbeat": 6, "swap_after": 7})
    assert (settings.queue.max_queued, settings.http.heartbeat, settings.worker.swap_after) == (5, 6.0, 7.0)
    assert len(SETTINGS) == len({(each.section, each.key) for each in SETTINGS.values()})


def test_a_file_may_have_sections() -> None:
    write(
        "port = 1\n[queue]\nmax_queued = 2\nweights = { acme = 2 }\n"
        '[broker]\nurl = "redis://h"\nprefix = "p"\n[log]\nlevel = "debug"'
    )
    settings = load_settings()
    assert (settings.server.port, settings.queue.max_queued, settings.queue.weights) == (1, 2, {"acme": 2.0})
    assert (settings.broker.url, settings.broker.prefix, settings.log.level) == ("redis://h", "p", "debug")
    assert set(settings.sources) == {"port", "max_queued", "tenant_weights", "broker", "broker_prefix", "log_level"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[queue]\nmax_queud = 2", r"Unknown key 'max_queud' of \[queue\] in penstock.toml. Did you mean max_queued\?"),
        ("[queue]\nheartbeat = 2", r"Unknown key 'heartbeat' of \[queue\]"),
        ("[queues]\nmax_queued = 2", r"Unknown key 'queues'"),
        ("log_level = 'info'\n[log]\nlevel = 'info'", r"has log_level twice, and once as level of \[log\]"),
        ("[queue]\nlease_ttl = 0", r"lease_ttl: Expected `float` > 0.0"),
        ("queue = 5", r"Unknown key 'queue'"),
    ],
)
def test_a_section_that_does_not_work_is_refused(text: str, message: str) -> None:
    write(text)
    with pytest.raises(InvalidRequest, match=message):
        load_settings()


def test_everything_that_does_not_work_is_told_at_once() -> None:
    write("port = -1\nallowed_origins = ['*', 'https://a/b']")
    with pytest.raises(InvalidRequest) as caught:
        load_settings({"memory_budget": "8"})
    assert caught.value.message.splitlines() == [
        "These settings don't work:",
        "  port: Expected `int` >= 0",
        "  allowed_origins[1]: 'https://a/b' is no origin: write https://name or http://name:port, without a path",
        "  memory_budget: '8' is no size: write 500MB, 8GB (10^9 bytes), 8GiB (2^30), or 0 for no limit",
    ]


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("1", True), ("False", False), ("OFF", False)])
def test_a_switch_in_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    monkeypatch.setenv("PENSTOCK_INSECURE_PUBLIC", text)
    assert load_settings()["insecure_public"] is value


def test_a_size_is_a_number_too() -> None:
    write("memory_budget = 0")
    assert load_settings().worker.memory_budget.bytes == 0
    assert load_settings({"memory_budget": "2GiB"}).worker.memory_budget.bytes == 2 << 30


def test_the_file_may_be_elsewhere_but_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("port = 1", "other.toml")
    monkeypatch.setenv("PENSTOCK_CONFIG", str(tmp_path / "other.toml"))
    assert load_settings()["port"] == 1
    monkeypatch.setenv("PENSTOCK_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(InvalidRequest, match="not a file"):
        load_settings()


def test_models_and_structures_come_from_the_file_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [model.name for model in load_settings().models] == [FIRST]
    write('tenant_weights = { acme = 2.0 }\n[[models]]\nname = "a"\nengine = "synthetic"\noptions = { rate = "5" }')
    settings = load_settings()
    assert settings.queue.weights == {"acme": 2.0}
    [model] = settings.models
    assert (model.name, model.engine, model.path, model.options) == ("a", "synthetic", None, {"rate": "5"})
    monkeypatch.setenv("PENSTOCK_MODELS", json.dumps([{"name": "b"}]))
    assert [model.name for model in load_settings().models] == ["b"]


def test_an_unknown_key_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    write("heart_beat = 5")
    with pytest.raises(InvalidRequest, match=r"Unknown key 'heart_beat' in penstock.toml. Did you mean heartbeat\?"):
        load_settings()
    write("")
    monkeypatch.setenv("PENSTOCK_PROT", "1")
    with pytest.raises(
        InvalidRequest, match=r"Unknown environment variable PENSTOCK_PROT. Did you mean PENSTOCK_PORT\?"
    ):
        load_settings()
    monkeypatch.delenv("PENSTOCK_PROT")
    monkeypatch.setenv("PENSTOCK_XYZZY", "1")
    with pytest.raises(InvalidRequest, match="See `penstock config`"):
        load_settings()


def test_an_unknown_key_of_a_model_is_refused_too() -> None:
    write('[[models]]\nname = "a"\nengin = "synthetic"')
    with pytest.raises(InvalidRequest, match=r"models\[0\]: .*`engin`"):
        load_settings()


@pytest.mark.parametrize("name", ["PENSTOCK_URL", "PENSTOCK_CACHE"])
def test_variables_of_the_client_and_the_cache_are_no_settings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    load_settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 70000", "port"),
        ("lease_ttl = 0", "lease_ttl"),
        ("models = []", "models"),
        ("port = [", "cannot be read"),
    ],
)
def test_a_value_that_does_not_work_is_named(text: str, message: str) -> None:
    write(text)
    with pytest.raises(InvalidRequest, match=message):
        load_settings()


def test_a_variable_that_should_be_json_is_said_to_be_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_MODELS", "a,b")
    with pytest.raises(InvalidRequest, match="models"):
        load_settings()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.0.0.2", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert load_settings({"host": host}).server.loopback is loopback


@pytest.mark.parametrize(
    "broker",
    [
        "embedded",
        "redis://localhost",
        "redis://user:p%40ss@10.0.0.5:6379/2",
        "rediss://:secret@redis.example.org:6380?ssl_ca_certs=/etc/ca.pem",
        "redis://[::1]:6379/0",
        "unix:///run/redis.sock?db=1&password=secret",
        "redis://a:1,redis://b:2",
    ],
)
def test_a_broker_is_embedded_or_a_redis(broker: str) -> None:
    settings = load_settings({"broker": broker})
    assert (settings.broker.url, settings.broker.embedded) == (broker, broker == "embedded")


@pytest.mark.parametrize(
    ("broker", "hint"),
    [
        ("", "begins with redis://"),
        ("http://localhost", "begins with redis://"),
        ("localhost:6379", "begins with redis://"),
        ("redis://:s3cr,et@localhost", "special characters"),
        ("redis://", "not of the form"),
        ("redis://localhost/jobs", "not of the form"),
        ("redis://localhost:99999", "not of the form"),
        ("redis://:s3cr/et@localhost", "special characters"),
        ("redis://:s3cret@localhost:port", "not of the form"),
        ("unix://", "not of the form"),
        ("redis://a,unix:///run/redis.sock", "cluster"),
        ("redis://a,b", "separated by commas"),
    ],
)
def test_another_broker_is_refused_with_a_hint_and_without_its_password(broker: str, hint: str) -> None:
    with pytest.raises(InvalidRequest, match="broker: ") as caught:
        load_settings({"broker": broker})
    assert hint in caught.value.message
    assert "s3cr" not in caught.value.message
    assert "Value error" not in caught.value.message


@pytest.mark.parametrize(
    ("urls", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:pw@h:1", "redis://:***@h:1"),
        ("redis://user:pw@h", "redis://user:***@h"),
        ("redis://:p@w@h", "redis://:***@h"),
        ("redis://pw@h", "redis://***@h"),
        ("unix:///s?password=pw&db=1", "unix:///s?password=***&db=1"),
        ("rediss://:pw@h,rediss://:pw@i:2", "rediss://:***@h,rediss://:***@i:2"),
    ],
)
def test_passwords_are_not_for_people(urls: str, shown: str) -> None:
    assert without_passwords(urls) == shown


@pytest.mark.parametrize("prefix", ["", "a{b}", "a b", "x" * 65])
def test_a_prefix_that_redis_would_take_for_a_slot_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidRequest, match="broker_prefix"):
        load_settings({"broker_prefix": prefix})
