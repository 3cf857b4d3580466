"""The Python client: submit once, stream anywhere, resume by itself.

`Client` and `AsyncClient` (`client`) share one implementation, `core.Core`, written as coroutines over a `wire.Wire`:
the few things that differ between blocking and asynchronous HTTP. The blocking wire's coroutines never suspend, so
`Client` runs the same code to its end in one step, without an event loop.

Everything is retried that a retry can cure: a dropped connection, a refused one, a server that restarts (502, 503,
504) or is full (429). A stream reconnects with ``Last-Event-ID`` and continues behind the last token it delivered; a
submit carries an idempotency key, so that one whose answer was lost makes no second job. Failures are the exceptions
of `penstock.core.errors`, rebuilt from the wire, and `Unreachable` and `ProtocolError`.
"""

from __future__ import annotations

from penstock.api import JobSummary, JobView, ModelView, Submitted, Timings
from penstock.client.client import AsyncClient, Client
from penstock.client.errors import ProtocolError, Unreachable
from penstock.client.results import End, OnRetry, Options, Result, Token
from penstock.client.wire import DEFAULT_URL

__all__ = [
    "DEFAULT_URL",
    "AsyncClient",
    "Client",
    "End",
    "JobSummary",
    "JobView",
    "ModelView",
    "OnRetry",
    "Options",
    "ProtocolError",
    "Result",
    "Submitted",
    "Timings",
    "Token",
    "Unreachable",
]
