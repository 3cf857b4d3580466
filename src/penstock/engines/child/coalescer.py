"""Gathers the outputs of several steps into fewer, larger frames.

Everything downstream costs about the same whether it brings one token or ten: a row in the log, a wake-up and a
``send`` for each reader. With many fast sequences that would take a large part of the machine from the engine. So
tokens wait for the next tick, which comes the sooner the fewer sequences run, and never later than a reader could
notice. First tokens and ends do not wait: the time to the first token and the turn-around of a slot stay what they
were. Nor does anything wait for an engine that has a pause.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.core.ports import Output

#: Seconds between two frames: at least, per running sequence, and at most. An engine whose steps take longer than this
#: waits for nothing; the log of one that is faster has some tokens in a row.
MIN_TICK = 0.005
TICK_PER_SEQUENCE = 0.0005
MAX_TICK = 0.03


class OutputCoalescer:
    def __init__(self) -> None:
        self._held: dict[int, Output] = {}
        self._begun: set[int] = set()
        self._flushed_at = 0.0
        self._tick = 0.0

    def take(self, outputs: Sequence[Output], running: int) -> list[Output]:
        """Add a step's *outputs*; what has to go now: everything when the tick of *running* sequences has come, else
        what is urgent."""
        held = self._held
        urgent = []
        for output in outputs:
            if (earlier := held.pop(output.key, None)) is not None:
                earlier.extend(output)
                output = earlier
            if output.finish is not None:
                self._begun.discard(output.key)
                urgent.append(output)
            elif output.key not in self._begun:
                self._begun.add(output.key)
                urgent.append(output)
            else:
                held[output.key] = output
        self._tick = min(MAX_TICK, max(MIN_TICK, TICK_PER_SEQUENCE * running))
        if self.due() <= 0:
            urgent += self.flush()
        return urgent

    def due(self) -> float:
        """Seconds until the tick."""
        return self._flushed_at + self._tick - time.monotonic()

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def flush(self) -> list[Output]:
        """Everything that is held."""
        outputs = list(self._held.values())
        self._held.clear()
        self._flushed_at = time.monotonic()
        return outputs

    def drop(self, key: int) -> None:
        """An aborted sequence: nobody waits for it."""
        self._held.pop(key, None)
        self._begun.discard(key)
