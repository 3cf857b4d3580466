"""What the subcommands share: where they write, which server they talk to."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from penstock.client import DEFAULT_URL, Client, ModelView, OnRetry, Token
from penstock.core.errors import ModelNotFound

Url = Annotated[
    str, typer.Option("--url", envvar="PENSTOCK_URL", help="The server to talk to.", rich_help_panel="Connection")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

URL = DEFAULT_URL

#: C0 and C1 controls except tab and line feed: a model's text must not move the cursor or retitle the terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def stdout() -> Console:
    """For results. Lines are only wrapped on a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 250)


def stderr() -> Console:
    """For progress, notes and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """Print a line for people: on stderr, never interpreted as markup."""
    stderr().print(text, style=style, markup=False)


def write(text: str) -> None:
    """Print a piece of a model's text at once: unchanged into a pipe, without control characters on a terminal."""
    sys.stdout.write(_CONTROLS.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class ReplyWriter:
    """Writes a reply as it comes: what it says to stdout; what the model thinks dimmed, for people only."""

    def __init__(self) -> None:
        self._thinking = False

    def write(self, token: Token) -> None:
        said = token.text + token.calls
        if token.reasoning:
            self._think(token.reasoning)
        if said and self._thinking:
            self._think("\n\n")
            self._thinking = False
            said = said.lstrip("\n") if stderr().is_terminal else said
        if said:
            write(said)

    def _think(self, text: str) -> None:
        console = stderr()
        self._thinking = True
        if console.is_terminal:
            console.print(thought(text), end="")


def thought(text: str) -> Text:
    return Text(_CONTROLS.sub("", text), style="dim")


def print_json(value: Any) -> None:
    """Print JSON as one line of ASCII: Unicode has line ends that JSON does not escape."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), separators=(",", ":")) + "\n")
    sys.stdout.flush()


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        made.add_column(name, no_wrap=name in ("ID", "STATUS"))
    return made


def connect(url: str, *, give_up: float = 0.0, on_retry: OnRetry | None = None) -> Client:
    """A client of the server at *url*; by default it fails at once if nobody answers there."""
    return Client(url, give_up=give_up, on_retry=on_retry)


def choose_model(served: Sequence[ModelView], wanted: str | None) -> str:
    """*wanted* if it is served, or the server's default if that is None. Raises `ModelNotFound`."""
    names = [each.id for each in served]
    name = wanted or (names[0] if names else None)
    if name is None or name not in names:
        raise ModelNotFound(f"The server has no model {name!r}. It has: {', '.join(names) or 'none'}.", param="model")
    return name


def ago(moment: float | None) -> str:
    """How long ago *moment* (seconds since the epoch) was."""
    if moment is None:
        return ""
    return f"{duration(max(0.0, time.time() - moment))} ago"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
