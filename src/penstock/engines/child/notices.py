"""What an engine tells the server's telemetry beside its outputs: an upstream replica is down, the model has no usable
chat template. Bad news have a fact ``error``."""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.foreign import whole
from penstock.core.telemetry import Fact
from penstock.engines.frames import Notice


def _nobody(notice: Notice) -> None:
    pass


_listener: Callable[[Notice], None] = _nobody


def listen(listener: Callable[[Notice], None] = _nobody) -> None:
    """Tell *listener* from now on, from whatever thread."""
    global _listener
    _listener = listener


def notify(name: str, /, **facts: Fact) -> None:
    """*name* (e.g. ``replica.down``) has happened."""
    _listener(Notice(name, {key: whole(fact) if isinstance(fact, str) else fact for key, fact in facts.items()}))
