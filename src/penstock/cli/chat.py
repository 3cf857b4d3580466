"""``penstock chat``: talk to a running server. The jobs API underneath: a reply survives a restarted server."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.common import URL, ReplyWriter, Url, choose_model, connect, print_json, say, stderr, write
from penstock.client import Client, End, Options, Token
from penstock.core.errors import ContextLengthExceeded, PenstockError

HELP = """\
/help          this
/clear         forget the conversation
/save [FILE]   write the conversation (.json as messages, anything else as Markdown)
/model [NAME]  list the models, or go on with another
/quit          leave (or Ctrl-D)
Ctrl-C stops a reply."""

#: Seconds without any progress after which a reply is given up; the job itself stays on the server.
PATIENCE = 300.0


class Chat:
    """A conversation: the turns so far, and the next reply to them."""

    def __init__(self, client: Client, model: str, system: str | None, options: Options) -> None:
        self._client = client
        self._options = options
        self._system = [{"role": "system", "content": system}] if system else []
        self.model = model
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*self._system, *self.turns]

    def clear(self) -> None:
        self.turns.clear()

    def reply(self, text: str, show: Callable[[Token], None]) -> str:
        """The model's reply to *text*, whose tokens are given to *show* as they come. Thoughts are no part of it.

        Interrupted (KeyboardInterrupt), the job is cancelled, and what had come of the reply stays in the
        conversation; if nothing had, the conversation is as before.
        """
        self.turns.append({"role": "user", "content": text})
        parts: list[str] = []
        try:
            while True:
                try:
                    self._generate(parts, show)
                    break
                except ContextLengthExceeded:
                    if parts or len(self.turns) < 3:
                        raise
                    # The conversation has outgrown the model: go on without its oldest exchange.
                    del self.turns[:2]
                    say("(forgetting the oldest exchange: the conversation is longer than the model's context)", "dim")
        finally:
            reply = "".join(parts)
            if reply:
                self.turns.append({"role": "assistant", "content": reply})
            else:
                self.turns.pop()
        return reply

    def _generate(self, parts: list[str], show: Callable[[Token], None]) -> None:
        options: Options = {**self._options, "model": self.model}
        job = self._client.submit(messages=self.messages, **options)
        thinking = False
        try:
            for event in self._client.stream(job):
                if isinstance(event, End):
                    event.raise_for_status()
                    if thinking and event.finish_reason == "length":
                        say("\n(the reply ended within its thought: --max-tokens lets it be longer)", "dim")
                else:
                    if event.text:
                        parts.append(event.text)
                    if event.text or event.reasoning:
                        thinking = not event.text
                        show(event)
        except KeyboardInterrupt:
            with contextlib.suppress(PenstockError):
                self._client.cancel(job)
            raise


def chat(
    model: Annotated[str | None, typer.Option(help="The model to talk to; default: the server's first.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0: always the likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(help="For replies that can be repeated.")] = None,
    json: Annotated[bool, typer.Option("--json", help="From a pipe: one line of JSON per reply.")] = False,
    url: Url = URL,
) -> None:
    """Talk to a model. From a pipe: every line is one message of the conversation, answered in turn."""
    with connect(url) as probe:
        name = choose_model(probe.models(), model)
    options: Options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with connect(url, give_up=PATIENCE, on_retry=_lost) as client:
        conversation = Chat(client, name, system, options)
        if sys.stdin.isatty():
            _converse(conversation, client, url)
        else:
            _pipe(conversation, json)


def _lost(error: PenstockError, pause: float) -> None:
    say(f"({error.message} Waiting to resume …)", "dim")


def _pipe(conversation: Chat, json: bool) -> None:
    for line in sys.stdin:
        text = line.strip()
        if not text:
            continue
        if json:
            tokens: list[Token] = []
            reply = conversation.reply(text, tokens.append)
            thought = "".join(token.reasoning for token in tokens)
            told = {"reasoning": thought} if thought else {}
            print_json({"message": text, "reply": reply, **told, "model": conversation.model})
        else:
            conversation.reply(text, ReplyWriter().write)
            write("\n")


def _converse(conversation: Chat, client: Client, url: str) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and a history
    say(f"{conversation.model} at {url}. /help for help, Ctrl-D to leave.", "dim")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text == "/quit":
            return
        try:
            if text.startswith("/"):
                _command(conversation, client, text)
            elif text:
                _turn(conversation, text)
        except KeyboardInterrupt:
            print()
            say("(stopped)", "dim")
        except PenstockError as error:
            print()
            say(error.message, "red")


def _turn(conversation: Chat, text: str) -> None:
    writer = ReplyWriter()
    with stderr().status("") as spinner:

        def show(token: Token) -> None:
            spinner.stop()
            writer.write(token)

        conversation.reply(text, show)
    print("\n")


def _command(conversation: Chat, client: Client, text: str) -> None:
    name, _, argument = text.partition(" ")
    argument = argument.strip()
    if name == "/help":
        say(HELP)
    elif name == "/clear":
        conversation.clear()
        say("(a new conversation)", "dim")
    elif name == "/save":
        _save(conversation, Path(argument or "penstock-chat.md").expanduser())
    elif name == "/model":
        served = client.models()
        conversation.model = choose_model(served, argument or conversation.model)
        for each in served:
            say(f"{'*' if each.id == conversation.model else ' '} {each.id}  {each.state}")
    else:
        say(f"There is no {name}.\n{HELP}")


def _save(conversation: Chat, path: Path) -> None:
    if path.suffix == ".json":
        content = jsonlib.dumps(conversation.messages, ensure_ascii=False, indent=2) + "\n"
    else:
        content = "".join(f"**{each['role']}**\n\n{each['content']}\n\n" for each in conversation.messages)
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        say(f"Cannot write {path}: {error.strerror}", "red")
    else:
        say(f"(saved to {path})", "dim")
