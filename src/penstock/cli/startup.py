"""What a gateway or a worker shows while it starts."""

from __future__ import annotations

import shlex
from types import TracebackType

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from penstock import __version__
from penstock.cli.common import URL, say, stderr
from penstock.cli.flags import describe
from penstock.settings import Settings, without_passwords


class Startup:
    """Shows the progress on stderr until every model is ready: bars on a terminal, plain lines elsewhere."""

    def __init__(self, settings: Settings, *, gateway: bool = True, workers: bool = True) -> None:
        self._settings = settings
        self._gateway = gateway
        self._models = settings.models if workers else []
        self._url = ""
        self._loading = {model.name for model in self._models if model.load == "start"}
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

    def waiting(self, why: str, pause: float) -> None:
        say(f"{why} Trying again in {pause:.1f} s.", "yellow")

    def listening(self, url: str) -> None:
        self._url = url
        say(f"penstock {__version__}{self._role(url)}{self._broker()}", "bold")
        for model in self._models:
            if model.name not in self._loading:
                say(f"has {describe(model)}")
                continue
            self._bars[model.name] = self._progress.add_task(f"{model.name}: starting the engine", total=None)
            if self._progress.disable:
                say(f"loading {describe(model)}")
        if self._loading:
            self._progress.start()
        elif self._models:
            self._tell_ready()
        else:
            self._tell_stop()

    def _role(self, url: str) -> str:
        if not self._gateway:
            return f" worker, metrics on {url}/metrics"
        return f" listens on {url}" if self._models else f" gateway listens on {url}"

    def _broker(self) -> str:
        if self._settings.broker.embedded:
            return ""
        return f", broker {without_passwords(self._settings.broker.url)} ({self._settings.broker.durability})"

    def _tell_stop(self) -> None:
        say("  stop     Ctrl-C")

    def progress(self, model: str, what: str, fraction: float | None) -> None:
        if model not in self._loading:
            return  # a restarted engine is in the log
        self._progress.update(
            self._bars[model],
            description=f"{model}: {what}",
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
        )
        if self._progress.disable and self._said.get(model) != what:
            self._said[model] = what
            say(f"{model}: {what}")

    def deferred(self, model: str) -> None:
        say(f"{model}: no room beside the others (memory_budget); it is loaded on demand", "yellow")
        self._done(model)

    def ready(self, model: str) -> None:
        if model in self._loading and len(self._loading) > 1:
            say(f"{model} is ready", "green")
        self._done(model)

    def _done(self, model: str) -> None:
        if model not in self._loading:
            return
        self._loading.remove(model)
        self._progress.remove_task(self._bars.pop(model))
        if not self._loading:
            self._progress.stop()
            self._tell_ready()

    def _tell_ready(self) -> None:
        say(f"ready: {', '.join(each.name for each in self._models)}", "bold green")
        if self._gateway:
            self._tell_use()
        self._tell_stop()

    def _tell_use(self) -> None:
        body = '{"prompt": "The capital of France is", "stream": true}'
        chat = "penstock chat" if self._url == URL else f"penstock chat --url {self._url}"
        say(f"  try it   curl -N {self._url}/v1/generate -d {shlex.quote(body)}")
        say(f"  talk     {chat}")
        if self._settings.broker.embedded:
            say(f"  data in  {self._settings.broker.data_dir}")
