"""6. The OpenAI dialects: chat completions and completions."""

from __future__ import annotations

import json
from typing import Any

from penstock.testing.oracle import tokens_of
from penstock.testing.protocol.rule import expect, expect_equal, none_of, rule
from penstock.testing.protocol.server import Server
from penstock.testing.protocol.stream import Stream

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


async def reply(server: Server, path: str, **fields: Any) -> Stream:
    """The stream of a reply."""
    body = await (server.chat if path == CHAT else server.request)(stream=True, **fields)
    stream = await server.stream("POST", path, json=body)
    expect_equal(stream.status, 200, f"the status of POST {path}")
    return stream


def chunks(stream: Stream) -> list[dict[str, Any]]:
    """The data of all blocks but the last, which must be [DONE]."""
    none_of(stream.text.problems)
    expect(stream.blocks and stream.blocks[-1].data == "[DONE]", f"the stream ends with {stream.raw[-80:]!r}")
    return [json.loads(block.data) for block in stream.blocks[:-1]]


@rule("6.1", "Chunks have no event; ids are positions, on chunks with tokens and on [DONE] only")
async def ids(server: Server) -> None:
    for path in (CHAT, TEXT):
        stream = await reply(server, path)
        seen: list[int] = []
        for block, chunk in zip(stream.blocks, chunks(stream), strict=False):
            expect(block.event is None, f"a chunk has the event {block.event!r}")
            closes = not chunk["choices"] or chunk["choices"][0].get("finish_reason")
            expect(not closes or block.id is None, "a chunk with a finish reason or the usage has an id")
            seen += [] if block.id is None else [int(block.id)]
        log = (await server.events(stream.job)).blocks
        seen.append(int(stream.blocks[-1].id or 0))
        expect_equal(seen, sorted(set(seen)), "the sequence of ids")
        expect_equal(seen[-1], len(log), "the id of [DONE]")
        for after in seen[:-1]:
            expect(1 <= after < len(log), f"the id {after} is no token's position")


@rule("6.2", "The JSON id is the prefix and the digits of the job's id; it and created are the same on all chunks")
async def one_id(server: Server) -> None:
    for path, prefix in ((CHAT, "chatcmpl-"), (TEXT, "cmpl-")):
        stream = await reply(server, path)
        expect_equal(
            {chunk["id"] for chunk in chunks(stream)}, {prefix + stream.job.removeprefix("job_")}, "the set of ids"
        )
        expect_equal(
            len({chunk["created"] for chunk in chunks(stream)}), 1, "the number of different values of created"
        )


@rule("6.3", "Role on each choice's first chunk, finish_reason on its last, usage where asked, then [DONE]")
async def chat_chunks(server: Server) -> None:
    seen = chunks(await reply(server, CHAT, n=2, stream_options={"include_usage": True}))
    *all_chunks, usage = seen
    for chunk in all_chunks:
        expect_equal(chunk.get("usage", "missing"), None, "usage of a chunk before the last")
    expect_equal(usage.get("choices"), [], "choices of the chunk with the usage")
    expect(isinstance(usage.get("usage"), dict), f"the usage is {usage.get('usage')!r}")
    for index in (0, 1):
        of_choice = [choice for chunk in all_chunks for choice in chunk["choices"] if choice["index"] == index]
        roles = ["role" in choice["delta"] for choice in of_choice]
        expect(roles and roles[0] and not any(roles[1:]), f"choice {index} has its role on {roles}")
        reasons = [bool(choice.get("finish_reason")) for choice in of_choice]
        expect(reasons[-1] and not any(reasons[:-1]), f"choice {index} has a finish_reason on {reasons}")
    plain = chunks(await reply(server, CHAT))
    expect(all("usage" not in chunk for chunk in plain), "there is a usage that nobody asked for")


@rule("6.4", "What fails before the first token is an HTTP error")
async def failures(server: Server) -> None:
    for path in (CHAT, TEXT):
        body = await (server.chat if path == CHAT else server.request)(stream=True)
        answer = await server.json("POST", path, 404, json={**body, "model": server.key()})
        expect_equal((answer.get("error") or {}).get("code"), "model_not_found", f"the code of POST {path}")


@rule("6.5", "A reply is a job: x-penstock-job names it, and its log has the reply's text")
async def is_a_job(server: Server) -> None:
    for path in (CHAT, TEXT):
        stream = await reply(server, path)
        choices = [choice for chunk in chunks(stream) for choice in chunk["choices"]]
        text = "".join(choice["delta"].get("content") or "" if path == CHAT else choice["text"] for choice in choices)
        expect(stream.job, f"there is no x-penstock-job on POST {path}")
        log = "".join(token.said for token in tokens_of((await server.events(stream.job)).blocks))
        expect_equal(text, log, f"the text of POST {path}")
