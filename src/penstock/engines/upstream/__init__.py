"""An engine over any OpenAI-compatible server, or several replicas of one: what it streams goes into the log.

A reply that a replica did not finish goes on at another, from what was logged; so do the vectors of many inputs.

===========  ===========================================================================================
options      what the operator says
dialects     what a request looks like for each kind of server, and what a refusal means
stream       what comes down a stream: lines, chunks
reply        chunks into tokens: the hot path
calls        calls of tools, in any form
answers      what is no stream: vectors, and the tokens of a prompt
replicas     what each can do, health, circuit breakers, the choice among them
backend      calls, retries, failover
===========  ===========================================================================================
"""

from __future__ import annotations

from penstock.engines.plugin import Plugin
from penstock.engines.upstream.options import UpstreamOptions, addresses


def _check(name: str, path: str | None, options: UpstreamOptions) -> None:
    _ = options.secret
    addresses(path)


PLUGIN = Plugin(load="penstock.engines.upstream.backend:load", options=UpstreamOptions, check=_check)
