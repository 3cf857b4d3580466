"""``penstock models``: what the server can serve; for its operator, to load and unload it. And what could be served:
the catalogue, and what of it is on this machine."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.text import Text

from penstock.cli.common import URL, Json, Url, connect, print_json, say, stderr, stdout, table
from penstock.cli.pull import find_entry
from penstock.client import ModelView
from penstock.core.ports import LoadProgress
from penstock.models.cache import pulled
from penstock.models.catalogue import CATALOGUE, Entry
from penstock.models.pull import remove as remove_model

app = typer.Typer(invoke_without_command=True, help="List the models; load, unload and remove them.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")]

COLOURS = {"ready": "green", "failed": "red", "unavailable": "red"}


Available = Annotated[
    bool, typer.Option("--available", help="Ask no server: list the catalogue, and what of it is on this machine.")
]


@app.callback()
def models(context: typer.Context, available: Available = False, json: Json = False, url: Url = URL) -> None:
    """List the models that the server serves; the first is the default."""
    source = context.get_parameter_source("url")
    if context.invoked_subcommand is None and available:
        list_available(json)
    elif context.invoked_subcommand is None:
        list_models(json, url)
    elif source is not None and source.name == "COMMANDLINE":
        verb = context.invoked_subcommand
        raise typer.BadParameter(f"--url goes behind the subcommand: penstock models {verb} NAME --url {url}")


@app.command(name="list")
def list_models(json: Json = False, url: Url = URL) -> None:
    """List the models that the server serves; the first is the default."""
    with connect(url) as client:
        views = client.models()
    if json:
        print_json(views)
        return
    rows = table("ID", "STATE", "ENGINE", "CONTEXT", "PRECISION", "NOT SUPPORTED")
    for view in views:
        rows.add_row(
            Text(view.id),
            _state(view),
            view.engine or "",
            str(view.context_length or ""),
            view.precision or "",
            ", ".join(view.unsupported or ()),
        )
    stdout().print(rows)


def list_available(json: bool) -> None:
    """The catalogue, what is pulled and where."""
    entries = CATALOGUE.values()
    if json:
        print_json({"models": [_listed(entry) for entry in entries]})
        return
    rows = table("NAME", "MODEL", "TASK", "SIZE", "CONTEXT", "LICENCE", "ENGINES", "HERE")
    for entry in entries:
        rows.add_row(
            entry.name,
            entry.title,
            entry.task,
            f"{entry.size / 1e6:.0f} MB",
            str(entry.context),
            entry.licence,
            ", ".join(entry.engines),
            Text(str(pulled(entry) or "no")),
        )
    stdout().print(rows)


def _listed(entry: Entry) -> dict[str, object]:
    sources = [{"from": str(source), **msgspec.to_builtins(source, enc_hook=str)} for source in entry.sources]
    place = pulled(entry)
    return {**msgspec.to_builtins(entry, enc_hook=str), "sources": sources, "path": place and str(place)}


@app.command()
def remove(name: Name) -> None:
    """Delete a pulled model from this machine's cache. A server that has it loaded goes on with it."""
    size = remove_model(find_entry(name))
    say(f"{name}: {size / 1e6:.0f} MB removed")


@app.command()
def load(name: Name, json: Json = False, url: Url = URL) -> None:
    """Load a model now, and wait until it is ready. Ask the process that has it: serve, or a worker's metrics port."""
    with connect(url) as client, _Progress(name) as progress:
        view = client.load_model(name, progress.show)
    _tell(view, json)


@app.command()
def unload(name: Name, json: Json = False, url: Url = URL) -> None:
    """Unload a model: jobs that run are given a moment, or back to the queue. A job for it loads it again."""
    with connect(url) as client, _Progress(name) as progress:
        view = client.unload_model(name, progress.show)
    _tell(view, json)


def _tell(view: ModelView, json: bool) -> None:
    if json:
        print_json(view)
    else:
        stdout().print(Text(f"{view.id} ").append(_state(view)))


def _state(view: ModelView) -> Text:
    return Text(view.state, style=COLOURS.get(view.state, "yellow"))


class _Progress:
    """The progress as one line that changes on a terminal, as a line for each step elsewhere."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._console = stderr()
        self._status = self._console.status(name)
        self._said = ""

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._status.stop()

    def show(self, step: LoadProgress) -> None:
        what = f"{self._name}: {step.what or step.state}"
        if self._console.is_terminal:
            done = f" {step.fraction:.0%}" if step.fraction is not None else ""
            self._status.update(Text(what + done))
        elif what != self._said:
            say(what)
        self._said = what
