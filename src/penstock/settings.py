"""Everything an operator can set, in one place: flag > ``PENSTOCK_*`` > ``penstock.toml`` > default.

Unknown keys are refused with the nearest known name. `penstock config` prints what is in force and where it came from.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import TomlConfigSettingsSource

from penstock.brokers.registry import EMBEDDED, broker_type
from penstock.core.errors import InvalidRequest

PREFIX = "PENSTOCK_"
FILE = "penstock.toml"

#: Variables with our prefix that are not settings of a server: where the file is, where converted models are kept,
#: which server the command line talks to.
OTHER_VARIABLES = frozenset({"config", "cache", "url"})

#: The bundled model.
BUNDLED = "millrace"


class ModelSettings(BaseModel):
    """One served model: ``[[models]]`` in the file, ``--model NAME[=PATH]`` with ``--engine`` and ``--option``,
    ``--on-demand`` and ``--standby``."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    engine: str = "openvino"
    path: str | None = None
    options: dict[str, str] = {}
    load: Literal["start", "demand"] = "start"
    standby: int = Field(0, ge=0, le=16)

    def without_secrets(self) -> ModelSettings:
        """For people and logs: without API keys and passwords in addresses."""
        shown = {name: "***" if name == "key" else value for name, value in self.options.items()}
        return self.model_copy(update={"options": shown, "path": self.path and without_passwords(self.path)})


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", nested_model_default_partial_update=False)

    # Where it listens and where it keeps its data.
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    insecure_public: bool = Field(
        False, description="Allow an address that other machines reach, without authentication."
    )
    allowed_hosts: list[str] = Field(
        [], description="Host names clients may use; default: the loopback names, or all when public."
    )
    allowed_origins: list[str] = Field(
        [], description="Origins of other web pages that may use the API, like https://app.example.org; * for all."
    )
    data_dir: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("penstock", appauthor=False)),
        description="Jobs, queue and logs of the embedded broker.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address where a worker answers /metrics and /healthz.")
    metrics_port: int = Field(9100, ge=0, le=65535, description="Port of a worker's metrics; 0 picks a free one.")

    # The broker: what gateways and workers share.
    broker: str = Field(
        EMBEDDED, description="Where jobs, queue and logs are kept: embedded (in data_dir), or Redis by its URL."
    )
    durability: Literal["strict", "fast", "replicated"] = Field(
        "strict", description="What a crash of Redis may cost. The server must be set up for it."
    )
    broker_prefix: str = Field("penstock", pattern=r"^[\w.:-]{1,64}$", description="Beginning of every key in Redis.")
    shards: int = Field(1, ge=1, le=1024, description="Parts that the queue is cut into, for a Redis Cluster.")
    replicas: int = Field(1, ge=1, description="Replicas that must have a write (durability replicated).")
    broker_timeout: float = Field(5.0, gt=0, description="Seconds a request waits for Redis before it gets a 503.")

    # What it serves.
    models: list[ModelSettings] = Field(
        [ModelSettings(name=BUNDLED)], min_length=1, description="The models served; the first is the default."
    )
    hang_timeout: float = Field(
        30.0, gt=0, description="Seconds of silence after which an engine process is killed and restarted."
    )
    load_timeout: float = Field(900.0, gt=0, description="Seconds that loading a model may take.")
    memory_budget: str = Field(
        "0", description="Memory for all engine processes, as 8GB or 8GiB: idle models make room; 0: no limit."
    )
    idle_unload: float = Field(
        0.0, ge=0, description="Seconds without a job after which a model on demand is unloaded; 0: never."
    )
    batch_reserve: float = Field(
        0.25, ge=0, lt=1, description="Share of an engine's slots that jobs of batch priority leave free for others."
    )
    swap_after: float = Field(
        30.0, ge=0, description="Seconds that jobs wait for memory before a busy model makes room for theirs."
    )
    warm_processes: int = Field(
        0, ge=0, le=16, description="Processes per engine that wait for a model, so that loading one is faster."
    )

    # The queue.
    max_queued: int = Field(10_000, ge=0, description="Jobs that may wait in all; 0: no limit.")
    max_queued_per_tenant: int = Field(1_000, ge=0, description="Jobs that may wait per tenant; 0: no limit.")
    max_bytes_per_tenant: int = Field(
        1 << 30, ge=0, description="Bytes of requests and logs that one tenant may have in Redis; 0: no limit."
    )
    max_running_per_tenant: int = Field(0, ge=0, description="Jobs that may run at once per tenant; 0: no limit.")
    tenant_weights: dict[str, float] = Field({}, description="Fair share per tenant (default 1.0).")
    lease_ttl: float = Field(5.0, gt=0, description="Seconds a worker may be silent before its jobs go to another.")
    result_ttl: float = Field(3600.0, gt=0, description="Seconds that results and logs are kept after the end.")
    max_attempts: int = Field(3, ge=0, description="Retries of failures that a retry can cure.")

    # Files and batches.
    files_dir: Path | None = Field(
        None, description="Uploaded files and batches (default: files in data_dir). The same for all gateways."
    )
    max_file: int = Field(200 << 20, gt=0, description="Largest upload in bytes.")
    max_file_bytes_per_tenant: int = Field(
        10 << 30, ge=0, description="Bytes of files that one tenant may have when it uploads another; 0: no limit."
    )
    file_ttl: float = Field(30 * 86400.0, gt=0, description="Seconds that files and ended batches are kept.")
    batch_window: int = Field(
        256, ge=1, description="Lines of a tenant's batches for one model that are in the queue at once."
    )

    # HTTP.
    max_body: int = Field(1 << 20, gt=0, description="Largest request body in bytes.")
    default_max_tokens: int = Field(
        2048, gt=0, description="Tokens an OpenAI chat request gets that does not say how many."
    )
    heartbeat: float = Field(10.0, gt=0, description="Seconds of silence after which a stream carries a ping.")
    send_deadline: float = Field(
        30.0, gt=0, description="Seconds a reader may take nothing before it is dropped (it can resume)."
    )
    disconnect_grace: float = Field(
        10.0, ge=0, description="Seconds that a job without readers lives on, where its route cancels at all."
    )
    drain_timeout: float = Field(
        5.0, ge=0, description="Seconds that running jobs get to finish at shutdown; the others continue after it."
    )

    # Logs.
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="JSON lines, or text for people; auto: text on a terminal."
    )
    log_dir: Path | None = Field(
        None, description="Also write llm_requests.log, errors.log and app.log here (rotating)."
    )

    @field_validator("broker")
    @classmethod
    def _broker_can_be_used(cls, value: str) -> str:
        """The message leaves out the value, which may hold a password."""
        try:
            broker_type(value)
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins_are_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/?#@\s]+", origin):
                raise ValueError(f"{origin!r} is no origin: write https://name or http://name:port, without a path")
        return value

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _budget_is_a_size(cls, value: Any) -> str:
        parse_size(str(value))
        return str(value)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _file())

    @property
    def loopback(self) -> bool:
        return _is_loopback(self.host)

    @property
    def metrics_loopback(self) -> bool:
        return _is_loopback(self.metrics_host)

    @property
    def embedded(self) -> bool:
        return self.broker == EMBEDDED


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{unit}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for unit, base in (("b", 1000), ("ib", 1024))
}


def parse_size(text: str) -> int:
    """Bytes of a size like 500MB, 8GB (10^9) or 8GiB (2^30). Raises `ValueError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS or (not found[2] and 0 < float(found[1]) < 1e6):
        raise ValueError(f"{text!r} is no size: write 500MB, 8GB (10^9 bytes), 8GiB (2^30), or 0 for no limit")
    size: int = round(float(found[1]) * _UNITS[found[2]])
    return size


def without_passwords(urls: str) -> str:
    """*urls* for people and logs."""
    hidden = re.sub(r"(?<=://)([^:@,/]*:)?[^,]*@", lambda found: f"{found[1] or ''}***@", urls)
    return re.sub(r"(?<=[?&]password=)[^&,]*", "***", hidden)


def load_settings(flags: dict[str, Any] | None = None) -> Settings:
    """The settings in force. Raises `InvalidRequest` with a message that says what to change."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    known = {*Settings.model_fields}
    for name in os.environ:
        if name.startswith(PREFIX) and name.removeprefix(PREFIX).lower() not in known | OTHER_VARIABLES:
            raise _unknown(f"environment variable {name}", name.removeprefix(PREFIX).lower(), known, PREFIX)
    path = _file()
    if PREFIX + "CONFIG" in os.environ and not path.is_file():
        raise InvalidRequest(f"PENSTOCK_CONFIG names {path}, which is not a file.")
    try:
        for name in TomlConfigSettingsSource(Settings, path)():
            if name not in known:
                raise _unknown(f"key {name!r} in {path}", name, known)
        return Settings(**given)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise InvalidRequest("These settings don't work:\n  " + "\n  ".join(lines)) from error
    except ValueError as error:  # a broken file, or a variable that should be JSON
        raise InvalidRequest(f"The settings cannot be read: {error}") from error


def explain(settings: Settings, flags: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(name, value, where it came from) of every setting."""
    environment = EnvSettingsSource(Settings)()
    path = _file()
    file = TomlConfigSettingsSource(Settings, path)()
    rows = []
    for name in Settings.model_fields:
        if flags.get(name) is not None:
            source = "flag"
        elif name in environment:
            source = f"{PREFIX}{name.upper()}"
        elif name in file:
            source = str(path)
        else:
            source = "default"
        rows.append((name, getattr(settings, name), source))
    return rows


def _file() -> Path:
    return Path(os.environ.get(PREFIX + "CONFIG", FILE))


def _unknown(what: str, name: str, known: set[str], prefix: str = "") -> InvalidRequest:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    suggestion = (prefix + near[0].upper() if prefix else near[0]) if near else None
    hint = f" Did you mean {suggestion}?" if suggestion else " See `penstock config` for all of them."
    return InvalidRequest(f"Unknown {what}.{hint}")
