"""Micro-batches, for engines that cannot take a sequence into a batch that runs.

A request waits a few hundredths of a second for others that want as many tokens; then they run to their end together.
Who comes meanwhile is in the next batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from penstock.core.events import Logprob, Prefix
from penstock.core.job import Request
from penstock.core.ports import ModelInfo
from penstock.core.tasks import Tokenized
from penstock.engines.child.choices import ThreadedChoices
from penstock.engines.child.output_queue import ThreadedBackend
from penstock.engines.parts.guide import Guides, followed
from penstock.engines.parts.sampling import stream_key
from penstock.engines.text.model import TextModel
from penstock.engines.text.reply import Reply

#: Which rows may run beside each other: any, those of equal lengths, or one at a time.
Together = Literal["any", "equal", "one"]


class Row:
    """One choice of a request, in a batch. ``ids``: prompt and what an earlier attempt logged."""

    def __init__(
        self,
        batching: StaticBatching,
        choices: ThreadedChoices,
        choice: int,
        request: Request,
        prompt: list[int],
        reply: Reply,
    ) -> None:
        self._text = batching.text
        self._queue = batching.queue
        self._choices = choices
        self._choice = choice
        self.request = request
        self.prompt = prompt
        self.reply = reply
        self.ids = prompt + reply.ids
        self.rng = stream_key(request.sampling.seed, choice)

    @property
    def over(self) -> bool:
        """Nothing more of it is wanted: it has ended, or was aborted."""
        return self._choices.over or self.reply.finish is not None

    def take(self, token: int, logprob: tuple[float, list[tuple[int, float]]] | None) -> None:
        """The next token; with its log-probability and the best alternatives where they were asked for."""
        text = self.reply.push(token)
        logprobs: list[Logprob | None] | None = None if logprob is None else [self._text.logprob(token, *logprob)]
        self._queue.put(self._choices.output(self._choice, [token], [text], logprobs, self.reply.phases))
        if self.reply.finish is not None:
            self.end()

    def end(self) -> None:
        reply = self.reply
        last = self._choices.end(self._choice, reply.finish or "stop", reply.stop, followed(reply.guide))
        if last is not None:
            self._queue.put(last)


class StaticBatching(ThreadedBackend):
    """See `penstock.engines.child.backend.Backend`.

    *generate* runs some rows for a number of steps, calling `Row.take` for each token until `Row.over`; it is called
    from one thread. *window*: seconds.
    """

    def __init__(
        self,
        info: ModelInfo,
        text: TextModel,
        generate: Callable[[Sequence[Row], int], None],
        *,
        slots: int,
        window: float,
        together: Together = "any",
    ) -> None:
        super().__init__()
        self.info = info
        self.slots = slots
        self.text = text
        self._generate = generate
        self._window = window
        self._together = together
        self._guides = Guides(text) if text.has_token_bytes else None
        self._waiting: list[Row] = []
        self._arrived = threading.Condition()
        threading.Thread(target=self._run, name="batches", daemon=True).start()

    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        text = self.text
        prompt = text.encode_request(request)
        text.check_ids(request.sampling)
        limit = min(request.sampling.max_tokens, text.context_length - len(prompt))
        choices = ThreadedChoices(key, len(prefixes), len(prompt))
        rows = []
        for choice, prefix in enumerate(prefixes):
            guide = self._guides.begin(request) if self._guides else None
            reply = text.reply(request, limit, prefix.ids, guide, prompt=prompt)
            rows.append(Row(self, choices, choice, request, prompt, reply))
        self.requests[key] = choices
        for row in rows:
            if row.over:
                row.end()
        with self._arrived:
            self._waiting += [row for row in rows if not row.over]
            self._arrived.notify()

    def tokenize(self, request: Request) -> Tokenized:
        return self.text.tokenize(request)

    # ---------------------------------------------------------------------------- batches

    def _run(self) -> None:
        while True:
            try:
                batch, steps = self._gather()
                if batch:
                    self._generate(batch, steps)
            except BaseException as error:
                self.queue.fail(error)
                return

    def _gather(self) -> tuple[list[Row], int]:
        """The next batch and how many steps it takes: the oldest row, and who comes within its window for as many.
        Empty if they were aborted meanwhile."""
        with self._arrived:
            while not (waiting := self._alive()):
                self._arrived.wait()
            steps, most = waiting[0].reply.left, 1 if self._together == "one" else self.slots
            deadline = time.monotonic() + self._window
            while len(batch := self._batch()[:most]) < most:
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self._arrived.wait(left)
            self._waiting = [row for row in self._waiting if row not in batch]
            return batch, steps

    def _batch(self) -> list[Row]:
        """The oldest row, and all that may run with it."""
        waiting = self._alive()
        return [
            row
            for row in waiting
            if row.reply.left == waiting[0].reply.left
            and row.request.model == waiting[0].request.model  # another adapter
            and (self._together == "any" or len(row.ids) == len(waiting[0].ids))
        ]

    def _alive(self) -> list[Row]:
        self._waiting = [row for row in self._waiting if not row.over]
        return self._waiting
