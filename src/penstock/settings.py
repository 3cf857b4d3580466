"""Everything an operator can set, in sections: flag > ``PENSTOCK_*`` > ``penstock.toml`` > default.

A setting is a field with a description in one of the sections of `Settings`. The name of its flag and of its variable
is the field's, or the one that ``name=`` gives it; ``penstock.toml`` has it in its section (``[queue] max_queued``) or
by that name alone. Unknown names are refused with the nearest known one. `penstock config` prints what is in force and
where it came from.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import platformdirs
from msgspec import Meta, Struct, field

from penstock.brokers.registry import EMBEDDED, broker_type
from penstock.core.errors import InvalidRequest
from penstock.core.ports import QueuePolicy
from penstock.gateway.config import HttpSettings
from penstock.models.catalogue import FIRST
from penstock.worker.placement import Policy

PREFIX = "PENSTOCK_"
FILE = "penstock.toml"

#: Variables with our prefix that are not settings of a server: where the file is, where converted models are kept,
#: which server the command line talks to.
OTHER_VARIABLES = frozenset({"config", "cache", "url"})


# ---------------------------------------------------------------------------------------------- types of values


class BrokerAddress(str):
    """A message leaves it out, since it may hold a password."""

    def __new__(cls, value: object) -> BrokerAddress:
        if value != EMBEDDED:
            try:
                broker_type(str(value))
            except InvalidRequest as error:
                raise ValueError(error.message) from None
        return super().__new__(cls, value)


class Size(str):
    """A size as people write it: 500MB, 8GB (10^9 bytes), 8GiB (2^30), or 0 for no limit."""

    def __new__(cls, value: object) -> Size:
        size = super().__new__(cls, value)
        size.bytes = parse_size(size)
        return size

    bytes: int


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{unit}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for unit, base in (("b", 1000), ("ib", 1024))
}


def parse_size(text: str) -> int:
    """Bytes of a `Size`. Raises `ValueError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS or (not found[2] and 0 < float(found[1]) < 1e6):
        raise ValueError(f"{text!r} is no size: write 500MB, 8GB (10^9 bytes), 8GiB (2^30), or 0 for no limit")
    size: int = round(float(found[1]) * _UNITS[found[2]])
    return size


# ---------------------------------------------------------------------------------------------- sections


class ServerSettings(Struct, frozen=True, kw_only=True):
    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 picks a free one.")] = 8000
    insecure_public: Annotated[
        bool, Meta(description="Allow an address that other machines reach, without authentication.")
    ] = False
    drain_timeout: Annotated[
        float,
        Meta(ge=0, description="Seconds that running jobs get to finish at shutdown; the others continue after it."),
    ] = 5.0

    @property
    def loopback(self) -> bool:
        return _is_loopback(self.host)


class MetricsSettings(Struct, frozen=True, kw_only=True):
    host: Annotated[str, Meta(description="Address where a worker answers /metrics and /healthz.")] = field(
        default="127.0.0.1", name="metrics_host"
    )
    port: Annotated[int, Meta(ge=0, le=65535, description="Port of a worker's metrics; 0 picks a free one.")] = field(
        default=9100, name="metrics_port"
    )

    @property
    def loopback(self) -> bool:
        return _is_loopback(self.host)


class BrokerSettings(Struct, frozen=True, kw_only=True):
    """What gateways and workers share. Beside ``url``, the options of brokers; each takes those that it knows."""

    url: Annotated[
        BrokerAddress,
        Meta(description="Where jobs, queue and logs are kept: embedded (in data_dir), or Redis by its URL."),
    ] = field(default=BrokerAddress(EMBEDDED), name="broker")
    data_dir: Annotated[Path, Meta(description="Jobs, queue and logs of the embedded broker.")] = field(
        default_factory=lambda: Path(platformdirs.user_data_dir("penstock", appauthor=False))
    )
    durability: Annotated[
        Literal["strict", "fast", "replicated"],
        Meta(description="What a crash of Redis may cost. The server must be set up for it."),
    ] = "strict"
    prefix: Annotated[str, Meta(pattern=r"^[\w.:-]{1,64}$", description="Beginning of every key in Redis.")] = field(
        default="penstock", name="broker_prefix"
    )
    shards: Annotated[
        int, Meta(ge=1, le=1024, description="Parts that the queue is cut into, for a Redis Cluster.")
    ] = 1
    replicas: Annotated[int, Meta(ge=1, description="Replicas that must have a write (durability replicated).")] = 1
    timeout: Annotated[float, Meta(gt=0, description="Seconds a request waits for Redis before it gets a 503.")] = (
        field(default=5.0, name="broker_timeout")
    )

    @property
    def embedded(self) -> bool:
        return self.url == EMBEDDED


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One served model: ``[[models]]`` in the file, ``--model NAME[=PATH]`` with ``--engine`` and ``--option``,
    ``--on-demand`` and ``--standby``."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    engine: str = "openvino"
    path: str | None = None
    options: dict[str, str] = {}
    load: Literal["start", "demand"] = "start"
    standby: Annotated[int, Meta(ge=0, le=16)] = 0

    def without_secrets(self) -> ModelSettings:
        """For people and logs: without API keys and passwords in addresses."""
        shown = {name: "***" if name == "key" else value for name, value in self.options.items()}
        return msgspec.structs.replace(self, options=shown, path=self.path and without_passwords(self.path))


class EngineSettings(Struct, frozen=True, kw_only=True):
    hang_timeout: Annotated[
        float, Meta(gt=0, description="Seconds of silence after which an engine process is killed and restarted.")
    ] = 30.0
    load_timeout: Annotated[float, Meta(gt=0, description="Seconds that loading a model may take.")] = 900.0
    warm_processes: Annotated[
        int,
        Meta(ge=0, le=16, description="Processes per engine that wait for a model, so that loading one is faster."),
    ] = 0


class WorkerSettings(Policy, frozen=True, kw_only=True):
    """Which models are loaded, and how full their slots get."""

    memory_budget: Annotated[
        Size,
        Meta(description="Memory for all engine processes, as 8GB or 8GiB: idle models make room; 0: no limit."),
    ] = Size("0")
    batch_reserve: Annotated[
        float,
        Meta(ge=0, lt=1, description="Share of an engine's slots that jobs of batch priority leave free for others."),
    ] = 0.25


class FileSettings(Struct, frozen=True, kw_only=True):
    """Files and batches."""

    dir: Annotated[
        Path | None,
        Meta(description="Uploaded files and batches (default: files in data_dir). The same for all gateways."),
    ] = field(default=None, name="files_dir")
    max_file: Annotated[int, Meta(gt=0, description="Largest upload in bytes.")] = 200 << 20
    max_bytes_per_tenant: Annotated[
        int,
        Meta(ge=0, description="Bytes of files that one tenant may have when it uploads another; 0: no limit."),
    ] = field(default=10 << 30, name="max_file_bytes_per_tenant")
    ttl: Annotated[float, Meta(gt=0, description="Seconds that files and ended batches are kept.")] = field(
        default=30 * 86400.0, name="file_ttl"
    )
    batch_window: Annotated[
        int, Meta(ge=1, description="Lines of a tenant's batches for one model that are in the queue at once.")
    ] = 256


class LogSettings(Struct, frozen=True, kw_only=True):
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="What is logged.")] = field(
        default="info", name="log_level"
    )
    format: Annotated[
        Literal["auto", "json", "console"],
        Meta(description="JSON lines, or text for people; auto: text on a terminal."),
    ] = field(default="auto", name="log_format")
    dir: Annotated[
        Path | None, Meta(description="Also write llm_requests.log, errors.log and app.log here (rotating).")
    ] = field(default=None, name="log_dir")


class Settings(Struct, frozen=True, kw_only=True):
    server: ServerSettings = ServerSettings()
    metrics: MetricsSettings = MetricsSettings()
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    models: Annotated[
        list[ModelSettings], Meta(min_length=1, description="The models served; the first is the default.")
    ] = field(default_factory=lambda: [ModelSettings(name=FIRST)])
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    queue: QueuePolicy = QueuePolicy()
    files: FileSettings = FileSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()

    sources: dict[str, str] = {}
    """Where each setting came from that has not its default: ``flag``, a variable, or the file."""

    def __getitem__(self, name: str) -> Any:
        """The value of the setting *name*."""
        setting = SETTINGS[name]
        return getattr(getattr(self, setting.section), setting.key) if setting.section else getattr(self, setting.key)


class Setting(Struct, frozen=True, kw_only=True):
    """One thing that can be set, as the section has it."""

    name: str
    section: str
    """Empty for one that is a section of its own."""
    key: str
    type: Any
    """With its bounds."""
    description: str
    default: Any

    @property
    def plain_type(self) -> Any:
        return get_args(self.type)[0]

    @property
    def structured(self) -> bool:
        """Is it a list or a table, which is JSON in a variable?"""
        return get_origin(self.plain_type) in (list, dict)


def _settings(kind: type[Struct], section: str = "") -> Iterator[Setting]:
    for each in msgspec.structs.fields(kind):
        meta = next((part for part in get_args(each.type) if isinstance(part, Meta)), None)
        if meta is not None and meta.description is not None:
            default = each.default if each.default_factory is msgspec.NODEFAULT else each.default_factory()
            yield Setting(
                name=each.encode_name, section=section, key=each.name, type=each.type, description=meta.description,
                default=default,
            )  # fmt: skip
        elif isinstance(each.type, type) and issubclass(each.type, Struct):
            yield from _settings(each.type, each.name)


#: All of them by name, in the order of their sections.
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _settings(Settings)}


# ---------------------------------------------------------------------------------------------- where they come from


def load_settings(flags: dict[str, Any] | None = None) -> Settings:
    """The settings in force. Raises `InvalidRequest` with a message that says what to change."""
    path = Path(os.environ.get(PREFIX + "CONFIG", FILE))
    given: dict[str, tuple[str, Any]] = {name: (str(path), value) for name, value in _from_file(path).items()}
    given |= {name: (f"{PREFIX}{name.upper()}", value) for name, value in _from_environment().items()}
    given |= {name: ("flag", value) for name, value in (flags or {}).items() if value is not None}
    sections: dict[str, dict[str, Any]] = {}
    problems = []
    for name, (source, value) in given.items():
        setting = SETTINGS[name]
        try:
            found = _convert(setting, value, text=source.startswith(PREFIX))
        except msgspec.MsgspecError as error:
            problems.append(_problem(name, str(error)))
        else:
            sections.setdefault(setting.section, {})[setting.key] = found
    if problems:
        raise InvalidRequest("These settings don't work:\n  " + "\n  ".join(problems))
    kinds = {each.name: each.type for each in msgspec.structs.fields(Settings)}
    alone = sections.pop("", {})
    parts = {section: kinds[section](**values) for section, values in sections.items()}
    return Settings(**parts, **alone, sources={name: source for name, (source, _) in given.items()})


def _from_file(path: Path) -> dict[str, Any]:
    """What the settings file says, by name."""
    if not path.is_file():
        if PREFIX + "CONFIG" in os.environ:
            raise InvalidRequest(f"PENSTOCK_CONFIG names {path}, which is not a file.")
        return {}
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"The settings cannot be read: {path}: {error}") from error
    sections = {setting.section for setting in SETTINGS.values()}
    found = {}
    for name, value in values.items():
        if name in sections and isinstance(value, dict):
            keys = {setting.key: setting.name for setting in SETTINGS.values() if setting.section == name}
            for key, each in value.items():
                if key not in keys:
                    raise _unknown(f"key {key!r} of [{name}] in {path}", key, {*keys})
                if keys[key] in values and keys[key] != name:  # [broker] is the section, not its url
                    raise InvalidRequest(f"{path} has {keys[key]} twice, and once as {key} of [{name}].")
                found[keys[key]] = each
        elif name in SETTINGS:
            found[name] = value
        else:
            raise _unknown(f"key {name!r} in {path}", name, {*SETTINGS})
    return found


def _from_environment() -> dict[str, str]:
    names = {name.removeprefix(PREFIX).lower(): name for name in os.environ if name.startswith(PREFIX)}
    for name, variable in names.items():
        if name not in SETTINGS and name not in OTHER_VARIABLES:
            raise _unknown(f"environment variable {variable}", name, {*SETTINGS}, PREFIX)
    return {name: os.environ[variable] for name, variable in names.items() if name in SETTINGS}


_SWITCHES = dict.fromkeys(("yes", "y", "on", "t"), True) | dict.fromkeys(("no", "n", "off", "f"), False)


def _convert(setting: Setting, value: Any, *, text: bool) -> Any:
    """*value* as the setting's type, from JSON if it is *text* of a list or table. Raises `msgspec.MsgspecError`."""
    if text and setting.structured:
        value = msgspec.json.decode(value)
    if setting.plain_type is bool and isinstance(value, str):
        value = _SWITCHES.get(value.lower(), value)
    return msgspec.convert(value, setting.type, strict=False, dec_hook=lambda kind, value: kind(value))


def _problem(name: str, told: str) -> str:
    """What msgspec says of a setting, with the place inside of it: models[0].engine."""
    what, _, place = told.partition(" - at `$")
    return f"{name}{place.rstrip('`')}: {what}"


def _unknown(what: str, name: str, known: set[str], prefix: str = "") -> InvalidRequest:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    suggestion = (prefix + near[0].upper() if prefix else near[0]) if near else None
    hint = f" Did you mean {suggestion}?" if suggestion else " See `penstock config` for all of them."
    return InvalidRequest(f"Unknown {what}.{hint}")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def without_passwords(urls: str) -> str:
    """*urls* for people and logs."""
    hidden = re.sub(r"(?<=://)([^:@,/]*:)?[^,]*@", lambda found: f"{found[1] or ''}***@", urls)
    return re.sub(r"(?<=[?&]password=)[^&,]*", "***", hidden)
