"""The client against a scripted server: what it resumes, what it retries, what it refuses to believe."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

import penstock
from penstock.api import Links, Submitted, UsageView
from penstock.client import AsyncClient, Client, End, ProtocolError, Token, Unreachable, resume
from penstock.client.resume import ResumePoint
from penstock.client.sse import SSEDecoder
from penstock.core.calls import call_id
from penstock.core.errors import (
    InvalidRequest,
    LogRewound,
    ModelNotFound,
    NotFound,
    NoWorker,
    Overloaded,
    PenstockError,
    Unsupported,
)
from penstock.core.job import Status, ToolCall

USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "BACKOFF", 0.001)
    monkeypatch.setattr(resume, "BACKOFF_MAX", 0.002)


# ---------------------------------------------------------------------------------------------- a scripted server


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Chunks, and then perhaps the end of the connection; ``closed`` when the client has let go of it."""

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self._chunks = chunks
        self._error = error
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


TORN = httpx.ReadError("Connection reset by peer")


def token(position: int, attempt: int = 1, **extra: Any) -> bytes:
    data = {"job_id": "job_1", "token": f"{position}@{attempt} ", "token_id": position, "attempt": attempt, **extra}
    return f"id: {position}\nevent: token\ndata: {json.dumps(data)}\n\n".encode()


def done(position: int, **fields: Any) -> bytes:
    data = {"job_id": "job_1", "status": "completed", "finish_reason": "length", "usage": USAGE, **fields}
    return f"id: {position}\nevent: done\ndata: {json.dumps(data)}\n\n".encode()


def failed(position: int | None, code: str, status: str = "failed") -> bytes:
    data = {"job_id": "job_1", "status": status, "error": problem(code)}
    head = f"id: {position}\n" if position is not None else ""
    return f"{head}event: error\ndata: {json.dumps(data)}\n\n".encode()


def problem(code: str, param: str | None = None) -> dict[str, Any]:
    return {"message": f"about {code}", "type": "server_error", "param": param, "code": code}


def sse(*chunks: bytes, error: Exception | None = None) -> httpx.Response:
    return httpx.Response(
        200, headers={"content-type": "text/event-stream; charset=utf-8"}, stream=Body(*chunks, error=error)
    )


def refused(status: int, code: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": problem(code)}, headers=headers)


LINKS = {"self": "/v1/jobs/job_1", "events": "/v1/jobs/job_1/events", "cancel": "/v1/jobs/job_1/cancel"}
ACCEPTED = {"id": "job_1", "status": "queued", "position_in_queue": 1, "links": LINKS}


def summary(job: str, **fields: Any) -> dict[str, Any]:
    """A job as the server shows it."""
    nothing = ("user_id", "position_in_queue", "started_at", "ended_at", "deadline_at", "request_id", "finish_reason")
    return {
        "id": job,
        "status": "completed",
        "model": "m",
        "priority": "normal",
        "attempt": 1,
        "created_at": 1_700_000_000.0,
        "metadata": {},
        "tokens": 3,
        "error": None,
        "links": LINKS,
        **dict.fromkeys(nothing),
        **fields,
    }


MODEL = {"id": "m", "object": "model", "created": 1_700_000_000, "owned_by": "penstock", "state": "ready"}
Step = httpx.Response | Exception


class Script:
    """Answers each request with the next step, and keeps the requests."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.steps.pop(0) if self.steps else httpx.ConnectError("Connection refused")
        if isinstance(step, Exception):
            raise step
        return step

    @property
    def resumed_after(self) -> list[str | None]:
        return [request.headers.get("last-event-id") for request in self.requests]


Call = Callable[..., Any]


@pytest.fixture(params=["blocking", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """``call(script, method, *args)`` on either client; what it yields comes as a list."""

    def blocking(script: Script, method: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        with Client(transport=httpx.MockTransport(script), **(client or {})) as made:
            result = getattr(made, method)(*args, **kwargs)
            return list(result) if hasattr(result, "__next__") else result

    def asynchronous(
        script: Script, method: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        async def main() -> Any:
            async with AsyncClient(transport=httpx.MockTransport(script), **(client or {})) as made:
                result = getattr(made, method)(*args, **kwargs)
                return [item async for item in result] if hasattr(result, "__anext__") else await result

        return asyncio.run(main())

    return blocking if request.param == "blocking" else asynchronous


def check(events: list[Token | End], count: int) -> None:
    *tokens, end = events
    assert [each.position for each in tokens] == list(range(1, count + 1))
    assert isinstance(end, End)
    assert end.position == count + 1


# ---------------------------------------------------------------------------------------------- streams


def test_a_stream_is_its_tokens_and_then_its_end(call: Call) -> None:
    script = Script(sse(b"retry: 1000\n", token(1), token(2, attempt=2, index=1), done(3)))
    assert call(script, "stream", "job_1") == [
        Token(1, "1@1 ", 1, 1),
        Token(2, "2@2 ", 2, 2, index=1),
        End(3, Status.COMPLETED, ("length",), UsageView(2, 3, 5)),
    ]
    assert script.requests[0].url.path == "/v1/jobs/job_1/events"
    assert script.resumed_after == [None]


def test_a_dropped_connection_is_resumed_behind_the_last_token(call: Call) -> None:
    script = Script(
        sse(token(1), token(2), token(3)[:-1], error=TORN),  # the third block lacks its blank line
        httpx.ConnectError("Connection refused"),
        httpx.ReadTimeout("timed out"),
        sse(token(3), error=httpx.RemoteProtocolError("peer closed connection")),
        sse(token(4, attempt=2), done(5)),
    )
    check(call(script, "stream", "job_1"), 4)
    assert script.resumed_after == [None, "2", "2", "2", "3"]


def test_a_server_that_says_goodbye_is_asked_again(call: Call) -> None:
    script = Script(sse(token(1), b"retry: 20\n"), refused(503, "broker_unavailable"), sse(done(2)))
    pauses: list[float] = []
    check(call(script, "stream", "job_1", client={"on_retry": lambda error, pause: pauses.append(pause)}), 1)
    assert pauses[0] >= 0.02


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (503, {"retry-after": "1", "retry-after-ms": "30"}),
        (429, {"retry-after-ms": "30"}),
        (502, {"retry-after": "0.03"}),
    ],
)
def test_a_refusal_that_passes_is_waited_for_as_long_as_asked(call: Call, status: int, headers: dict[str, str]) -> None:
    script = Script(httpx.Response(status, text="Bad Gateway", headers=headers), sse(token(1), done(2)))
    pauses: list[float] = []
    check(call(script, "stream", "job_1", client={"on_retry": lambda error, pause: pauses.append(pause)}), 1)
    assert len(pauses) == 1
    assert 0.03 <= pauses[0] < 0.9


def test_a_replay_by_a_proxy_that_drops_last_event_id_is_not_delivered_twice(call: Call) -> None:
    script = Script(sse(token(1), token(2), error=TORN), sse(token(1), token(2), token(3), done(4)))
    check(call(script, "stream", "job_1"), 3)


def test_a_stream_can_begin_behind_a_position(call: Call) -> None:
    script = Script(sse(token(3), done(4)))
    events = call(script, "stream", Submitted("job_1", Status.QUEUED, 1, Links("", "", "")), after=2)
    assert [event.position for event in events] == [3, 4]
    assert script.resumed_after == ["2"]


def test_a_stream_that_had_ended_before_is_empty(call: Call) -> None:
    assert call(Script(httpx.Response(204)), "stream", "job_1", after=9) == []


def test_the_end_of_a_failed_job_says_why(call: Call) -> None:
    [end] = call(Script(sse(failed(1, "poisoned"))), "stream", "job_1")
    assert (end.status, end.error.code) == (Status.FAILED, "poisoned")
    with pytest.raises(PenstockError, match="about poisoned"):
        end.raise_for_status()


THINKING = (
    token(1, token="Hm", phase="reasoning"),
    token(2, token=" é.Hi", phase=[["reasoning", 3], ["text", 2]]),
    token(3, token="!"),
    token(4, token='{"name": "look", "arguments": {"at": 1}}\n', phase="tool"),
)


def test_thoughts_and_calls_are_apart_from_the_text(call: Call) -> None:
    *tokens, _ = call(Script(sse(*THINKING, done(5))), "stream", "job_1")
    assert [token.phase for token in tokens] == ["reasoning", "reasoning", "text", "tool"]
    assert [(token.text, token.reasoning) for token in tokens] == [("", "Hm"), ("Hi", " é."), ("!", ""), ("", "")]
    assert tokens[-1].calls == '{"name": "look", "arguments": {"at": 1}}\n'
    result = call(Script(sse(*THINKING[:2], error=TORN), sse(*THINKING[2:], done(5))), "result", "job_1")
    assert (result.text, result.reasoning) == ("Hi!", "Hm é.")
    assert result.tool_calls == [ToolCall(call_id("job_1", 0, 0), "look", '{"at": 1}')]


def test_unknown_events_are_ignored(call: Call) -> None:
    check(call(Script(sse(b"event: progress\ndata: {}\n\n", token(1), done(2))), "stream", "job_1"), 1)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([token(1), token(3)], "jumps to position 3 after 1"),
        ([token(1), token(1)], "jumps to position 1 after 1"),
        ([token(2)], "jumps to position 2 after 0"),
        ([token(1, token="abc", phase=[["reasoning", 1], ["text", 1]])], "are not those of the token 'abc'"),
        ([token(1, phase="daydream")], "cannot be read: Invalid enum value 'daydream'"),
        ([token(1), done(3)], "jumps to position 3 after 1"),
        ([token(1, attempt=2), token(2, attempt=1)], "Attempt 1 wrote at 2, after attempt 2"),
        ([token(1).replace(b"id: 1", b"id: x")], "'x', which is not a position"),
        ([token(1).replace(b"token_id", b"nonsense")], "cannot be read"),
        ([token(1), done(2), token(3)], "goes on after its end"),
    ],
)
def test_a_log_that_is_not_one_is_refused(call: Call, blocks: list[bytes], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        call(Script(sse(*blocks)), "stream", "job_1")


def test_a_log_that_ends_before_what_was_delivered_is_refused(call: Call) -> None:
    script = Script(sse(token(1), token(2), error=TORN), sse(token(1), done(2)))
    with pytest.raises(ProtocolError, match="ends at 2, but 2 was delivered"):
        call(script, "stream", "job_1")


def test_a_rewound_log_surfaces(call: Call) -> None:
    script = Script(sse(token(1), token(2), error=TORN), sse(failed(None, "log_rewound", "running")))
    with pytest.raises(LogRewound):
        call(script, "stream", "job_1")


@pytest.mark.parametrize(("status", "code"), [(404, "not_found"), (500, "internal_error")])
def test_what_no_retry_can_cure_is_raised_at_once(call: Call, status: int, code: str) -> None:
    script = Script(refused(status, code), sse(done(1)))
    with pytest.raises(PenstockError) as caught:
        call(script, "stream", "job_1")
    assert (caught.value.code, isinstance(caught.value, NotFound)) == (code, status == 404)
    assert len(script.requests) == 1


def test_a_page_of_html_is_no_stream(call: Call) -> None:
    script = Script(httpx.Response(200, html="<h1>Welcome</h1>"))
    with pytest.raises(ProtocolError, match="text/html"):
        call(script, "stream", "job_1")


def test_a_server_that_stays_away_is_given_up(call: Call) -> None:
    told: list[PenstockError] = []
    script = Script(sse(token(1), error=TORN))
    with pytest.raises(Unreachable, match=r"Cannot reach http://127.0.0.1:8000: Connection refused"):
        call(script, "stream", "job_1", client={"give_up": 0.1, "on_retry": lambda error, pause: told.append(error)})
    assert len(told) == len(script.requests) - 1
    assert all(isinstance(error, Unreachable) for error in told)


def test_the_last_refusal_is_what_is_raised_in_the_end(call: Call) -> None:
    script = Script(*[refused(503, "no_worker", **{"retry-after-ms": "40"}) for _ in range(9)])
    with pytest.raises(NoWorker) as caught:
        call(script, "stream", "job_1", client={"give_up": 0.1})
    assert caught.value.retry_after == 0.04
    assert 2 <= len(script.requests) <= 4


def test_heartbeats_are_progress(call: Call) -> None:
    class Slow(Script):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            time.sleep(0.03)
            return super().__call__(request)

    waiting = [sse(b": ping\n", error=TORN) for _ in range(6)]
    check(call(Slow(*waiting, sse(token(1), done(2))), "stream", "job_1", client={"give_up": 0.1}), 1)
    silent = [sse(error=TORN) for _ in range(6)]
    with pytest.raises(Unreachable):
        call(Slow(*silent, sse(token(1), done(2))), "stream", "job_1", client={"give_up": 0.1})


def test_the_clock_of_giving_up_does_not_run_while_the_caller_thinks() -> None:
    script = Script(sse(token(1), error=TORN), httpx.ConnectError("refused"), sse(token(2), done(3)))
    with Client(transport=httpx.MockTransport(script), give_up=0.1) as client:
        stream = client.stream("job_1")
        first = next(stream)
        time.sleep(0.15)
        check([first, *stream], 2)


def test_a_stream_left_early_lets_go_of_its_connection() -> None:
    body = Body(token(1), token(2), done(3))
    answer = httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=body)
    with Client(transport=httpx.MockTransport(Script(answer))) as client:
        stream = client.stream("job_1")
        next(stream)
        assert not body.closed
        stream.close()
        assert body.closed


# ---------------------------------------------------------------------------------------------- the parts of resuming


def test_a_resume_point_takes_a_connection_that_overlaps_and_continues() -> None:
    point = ResumePoint(5)
    point.reconnected()

    def take(position: int) -> Token | End | None:
        (event,) = SSEDecoder().feed(token(position))
        return point.take(event)

    assert [take(position) is None for position in (4, 5, 6)] == [True, True, False]
    point.reconnected()
    with pytest.raises(ProtocolError):
        take(8)


# ---------------------------------------------------------------------------------------------- calls


def test_a_submit_whose_answer_was_lost_makes_no_second_job(call: Call) -> None:
    script = Script(TORN, httpx.ReadTimeout("timed out"), httpx.Response(202, json=ACCEPTED))
    job = call(script, "submit", "Hi", max_tokens=3, temperature=None)
    assert job == Submitted("job_1", Status.QUEUED, 1, Links(*LINKS.values()))
    assert [json.loads(request.content) for request in script.requests] == [{"prompt": "Hi", "max_tokens": 3}] * 3
    assert len({request.headers["idempotency-key"] for request in script.requests}) == 1


def test_every_submit_has_a_key_of_its_own_unless_the_caller_has_one(call: Call) -> None:
    script = Script(*[httpx.Response(202, json=ACCEPTED) for _ in range(3)])
    for key in (None, None, "mine"):
        call(script, "submit", messages=[{"role": "user", "content": "Hi"}], idempotency_key=key)
    keys = [request.headers["idempotency-key"] for request in script.requests]
    assert keys[2] == "mine"
    assert len(set(keys)) == 3
    assert json.loads(script.requests[2].content) == {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(400, "unsupported", Unsupported), (404, "model_not_found", ModelNotFound), (429, "overloaded", Overloaded)],
)
def test_failures_are_the_exceptions_of_the_core(call: Call, status: int, code: str, kind: type[PenstockError]) -> None:
    script = Script(httpx.Response(status, json={"error": problem(code, "seed")}, headers={"retry-after": "90"}))
    with pytest.raises(kind) as caught:
        call(script, "submit", "Hi")
    assert (caught.value.param, caught.value.status, caught.value.retry_after) == ("seed", status, 90)
    assert len(script.requests) == 1  # what is asked to come back after 90 s is not waited for with a budget of 60 s


def test_retry_after_may_be_a_date(call: Call) -> None:
    script = Script(
        refused(503, "no_worker", **{"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        httpx.Response(200, json={"status": "ok"}),
    )
    assert call(script, "health") == {"status": "ok"}


def test_something_else_on_the_port_is_named_as_such(call: Call) -> None:
    with pytest.raises(ProtocolError, match="does not answer like a Penstock server"):
        call(Script(httpx.Response(200, html="<h1>Welcome</h1>")), "models")
    with pytest.raises(PenstockError, match="answered 403 Forbidden"):
        call(Script(httpx.Response(403, html="<h1>Go away</h1>")), "models")


def test_jobs_are_fetched_page_by_page(call: Call) -> None:
    def page(ids: range, cursor: str | None) -> httpx.Response:
        views = [summary(f"job_{i}") for i in ids]
        return httpx.Response(200, json={"data": views, "next_cursor": cursor})

    script = Script(page(range(2), "c1"), page(range(2, 4), None))
    views = call(script, "jobs", status=["completed", "failed"], user_id="ada")
    assert [view.id for view in views] == ["job_0", "job_1", "job_2", "job_3"]
    first, second = (dict(request.url.params) for request in script.requests)
    assert first == {"status": "completed,failed", "user_id": "ada", "limit": "500"}
    assert second == {**first, "cursor": "c1"}
    script = Script(page(range(2), "c1"), page(range(2, 4), "c2"))
    assert len(call(script, "jobs", limit=3)) == 3
    assert [request.url.params["limit"] for request in script.requests] == ["3", "1"]


def test_a_job_and_its_cancellation(call: Call) -> None:
    fields = {"error": problem("cancelled"), "result": {"text": "half"}, "a_field_of_a_later_version": 1}
    view = summary("job_1", status="cancelled", **fields)
    script = Script(httpx.Response(200, json=view), httpx.Response(200, json=view))
    for method in ("job", "cancel"):
        job = call(script, method, "job_1")
        assert (job.status, job.error.code, job.result.text) == (Status.CANCELLED, "cancelled", "half")
    assert [(request.method, request.url.path) for request in script.requests] == [
        ("GET", "/v1/jobs/job_1"),
        ("POST", "/v1/jobs/job_1/cancel"),
    ]


def test_an_id_cannot_reach_another_route(call: Call) -> None:
    script = Script(refused(404, "not_found"))
    with pytest.raises(NotFound):
        call(script, "job", "../models?x=1")
    assert script.requests[0].url.raw_path == b"/v1/jobs/..%2Fmodels%3Fx%3D1"


# ---------------------------------------------------------------------------------------------- in one call


def test_generate_folds_the_log_across_a_drop(call: Call) -> None:
    script = Script(
        httpx.Response(202, json=ACCEPTED),
        sse(token(1), token(2, index=1), error=TORN),
        sse(token(3), done(4, finish_reasons=["stop", "length"])),
    )
    result = call(script, "generate", "Hi", n=2)
    assert result.texts == ("1@1 3@1 ", "2@1 ")
    assert (result.text, result.finish_reason, result.finish_reasons) == ("1@1 3@1 ", "stop", ("stop", "length"))
    assert (result.job_id, result.usage.total_tokens) == ("job_1", 5)


def test_chat_takes_a_text_or_messages(call: Call) -> None:
    for messages in ("Hi", [{"role": "user", "content": "Hi"}]):
        script = Script(httpx.Response(202, json=ACCEPTED), sse(token(1), done(2)))
        assert call(script, "chat", messages).text == "1@1 "
        assert json.loads(script.requests[0].content) == {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_the_error_of_a_job_is_raised(call: Call, method: str) -> None:
    script = Script(httpx.Response(202, json=ACCEPTED), sse(token(1), failed(2, "poisoned")))
    with pytest.raises(PenstockError) as caught:
        call(script, method, "Hi")
    assert caught.value.code == "poisoned"
    assert len(script.requests) == 2


def test_generate_stream_yields_tokens_only(call: Call) -> None:
    script = Script(httpx.Response(202, json=ACCEPTED), sse(token(1), token(2), done(3)))
    assert [each.text for each in call(script, "generate_stream", "Hi")] == ["1@1 ", "2@1 "]


def test_a_job_that_nobody_else_knows_is_cancelled_when_its_stream_is_left() -> None:
    script = Script(httpx.Response(202, json=ACCEPTED), sse(token(1), token(2), done(3)), httpx.Response(200, json={}))
    with Client(transport=httpx.MockTransport(script)) as client:
        for _ in client.generate_stream("Hi"):
            break
        assert script.requests[-1].url.path == "/v1/jobs/job_1/cancel"


async def test_a_job_that_nobody_else_knows_is_cancelled_with_its_task() -> None:
    streaming = asyncio.Event()

    class Hanging(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield token(1)
            streaming.set()
            await asyncio.Event().wait()

    stream = httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Hanging())
    script = Script(httpx.Response(202, json=ACCEPTED), stream, httpx.ConnectError("Connection refused"))
    async with AsyncClient(transport=httpx.MockTransport(script)) as client:
        task = asyncio.create_task(client.generate("Hi"))
        await streaming.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert script.requests[-1].url.path == "/v1/jobs/job_1/cancel"


def test_a_job_whose_server_is_gone_is_named_in_the_error(call: Call) -> None:
    script = Script(httpx.Response(202, json=ACCEPTED))
    with pytest.raises(Unreachable) as caught:
        call(script, "generate", "Hi", client={"give_up": 0.01})
    assert "job_1" in caught.value.__notes__[0]


# ---------------------------------------------------------------------------------------------- the package


@pytest.mark.parametrize("url", ["localhost:8000/llm", "http://localhost:8000/llm/"])
def test_a_url_may_lack_its_scheme_and_have_a_path(url: str) -> None:
    script = Script(httpx.Response(200, json={"object": "list", "data": [MODEL]}))
    with Client(url, transport=httpx.MockTransport(script), headers={"authorization": "Bearer x"}) as client:
        assert [model.id for model in client.models()] == ["m"]
    assert str(script.requests[0].url) == "http://localhost:8000/llm/v1/models"
    assert script.requests[0].headers["authorization"] == "Bearer x"


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port"])
def test_what_is_no_url_is_said_at_once(url: str) -> None:
    with pytest.raises(InvalidRequest):
        Client(url)


def test_the_package_gives_the_clients_and_stays_light() -> None:
    assert (penstock.Client, penstock.AsyncClient) == (Client, AsyncClient)
    with pytest.raises(AttributeError):
        _ = penstock.Klient  # type: ignore[attr-defined]
    code = "import sys, penstock.core.ports; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
