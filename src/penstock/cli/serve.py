"""``penstock serve`` and ``penstock config``: flags into settings, and what a person sees while the server starts."""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from penstock import __version__
from penstock.cli.common import URL, Json, print_json, say, stderr, stdout, table
from penstock.core.errors import InvalidRequest
from penstock.settings import BUNDLED, ModelSettings, Settings, explain, load_settings

#: Which settings have a flag, by panel of the help page. The others are structures: environment or file.
PANELS: dict[str, tuple[str, ...]] = {
    "Address and data": ("host", "port", "insecure_public", "allowed_hosts", "data_dir"),
    "Logs": ("log_level", "log_format", "log_dir"),
    "Queue": (
        "max_queued",
        "max_queued_per_tenant",
        "max_running_per_tenant",
        "lease_ttl",
        "result_ttl",
        "max_attempts",
    ),
    "HTTP": ("max_body", "default_max_tokens", "heartbeat", "send_deadline", "disconnect_grace", "drain_timeout"),
    "Engines": ("hang_timeout", "load_timeout"),
}

STRUCTURES = frozenset({"models", "tenant_weights"})


def _parameters() -> list[inspect.Parameter]:
    """A command-line option for every setting that can have one, made from the settings themselves."""
    parameters = []
    for panel, names in PANELS.items():
        for name in names:
            field = Settings.model_fields[name]
            default = field.get_default(call_default_factory=True)
            shown = "" if default in (None, [], False) else f" Default: {default}."
            option = typer.Option(help=f"{field.description}{shown}", rich_help_panel=panel)
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[field.annotation | None, option],  # type: ignore[operator]
                )
            )
    return parameters


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the ``**flags`` of *command* with one option per setting."""
    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own, *_parameters()]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        command(**values)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapper


Engines = Annotated[
    list[str] | None,
    typer.Option("--engine", metavar="ENGINE", help="One for all models, or one per model, in order."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME[=PATH]",
        help=f"A model to serve (repeatable; the first is the default). Without any: {BUNDLED}, the model in the box.",
    ),
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="[NAME.]KEY=VALUE", help="An option of the engines, or of NAME's alone (repeatable)."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings file, instead of ./penstock.toml.")
]


@_with_settings
def serve(
    *,
    engine: Engines = None,
    model: Models = None,
    option: EngineOptions = None,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Serve models: gateway, durable queue and engines in one command.

    Everything below can also be set as PENSTOCK_<NAME> or in penstock.toml; a flag wins over both.
    """
    settings, _ = _settle(engine, model, option, config, flags)
    # Only here: the other commands need none of the server.
    from penstock.observability.logs import configure
    from penstock.wiring import serve as run_server

    configure(settings.log_level, settings.log_format, settings.log_dir)
    with Startup(settings) as startup, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(
            run_server(settings, on_listening=startup.listening, progress=startup.progress, on_ready=startup.ready)
        )


@_with_settings
def config(
    *,
    engine: Engines = None,
    model: Models = None,
    option: EngineOptions = None,
    config: ConfigFile = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Print the settings in force and where each value comes from: flag, environment, file or default."""
    settings, given = _settle(engine, model, option, config, flags)
    plain = settings.model_dump(mode="json")
    rows = [(name, plain[name], source) for name, _, source in explain(settings, given)]
    if json:
        print_json({name: {"value": value, "source": source} for name, value, source in rows})
        return
    shown = table("SETTING", "VALUE", "SOURCE")
    for name, value, source in rows:
        shown.add_row(name, Text(_plain(name, value)), Text(source, style="dim" if source == "default" else "green"))
    stdout().print(shown)


def _plain(name: str, value: Any) -> str:
    if name == "models":
        return "\n".join(_describe(ModelSettings(**each)) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _describe(model: ModelSettings) -> str:
    options = "".join(f" {key}={value}" for key, value in model.options.items())
    return f"{model.name}{f'={model.path}' if model.path else ''} ({model.engine}{options})"


# ---------------------------------------------------------------------------------------------- flags into settings


def _settle(
    engines: Sequence[str] | None,
    models: Sequence[str] | None,
    options: Sequence[str] | None,
    file: Path | None,
    flags: dict[str, Any],
) -> tuple[Settings, dict[str, Any]]:
    """The settings in force, and the flags among them. Raises `InvalidRequest`, `typer.BadParameter`."""
    if file is not None:
        os.environ["PENSTOCK_CONFIG"] = str(file)
    given = {name: value for name, value in flags.items() if value is not None}
    if models or engines:
        given["models"] = choose_models(engines or (), models or ())
    settings = load_settings(given)
    if options:
        given["models"] = add_options(settings.models, options)
        settings = load_settings(given)
    names = [each.name for each in settings.models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"Two models are called {twice!r}: give one of them another name, --model NAME=PATH.")
    return settings, given


def choose_models(engines: Sequence[str], models: Sequence[str]) -> list[dict[str, Any]]:
    """``--engine`` and ``--model`` as entries of the ``models`` setting."""
    from penstock.engines.child import ENGINES

    for engine in engines:
        if engine not in ENGINES:
            near = difflib.get_close_matches(engine, ENGINES, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise typer.BadParameter(f"There is no engine {engine!r}.{hint} Engines: {', '.join(ENGINES)}.")
    if not models:
        if list(engines) == ["synthetic"]:
            models = ["synthetic"]
        elif set(engines) == {"openvino"}:
            models = [BUNDLED]
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
    chosen = [model.model_dump() for model in models]
    for text in options:
        key, equals, value = text.partition("=")
        # Names may have dots ("qwen2.5"), keys don't; the longest name that fits is meant.
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


# ---------------------------------------------------------------------------------------------- while it starts


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class Startup:
    """Tells on stderr what happens until every model is ready: bars on a terminal, plain lines elsewhere."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._url = ""
        self._loading = {model.name for model in settings.models}
        self._said: dict[str, str] = {}
        self._bars: dict[str, TaskID] = {}
        console = stderr()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Startup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def listening(self, url: str) -> None:
        self._url = url
        say(f"penstock {__version__} listens on {url}", "bold")
        for model in self._settings.models:
            self._bars[model.name] = self._progress.add_task(f"{model.name}: starting the engine", total=None)
            if self._progress.disable:
                say(f"loading {_describe(model)}")
        self._progress.start()

    def progress(self, model: str, what: str, fraction: float | None) -> None:
        if model not in self._loading:
            return  # an engine that is started again: the log tells
        self._progress.update(
            self._bars[model],
            description=f"{model}: {what}",
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
        )
        if self._progress.disable and self._said.get(model) != what:
            self._said[model] = what
            say(f"{model}: {what}")

    def ready(self, model: str) -> None:
        if model not in self._loading:
            return
        self._loading.remove(model)
        self._progress.remove_task(self._bars.pop(model))
        if self._loading:
            say(f"{model} is ready", "green")
            return
        self._progress.stop()
        names = ", ".join(each.name for each in self._settings.models)
        say(f"ready: {names}", "bold green")
        body = '{"prompt": "Once upon a time", "stream": true}'
        chat = "penstock chat" if self._url == URL else f"penstock chat --url {self._url}"
        say(f"  try it   curl -N {self._url}/v1/generate -d {shlex.quote(body)}")
        say(f"  talk     {chat}")
        say(f"  data in  {self._settings.data_dir}")
        say("  stop     Ctrl-C")
