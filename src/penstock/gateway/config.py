"""What an operator can set of the gateway."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta


class Origin(str):
    """Of web pages: a scheme, a name and perhaps a port; or ``*`` for all."""

    def __new__(cls, value: str) -> Origin:
        if value != "*" and not re.fullmatch(r"https?://[^/?#@\s]+", value):
            raise ValueError(f"{value!r} is no origin: write https://name or http://name:port, without a path")
        return super().__new__(cls, value)


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator can set of it. Times in seconds, sizes in bytes."""

    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(description="Host names clients may use; default: the loopback names, or all when public."),
    ] = ()
    allowed_origins: Annotated[
        tuple[Origin, ...],
        Meta(description="Origins of other web pages that may use the API, like https://app.example.org; * for all."),
    ] = ()
    max_body: Annotated[int, Meta(gt=0, description="Largest request body in bytes.")] = 1 << 20
    default_max_tokens: Annotated[
        int, Meta(gt=0, description="Tokens an OpenAI chat request gets that does not say how many.")
    ] = 2048
    heartbeat: Annotated[float, Meta(gt=0, description="Seconds of silence after which a stream carries a ping.")] = (
        10.0
    )
    send_deadline: Annotated[
        float, Meta(gt=0, description="Seconds a reader may take nothing before it is dropped (it can resume).")
    ] = 30.0
    disconnect_grace: Annotated[
        float,
        Meta(ge=0, description="Seconds that a job without readers lives on, where its route cancels at all."),
    ] = 10.0


class GatewayConfig(HttpSettings, frozen=True, kw_only=True):
    """The gateway's numbers. Times in seconds."""

    broker: str = ""
    """What kind of broker is behind it, for ``/health``."""
    models: tuple[str, ...] = ()
    """Models that are configured to be served, whether or not a worker has them up yet; the first is the default."""
    first_event_wait: float = 0.25
    """How long a stream's headers wait for its first event, so that an early refusal is still an HTTP error."""
    first_event_wait_long_prompt: float = 30.0
    """… where the prompt may be more than the context holds, which an engine says only when it has a slot."""
    drain_timeout: float = 5.0
    """How long JSON replies are waited for after `Gateway.drain`; then they are 503 and their jobs go on."""
    allowed_hosts: tuple[str, ...] = ("*",)
    manageable: bool = True
    """May whoever reaches it load and unload models? There is no authentication."""
