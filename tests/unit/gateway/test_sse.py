"""Event streams without a server: frames, heartbeats, slow and departed readers, the drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ErrorInfo, NotFound
from penstock.core.events import Ended, Event, Logprob, Tokens, TopLogprob
from penstock.core.job import Job, Request, Status, Usage, new_job_id
from penstock.gateway.dialects.native.stream import render
from penstock.gateway.dialects.openai.stream import ChatWriter, TextWriter
from penstock.gateway.sse import EventStream, Streams
from tests.support.sse import Event as Seen
from tests.support.sse import Parser

AWKWARD = '\u2028\u2029\x85\r\n\x00\x1b[31m\U0001f600é"\\/\x7f\ufeff'
TEXTS = st.lists(
    st.text(max_size=20) | st.sampled_from([*AWKWARD, AWKWARD, "", "data: x\n\n", "\n\nid: 9\n"]), min_size=1
)


def job(n: int = 1) -> Job:
    return Job(id=new_job_id(), tenant="t", request=Request(model="m", prompt="x", n=n), created_at=1.0)


async def blocks(rendered: AsyncIterator[bytes]) -> bytes:
    return b"".join([block async for block in rendered])


async def replay(*events: Event) -> AsyncIterator[Event]:
    for event in events:
        yield event


def parse(raw: bytes) -> list[Seen]:
    """As any client would; and what no stream may do."""
    assert raw.isascii()
    assert b"\r" not in raw
    assert b"\x00" not in raw
    parser = Parser()
    events = parser.feed(raw)
    assert parser.empty_blocks == 0
    assert [event.retry is not None for event in events] == [True] + [False] * (len(events) - 1)
    return events


class TestFrames:
    @given(TEXTS)
    def test_any_text_passes_a_jobs_stream_unchanged(self, texts: list[str]) -> None:
        logprobs: list[Logprob | None] = [Logprob(-0.5, (TopLogprob(1, text, -0.5),)) for text in texts]
        end = Ended(len(texts) + 1, 1, Status.COMPLETED, ("stop",), Usage(1, len(texts)))
        for given_logprobs in (None, logprobs):
            run = Tokens(1, 1, list(range(len(texts))), texts, None, given_logprobs)
            events = parse(asyncio.run(blocks(render(job(), replay(run, end)))))
            assert [event.data["token"] for event in events[:-1]] == texts
            assert [event.id for event in events] == [str(n) for n in range(1, len(texts) + 2)]
            assert [event.event for event in events] == ["token"] * len(texts) + ["done"]

    @pytest.mark.parametrize("dialect", [ChatWriter, TextWriter])
    @given(texts=TEXTS)
    def test_any_text_passes_an_openai_stream_unchanged(self, dialect: Any, texts: list[str]) -> None:
        logprobs = [Logprob(-0.5, (TopLogprob(1, text, -0.5),)) for text in texts]
        end = Ended(len(texts) + 1, 1, Status.COMPLETED, ("stop",), Usage(1, len(texts)))
        for given_logprobs in (None, logprobs):
            run = Tokens(1, 1, list(range(len(texts))), texts, None, given_logprobs)  # type: ignore[arg-type]
            raw = asyncio.run(blocks(dialect(job(), include_usage=True).render(replay(run, end))))
            events = parse(raw)
            assert events[-1].data == "[DONE]"
            assert events[-2].data["choices"] == []
            parts = [event.data["choices"][0] for event in events[:-2]]
            given_out = "".join(
                part["text"] if "text" in part else part["delta"].get("content") or "" for part in parts
            )
            assert given_out == "".join(texts)

    @given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=5)), min_size=1, max_size=30), st.data())
    def test_choices_keep_their_texts_however_the_runs_fall(
        self, tokens: list[tuple[int, str]], data: st.DataObject
    ) -> None:
        runs: list[Event] = []
        position = 1
        while position <= len(tokens):
            size = data.draw(st.integers(1, len(tokens) - position + 1))
            part = tokens[position - 1 : position - 1 + size]
            runs.append(Tokens(position, 1, [0] * size, [text for _, text in part], [choice for choice, _ in part]))
            position += size
        end = Ended(position, 1, Status.COMPLETED, ("stop",) * 3, Usage(1, len(tokens)))
        events = parse(asyncio.run(blocks(TextWriter(job(3), include_usage=False).render(replay(*runs, end)))))
        texts = ["", "", ""]
        for event in events[:-1]:
            for choice in event.data["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == ["".join(text for choice, text in tokens if choice == index) for index in range(3)]
        ids = [int(event.id) for event in events if event.id is not None]
        assert ids == sorted(ids)
        assert ids[-1] == position

    @given(st.text())
    def test_an_errors_words_cannot_break_out(self, message: str) -> None:
        end = Ended(1, 1, Status.FAILED, (), Usage(), ErrorInfo(message, code="engine_error"))
        for raw in (
            asyncio.run(blocks(render(job(), replay(end)))),
            asyncio.run(blocks(ChatWriter(job(), include_usage=False).render(replay(end)))),
        ):
            (event,) = parse(raw)
            assert event.data["error"]["message"] == message

    @given(TEXTS, st.data())
    def test_a_resume_anywhere_continues_the_stream(self, texts: list[str], data: st.DataObject) -> None:
        run = Tokens(1, 1, list(range(len(texts))), texts)
        end = Ended(len(texts) + 1, 1, Status.COMPLETED, ("stop",), Usage(1, len(texts)))
        after = data.draw(st.integers(0, len(texts)))
        rest = [run.after(after)] if after < len(texts) else []
        events = parse(asyncio.run(blocks(render(job(), replay(*rest, end)))))
        assert [event.id for event in events] == [str(n) for n in range(after + 1, len(texts) + 2)]
        assert [event.data["token"] for event in events[:-1]] == texts[after:]


class Client:
    """The other end of an ASGI response: takes what is sent, unless it is told not to."""

    def __init__(self) -> None:
        self.body = b""
        self.started = asyncio.Event()
        self.finished = False
        self.reading = asyncio.Event()
        self.reading.set()
        self.left = asyncio.Event()
        self.closed: list[bool] = []

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.started.set()
        else:
            self.body += message["body"]
            self.finished = not message.get("more_body", False)

    async def on_close(self, complete: bool) -> None:
        self.closed.append(complete)

    def connect(self, streams: Streams, source: AsyncIterator[bytes]) -> asyncio.Task[None]:
        stream = EventStream(streams, source, on_close=self.on_close)
        return asyncio.create_task(stream({"type": "http", "method": "GET", "path": "/"}, self.receive, self.send))  # type: ignore[arg-type]


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def silence(*first: bytes) -> AsyncIterator[bytes]:
    for block in first:
        yield block
    await asyncio.Event().wait()


class Running:
    def __init__(self, **settings: float) -> None:
        self.streams = Streams(**settings)

    async def __aenter__(self) -> Streams:
        self.task = asyncio.create_task(self.streams.run())
        return self.streams

    async def __aexit__(self, *exc: object) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class TestStreams:
    async def test_silence_is_broken_by_pings_of_one_line_feed(self) -> None:
        async with Running(heartbeat=0.05) as streams:
            client = Client()
            task = client.connect(streams, silence(b"id: 1\ndata: 1\n\n"))
            await until(lambda: client.body.count(b": ping\n") >= 3)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert client.body.startswith(b"id: 1\ndata: 1\n\n: ping\n")
        assert client.body.replace(b": ping\n", b"") == b"id: 1\ndata: 1\n\n"
        assert len(streams) == 0

    async def test_a_stream_that_ends_is_complete(self) -> None:
        async def source() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"

        client = Client()
        await client.connect(Streams(), source())
        assert client.body == b"data: 1\n\n"
        assert client.finished
        assert client.closed == [True]

    async def test_a_reader_that_takes_nothing_is_dropped_and_disturbs_nobody(self) -> None:
        async with Running(heartbeat=0.05, send_deadline=0.2) as streams:
            stuck, well = Client(), Client()
            first = stuck.connect(streams, silence(b"data: 1\n\n", b"data: 2\n\n"))
            second = well.connect(streams, silence(b"data: 1\n\n"))
            await stuck.started.wait()
            stuck.reading.clear()
            await until(first.done)
            assert stuck.closed == [False]
            pings = well.body.count(b": ping\n")
            await until(lambda: well.body.count(b": ping\n") > pings + 2)
            assert not second.done()
            well.left.set()
            await second
        assert well.closed == [False]

    async def test_a_reader_that_leaves_ends_the_stream(self) -> None:
        client = Client()
        task = client.connect(Streams(), silence(b"data: 1\n\n"))
        await until(lambda: client.body)
        client.left.set()
        await task
        assert client.closed == [False]
        assert not client.finished

    async def test_a_replay_to_a_reader_that_left_does_not_spin(self) -> None:
        """A source that never suspends would hold the loop for ever: the stream itself lets go now and then."""
        sent = 0

        async def source() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                yield b"data: 1\n\n"

        client = Client()
        task = client.connect(Streams(), source())
        await client.started.wait()
        client.left.set()
        async with asyncio.timeout(30):
            await task
        assert sent < 100_000

    async def test_the_drain_tells_everyone_when_to_come_back(self) -> None:
        streams = Streams()
        clients = [Client() for _ in range(50)]
        tasks = [client.connect(streams, silence(b"data: 1\n\n")) for client in clients]
        await until(lambda: all(client.body for client in clients))
        streams.close()
        await asyncio.gather(*tasks)
        retries = set()
        for client in clients:
            assert client.finished
            assert client.closed == [False]
            last = client.body.removeprefix(b"data: 1\n\n").decode()
            assert last.startswith("retry: ")
            assert last.endswith("\n")
            assert "\n\n" not in last
            retries.add(int(last[7:]))
        assert len(retries) > 10, "they must not all come back at once"
        assert len(streams) == 0
        late = Client()
        await late.connect(streams, silence())
        assert late.finished
        assert late.body.startswith(b"retry: ")

    async def test_a_source_that_fails_is_closed_and_tells_its_owner(self) -> None:
        async def source() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            raise RuntimeError("broken")

        client = Client()
        with pytest.raises(RuntimeError, match="broken"):
            await client.connect(Streams(), source())
        assert client.closed == [False]

    async def test_a_log_that_is_dropped_in_the_middle_of_its_replay_ends_the_stream(self) -> None:
        async def source() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            raise NotFound("No such job.")

        client = Client()
        await client.connect(Streams(), source())
        assert client.body.startswith(b"data: 1\n\nretry: ")
        assert client.finished
        assert client.closed == [False]


def test_the_json_of_an_error_is_one_line() -> None:
    raw = asyncio.run(
        blocks(render(job(), replay(Ended(1, 1, Status.FAILED, (), Usage(), ErrorInfo(AWKWARD, code="x")))))
    )
    (data,) = [line for line in raw.split(b"\n") if line.startswith(b"data: ")]
    assert json.loads(data[6:])["error"]["message"] == AWKWARD
