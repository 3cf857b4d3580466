"""Gathers what the engine produces into fewer, larger appends.

Every append of a job costs about the same whether it brings one token or ten: a row, a wake-up and a ``send`` for
each of its readers. A fast engine with many running jobs would spend a large part of the machine on that. So tokens
wait for the next tick; it comes the sooner the fewer jobs run, and never later than a reader could notice. First
tokens and ends do not wait at all: the time to the first token and the turn-around of a slot stay what they were.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.core.ports import Output

#: Seconds between two appends of a job, per running job, and at most.
TICK_PER_JOB = 0.0004
MAX_TICK = 0.025


class Outbox:
    def __init__(self) -> None:
        self._held: dict[int, Output] = {}
        self._flushed_at = 0.0

    def due_in(self, running: int) -> float | None:
        """Seconds until what is held must go; None while nothing is held."""
        if not self._held:
            return None
        return max(0.0, self._flushed_at + _tick(running) - time.monotonic())

    def take(self, outputs: Sequence[Output], running: int) -> list[Output]:
        """Add *outputs*; what has to be appended now: everything when the tick has come, else what is urgent."""
        held = self._held
        if time.monotonic() - self._flushed_at >= _tick(running):
            if not held:
                self._flushed_at = time.monotonic()
                return list(outputs)
            self._hold(outputs)
            return self.flush()
        urgent = []
        for output in outputs:
            if output.finish is not None or output.prompt_tokens is not None:
                if (earlier := held.pop(output.key, None)) is not None:
                    earlier.extend(output)
                    output = earlier
                urgent.append(output)
            else:
                self._hold([output])
        return urgent

    def flush(self) -> list[Output]:
        """Everything that is held."""
        outputs = list(self._held.values())
        self._held.clear()
        self._flushed_at = time.monotonic()
        return outputs

    def _hold(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            earlier = self._held.get(output.key)
            if earlier is None:
                self._held[output.key] = output
            else:
                earlier.extend(output)


def _tick(running: int) -> float:
    return min(MAX_TICK, TICK_PER_JOB * running)
