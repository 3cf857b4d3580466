"""7. Disconnect."""

from __future__ import annotations

from penstock.testing.protocol.rule import expect_equal, rule, skip
from penstock.testing.protocol.server import Server
from penstock.testing.protocol.stream import NoAnswer

#: Enough for a model to be still at work when its only reader has been gone for the grace period.
LONG = 400


async def abandoned(server: Server, metadata: dict[str, str] | None = None) -> str:
    """The status in which a long chat ends whose reader went away behind the first token."""
    body = await server.chat(LONG, stream=True, **({"metadata": metadata} if metadata else {}))
    async with server.open("POST", "/v1/chat/completions", json=body) as stream:
        await stream.read_blocks(1)
    return str((await server.settled(stream.job)).get("status"))


@rule("7.1", "A job of POST /v1/jobs runs whether or not anybody reads it")
async def unread(server: Server) -> None:
    expect_equal(
        (await server.settled(await server.submit())).get("status"), "completed", "the status of an unread job"
    )


@rule("7.2", "A chat that has no reader for the grace period is cancelled")
async def cancelled(server: Server) -> None:
    status = await abandoned(server)
    if status == "completed":
        skip("the model is done before the grace period is over")
    expect_equal(status, "cancelled", "the status of an abandoned chat")


@rule("7.3", "metadata.on_disconnect overrides it")
async def continued(server: Server) -> None:
    try:
        status = await abandoned(server, {"on_disconnect": "continue"})
    except NoAnswer:
        skip(f"the model needs more than {server.patience:g} s for a long reply")
    expect_equal(status, "completed", "the status of an abandoned chat that was to continue")
