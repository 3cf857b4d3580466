"""What is said of all choices of a request together: the prompt's tokens once, the finish when the last has ended."""

from __future__ import annotations

import threading

from penstock.core.errors import PenstockError
from penstock.core.events import Logprob, TokenPhase
from penstock.core.ports import Finish, Output


class Choices:
    """Makes the outputs of one request. The first has ``prompt_tokens``, and how many of them were cached; one behind
    the last choice's end the finish.

    *prompt_tokens* may be None as long as they are not known.
    """

    __slots__ = ("_ends", "_error", "_open", "_prompt_tokens", "cached_tokens", "key", "reported")

    def __init__(
        self, key: int, count: int, prompt_tokens: int | None = None, cached_tokens: int | None = None
    ) -> None:
        self.key = key
        self.cached_tokens = cached_tokens
        """How many tokens need not be computed, of the prompt or behind it; may be set until there is an output (None:
        not yet)."""
        self.reported = False
        """Was there an output?"""
        self._prompt_tokens = prompt_tokens
        self._ends: list[tuple[str, str | None]] = [("", None)] * count
        self._open = count
        self._error: PenstockError | None = None

    def output(
        self,
        choice: int,
        ids: list[int],
        texts: list[str],
        logprobs: list[Logprob | None] | None = None,
        phases: list[TokenPhase] | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int = 0,
    ) -> Output:
        """New tokens of *choice*; *prompt_tokens* and *cached_tokens* (as the attribute) where they were not known
        before."""
        output = Output(self.key, ids, texts, [choice] * len(ids) if len(self._ends) > 1 else None, logprobs)
        output.phases = phases
        if not self.reported:
            self.reported = True
            output.prompt_tokens = prompt_tokens if self._prompt_tokens is None else self._prompt_tokens
            output.cached_tokens = min(self.cached_tokens or cached_tokens, output.prompt_tokens or 0)
        return output

    def end(
        self, choice: int, reason: str, stop: str | None = None, error: PenstockError | None = None
    ) -> Output | None:
        """*choice* has ended, perhaps by the stop string *stop*, or by an *error*, which is then the whole request's:
        the output that says how the request ended, if it was the last one."""
        self._ends[choice] = (reason, stop)
        self._error = self._error or error
        self._open -= 1
        if self._open:
            return None
        last = Output(self.key, finish=Finish(error=self._error.info) if self._error else Finish.of(self._ends))
        if not self.reported:
            last.prompt_tokens = self._prompt_tokens
            last.cached_tokens = min(self.cached_tokens or 0, self._prompt_tokens or 0)
        return last


class ThreadedChoices(Choices):
    """Choices that run in threads of their own."""

    __slots__ = ("_lock", "over")

    def __init__(
        self, key: int, count: int, prompt_tokens: int | None = None, cached_tokens: int | None = None
    ) -> None:
        super().__init__(key, count, prompt_tokens, cached_tokens)
        self.over = False
        """Aborted or failed: nothing more must come."""
        self._lock = threading.Lock()

    def output(
        self,
        choice: int,
        ids: list[int],
        texts: list[str],
        logprobs: list[Logprob | None] | None = None,
        phases: list[TokenPhase] | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int = 0,
    ) -> Output:
        with self._lock:
            return super().output(choice, ids, texts, logprobs, phases, prompt_tokens, cached_tokens)

    def end(
        self, choice: int, reason: str, stop: str | None = None, error: PenstockError | None = None
    ) -> Output | None:
        with self._lock:
            last = super().end(choice, reason, stop, error)
            return None if self.over else last
