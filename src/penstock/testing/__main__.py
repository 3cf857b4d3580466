"""``python -m penstock.testing URL``: does the server there keep the rules of docs/protocol.md?"""

from __future__ import annotations

import asyncio
from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console
from rich.text import Text

from penstock.testing.protocol import Outcome, check
from penstock.testing.protocol.run import chosen

COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


def main(
    url: Annotated[str, typer.Argument(help="The server, for instance http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option(help="The model to ask; by default the server's first.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="NAME: VALUE, with every request (repeatable).")] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent as Authorization: Bearer.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A rule or a section, as 4.1 or 4 (repeatable).")] = None,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds after which what has not come is missing; above the heartbeat.")
    ] = 30.0,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON a rule.")] = False,
) -> None:
    """Hold a running server against the stream protocol, and report a line a rule. Exit status 1 if one is broken.

    The jobs that it submits are deleted afterwards.
    """
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    for line in header or ():
        name, colon, value = line.partition(":")
        if not colon:
            raise typer.BadParameter(f"{line!r} is not NAME: VALUE", param_hint="--header")
        headers[name.strip()] = value.strip()
    try:
        chosen(only or ())
    except LookupError as error:
        raise typer.BadParameter(str(error.args[0]), param_hint="--only") from error

    async def run() -> list[Outcome]:
        console = Console(soft_wrap=True, highlight=False)
        outcomes = []
        async for outcome in check(url, model=model, headers=headers, only=only or (), patience=patience):
            outcomes.append(outcome)
            if json:
                print(msgspec.json.encode(outcome).decode(), flush=True)
            else:
                console.print(_line(outcome))
        if not json:
            console.print(_summary(outcomes))
        return outcomes

    try:
        outcomes = asyncio.run(run())
    except httpx.ConnectError as error:
        typer.echo(f"Cannot reach {url}: {error}", err=True)
        raise typer.Exit(1) from error
    if any(outcome.outcome == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _line(outcome: Outcome) -> Text:
    line = Text(f"{outcome.rule:<14} ")
    line.append(f"{outcome.outcome:<8}", style=COLOURS[outcome.outcome]).append(outcome.title)
    return line.append(f"\n{'':<23}{outcome.why}", style="dim") if outcome.why else line


def _summary(outcomes: list[Outcome]) -> Text:
    counts = {name: sum(outcome.outcome == name for outcome in outcomes) for name in COLOURS}
    return Text(", ".join(f"{count} {name}" for name, count in counts.items()), style="bold")


if __name__ == "__main__":
    typer.run(main)
