"""The HTTP side's state: nothing that another gateway over the same broker would miss."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from penstock.core.ports import Broker, Clock, ModelControl
from penstock.gateway.catalogue import Catalogue
from penstock.gateway.config import GatewayConfig
from penstock.gateway.jobs import Jobs
from penstock.gateway.sse import Streams


class Gateway:
    """What requests have in common: the streams that are open, the models that are known, the jobs of everybody."""

    def __init__(
        self,
        broker: Broker,
        config: GatewayConfig | None = None,
        clock: Clock | None = None,
        models: ModelControl | None = None,
    ) -> None:
        """*models*: those of workers in the same process."""
        self.config = config or GatewayConfig()
        self.streams = Streams(heartbeat=self.config.heartbeat, send_deadline=self.config.send_deadline)
        self.catalogue = Catalogue(broker, self.config.models, models.workers if models is not None else list)
        self.jobs = Jobs(
            broker,
            self.config,
            self.catalogue,
            self.streams,
            clock=clock,
            on_submit=models.notify if models is not None else lambda model: None,
        )

    @contextlib.asynccontextmanager
    async def running(self, *, catalogue: bool = True) -> AsyncIterator[None]:
        """Whoever shows its own models only needs no *catalogue* of the others'."""
        tasks = [asyncio.create_task(self.streams.run(), name="gateway: heartbeat")]
        if catalogue:
            tasks.append(asyncio.create_task(self.catalogue.run(), name="gateway: catalogue"))
        try:
            yield
        finally:
            self.jobs.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def drain(self) -> None:
        """End every stream; the clients are told to come back. Replies in one piece get ``drain_timeout`` seconds."""
        self.streams.close()
        self.jobs.drain()
