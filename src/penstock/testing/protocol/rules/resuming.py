"""4. Resuming."""

from __future__ import annotations

import asyncio

from penstock.testing.protocol.rule import expect, expect_equal, none_of, rule
from penstock.testing.protocol.server import Server
from penstock.testing.protocol.stream import Stream


@rule("4.1", "Last-Event-ID or ?after= begins behind any position; the header goes first; nonsense is 400")
async def behind_any_position(server: Server) -> None:
    job, whole = await server.finished()
    path = f"/v1/jobs/{job}/events"
    for after in range(len(whole.blocks)):
        rest = [block.data for block in whole.blocks[after:]]
        for how in ({"headers": {"last-event-id": str(after)}}, {"params": {"after": after}}):
            stream = await server.stream("GET", path, **how)
            expect_equal([block.data for block in stream.blocks], rest, f"the rest behind {after} by {next(iter(how))}")
            expect_equal(stream.blocks[0].id, str(after + 1), f"the first id behind {after}")
    both = await server.stream("GET", path, headers={"last-event-id": "2"}, params={"after": 1})
    expect_equal(both.blocks[0].id, "3", "the first id with a header of 2 and a query of 1")
    for nonsense in ("x", "-1", "1.5", "9" * 16):
        answer = await server.call("GET", path, headers={"last-event-id": nonsense})
        expect_equal(answer.status_code, 400, f"the status behind {nonsense!r}")


@rule("4.2", "Behind the terminal event: 204 without a body")
async def at_the_end(server: Server) -> None:
    job, whole = await server.finished()
    stream = await server.events(job, len(whole.blocks))
    expect_equal((stream.status, stream.raw), (204, b""), "the answer")


@rule("4.3", "Beyond the head: 200 and one error event without id, log_rewound, and the end")
async def beyond_the_head(server: Server) -> None:
    job, whole = await server.finished()
    stream = await server.events(job, len(whole.blocks) + 5)
    expect_equal((stream.status, len(stream.blocks)), (200, 1), "status and number of events")
    (block,) = stream.blocks
    expect_equal((block.event, block.id), ("error", None), "event and id")
    expect_equal((block.json().get("error") or {}).get("code"), "log_rewound", "the code")


@rule("4.4", "An unknown job is 404 not_found")
async def unknown(server: Server) -> None:
    answer = await server.json("GET", f"/v1/jobs/job_{'0' * 32}/events", 404)
    expect_equal((answer.get("error") or {}).get("code"), "not_found", "the code")


@rule("4.5", "Any number of readers follow a job, each from its own position")
async def many_readers(server: Server) -> None:
    job = await server.submit(24)
    streams = await asyncio.gather(*(server.events(job) for _ in range(4)))
    whole = [block.data for block in streams[0].blocks]
    for stream in streams:
        expect_equal([block.data for block in stream.blocks], whole, "what a reader saw")
    for after, stream in enumerate(await asyncio.gather(*(server.events(job, after) for after in range(4)))):
        expect_equal([block.data for block in stream.blocks], whole[after:], f"what a reader behind {after} saw")


@rule("4.6", "The stream of a POST is resumed at its job's events, or by its key; 409 beyond, empty at the end")
async def of_a_post(server: Server) -> None:
    headers, body = {"idempotency-key": server.key()}, await server.request(stream=True)

    async def repeat(after: int) -> Stream:
        return await server.stream("POST", "/v1/generate", headers={**headers, "last-event-id": str(after)}, json=body)

    whole = await server.stream("POST", "/v1/generate", headers=headers, json=body)
    none_of(whole.text.problems)
    expect(whole.job, "there is no x-penstock-job")
    rest = [block.data for block in whole.blocks[2:]]
    expect_equal([block.data for block in (await server.events(whole.job, 2)).blocks], rest, "the job's own stream")
    expect_equal([block.data for block in (await repeat(2)).blocks], rest, "the repeated request")
    beyond = await repeat(len(whole.blocks) + 5)
    expect_equal(beyond.status, 409, "the status beyond the head")
    expect(b"log_rewound" in beyond.raw, f"the answer beyond the head is {beyond.raw[:80]!r}")
    end = await repeat(len(whole.blocks))
    expect_equal((end.status, end.blocks), (200, []), "the answer at the end")
