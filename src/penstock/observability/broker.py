"""A broker whose calls are told of: a span ``broker.<verb>`` around each call of a verb."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

from penstock.core.ports import Broker, Lease
from penstock.core.telemetry import Span, Telemetry
from penstock.observability.wrapper import Wrapper

#: What of the `Broker` protocol is called, and not only once in its life.
VERBS = tuple(
    name
    for name, member in vars(Broker).items()
    if inspect.isfunction(member) and not name.startswith("_") and name not in ("open", "close")
)


def _claimed(span: Span, leases: list[Lease]) -> None:
    span.note(jobs=len(leases))
    for lease in leases:
        span.link(lease.job.trace)


#: What a span tells besides, from what was answered.
_NOTES: dict[str, Callable[[Span, Any], None]] = {
    "submit": lambda span, job: span.note(job=job.id, trace=job.trace),
    "claim": _claimed,
    "append": lambda span, verdicts: span.note(jobs=len(verdicts)),
}


class _Observed(Wrapper[Broker]):
    def __init__(self, broker: Broker, telemetry: Telemetry) -> None:
        super().__init__(broker)
        for verb in VERBS:
            kind = _answering if inspect.iscoroutinefunction(getattr(Broker, verb)) else _streaming
            setattr(self, verb, kind(getattr(broker, verb), verb, telemetry))


def observed(broker: Broker, telemetry: Telemetry) -> Broker:
    """*broker*, with a span for each call of a verb: until it answers, or as long as its stream is read."""
    return cast("Broker", _Observed(broker, telemetry))


def _answering(call: Callable[..., Awaitable[Any]], verb: str, telemetry: Telemetry) -> Callable[..., Awaitable[Any]]:
    name, note = f"broker.{verb}", _NOTES.get(verb)

    @functools.wraps(call)
    async def observe(*args: Any, **kwargs: Any) -> Any:
        with telemetry.span(name) as span:
            answer = await call(*args, **kwargs)
            if note is not None:
                note(span, answer)
            return answer

    return observe


def _streaming(
    call: Callable[..., AsyncGenerator[Any]], verb: str, telemetry: Telemetry
) -> Callable[..., AsyncGenerator[Any]]:
    name = f"broker.{verb}"

    async def read(items: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        with telemetry.span(name):
            async with contextlib.aclosing(items):
                async for item in items:
                    yield item

    @functools.wraps(call)
    def observe(*args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        return read(call(*args, **kwargs))  # called now: `arrivals` tells what comes from the call on

    return observe
