"""5. All jobs of a user: the multiplexed stream."""

from __future__ import annotations

from penstock.testing.oracle import problems
from penstock.testing.protocol.rule import expect, expect_equal, none_of, rule
from penstock.testing.protocol.server import Server
from penstock.testing.protocol.stream import Block, Stream

PATH = "/v1/events"


def ends(stream: Stream) -> int:
    return sum(block.event == "job_complete" for block in stream.blocks)


async def two_jobs(server: Server, user: str) -> list[Block]:
    """The blocks of two jobs of *user*, one submitted before the stream began and one while it ran."""
    first = await server.submit(64, user_id=user)
    async with server.open("GET", PATH, params={"user_id": user}) as stream:
        second = await server.submit(user_id=user)
        await stream.read_until(lambda stream: _ended(stream, second) and (_ended(stream, first) or ends(stream) > 1))
        none_of(stream.text.problems)
        return stream.blocks


def _ended(stream: Stream, job: str) -> bool:
    return any(block.event == "job_complete" and block.json().get("job_id") == job for block in stream.blocks)


@rule("5.1", "Without a cursor: every job that has not ended from its beginning, and every job to come")
async def jobs_to_come(server: Server) -> None:
    user = server.key()
    async with server.open("GET", PATH, params={"user_id": user}) as stream:
        jobs = [await server.submit(user_id=user) for _ in range(2)]
        await stream.read_until(lambda stream: ends(stream) == 2)
        expect(not stream.ended, "the stream ended by itself")
        seen = {block.json().get("job_id") for block in stream.blocks}
        expect_equal(seen, set(jobs), "the set of jobs on the stream")


@rule("5.2", "Every block has a cursor as id; tokens tell their position; the terminal event is job_complete")
async def cursors(server: Server) -> None:
    blocks = await two_jobs(server, server.key())
    expect(all(block.id for block in blocks), "a block has no id")
    expect_equal(len({block.id for block in blocks}), len(blocks), "the number of different ids")
    expect_equal({block.event for block in blocks}, {"token", "job_complete"}, "the set of event names")
    for block in blocks:
        data = block.json()
        if block.event == "token":
            expect(isinstance(data.get("position"), int), f"a token without its position: {block.data}")
        else:
            expect_equal(data.get("error", "missing"), None, "error of a job that completed")


@rule("5.3", "With a cursor the stream goes on exactly behind that block, wherever it was cut")
async def behind_any_cursor(server: Server) -> None:
    user = server.key()
    jobs = []
    async with server.open("GET", PATH, params={"user_id": user}) as stream:
        for _ in range(2):
            jobs.append(await server.submit(user_id=user))
            await stream.read_until(lambda stream: ends(stream) == len(jobs))
        blocks = stream.blocks
    for cut in range(len(blocks) - 1):
        cursor = {"last-event-id": blocks[cut].id or ""}
        async with server.open("GET", PATH, params={"user_id": user}, headers=cursor) as stream:
            rest = await stream.read_blocks(len(blocks) - cut - 1)
        for job in jobs:
            wanted = [block.data for block in blocks[cut + 1 :] if block.json().get("job_id") == job]
            seen = [block.data for block in rest if block.json().get("job_id") == job]
            expect_equal(seen, wanted, f"what {job} has behind block {cut + 1} of {len(blocks)}")


@rule("5.4", "A cursor gives access to nothing: with a foreign one a client sees its own jobs; nonsense is 400")
async def foreign_cursors(server: Server) -> None:
    theirs, ours = server.key(), server.key()
    cursor = (await two_jobs(server, theirs))[0].id or ""
    async with server.open("GET", PATH, params={"user_id": ours}, headers={"last-event-id": cursor}) as stream:
        job = await server.submit(user_id=ours)
        await stream.read_until(lambda stream: ends(stream) == 1)
        seen = {block.json().get("job_id") for block in stream.blocks}
        expect_equal(seen, {job}, "the set of jobs on the stream")
    answer = await server.call("GET", PATH, params={"user_id": ours, "after": "no cursor!"})
    expect_equal(answer.status_code, 400, "the status of a cursor that is none")


@rule("5.5", "Order is kept within a job")
async def order(server: Server) -> None:
    logs: dict[str, list[Block]] = {}
    for block in await two_jobs(server, server.key()):
        logs.setdefault(str(block.json().get("job_id")), []).append(_of_a_job(block))
    for job, blocks in logs.items():
        none_of(problems(blocks, job=job))


def _of_a_job(block: Block) -> Block:
    """The block as it is on the stream of its own job, for the oracle."""
    if block.event == "token":
        return Block((("id", str(block.json().get("position"))), *block.fields[1:]))
    return Block((("event", "done"), ("data", block.data)))
