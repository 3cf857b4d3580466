"""6. Responses: their events are a function of the log."""

from __future__ import annotations

from typing import Any

from penstock.testing.protocol.rule import expect, expect_equal, none_of, rule
from penstock.testing.protocol.server import Server
from penstock.testing.protocol.stream import Stream

PATH = "/v1/responses"
ENDS = {"response.completed", "response.incomplete", "response.failed"}


async def response(server: Server, headers: dict[str, str] | None = None) -> tuple[str, Stream]:
    """The id and the events of a response."""
    body = await server.request(stream=True)
    body = {"model": body["model"], "input": body["prompt"], "max_output_tokens": body["max_tokens"], "stream": True}
    stream = await server.stream("POST", PATH, json=body, headers=headers)
    expect_equal(stream.status, 200, f"the status of POST {PATH}")
    none_of(stream.text.problems)
    expect(stream.blocks, "the stream is empty")
    return str((stream.blocks[0].json().get("response") or {}).get("id")), stream


async def again(server: Server, id: str, **arguments: Any) -> Stream:
    params = {"stream": "true", **arguments.pop("params", {})}
    return await server.stream("GET", f"{PATH}/{id}", params=params, **arguments)


@rule("6.responses.1", "Events and sequence_numbers, from 0, are a function of the log: created … one end")
async def sequence(server: Server) -> None:
    id, stream = await response(server)
    names = [block.event for block in stream.blocks]
    expect_equal(names[:2], ["response.created", "response.in_progress"], "the beginning")
    expect(names[-1] in ENDS and not ENDS & set(names[:-1]), f"the ends are {[name for name in names if name in ENDS]}")
    numbers = [block.json().get("sequence_number") for block in stream.blocks]
    expect_equal(numbers, list(range(len(numbers))), "the sequence of numbers")
    replay = await again(server, id)
    expect_equal([block.data for block in replay.blocks], [block.data for block in stream.blocks], "the replay")


@rule("6.responses.2", "The id is the sequence_number; starting_after and Last-Event-ID begin with the next")
async def behind_any_number(server: Server) -> None:
    id, stream = await response(server)
    expect_equal(
        [block.id for block in stream.blocks], [str(i) for i in range(len(stream.blocks))], "the sequence of ids"
    )
    data = [block.data for block in stream.blocks]
    for after in range(len(data) - 1):
        for how in ({"params": {"starting_after": after}}, {"headers": {"last-event-id": str(after)}}):
            rest = [block.data for block in (await again(server, id, **how)).blocks]
            expect_equal(rest, data[after + 1 :], f"the rest behind {after} by {next(iter(how))}")


@rule("6.responses.3", "At the end: an empty 200, or 204 by header; beyond it one error, log_rewound")
async def at_the_end(server: Server) -> None:
    id, stream = await response(server)
    last = len(stream.blocks) - 1
    end = await again(server, id, params={"starting_after": last})
    expect_equal((end.status, end.raw), (200, b""), "the answer at the end")
    expect_equal((await again(server, id, headers={"last-event-id": str(last)})).status, 204, "the status by header")
    beyond = await again(server, id, params={"starting_after": last + 5})
    expect_equal((beyond.status, len(beyond.blocks)), (200, 1), "status and number of events beyond the end")
    expect_equal((beyond.blocks[0].event, beyond.blocks[0].id), ("error", None), "event and id beyond the end")
    expect_equal(beyond.blocks[0].json().get("code"), "log_rewound", "the code beyond the end")


@rule("6.responses.4", "What of a response is not in the log is in the last event")
async def last_event(server: Server) -> None:
    id, stream = await response(server)
    told = stream.blocks[-1].json().get("response") or {}
    kept = await server.json("GET", f"{PATH}/{id}")
    expect_equal(told.get("completed_at", "missing"), kept.get("completed_at", "missing"), "completed_at")
