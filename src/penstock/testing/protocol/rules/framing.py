"""3. Framing: headers, blocks, terminal events, heartbeats."""

from __future__ import annotations

from penstock.core.events import Phase
from penstock.testing.oracle import problems, tokens_of
from penstock.testing.protocol.rule import expect, expect_equal, none_of, rule, skip
from penstock.testing.protocol.server import Server

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-store, no-transform",
    "x-accel-buffering": "no",
}


@rule("3.headers", "A stream is a 200 with the headers of a stream and of its job, never compressed")
async def headers(server: Server) -> None:
    job, _ = await server.finished()
    stream = await server.stream("GET", f"/v1/jobs/{job}/events", headers={"accept-encoding": "gzip, deflate, br"})
    expect_equal(stream.status, 200, "the status")
    sent = stream.response.headers
    for name, value in {**HEADERS, "x-penstock-job": job}.items():
        expect_equal(sent.get(name), value, f"the header {name}")
    expect("content-encoding" not in sent, f"the stream is compressed: {sent.get('content-encoding')}")


@rule("3.1", "A block is id, event and one line of data, every line ended by one LF; the id is the position")
async def blocks(server: Server) -> None:
    job, stream = await server.finished()
    none_of(stream.text.problems)
    for number, block in enumerate(stream.blocks, 1):
        names = [name for name, _ in block.fields if name != "retry"]
        expect_equal(names, ["id", "event", "data"], f"the lines of block {number}")
        expect_equal(block.id, str(number), f"the id of block {number}")
        expect_equal(block.json().get("job_id"), job, f"the job_id of block {number}")


@rule("3.2", "Data is one line of JSON in ASCII")
async def data(server: Server) -> None:
    job = await server.submit(user_id=server.key(), metadata={"note": "ż\u2028🦆"})
    for stream in ((await server.finished())[1], await server.events(job)):
        expect(stream.raw.isascii(), "there are bytes that are not ASCII")
        for block in stream.blocks:
            try:
                block.json()
            except ValueError as error:
                expect(False, f"data that is no JSON object: {error}")


@rule("3.3", "retry stands only inside the first block, and every block has data")
async def retry(server: Server) -> None:
    _, stream = await server.finished()
    first, *others = stream.blocks
    expect(first.retry is not None and first.retry.isdigit(), "the first block has no retry")
    expect(all(block.retry is None for block in others), "a later block has a retry")
    expect(all(block.lines_of_data for block in stream.blocks), "a block has no data")


@rule("3.4", "No CR or NUL reaches the stream, whatever the client's own texts hold")
async def clean(server: Server) -> None:
    job = await server.submit(metadata={"note": "a\r\nid: 9\r\n\r\n\x00"}, prompt="One\r\ntwo\r\n\r\n")
    stream = await server.events(job)
    expect(not {b"\r", b"\0"} & {bytes([byte]) for byte in stream.raw}, "there is a CR or a NUL")
    none_of(stream.text.problems)


@rule("3.6", "Tokens tell their choice and log-probabilities where asked; done tells all finish reasons")
async def extras(server: Server) -> None:
    _, stream = await server.finished()
    for block in stream.blocks[:-1]:
        expect(not {"index", "logprob", "top_logprobs"} & block.json().keys(), f"what nobody asked for: {block.data}")
    expect("finish_reasons" not in stream.blocks[-1].json(), "done of one choice has finish_reasons")
    _, stream = await server.finished(2)
    *tokens, end = [block.json() for block in stream.blocks]
    expect_equal({token.get("index") for token in tokens}, {0, 1}, "the set of indexes of two choices")
    expect_equal(len(end.get("finish_reasons") or ()), 2, "the number of finish_reasons of two choices")
    answer = await server.call("POST", "/v1/jobs", json=await server.request(2, logprobs=2))
    if answer.status_code == 400:
        skip("the model gives no log-probabilities")
    for block in (await server.events(str(answer.json()["id"]))).blocks[:-1]:
        token = block.json()
        expect(isinstance(token.get("logprob"), int | float), f"a token without its logprob: {block.data}")
        expect_equal(len(token.get("top_logprobs") or ()), 2, "the number of top_logprobs")


@rule("3.8", "A token tells of what it is part; thoughts and calls are no text, and are in the result")
async def phases(server: Server) -> None:
    answer = await server.call("POST", "/v1/jobs", json=await server.chat())
    if answer.status_code == 400:
        skip("the model does not chat")
    job = str(answer.json()["id"])
    stream = await server.events(job)
    none_of(problems(stream.blocks, job=job))
    said = thought = ""
    for token in tokens_of(stream.blocks):
        said += token.said
        thought += token.text_of(Phase.REASONING)
    result = (await server.settled(job)).get("result") or {}
    expect_equal(result.get("text"), said, "the result's text")
    expect_equal(result.get("reasoning", ""), thought, "the result's reasoning")


@rule("3.terminal", "done or error has job_id, status and its fields; the server ends the response after it")
async def terminal(server: Server) -> None:
    job, stream = await server.finished()
    expect(stream.ended, "the response goes on after the terminal event")
    expect_equal(stream.blocks[-1].event, "done", "the last event")
    done = stream.blocks[-1].json()
    expect_equal((done.get("job_id"), done.get("status")), (job, "completed"), "job and status of done")
    expect(done.get("finish_reason") in ("stop", "length"), f"the finish_reason is {done.get('finish_reason')!r}")
    usage = done.get("usage") or {}
    expect_equal(usage.get("completion_tokens"), len(stream.blocks) - 1, "usage.completion_tokens")
    expect_equal(
        usage.get("total_tokens"), usage.get("prompt_tokens", 0) + len(stream.blocks) - 1, "usage.total_tokens"
    )

    job = await server.submit(400)
    await server.json("POST", f"/v1/jobs/{job}/cancel")
    last = (await server.events(job)).blocks[-1]
    if last.event == "done":
        skip("every job ends before it can be cancelled")
    expect_equal(last.event, "error", "the last event of a cancelled job")
    error = last.json()
    expect_equal((error.get("job_id"), error.get("status")), (job, "cancelled"), "job and status of error")
    expect(isinstance(error.get("error"), dict), f"error is {error.get('error')!r}")
    expect_equal(set(error["error"]), {"message", "type", "param", "code"}, "the set of an error's fields")
    expect_equal(error["error"]["code"], "cancelled", "the error's code")


@rule("3.heartbeat", "A silent stream has `: ping` and one LF, between blocks, without a blank line")
async def heartbeat(server: Server) -> None:
    user = server.key()
    async with server.open("GET", "/v1/events", params={"user_id": user}) as stream:
        await stream.read_until(lambda stream: b"\n" in stream.raw)
        expect(stream.raw.startswith(b": ping\n"), f"a silent stream begins with {stream.raw[:40]!r}")
        await server.submit(1, user_id=user)
        await stream.read_until(lambda stream: any(block.event == "job_complete" for block in stream.blocks))
        none_of(stream.text.problems)
        expect_equal(set(stream.text.comments), {"ping"}, "the set of comments")
