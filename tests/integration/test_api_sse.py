"""SPEC 6: the rules of event streams, byte for byte, and resuming."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import httpx
import pytest

from penstock.testing.oracle import check_log, check_views
from tests.support.api import check_error, ended, poll, running, submit, text_of
from tests.support.http import send
from tests.support.server import PATIENCE, Server
from tests.support.sse import Event, Stream, open_stream

STREAMED = [
    ("/v1/generate", {"prompt": "x"}),
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
]

#: Every route that answers with a stream of one job, and its whole body but for the model: three tokens.
EVERY = [
    *((route, {**body, "max_tokens": 3, "stream": True}) for route, body in STREAMED),
    ("/v1/responses", {"input": "x", "max_output_tokens": 3, "stream": True}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": True}),
    ("/generate_stream", {"prompt": "x", "max_tokens": 3}),
    ("/api/v1/req", {"prompt": "x", "max_tokens": 3}),
]


async def finished(http: httpx.AsyncClient, tokens: int = 8, **fields: object) -> str:
    job = await submit(http, max_tokens=tokens, **fields)
    await ended(http, job)
    return job


def check_bytes(stream: Stream) -> None:
    """What holds for every stream: no carriage return, ASCII, one line per datum, no block without data."""
    assert b"\r" not in stream.raw
    assert stream.raw.isascii()
    assert stream.parser.empty_blocks == 0
    # Heartbeats are a comment line with ONE line feed, wherever they come; without them only data blocks are left.
    raw = stream.raw.replace(b": ping\n", b"")
    assert b"\n\n\n" not in raw
    blocks = raw.split(b"\n\n")
    assert blocks.pop() == b"", "the stream ends after a whole block"
    for number, block in enumerate(blocks):
        lines = block.split(b"\n")
        assert sum(line.startswith(b"data: ") for line in lines) == 1, block
        for line in lines:
            assert re.match(rb"(id|event|data|retry): [^\x00]*$", line), line

        assert not number or not any(line.startswith(b"retry: ") for line in lines), block


class TestBytes:
    async def test_a_jobs_stream_is_exactly_this(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await finished(http, 2, prompt="a b c")
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            await stream.rest()
        assert not stream.torn
        assert stream.raw.decode() == (
            "retry: 1000\n"
            f'id: 1\nevent: token\ndata: {{"job_id":"{job}","token":"1@1 ","token_id":1,"attempt":1}}\n\n'
            f'id: 2\nevent: token\ndata: {{"job_id":"{job}","token":"2@1 ","token_id":2,"attempt":1}}\n\n'
            f'id: 3\nevent: done\ndata: {{"job_id":"{job}","status":"completed","finish_reason":"length",'
            '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
        )

    @pytest.mark.parametrize(("route", "body"), EVERY, ids=[route for route, _ in EVERY])
    async def test_the_headers(self, server: Server, route: str, body: dict[str, object]) -> None:
        fields = {"model": "synthetic", **body}
        headers = {"accept-encoding": "gzip, br, deflate"}
        async with await open_stream(server.url + route, "POST", json_body=fields, headers=headers) as stream:
            await stream.rest()
        assert stream.status == 200
        check_headers(stream)
        assert stream.headers["x-penstock-job"].startswith("job_")
        check_bytes(stream)

    async def test_the_headers_of_the_others(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await finished(http)
        for path in (f"/v1/jobs/{job}/events", "/v1/events?user_id=nobody"):
            async with await open_stream(server.url + path) as stream:
                check_headers(stream)

    @pytest.mark.parametrize(("route", "body"), STREAMED, ids=[route for route, _ in STREAMED])
    async def test_live_streams_keep_the_rules(self, server: Server, route: str, body: dict[str, object]) -> None:
        fields = {"model": "paced", "max_tokens": 20, "stream": True, "n": 2, **body}
        async with await open_stream(server.url + route, "POST", json_body=fields) as stream:
            events = await stream.rest()
        check_bytes(stream)
        assert events[0].retry is not None
        assert [event.retry for event in events[1:]] == [None] * (len(events) - 1)
        ids = [int(event.id) for event in events if event.id is not None]
        assert ids == sorted(ids)
        assert ids[-1] == 41

    @pytest.mark.parametrize("failure", ["cancelled", "expired"])
    async def test_a_failure_is_an_event(self, server: Server, http: httpx.AsyncClient, failure: str) -> None:
        fields = {"deadline": 0.6} if failure == "expired" else {}
        job = await submit(http, model="paced", max_tokens=100_000, **fields)
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            events = await stream.take(3)
            if failure == "cancelled":
                await http.post(f"/v1/jobs/{job}/cancel")
            events += await stream.rest()
        check_bytes(stream)
        check_log(events, job=job)
        assert events[-1].event == "error"
        assert set(events[-1].data) == {"job_id", "status", "error"}
        assert events[-1].data["status"] == failure
        assert set(events[-1].data["error"]) == {"message", "type", "param", "code"}
        assert events[-1].data["error"]["code"] == failure

    async def test_a_failure_in_an_openai_stream_is_a_data_object(
        self, server: Server, http: httpx.AsyncClient
    ) -> None:
        body = {"model": "paced", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 100_000}
        async with await open_stream(f"{server.url}/v1/chat/completions", "POST", json_body=body) as stream:
            events = await stream.take(3)
            await http.post(f"/v1/jobs/{stream.headers['x-penstock-job']}/cancel")
            events += await stream.rest()
        check_bytes(stream)
        assert set(events[-1].data) == {"error"}
        assert events[-1].data["error"]["code"] == "cancelled"

    async def test_a_failure_in_a_native_stream_is_its_error_event(
        self, server: Server, http: httpx.AsyncClient
    ) -> None:
        body = {"model": "paced", "prompt": "x", "stream": True, "max_tokens": 100_000}
        async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body) as stream:
            events = await stream.take(3)
            await http.post(f"/v1/jobs/{stream.headers['x-penstock-job']}/cancel")
            events += await stream.rest()
        check_log(events, job=stream.headers["x-penstock-job"])
        assert (events[-1].event, events[-1].data["error"]["code"]) == ("error", "cancelled")

    async def test_an_early_position_of_the_tokens_is_their_id(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await finished(http, 50)
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            events = await stream.rest()
        assert [event.id for event in events] == [str(position) for position in range(1, 52)]
        assert [event.data["token_id"] for event in events[:-1]] == list(range(1, 51))
        assert "".join(event.data["token"] for event in events[:-1]) == text_of(50)


class TestChunks:
    """What a chunk of OpenAI's has and has not: SDKs take a field that is missing for null."""

    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("usage", [True, False], ids=["usage", "no-usage"])
    @pytest.mark.parametrize(("route", "body"), STREAMED[1:], ids=[route for route, _ in STREAMED[1:]])
    async def test_the_chunks_of_a_reply(
        self, server: Server, route: str, body: dict[str, object], usage: bool, n: int
    ) -> None:
        fields = {"model": "paced", "max_tokens": 4, "n": n, "stream": True, **body}
        if usage:
            fields["stream_options"] = {"include_usage": True}
        async with await open_stream(server.url + route, "POST", json_body=fields) as stream:
            *events, done = await stream.rest()
        assert done.text == "[DONE]"
        assert stream.raw.endswith(b"data: [DONE]\n\n")
        chunks = [event.data for event in events]
        assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
        if usage:
            last = chunks.pop()
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 4 * n
            assert all("usage" in chunk and chunk["usage"] is None for chunk in chunks)
        else:
            assert not any("usage" in chunk for chunk in chunks)
        for index in range(n):
            mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            if route == "/v1/chat/completions":
                assert mine[0]["delta"]["role"] == "assistant"
                assert not any("role" in choice["delta"] for choice in mine[1:])
            assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]


def check_headers(stream: Stream) -> None:
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["cache-control"] == "no-cache, no-store, no-transform"
    assert stream.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in stream.headers
    assert "content-length" not in stream.headers
    assert stream.headers["x-request-id"]


class TestHeartbeat:
    async def test_silence_carries_pings_from_the_queue_wait_on(self, server: Server, http: httpx.AsyncClient) -> None:
        """Both slots are taken: the third job's stream has nothing to say for as long as it waits."""
        blockers = [await submit(http, model="crawl", max_tokens=100_000) for _ in range(2)]
        for blocker in blockers:
            await running(http, blocker)
        try:
            job = await submit(http, model="crawl", max_tokens=2)
            body = {"model": "crawl", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 1}
            async with (
                await open_stream(f"{server.url}/v1/jobs/{job}/events") as one,
                await open_stream(f"{server.url}/v1/chat/completions", "POST", json_body=body) as two,
            ):
                for stream in (one, two):
                    async with asyncio.timeout(PATIENCE):
                        while stream.raw.count(b": ping\n") < 3:
                            assert await stream.more()
                    assert stream.raw == b": ping\n" * stream.raw.count(b": ping\n")
                for blocker in blockers:
                    await http.post(f"/v1/jobs/{blocker}/cancel")
                events = await one.rest()
                await two.rest()
            check_bytes(one)
            check_bytes(two)
            check_log(events, job=job)
        finally:
            for blocker in blockers:
                await http.post(f"/v1/jobs/{blocker}/cancel")

    async def test_pings_between_tokens_make_no_event(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await submit(http, model="crawl", max_tokens=4)
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            events = await stream.rest()
        check_bytes(stream)
        assert stream.parser.comments
        assert set(stream.parser.comments) == {"ping"}
        assert [event.id for event in events] == ["1", "2", "3", "4", "5"]

    async def test_an_idle_users_stream_has_pings_too(self, server: Server) -> None:
        async with await open_stream(f"{server.url}/v1/events?user_id=idle") as stream, asyncio.timeout(PATIENCE):
            while stream.raw.count(b": ping\n") < 2:
                assert await stream.more()
        assert stream.raw.replace(b": ping\n", b"") == b""


class TestResume:
    @pytest.mark.parametrize("by", ["header", "query"])
    async def test_at_every_position_of_an_ended_job(self, server: Server, http: httpx.AsyncClient, by: str) -> None:
        tokens = 8
        job = await finished(http, tokens)
        url = f"{server.url}/v1/jobs/{job}/events"
        for after in range(tokens + 1):
            async with await self._resume(url, after, by) as stream:
                events = await stream.rest()
            assert [event.id for event in events] == [str(position) for position in range(after + 1, tokens + 2)]
            check_log(events, after=after, job=job)
            check_bytes(stream)

    @pytest.mark.parametrize("by", ["header", "query"])
    async def test_at_every_position_of_a_running_job(self, server: Server, http: httpx.AsyncClient, by: str) -> None:
        tokens = 12
        job = await submit(http, model="paced", max_tokens=40)
        await running(http, job, tokens)
        url = f"{server.url}/v1/jobs/{job}/events"
        views: list[list[Event]] = []

        async def read(after: int) -> None:
            async with await self._resume(url, after, by) as stream:
                events = await stream.rest()
            check_log(events, after=after, job=job)
            views.append(events)

        await asyncio.gather(*(read(after) for after in range(tokens + 1)))
        check_views(views)

    async def _resume(self, url: str, after: int, by: str) -> Stream:
        return await (open_stream(url, after=after) if by == "header" else open_stream(f"{url}?after={after}"))

    async def test_dropping_after_every_event_loses_and_repeats_nothing(
        self, server: Server, http: httpx.AsyncClient
    ) -> None:
        job = await submit(http, model="paced", max_tokens=25)
        events: list[Event] = []
        while not events or events[-1].event == "token":
            after = events[-1].id if events else None
            async with await open_stream(f"{server.url}/v1/jobs/{job}/events", after=after) as stream:
                events += await stream.take(1)
        check_log(events, job=job)

    async def test_after_the_terminal_event_it_is_204(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await finished(http, 3)
        cancelled = await submit(http, model="paced", max_tokens=100_000)
        await http.post(f"/v1/jobs/{cancelled}/cancel")
        end = (await ended(http, cancelled))["tokens"] + 1
        for id, after in ((job, 4), (cancelled, end)):
            async with await send(f"{server.url}/v1/jobs/{id}/events", headers={"last-event-id": str(after)}) as answer:
                assert answer.status == 204
                assert await answer.body() == b""

    async def test_beyond_the_head_of_a_log_is_log_rewound(self, server: Server, http: httpx.AsyncClient) -> None:
        done = await finished(http, 3)
        live = await submit(http, model="paced", max_tokens=100_000)
        await running(http, live)
        for job, after in ((done, 5), (done, 10**14), (live, 10**6)):
            async with await open_stream(f"{server.url}/v1/jobs/{job}/events", after=after) as stream:
                assert stream.status == 200
                (event,) = await stream.rest()
            check_headers(stream)
            assert event.event == "error"
            assert event.id is None, "an id here would move the reader's place"
            assert event.data["error"]["code"] == "log_rewound"
            assert event.data["job_id"] == job
        assert (await http.post(f"/v1/jobs/{live}/cancel")).json()["status"] == "cancelled"

    @pytest.mark.parametrize("after", ["-1", "x", "1.5", "1e3", "９", "1" * 16, "0x1"])
    async def test_what_is_no_position_is_refused(self, server: Server, http: httpx.AsyncClient, after: str) -> None:
        job = await finished(http, 1)
        check_error(await http.get(f"/v1/jobs/{job}/events", params={"after": after}), 400, "invalid_request", "after")

    async def test_an_empty_last_event_id_is_none(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await finished(http, 1)
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events", after="") as stream:
            assert len(await stream.rest()) == 2

    async def test_the_header_goes_before_the_query(self, server: Server, http: httpx.AsyncClient) -> None:
        """A browser that reconnects sends the header to the URL it was first given."""
        job = await finished(http, 5)
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events?after=1", after=4) as stream:
            assert [event.id for event in await stream.rest()] == ["5", "6"]

    async def test_a_streamed_reply_is_resumed_by_its_key(self, server: Server) -> None:
        """A POST that is sent again with its key and the last id goes on where it was."""
        body = {"model": "paced", "prompt": "x", "max_tokens": 25, "stream": True}
        key = {"idempotency-key": "resume-by-key"}
        async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body, headers=key) as stream:
            events = await stream.take(5)
        again = {**key, "last-event-id": events[-1].id or ""}
        async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body, headers=again) as stream:
            events += await stream.rest()
        check_log(events)

    @pytest.mark.parametrize(("route", "body"), STREAMED, ids=[route for route, _ in STREAMED])
    async def test_a_repeated_post_beyond_the_head_is_409_and_at_the_end_empty(
        self, server: Server, http: httpx.AsyncClient, route: str, body: dict[str, object]
    ) -> None:
        """Its answer has a status of its own: an SDK that repeats a POST reads that, and no event."""
        fields = {"model": "synthetic", "max_tokens": 3, "stream": True, **body}
        key = {"idempotency-key": f"beyond {route}"}
        async with await open_stream(server.url + route, "POST", json_body=fields, headers=key) as stream:
            await stream.rest()
        beyond = await http.post(route, json=fields, headers={**key, "last-event-id": "100"})
        check_error(beyond, 409, "log_rewound")
        at_end = await http.post(route, json=fields, headers={**key, "last-event-id": "4"})
        assert (at_end.status_code, at_end.content) == (200, b"")

    @pytest.mark.parametrize(("route", "body"), EVERY, ids=[route for route, _ in EVERY])
    async def test_every_streamed_reply_is_resumable_as_a_job(
        self, server: Server, route: str, body: dict[str, object]
    ) -> None:
        async with await open_stream(server.url + route, "POST", json_body={"model": "synthetic", **body}) as stream:
            await stream.rest()
            job = stream.headers["x-penstock-job"]
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events", after=2) as stream:
            (token,) = check_log(await stream.rest(), after=2, job=job)
        assert token.text == "3@1 "

    async def test_fifty_readers_see_the_same(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await submit(http, model="paced", max_tokens=30)

        async def read(after: int) -> list[Event]:
            async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
                return await stream.rest()

        views = await asyncio.gather(*(read(number) for number in range(50)))
        for view in views:
            check_log(view, job=job)
        check_views(views)

    async def test_a_long_log_is_replayed_whole(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await finished(http, 20_000)
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            assert len(check_log(await stream.rest(), job=job)) == 20_000


class TestRetention:
    async def test_an_expired_result_says_so(self, make_server: Callable[..., Server]) -> None:
        """Whichever way it is asked for."""
        server = make_server(rate=0, settings={"result_ttl": 0.5})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            reply = await http.post("/v1/responses", json={"model": "synthetic", "input": "x", "max_output_tokens": 1})
            response = reply.json()["id"]
            job = "job_" + response.removeprefix("resp_")
            reply = await poll(lambda: http.get(f"/v1/jobs/{job}"), lambda reply: reply.status_code != 200)
            check_error(reply, 404, "expired_result")
            check_error(await http.get(f"/v1/jobs/{job}/events"), 404, "expired_result")
            check_error(await http.get(f"/v1/jobs/{job}/events", headers={"last-event-id": "2"}), 404, "expired_result")
            check_error(await http.post(f"/v1/jobs/{job}/cancel"), 404, "expired_result")
            for path in (f"/result/{job}", f"/status/{job}", f"/v1/responses/{response}"):
                check_error(await http.get(path), 404, "expired_result")
            for query in ("?stream=true", "?stream=true&starting_after=2", "/input_items"):
                check_error(await http.get(f"/v1/responses/{response}{query}"), 404, "expired_result")
            assert (await http.get("/v1/jobs")).json()["data"] == []
