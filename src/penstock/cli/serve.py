"""The commands that serve, ``penstock serve``, ``gateway`` and ``worker``: one function that runs different parts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from msgspec import structs

from penstock.cli.common import say
from penstock.cli.flags import (
    GATEWAY,
    SERVE,
    WORKER,
    ConfigFile,
    EngineOptions,
    Engines,
    GatewayModels,
    Models,
    OnDemand,
    Standby,
    settle,
    with_settings,
)
from penstock.cli.pull import pull_shown
from penstock.cli.startup import Startup
from penstock.core.errors import InvalidRequest
from penstock.models.catalogue import BUNDLED, CATALOGUE, FIRST
from penstock.models.errors import PullError
from penstock.settings import ModelSettings, Settings


@with_settings(SERVE)
def serve(
    *,
    engine: Engines = None,
    model: Models = None,
    option: EngineOptions = None,
    on_demand: OnDemand = None,
    standby: Standby = None,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Serve models: gateway, durable queue and engines in one command.

    Everything below can also be set as PENSTOCK_<NAME> or in penstock.toml; a flag wins over both.
    """
    settings = settle(engine, model, option, config, flags, on_demand, standby)
    _run(_with_first_model(settings), gateway=True, workers=True)


@with_settings(GATEWAY)
def gateway(*, model: GatewayModels = None, config: ConfigFile = None, **flags: Any) -> None:
    """Answer HTTP for workers elsewhere: any number of gateways share the queue in a Redis.

    The models are those that workers say they have. Everything below can also be set as PENSTOCK_<NAME> or in
    penstock.toml; a flag wins over both.
    """
    settings = settle(None, model, None, config, flags)
    if "models" not in settings.sources:
        settings = structs.replace(settings, models=[])  # the default model is for workers
    _run(_shared(settings, "gateway"), gateway=True, workers=False)


@with_settings(WORKER)
def worker(
    *,
    engine: Engines = None,
    model: Models = None,
    option: EngineOptions = None,
    on_demand: OnDemand = None,
    standby: Standby = None,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Run models for gateways elsewhere: any number of workers take jobs from the queue in a Redis.

    Everything below can also be set as PENSTOCK_<NAME> or in penstock.toml; a flag wins over both.
    """
    settings = settle(engine, model, option, config, flags, on_demand, standby)
    _run(_with_first_model(_shared(settings, "worker")), gateway=False, workers=True)


def _shared(settings: Settings, command: str) -> Settings:
    if settings.broker.embedded:
        raise InvalidRequest(
            f"penstock {command} needs a broker that other processes reach: --broker redis://HOST:6379/0. "
            "For everything in one process there is `penstock serve`."
        )
    return settings


def _with_first_model(settings: Settings) -> Settings:
    """Where nobody said which models: the first of the catalogue, pulled now; the one in the package where that fails.

    A model that somebody asked for by name is never replaced.
    """
    if "models" in settings.sources:
        return settings
    try:
        pull_shown(CATALOGUE[FIRST])
    except PullError as error:
        say(error.message, "yellow")
        say(f"Serving {BUNDLED} instead, the toy in the package. For the real one: penstock pull {FIRST}", "yellow")
        return structs.replace(settings, models=[ModelSettings(name=BUNDLED)])
    return settings


def _run(settings: Settings, *, gateway: bool, workers: bool) -> None:
    # Imported here, since the other commands need nothing of the server.
    from penstock.observability.logs import configure
    from penstock.wiring.process import run

    configure(settings.log.level, settings.log.format, settings.log.dir)
    startup = Startup(settings, gateway=gateway, workers=workers)
    with startup, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(run(settings, startup, api=gateway, workers=workers))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
