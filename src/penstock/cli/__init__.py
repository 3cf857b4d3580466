"""The ``penstock`` command: a module for each group of subcommands; errors are reported here."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from penstock import __version__
from penstock.cli import bench, chat, flags, jobs, models, pull, serve
from penstock.cli.common import say
from penstock.client import Unreachable
from penstock.core.errors import InvalidRequest, PenstockError

__all__ = ["app", "main"]


class _Group(TyperGroup):
    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # typer's own Context type is private
        """Report a `PenstockError` in one message, without a traceback. Exit code 1, or 2 if only other settings or
        arguments can help.

        typer does the same for Ctrl-C (130), a broken pipe (1) and wrong usage (2).
        """
        try:
            return super().invoke(ctx)
        except PenstockError as error:
            _tell(error)
            raise typer.Exit(2 if isinstance(error, InvalidRequest) else 1) from None


def _tell(error: PenstockError) -> None:
    say(f"error: {error.message}", style="red")
    if isinstance(error, Unreachable):
        say("Start a server with `penstock serve`, or name a running one with --url or PENSTOCK_URL.")
    elif error.retry_after is not None:
        say(f"Try again in about {max(1, round(error.retry_after))} s.")


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Penstock feeds an inference engine: submit once, stream anywhere, lose nothing.",
)


def _version(wanted: bool) -> None:
    if wanted:
        show_version()
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


app.command(name="serve")(serve.serve)
app.command(name="gateway")(serve.gateway)
app.command(name="worker")(serve.worker)
app.command(name="chat")(chat.chat)
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.command(name="pull")(pull.pull)
app.command(name="bench")(bench.bench)
app.command(name="config")(flags.config)


@app.command(name="version")
def show_version() -> None:
    """Print the version."""
    print(f"penstock {__version__}")


def main() -> None:
    app()
