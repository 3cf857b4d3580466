"""Gateways and workers over Redis, each a real process: killed, stopped and restarted by its pid (see `Process`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.server import Process, model


class GatewayProcess(Process):
    """``penstock gateway``. Ready when it answers; `is_served` asks for a worker too."""

    command = "gateway"

    def __init__(
        self,
        folder: Path,
        broker_url: str,
        *,
        settings: Mapping[str, object] | None = None,
        args: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, settings={"broker": broker_url, **(settings or {})}, args=args)

    def is_ready(self) -> bool:
        return self.get("/healthz").status_code == 200

    def is_served(self) -> bool:
        """Is Redis there, and a worker for the default model?"""
        return self.get("/readyz").status_code == 200


class WorkerProcess(Process):
    """``penstock worker``. Its ``url`` is its metrics listener; ready when its models are loaded.

    *models* are entries of the ``models`` setting; by default one synthetic model at *rate* tokens a second.
    """

    command = "worker"

    def __init__(
        self,
        folder: Path,
        broker_url: str,
        *,
        models: Sequence[Any] | None = None,
        rate: float = 50,
        options: Mapping[str, object] | None = None,
        settings: Mapping[str, object] | None = None,
        args: Sequence[str] = (),
    ) -> None:
        served = models if models is not None else [model(rate=rate, **(options or {}))]
        super().__init__(folder, settings={"broker": broker_url, "models": served, **(settings or {})}, args=args)

    def arguments(self) -> list[str]:
        return ["--metrics-port", str(self.port), *self.args]

    def is_ready(self) -> bool:
        return self.get("/readyz").status_code == 200
