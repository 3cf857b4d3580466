"""The synthetic engine: for load and fault tests, through the same process and batching path as the real ones.

At position p (from 1) under attempt a it emits the text ``p@a `` — so a reader of a stream sees at once a gap, a
repeat or a stale attempt. Options: ``rate`` tokens a second per sequence (0: as fast as it can), ``slots``,
``load_seconds`` that loading takes, ``memory_mb`` that it then holds, and three
words that, found in a prompt, make the engine misbehave: ``crash`` (the process dies), ``hang`` (it stops answering),
``fail`` (that sequence ends with a retryable error).
"""

from __future__ import annotations

import os
import time

import msgspec

from penstock.core.errors import ContextLengthExceeded, ErrorInfo
from penstock.core.events import Prefix
from penstock.core.job import Request
from penstock.core.ports import Finish, ModelInfo, Output
from penstock.engines.child.backend import Backend
from penstock.engines.frames import Progress
from penstock.engines.options import Amount, Count, Positive
from penstock.engines.plugin import Plugin

CONTEXT = 1_000_000


class SyntheticOptions(msgspec.Struct, frozen=True):
    """See above."""

    rate: Amount = 0.0
    slots: Positive = 256
    load_seconds: Amount = 0.0
    memory_mb: Count = 0
    crash: str = ""
    hang: str = ""
    fail: str = ""

    @property
    def words(self) -> dict[str, str]:
        """What has the engine misbehave, by how."""
        return {kind: word for kind in ("crash", "hang", "fail") if (word := getattr(self, kind))}


class _Counting:
    """A request, and how far each of its choices has counted."""

    __slots__ = ("attempt", "choices", "due", "emitted", "failing", "prompt_tokens", "request")

    def __init__(self, request: Request, prefixes: list[Prefix], attempt: int, prompt_tokens: int) -> None:
        self.request = request
        self.attempt = attempt
        self.emitted = [len(prefix.ids) for prefix in prefixes]
        self.choices = len(prefixes)
        self.prompt_tokens: int | None = prompt_tokens
        self.due = 0.0
        self.failing = False


class SyntheticBackend(Backend):
    def __init__(self, name: str, options: SyntheticOptions, progress: Progress) -> None:
        self.rate, self.slots = options.rate, options.slots
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < options.load_seconds:
            progress("sleeping", passed / options.load_seconds)
            time.sleep(min(0.05, options.load_seconds - passed))
        self._weights = b"\x01" * (options.memory_mb * 1_000_000)
        self._words = options.words
        self._sequences: dict[int, _Counting] = {}
        self.info = ModelInfo(
            name=name,
            engine="synthetic",
            context_length=CONTEXT,
            deterministic=True,
            unsupported=(
                "bad_words",
                "logit_bias",
                "logprobs",
                "min_tokens",
                "response_format",
                "seed",
                "stop",
                "stop_token_ids",
                "tools",
            ),
        )

    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        text = request.prompt or " ".join(message.content for message in request.messages or ())
        prompt_tokens = len(request.prompt_ids) if request.prompt_ids is not None else len(text.split())
        if prompt_tokens >= CONTEXT:
            param = "messages" if request.messages is not None else "prompt"
            raise ContextLengthExceeded.of(param, prompt_tokens, CONTEXT)
        sequence = _Counting(request, prefixes, attempt, prompt_tokens)
        misbehaviour = next((kind for kind, word in self._words.items() if word in text), None)
        if misbehaviour == "crash":
            os._exit(70)
        while misbehaviour == "hang":
            time.sleep(3600)
        sequence.failing = misbehaviour == "fail"
        if self.rate:
            sequence.due = time.monotonic() + 1 / self.rate
        self._sequences[key] = sequence

    def abort(self, key: int) -> None:
        self._sequences.pop(key, None)

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    def delay(self) -> float | None:
        if not self.rate:
            return 0.0
        return max(0.0, min(sequence.due for sequence in self._sequences.values()) - time.monotonic())

    def step(self) -> list[Output]:
        now = time.monotonic() if self.rate else 0.0
        outputs = []
        for key, sequence in list(self._sequences.items()):
            if sequence.due <= now:
                output = self._advance(key, sequence)
                outputs.append(output)
                if output.finish is not None:
                    del self._sequences[key]
                elif self.rate:
                    # Paced from the last due time, not from now: the rate holds on average.
                    sequence.due = max(sequence.due + 1 / self.rate, now)
        return outputs

    def _advance(self, key: int, sequence: _Counting) -> Output:
        if sequence.failing:
            error = ErrorInfo("The synthetic engine was asked to fail.", code="engine_error")
            return Output(key, finish=Finish(error=error), retryable=True)
        limit = sequence.request.sampling.max_tokens
        ids, texts, choices = [], [], []
        for choice in range(sequence.choices):
            position = sequence.emitted[choice] + 1
            if position <= limit:
                sequence.emitted[choice] = position
                ids.append(position)
                texts.append(f"{position}@{sequence.attempt} ")
                choices.append(choice)
        output = Output(key, ids, texts, choices if sequence.choices > 1 else None, None, sequence.prompt_tokens)
        sequence.prompt_tokens = None
        if min(sequence.emitted) >= limit:
            output.finish = Finish(("length",) * sequence.choices)
        return output


def load(name: str, path: str | None, options: SyntheticOptions, progress: Progress) -> SyntheticBackend:
    return SyntheticBackend(name, options, progress)


PLUGIN = Plugin(load="penstock.engines.synthetic:load", options=SyntheticOptions)
