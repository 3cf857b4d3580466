"""What an operator can set of the gateway."""

from __future__ import annotations

import msgspec


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's numbers. Times in seconds, sizes in bytes."""

    broker: str = ""
    """What kind of broker is behind it, for ``/health``."""
    models: tuple[str, ...] = ()
    """Models that are configured to be served, whether or not a worker has them up yet; the first is the default."""
    max_body: int = 1 << 20
    heartbeat: float = 10.0
    send_deadline: float = 30.0
    disconnect_grace: float = 10.0
    first_event_wait: float = 0.25
    """How long a stream's headers wait for its first event, so that an early refusal is still an HTTP error."""
    first_event_wait_long_prompt: float = 30.0
    """… where the prompt may be more than the context holds, which an engine says only when it has a slot."""
    drain_timeout: float = 5.0
    """How long JSON replies are waited for after `Gateway.drain`; then they are 503 and their jobs go on."""
    default_max_tokens: int = 2048
    """What OpenAI routes generate at most when the request does not say (and the context allows it)."""
    allowed_hosts: tuple[str, ...] = ("*",)
    allowed_origins: tuple[str, ...] = ()
    """Origins, ours beside, whose pages may use the API."""
    manageable: bool = True
    """May whoever reaches it load and unload models? There is no authentication."""
