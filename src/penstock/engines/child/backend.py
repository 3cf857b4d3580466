"""What an engine implements inside its child process: synchronous, single-threaded, one model.

`penstock.engines.child.main` drives it: it adds and aborts sequences between steps and sends each step's outputs as one
frame. Nothing here knows of asyncio, leases or logs.
"""

from __future__ import annotations

import pkgutil
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from penstock.core.errors import EngineError, ModelLoadError, PenstockError
from penstock.core.events import Prefix
from penstock.core.job import Request
from penstock.core.ports import Finish, ModelInfo, Output
from penstock.core.tasks import Tokenized
from penstock.engines.frames import Progress
from penstock.engines.options import parse
from penstock.engines.plugin import find_engine


class Backend(ABC):
    info: ModelInfo
    """May be replaced while it runs, by one that runs by itself: when the model cannot serve (`ModelInfo.away`)."""
    slots: int
    """How many sequences may run at once (a request with n choices takes n)."""
    wakeup: int | None = None
    """A file descriptor that is readable when `step` has something, for engines that run by themselves
    (`penstock.engines.child.output_queue`); None where `step` itself computes."""
    spare_time: Iterator[None] = iter(())
    """Small pieces of work that make later steps faster, done one at a time while there is nothing else to do."""

    @abstractmethod
    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        """Begin a request under *key*; ``prefixes[c]`` is what choice *c* already has (continue it).

        ``attempt`` is the lease's number, for engines that show or use it.
        Raises a `PenstockError` (context length, unsupported field) when it must be refused; any other exception fails
        the request as well, and nobody else's. A continuation counts
        ``max_tokens`` from the start of the reply, not from the prefix, and rebuilds partial UTF-8, stop-string and
        penalty state from the prefix. If the prefix already completed every choice (its last token was an end token,
        a stop string or the max_tokens-th), the next `step` reports the finish and no token.
        """

    def tokenize(self, request: Request) -> Tokenized | None:
        """The tokens of the prompt of a request to tokenize; None: `add` it, and it answers with outputs."""
        return None

    @abstractmethod
    def abort(self, key: int) -> None:
        """Stop a request and free its slot; unknown keys are ignored. No more outputs for *key*."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Is there anything to step?"""

    def delay(self) -> float | None:
        """Seconds until `step` has something to do; 0 for an engine that computes, None for one that wakes us."""
        return 0.0

    @abstractmethod
    def step(self) -> list[Output]:
        """Advance every running sequence by one step; all their outputs (at most one `Output` per key).

        One output of a key carries ``prompt_tokens``: the first where it is known by then. Its last one carries
        ``finish``. `penstock.engines.child.choices` sees to both. An exception from here takes the whole process down:
        it is for broken engines, not for bad requests. What goes wrong with one request alone, wherever that is, is a
        `failed_output` of its.
        """


#: Loads a model: (name, path or None, the engine's options, progress). Raises `ModelLoadError` that says what to do.
Loader = Callable[[str, str | None, Any, Progress], Backend]


def load_backend(engine: str, model: str, path: str | None, options: Mapping[str, Any], progress: Progress) -> Backend:
    """Import the engine's library and load the model. *options*: as the operator typed them. Raises `ModelLoadError`
    for what is foreseen."""
    plugin = find_engine(engine)
    given = parse(plugin.options, options, engine)
    try:
        load: Loader = pkgutil.resolve_name(plugin.load)
    except ModuleNotFoundError as error:
        raise ModelLoadError(f"The {engine} engine needs {error.name}: {plugin.install or 'install it'}.") from error
    return load(model, path, given, progress)


def failed_output(key: int, error: Exception) -> Output:
    """That the request *key* failed by *error*. What is no `PenstockError` was not foreseen: the server's log gets its
    traceback, the client a word."""
    if isinstance(error, PenstockError):
        return Output(key, finish=Finish(error=error.info), retryable=error.retryable)
    traceback.print_exception(error)
    unforeseen = EngineError(
        f"The engine failed on this request ({type(error).__name__}); the server's log has the details."
    )
    return Output(key, finish=Finish(error=unforeseen.info))


def tokenized_output(key: int, found: Tokenized) -> Output:
    """All that there is to say of a request to tokenize."""
    return Output(key, [0], [found.encode()], prompt_tokens=len(found.tokens), finish=Finish(("stop",)))
