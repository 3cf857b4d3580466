"""Flags become settings: which command has which, and ``penstock config``, which prints the result."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin

import msgspec
import typer
from rich.text import Text

from penstock.cli.common import Json, print_json, stdout, table
from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.models.catalogue import BUNDLED, FIRST
from penstock.settings import SETTINGS, ModelSettings, Settings, load_settings, without_passwords

#: What needs a table or more than one flag: environment or file.
STRUCTURES = frozenset({"models", "tenant_weights"})

#: The sections whose settings are flags of each command, …
SECTIONS = ("server", "broker", "metrics", "log", "queue", "files", "http", "engine", "worker")
SERVE = frozenset(SECTIONS) - {"metrics"}
GATEWAY = SERVE - {"engine", "worker"}
WORKER = frozenset(SECTIONS) - {"files", "http"}
#: … and those among them that it has no use for.
UNUSED: dict[frozenset[str], frozenset[str]] = {
    GATEWAY: frozenset({"data_dir"}),
    WORKER: frozenset(
        {"data_dir", "host", "port", "insecure_public", "max_queued", "max_queued_per_tenant", "max_bytes_per_tenant"}
    ),
}


def _parameters(sections: Collection[str], unused: Collection[str]) -> list[inspect.Parameter]:
    """A command-line option for every setting that can have one, made from the settings themselves."""
    parameters = []
    for setting in sorted(SETTINGS.values(), key=lambda each: (*SECTIONS, "").index(each.section)):
        if setting.section not in sections or setting.name in {*STRUCTURES, *unused}:
            continue
        shown = "" if setting.default in (None, (), False) else f" Default: {setting.default}."
        panel = {"http": "HTTP"}.get(setting.section, setting.section.capitalize())
        option = typer.Option(help=f"{setting.description}{shown}", rich_help_panel=panel)
        parameters.append(
            inspect.Parameter(
                setting.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_flag_type(setting.plain_type) | None, option],
            )
        )
    return parameters


def _flag_type(kind: Any) -> Any:
    """A type that typer knows; what the text must be beside is found out with all other settings."""
    if get_origin(kind) is tuple:
        return list[str]
    return str if isinstance(kind, type) and issubclass(kind, str) else kind


def with_settings(
    sections: frozenset[str] = frozenset(SECTIONS),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the ``**flags`` of a command with one option per setting of *sections*."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *_parameters(sections, UNUSED.get(sections, frozenset()))]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            command(**values)

        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapper

    return decorate


Engines = Annotated[
    list[str] | None,
    typer.Option("--engine", metavar="ENGINE", help="One for all models, or one per model, in order."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME[=PATH]",
        help="A model to serve (repeatable; the first is the default): a name of `penstock models --available`, or "
        f"your own and where it is. Without any: {FIRST}, or {BUNDLED} where {FIRST} cannot be pulled.",
    ),
]
GatewayModels = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="A model to take jobs for before a worker has it up (repeatable; the first is the default). "
        "Without any: what the workers serve.",
    ),
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="[NAME.]KEY=VALUE", help="An option of the engines, or of NAME's alone (repeatable)."
    ),
]
OnDemand = Annotated[
    list[str] | None,
    typer.Option(
        "--on-demand",
        metavar="NAME",
        help="Load this model when the first job for it comes, not at the start (repeatable; all: every model).",
    ),
]
Standby = Annotated[
    list[str] | None,
    typer.Option(
        "--standby",
        metavar="[NAME=]N",
        help="Keep N spare engine processes with the model loaded, of every model or of NAME's (repeatable).",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings file, instead of ./penstock.toml.")
]


def settle(
    engines: Sequence[str] | None,
    models: Sequence[str] | None,
    options: Sequence[str] | None,
    file: Path | None,
    flags: dict[str, Any],
    on_demand: Sequence[str] | None = None,
    standby: Sequence[str] | None = None,
) -> Settings:
    """The settings in force. Raises `InvalidRequest`, `typer.BadParameter`."""
    if file is not None:
        os.environ["PENSTOCK_CONFIG"] = str(file)
    given = {name: value for name, value in flags.items() if value is not None}
    if models or engines:
        given["models"] = choose_models(engines or (), models or ())
    settings = load_settings(given)
    if options or on_demand or standby:
        chosen = add_options(settings.models, options or ())
        given["models"] = add_standby(add_on_demand(chosen, on_demand or ()), standby or ())
        settings = load_settings(given)
    names = [each.name for each in settings.models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"Two models are called {twice!r}: give one of them another name, --model NAME=PATH.")
    return settings


def choose_models(engines: Sequence[str], models: Sequence[str]) -> list[dict[str, Any]]:
    """``--engine`` and ``--model`` as entries of the ``models`` setting."""

    from penstock.engines.plugin import find_engine

    for engine in engines:
        try:
            find_engine(engine)
        except ModelLoadError as error:
            raise typer.BadParameter(error.message) from error
    if not models:
        if list(engines) == ["synthetic"]:
            models = ["synthetic"]
        elif set(engines) == {"openvino"}:
            models = [FIRST]
        else:
            raise typer.BadParameter("Say which models the engines run: --model NAME[=PATH].")
    if len(engines) > 1 and len(engines) != len(models):
        raise typer.BadParameter(
            f"{len(engines)} engines for {len(models)} models: give one engine for all of them, or one for each."
        )
    paired = list(engines) if len(engines) == len(models) else [*engines] * len(models)
    chosen = []
    for i, text in enumerate(models):
        name, equals, path = text.partition("=")
        if not name or (equals and not path):
            raise typer.BadParameter(f"--model {text!r} is not of the form NAME or NAME=PATH.")
        entry: dict[str, Any] = {"name": name, "path": path or None}
        chosen.append({**entry, "engine": paired[i]} if paired else entry)
    return chosen


def add_options(models: Sequence[ModelSettings], options: Sequence[str]) -> list[dict[str, Any]]:
    """``--option [NAME.]KEY=VALUE`` added to the entries of the ``models`` setting."""
    chosen: list[dict[str, Any]] = [msgspec.to_builtins(model) for model in models]
    for text in options:
        key, equals, value = text.partition("=")
        # Names may have dots ("qwen2.5"), keys have none: take the longest name that fits.
        name, _, key = key.rpartition(".")
        targets = [each for each in chosen if not name or each["name"] == name]
        if not equals or not key:
            raise typer.BadParameter(f"--option {text!r} is not of the form KEY=VALUE or NAME.KEY=VALUE.")
        if not targets:
            served = ", ".join(each["name"] for each in chosen)
            raise typer.BadParameter(f"--option {text!r}: there is no model {name!r} among {served}.")
        for each in targets:
            each["options"][key] = value
    return chosen


def add_on_demand(models: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """``--on-demand NAME`` (or ``all``) in entries of the ``models`` setting."""
    for name in names:
        for each in _called(models, name, f"--on-demand {name}", every="all"):
            each["load"] = "demand"
    return models


def add_standby(models: list[dict[str, Any]], wishes: Sequence[str]) -> list[dict[str, Any]]:
    """``--standby [NAME=]N`` in entries of the ``models`` setting."""
    for text in wishes:
        name, _, count = text.rpartition("=")
        if not count.isdecimal():
            raise typer.BadParameter(f"--standby {text!r} is not of the form N or NAME=N.")
        for each in _called(models, name, f"--standby {text!r}", every=""):
            each["standby"] = int(count)
    return models


def _called(models: list[dict[str, Any]], name: str, what: str, *, every: str) -> list[dict[str, Any]]:
    """The entries of the model *name*, or all if it is *every*."""
    found = [each for each in models if each["name"] == name]
    if not found and name != every:
        served = ", ".join(each["name"] for each in models)
        raise typer.BadParameter(f"{what}: there is no model {name!r} among {served}.")
    return found or models


# ---------------------------------------------------------------------------------------------- penstock config


@with_settings()
def config(
    *,
    engine: Engines = None,
    model: Models = None,
    option: EngineOptions = None,
    on_demand: OnDemand = None,
    standby: Standby = None,
    config: ConfigFile = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Print the settings in force and where each value comes from: flag, environment, file or default."""
    settings = settle(engine, model, option, config, flags, on_demand, standby)
    shown_instead = {
        "broker": without_passwords(settings.broker.url),
        "models": [each.without_secrets() for each in settings.models],
    }
    rows = [
        (
            name,
            msgspec.to_builtins(shown_instead.get(name, settings[name]), enc_hook=str),
            settings.sources.get(name, "default"),
        )
        for name in SETTINGS
    ]
    if json:
        print_json({name: {"value": value, "source": source} for name, value, source in rows})
        return
    rendered = table("SETTING", "VALUE", "SOURCE")
    for name, value, source in rows:
        rendered.add_row(name, Text(_plain(name, value)), Text(source, style="dim" if source == "default" else "green"))
    stdout().print(rendered)


def _plain(name: str, value: Any) -> str:
    if name == "models":
        return "\n".join(describe(ModelSettings(**each)) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def describe(model: ModelSettings) -> str:
    model = model.without_secrets()
    options = "".join(f" {key}={value}" for key, value in model.options.items())
    standby = f", {model.standby} on standby" if model.standby else ""
    load = ", on demand" if model.load == "demand" else ""
    return f"{model.name}{f'={model.path}' if model.path else ''} ({model.engine}{options}{load}{standby})"
