"""1. Logs and positions."""

from __future__ import annotations

import asyncio

from penstock.testing.oracle import problems, tokens_of, view_problems
from penstock.testing.protocol.rule import expect, expect_equal, none_of, rule
from penstock.testing.protocol.server import Server


@rule("1.1", "A log is tokens, then exactly one terminal event")
async def one_end(server: Server) -> None:
    job, stream = await server.finished()
    none_of(problems(stream.blocks, job=job))
    expect(tokens_of(stream.blocks), "the log has no token")


@rule("1.2", "Positions are 1..n; the terminal event's is n + 1; choices share one sequence")
async def positions(server: Server) -> None:
    for choices in (1, 2):
        _, stream = await server.finished(choices)
        seen = [block.id for block in stream.blocks]
        expect_equal(seen, [str(i) for i in range(1, len(seen) + 1)], f"the ids of a job of {choices} choices")


@rule("1.3", "A position means the same event for every reader at every later time")
async def same_for_all(server: Server) -> None:
    job = await server.submit()
    early = await asyncio.gather(server.events(job), server.events(job))
    late = await server.events(job)
    none_of(view_problems([stream.blocks for stream in (*early, late)]))
    for stream in early:
        expect_equal([block.data for block in stream.blocks], [block.data for block in late.blocks], "a reader's data")


@rule("1.4", "Every token has its attempt, from 1, which never decreases")
async def attempts(server: Server) -> None:
    _, stream = await server.finished()
    seen = [token.attempt for token in tokens_of(stream.blocks)]
    expect(all(isinstance(attempt, int) and attempt >= 1 for attempt in seen), f"the attempts are {seen}")
    expect_equal(seen, sorted(seen, key=lambda attempt: attempt or 0), "the sequence of attempts")


@rule("1.5", "The texts of a choice, joined, are its result, and hold no half character")
async def texts(server: Server) -> None:
    for choices in (1, 2):
        job, stream = await server.finished(choices)
        joined = [""] * choices
        for token in tokens_of(stream.blocks):
            joined[token.choice or 0] += token.said
        for text in joined:
            expect(not any("\ud800" <= character <= "\udfff" for character in text), "a text holds half a character")
        result = (await server.settled(job)).get("result") or {}
        expect_equal(joined, result.get("texts", [result.get("text")]), "what the tokens make")
