"""``penstock jobs``: what the server has done and is doing."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.text import Text

from penstock.api import UsageView
from penstock.cli.common import (
    URL,
    Json,
    ReplyWriter,
    Url,
    ago,
    connect,
    duration,
    print_json,
    say,
    stdout,
    table,
    thought,
    write,
)
from penstock.client import End, JobView
from penstock.core.job import Status

app = typer.Typer(no_args_is_help=True, help="Look at jobs, follow them, cancel them.")

Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]

COLOURS = {
    Status.QUEUED: "yellow",
    Status.RUNNING: "cyan",
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.CANCELLED: "magenta",
    Status.EXPIRED: "magenta",
}


def _status(status: Status) -> Text:
    return Text(status.value, style=COLOURS[status])


@app.command(name="list")
def list_jobs(
    status: Annotated[list[Status] | None, typer.Option(help="Only jobs in this state (repeatable).")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    user: Annotated[str | None, typer.Option(help="Only jobs of this user.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many, the newest first; 0: all.")] = 20,
    json: Json = False,
    url: Url = URL,
) -> None:
    """List jobs, the newest first."""
    with connect(url) as client:
        views = list(
            client.jobs(status=[one.value for one in status or ()], model=model, user_id=user, limit=limit or None)
        )
    if json:
        print_json(views)
        return
    rows = table("ID", "STATUS", "MODEL", "USER", "TOKENS", "CREATED", "TOOK")
    for view in views:
        took = max(0.0, view.ended_at - view.created_at) if view.ended_at else None
        rows.add_row(
            view.id,
            _status(view.status),
            Text(view.model),
            Text(view.user_id or ""),
            str(view.tokens),
            ago(view.created_at),
            duration(took),
        )
    stdout().print(rows)


@app.command()
def show(job: Id, json: Json = False, url: Url = URL) -> None:
    """Show everything about one job."""
    with connect(url) as client:
        view = client.job(job)
    if json:
        print_json(view)
        return
    rows = table("ID", "STATUS")
    rows.show_header = False
    for name, value in _facts(view):
        rows.add_row(Text(name, style="bold"), value if isinstance(value, Text) else Text(value))
    stdout().print(rows)
    if view.result is None:
        return
    if view.result.reasoning:
        print()
        stdout().print(thought(view.result.reasoning.strip()), soft_wrap=True)
    for text in view.result.texts or [view.result.text]:
        print()
        write(text.rstrip("\n") + "\n")
    for call in view.result.tool_calls or ():
        write(f"{call.function.name} {call.function.arguments}\n")


def _facts(view: JobView) -> list[tuple[str, str | Text]]:
    facts: list[tuple[str, str | Text]] = [
        ("id", view.id),
        ("status", _status(view.status)),
        ("model", view.model),
        ("user", view.user_id or ""),
        ("priority", view.priority),
        ("position in queue", "" if view.position_in_queue is None else str(view.position_in_queue)),
        ("attempt", str(view.attempt)),
        ("created", ago(view.created_at)),
        ("tokens", str(view.tokens)),
        ("finish reason", view.finish_reason or ""),
        ("request id", view.request_id or ""),
        ("metadata", ", ".join(f"{name}={value}" for name, value in view.metadata.items())),
        ("error", Text(f"{view.error.code}: {view.error.message}", style="red") if view.error else ""),
    ]
    if view.usage is not None:
        facts.append(("usage", _usage(view.usage)))
    if view.timings is not None:
        timings = view.timings
        rate = f"{timings.tokens_per_second:.1f} tokens/s" if timings.tokens_per_second else ""
        facts += [
            ("waited", duration(timings.queue_wait_time)),
            ("first token after", duration(timings.time_to_first_token)),
            ("took", duration(timings.total_time)),
            ("rate", rate),
        ]
    return [(name, value) for name, value in facts if value]


def _usage(usage: UsageView) -> str:
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    thoughts = f" ({usage.reasoning_tokens} of thoughts)" if usage.reasoning_tokens else ""
    return f"{usage.prompt_tokens} prompt{cached} + {usage.completion_tokens} completion tokens{thoughts}"


@app.command()
def tail(
    job: Id,
    after: Annotated[int, typer.Option(min=0, help="Begin behind this position.")] = 0,
    json: Json = False,
    url: Url = URL,
) -> None:
    """Follow a job's tokens to its end, across whatever happens to the server. Exits with 1 unless it completed."""
    with connect(url) as probe:
        probe.job(job)  # fail at once if nobody answers or there is no such job; after that, wait and resume
    end: End | None = None
    writer = ReplyWriter()
    with connect(url, give_up=60.0, on_retry=lambda error, pause: say(f"{error.message} Resuming …", "dim")) as client:
        for event in client.stream(job, after):
            if json:
                print_json({"event": "end" if isinstance(event, End) else "token", **msgspec.to_builtins(event)})
            elif not isinstance(event, End):
                writer.write(event)
            if isinstance(event, End):
                end = event
    if not json:
        print()
    if end is None:
        say("Nothing comes after that position: the job had ended.", "dim")
        return
    if not json:
        say(f"{end.status.value}{f' ({end.finish_reason})' if end.finish_reason else ''}", "dim")
    end.raise_for_status()


@app.command()
def cancel(
    job: Annotated[list[str], typer.Argument(metavar="ID...", help="The jobs' ids.")],
    json: Json = False,
    url: Url = URL,
) -> None:
    """Cancel jobs. One that has ended stays as it is."""
    with connect(url) as client:
        for one in job:
            view = client.cancel(one)
            if json:
                print_json(view)
            else:
                stdout().print(Text(f"{view.id} ").append(_status(view.status)))
