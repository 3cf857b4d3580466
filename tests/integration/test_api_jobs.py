"""SPEC 3: submit, look, list, cancel, generate; idempotency; deadlines and priorities."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.api import check_error, ended, running, submit, text_of, until
from tests.support.http import send
from tests.support.server import PATIENCE, Server
from tests.support.sse import open_stream


def unique(name: str = "u") -> str:
    return f"{name}-{uuid.uuid4().hex[:12]}"


class TestSubmit:
    async def test_a_submit_answers_202_with_links_that_work(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/jobs", json={"prompt": "hello there", "max_tokens": 3})
        assert reply.status_code == 202
        body = reply.json()
        assert set(body) == {"id", "status", "position_in_queue", "links"}
        assert body["status"] == "queued"
        assert body["position_in_queue"] >= 1
        assert set(body["links"]) == {"self", "events", "cancel"}
        assert reply.headers["location"] == body["links"]["self"]
        view = await ended(http, body["id"])
        assert view["result"] == {"text": text_of(3)}
        assert (await http.get(body["links"]["self"])).json()["id"] == body["id"]
        assert (await http.get(body["links"]["events"])).status_code == 200
        assert (await http.post(body["links"]["cancel"])).json()["status"] == "completed"

    async def test_a_submit_never_waits(self, http: httpx.AsyncClient) -> None:
        """Every slot of the model is taken, and the answer comes all the same, with the place in the queue."""
        jobs = [await submit(http, model="crawl", max_tokens=100_000, user_id=unique()) for _ in range(2)]
        for job in jobs:
            await running(http, job)
        try:
            for place in (1, 2, 3):
                reply = await http.post("/v1/jobs", json={"model": "crawl", "prompt": "x", "max_tokens": 1})
                jobs.append(reply.json()["id"])
                assert reply.json()["position_in_queue"] == place
            view = (await http.get(f"/v1/jobs/{jobs[3]}")).json()
            assert view["status"] == "queued"
            assert view["position_in_queue"] == 2
            assert view["started_at"] is None
        finally:
            for job in jobs:
                await http.post(f"/v1/jobs/{job}/cancel")

    async def test_an_ended_job_tells_everything(self, http: httpx.AsyncClient) -> None:
        job = await submit(http, model="paced", prompt="one two three", max_tokens=4, metadata={"k": "v"})
        view = await ended(http, job)
        assert view["status"] == "completed"
        assert view["finish_reason"] == "length"
        assert view["attempt"] == 1
        assert view["metadata"] == {"k": "v"}
        assert view["position_in_queue"] is None
        assert view["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        timings = view["timings"]
        assert set(timings) == {
            "queue_wait_time", "processing_time", "total_time", "time_to_first_token", "prompt_tokens",
            "completion_tokens", "tokens_per_second",
        }  # fmt: skip
        assert timings["prompt_tokens"] == 3
        assert timings["completion_tokens"] == 4
        assert 0 <= timings["queue_wait_time"] <= timings["total_time"]
        assert 0 < timings["time_to_first_token"] <= timings["total_time"]
        assert timings["total_time"] == pytest.approx(timings["queue_wait_time"] + timings["processing_time"])
        assert timings["tokens_per_second"] == pytest.approx(4 / timings["processing_time"])
        assert view["created_at"] <= view["started_at"] <= view["ended_at"]

    async def test_messages_and_token_ids_are_prompts_too(self, http: httpx.AsyncClient) -> None:
        chat = await submit(http, prompt=None, messages=[{"role": "user", "content": "a b c d"}])
        assert (await ended(http, chat))["usage"]["prompt_tokens"] >= 4
        ids = await submit(http, prompt=[5, 6, 7])
        assert (await ended(http, ids))["usage"]["prompt_tokens"] == 3

    async def test_several_choices(self, http: httpx.AsyncClient) -> None:
        view = await ended(http, await submit(http, n=3, max_tokens=2))
        assert view["result"]["texts"] == [text_of(2)] * 3
        assert view["result"]["text"] == text_of(2)
        assert view["finish_reasons"] == ["length"] * 3
        assert view["usage"]["completion_tokens"] == 6

    async def test_an_unknown_job_is_404_everywhere(self, http: httpx.AsyncClient) -> None:
        for job in ("job_" + "0" * 32, "x", "job_%00", "..%2f..%2fetc%2fpasswd", "job_'%20OR%201=1--", "é" * 20):
            check_error(await http.get(f"/v1/jobs/{job}"), 404, "not_found")
            check_error(await http.get(f"/v1/jobs/{job}/events"), 404, "not_found")
            check_error(await http.post(f"/v1/jobs/{job}/cancel"), 404, "not_found")


class TestCancel:
    async def test_a_running_job_is_cancelled_and_stays_so(self, http: httpx.AsyncClient) -> None:
        job = await submit(http, model="paced", max_tokens=100_000)
        await running(http, job, 3)
        reply = await http.post(f"/v1/jobs/{job}/cancel")
        assert reply.status_code == 200
        first = reply.json()
        assert first["status"] == "cancelled"
        assert first["error"]["code"] == "cancelled"
        assert first["result"]["text"].startswith("1@1 2@1 3@1 ")
        second = (await http.post(f"/v1/jobs/{job}/cancel")).json()
        assert second == first
        assert (await http.get(f"/v1/jobs/{job}")).json() == first

    @pytest.mark.parametrize("model", ["synthetic", "paced"])
    async def test_a_deleted_job_is_gone(self, http: httpx.AsyncClient, model: str) -> None:
        job = await submit(http, model=model, max_tokens=5 if model == "synthetic" else 100_000)
        if model == "synthetic":
            await ended(http, job)
        else:
            await running(http, job, 3)
        reply = await http.delete(f"/v1/jobs/{job}")
        assert (reply.status_code, reply.json()) == (200, {"id": job, "deleted": True})
        for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
            again = await http.request(method, f"/v1/jobs/{job}{path}")
            assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
        assert job not in {each["id"] for each in (await http.get("/v1/jobs?limit=500")).json()["data"]}

    async def test_a_queued_job_is_cancelled(self, http: httpx.AsyncClient) -> None:
        blockers = [await submit(http, model="crawl", max_tokens=100_000) for _ in range(2)]
        job = await submit(http, model="crawl")
        view = (await http.post(f"/v1/jobs/{job}/cancel")).json()
        assert view["status"] == "cancelled"
        assert view["result"] == {"text": ""}
        assert view["usage"]["completion_tokens"] == 0
        for blocker in blockers:
            await http.post(f"/v1/jobs/{blocker}/cancel")

    async def test_a_cancelled_job_frees_its_slot(self, http: httpx.AsyncClient) -> None:
        blockers = [await submit(http, model="crawl", max_tokens=100_000) for _ in range(2)]
        waiting = await submit(http, model="crawl", max_tokens=1)
        for blocker in blockers:
            await running(http, blocker)
            await http.post(f"/v1/jobs/{blocker}/cancel")
        assert (await ended(http, waiting))["status"] == "completed"

    async def test_concurrent_cancels_agree(self, http: httpx.AsyncClient) -> None:
        job = await submit(http, model="paced", max_tokens=100_000)
        await running(http, job)
        replies = await asyncio.gather(*(http.post(f"/v1/jobs/{job}/cancel") for _ in range(20)))
        assert {reply.status_code for reply in replies} == {200}
        assert len({reply.text for reply in replies}) == 1


class TestList:
    async def test_newest_first_in_pages_without_gap_or_repeat(self, http: httpx.AsyncClient) -> None:
        user = unique()
        jobs = [await submit(http, user_id=user, max_tokens=1) for _ in range(25)]
        seen: list[str] = []
        cursor: str | None = None
        while True:
            params = {"user_id": user, "limit": "7"} | ({"cursor": cursor} if cursor else {})
            page = (await http.get("/v1/jobs", params=params)).json()
            seen += [job["id"] for job in page["data"]]
            if len(seen) == 7:  # arrivals must not shift the pages
                await submit(http, user_id=user, max_tokens=1)
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == jobs[::-1]

    async def test_filters(self, http: httpx.AsyncClient) -> None:
        user = unique()
        done = await submit(http, user_id=user, max_tokens=1)
        await ended(http, done)
        alive = await submit(http, user_id=user, model="paced", max_tokens=100_000)
        cancelled = await submit(http, user_id=user, model="paced", max_tokens=100_000)
        await http.post(f"/v1/jobs/{cancelled}/cancel")
        await running(http, alive)

        async def ids(**params: str) -> list[str]:
            reply = await http.get("/v1/jobs", params={"user_id": user, **params})
            assert reply.status_code == 200, reply.text
            return [job["id"] for job in reply.json()["data"]]

        assert await ids() == [cancelled, alive, done]
        assert await ids(status="completed") == [done]
        assert await ids(status="running,cancelled") == [cancelled, alive]
        assert await ids(model="paced") == [cancelled, alive]
        assert await ids(model="nobody") == []
        await http.post(f"/v1/jobs/{alive}/cancel")
        assert (await http.get("/v1/jobs", params={"user_id": unique()})).json() == {"data": [], "next_cursor": None}

    @pytest.mark.parametrize(
        "params",
        [
            {"status": "asleep"},
            {"limit": "0"},
            {"limit": "501"},
            {"limit": "ten"},
            {"cursor": "!!!"},
            {"cursor": "AAAA"},
            {"cursor": base64.urlsafe_b64encode(b"seq:1;drop").decode()},
            {"cursor": "é"},
            {"colour": "blue"},
        ],
        ids=lambda params: "-".join(f"{k}={v[:12]}" for k, v in params.items()),
    )
    async def test_nonsense_is_refused(self, http: httpx.AsyncClient, params: dict[str, str]) -> None:
        check_error(await http.get("/v1/jobs", params=params), 400, "invalid_request")

    async def test_a_cursor_beyond_any_job_is_harmless(self, http: httpx.AsyncClient) -> None:
        cursor = base64.urlsafe_b64encode(b"seq:" + b"9" * 40).decode().rstrip("=")
        reply = await http.get("/v1/jobs", params={"cursor": cursor, "limit": "1"})
        assert reply.status_code in (200, 400), reply.text


class TestIdempotency:
    async def test_same_key_and_body_is_the_same_job_in_every_state(self, http: httpx.AsyncClient) -> None:
        body = {"prompt": "x", "max_tokens": 30, "model": "paced"}
        headers = {"idempotency-key": unique("key")}
        first = await http.post("/v1/jobs", json=body, headers=headers)
        again = await http.post("/v1/jobs", json=body, headers=headers)
        assert (first.status_code, again.status_code) == (202, 202)
        job = first.json()["id"]
        assert again.json()["id"] == job
        await running(http, job)
        assert (await http.post("/v1/jobs", json=body, headers=headers)).json()["id"] == job
        await ended(http, job)
        last = (await http.post("/v1/jobs", json=body, headers=headers)).json()
        assert last["id"] == job
        assert last["status"] == "completed"

    async def test_the_order_of_the_fields_does_not_matter(self, http: httpx.AsyncClient) -> None:
        key = {"idempotency-key": unique("key"), "content-type": "application/json"}
        one = await http.post(
            "/v1/jobs", content=b'{"prompt":"x","max_tokens":1,"metadata":{"a":"1","b":"2"}}', headers=key
        )
        two = await http.post(
            "/v1/jobs", content=b'{ "metadata" : {"b":"2","a":"1"}, "max_tokens":1, "prompt":"x" }', headers=key
        )
        assert one.json()["id"] == two.json()["id"]

    async def test_request_id_in_the_body_is_a_key_too(self, http: httpx.AsyncClient) -> None:
        body = {"prompt": "x", "max_tokens": 1, "request_id": unique("key")}
        first, again = await http.post("/v1/jobs", json=body), await http.post("/v1/jobs", json=body)
        assert first.json()["id"] == again.json()["id"]

    @pytest.mark.parametrize("change", [{"max_tokens": 6}, {"prompt": "y"}, {"user_id": "other"}, {"n": 2}])
    async def test_another_body_is_422(self, http: httpx.AsyncClient, change: dict[str, Any]) -> None:
        headers = {"idempotency-key": unique("key")}
        body = {"prompt": "x", "max_tokens": 5}
        first = await http.post("/v1/jobs", json=body, headers=headers)
        check_error(await http.post("/v1/jobs", json=body | change, headers=headers), 422, "idempotency_mismatch")
        assert (await ended(http, first.json()["id"]))["usage"]["completion_tokens"] == 5

    async def test_another_route_is_another_request(self, http: httpx.AsyncClient) -> None:
        headers = {"idempotency-key": unique("key")}
        await http.post("/v1/jobs", json={"prompt": "x"}, headers=headers)
        check_error(await http.post("/v1/generate", json={"prompt": "x"}, headers=headers), 422, "idempotency_mismatch")

    async def test_fifty_at_once_are_one_job(self, http: httpx.AsyncClient) -> None:
        headers = {"idempotency-key": unique("key")}
        body = {"prompt": "x", "max_tokens": 2, "user_id": unique()}
        replies = await asyncio.gather(*(http.post("/v1/jobs", json=body, headers=headers) for _ in range(50)))
        assert {reply.status_code for reply in replies} == {202}
        assert len({reply.json()["id"] for reply in replies}) == 1
        listed = (await http.get("/v1/jobs", params={"user_id": body["user_id"]})).json()["data"]
        assert len(listed) == 1

    async def test_two_bodies_at_once_under_one_key_have_one_winner(self, http: httpx.AsyncClient) -> None:
        headers = {"idempotency-key": unique("key")}
        bodies = [{"prompt": "x", "max_tokens": 1 + number % 2} for number in range(20)]
        replies = await asyncio.gather(*(http.post("/v1/jobs", json=body, headers=headers) for body in bodies))
        assert sorted({reply.status_code for reply in replies}) == [202, 422]
        assert len({reply.json()["id"] for reply in replies if reply.status_code == 202}) == 1

    @pytest.mark.parametrize("route", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
    async def test_a_duplicate_stream_attaches_to_the_running_log(
        self, server: Server, http: httpx.AsyncClient, route: str
    ) -> None:
        body = {**_endless(route), "max_tokens": 25}
        headers = {"idempotency-key": unique("key")}
        async with await open_stream(server.url + route, "POST", json_body=body, headers=headers) as first:
            early = await first.take(2)
            async with await open_stream(server.url + route, "POST", json_body=body, headers=headers) as second:
                assert first.headers["x-penstock-job"] == second.headers["x-penstock-job"]
                one = [event.data for event in early + await first.rest()]
                two = [event.data for event in await second.rest()]
        texts = [_text(one), _text(two)]
        assert texts == [text_of(25)] * 2

    async def test_a_duplicate_of_a_waited_for_reply_gets_the_same_reply(self, http: httpx.AsyncClient) -> None:
        headers = {"idempotency-key": unique("key")}
        body = {"model": "paced", "prompt": "x", "max_tokens": 5}
        replies = await asyncio.gather(*(http.post("/v1/generate", json=body, headers=headers) for _ in range(5)))
        assert len({reply.text for reply in replies}) == 1
        assert replies[0].json()["text"] == text_of(5)

    @pytest.mark.parametrize("key", ["k" * 257, "", "tab\there"])
    async def test_a_key_that_is_none_is_refused_or_ignored(self, http: httpx.AsyncClient, key: str) -> None:
        reply = await http.post("/v1/jobs", json={"prompt": "x", "max_tokens": 1}, headers={"idempotency-key": key})
        assert reply.status_code in (202, 400), reply.text
        if key == "k" * 257:
            check_error(reply, 400, "invalid_request", "request_id")


def _text(events: list[Any]) -> str:
    """The text of a stream in either dialect."""
    parts = []
    for data in events:
        if data == "[DONE]" or ("usage" in data and "choices" not in data):
            continue
        if "token" in data:
            parts.append(data["token"])
        else:
            choice = data["choices"][0]
            parts.append(choice["text"] if "text" in choice else choice["delta"].get("content", ""))
    return "".join(parts)


class TestGenerate:
    async def test_one_json_reply(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/generate", json={"prompt": "a b", "max_tokens": 3})
        assert reply.status_code == 200
        body = reply.json()
        assert body["text"] == text_of(3)
        assert body["finish_reason"] == "length"
        assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        assert body["model"] == "synthetic"
        assert reply.headers["x-penstock-job"] == body["job_id"]

    async def test_the_defaults(self, http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/generate", json={"prompt": "a"})).json()["usage"]["completion_tokens"] == 64

    async def test_a_stream(self, server: Server) -> None:
        body = {"prompt": "a b", "max_tokens": 3, "stream": True}
        async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body) as stream:
            events = await stream.rest()
        assert [event.event for event in events] == ["token"] * 3 + ["done"]
        assert [event.id for event in events] == ["1", "2", "3", "4"]
        assert events[-1].data["usage"]["completion_tokens"] == 3
        assert not stream.torn

    async def test_an_early_failure_is_an_http_error_in_both_forms(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=0, options={"fail": "BOOM"}, settings={"max_attempts": 0})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            for stream in (False, True):
                reply = await http.post("/v1/generate", json={"prompt": "BOOM", "stream": stream})
                check_error(reply, 500, "engine_error")
            reply = await http.post(
                "/v1/chat/completions", json={"model": "synthetic", "messages": [{"role": "user", "content": "BOOM"}]}
            )
            check_error(reply, 500, "engine_error")

    async def test_a_job_that_is_cancelled_meanwhile_is_a_499(self, http: httpx.AsyncClient) -> None:
        user = unique()
        body = {"model": "paced", "prompt": "x", "max_tokens": 100_000, "user_id": user}
        waiting = asyncio.create_task(http.post("/v1/generate", json=body))
        await http.post(f"/v1/jobs/{await _job_of(http, user)}/cancel")
        check_error(await waiting, 499, "cancelled")


class TestDeadline:
    async def test_a_running_job_expires(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await submit(http, model="paced", max_tokens=100_000, deadline=0.5)
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            events = await stream.rest()
        assert events[-1].event == "error"
        assert events[-1].data["status"] == "expired"
        assert events[-1].data["error"]["code"] == "expired"
        view = await ended(http, job)
        assert view["status"] == "expired"
        assert view["deadline_at"] == pytest.approx(view["created_at"] + 0.5, abs=0.2)

    async def test_a_queued_job_expires(self, http: httpx.AsyncClient) -> None:
        blockers = [await submit(http, model="crawl", max_tokens=100_000) for _ in range(2)]
        for blocker in blockers:
            await running(http, blocker)
        job = await submit(http, model="crawl", deadline=0.2)
        view = await ended(http, job)
        assert view["status"] == "expired"
        assert view["started_at"] is None
        for blocker in blockers:
            await http.post(f"/v1/jobs/{blocker}/cancel")

    async def test_a_waited_for_reply_is_a_504(self, http: httpx.AsyncClient) -> None:
        body = {"model": "paced", "prompt": "x", "max_tokens": 100_000, "deadline": 0.3}
        check_error(await http.post("/v1/generate", json=body), 504, "expired")

    async def test_a_deadline_that_is_not_reached_changes_nothing(self, http: httpx.AsyncClient) -> None:
        assert (await ended(http, await submit(http, deadline=3600)))["status"] == "completed"


class TestPriority:
    async def test_batch_jobs_leave_slots_for_others(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=20, options={"slots": 4})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            batch = [await submit(http, priority="batch", max_tokens=100_000) for _ in range(5)]
            for job in batch[:3]:
                await running(http, job)
            assert (await ended(http, await submit(http, max_tokens=1)))["status"] == "completed"
            states = [(await http.get(f"/v1/jobs/{job}")).json()["status"] for job in batch]
            assert states == ["running"] * 3 + ["queued"] * 2, "it waited for none of them to end"
            await http.post(f"/v1/jobs/{batch[0]}/cancel")
            await running(http, batch[3])
            assert (await http.get(f"/v1/jobs/{batch[4]}")).json()["status"] == "queued"

    async def test_classes_are_served_in_order(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=20, options={"slots": 1})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            blocker = await submit(http, max_tokens=100_000)
            await running(http, blocker)
            jobs = {
                name: [await submit(http, max_tokens=1, priority=name) for _ in range(2)]
                for name in ("batch", "normal", "interactive")
            }
            position = (await http.get(f"/v1/jobs/{jobs['interactive'][0]}")).json()["position_in_queue"]
            assert position == 1
            await http.post(f"/v1/jobs/{blocker}/cancel")
            started = {job: (await ended(http, job))["started_at"] for group in jobs.values() for job in group}
        order = sorted(started, key=lambda job: started[job])
        assert order == jobs["interactive"] + jobs["normal"] + jobs["batch"]


class TestDisconnect:
    """Chat, completions and generate are cancelled when nobody listens; jobs go on (SPEC 6)."""

    @pytest.mark.parametrize("route", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
    async def test_a_stream_nobody_reads_is_cancelled_after_the_grace(
        self, server: Server, http: httpx.AsyncClient, route: str
    ) -> None:
        async with await open_stream(server.url + route, "POST", json_body=_endless(route)) as stream:
            await stream.take(3)
            job = stream.headers["x-penstock-job"]
        assert (await ended(http, job))["status"] == "cancelled"

    @pytest.mark.parametrize("route", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
    async def test_so_is_a_reply_nobody_waits_for(self, server: Server, http: httpx.AsyncClient, route: str) -> None:
        user = unique()
        request = asyncio.create_task(
            send(server.url + route, "POST", json_body={**_endless(route), "stream": False, "user_id": user})
        )
        job = await _job_of(http, user)
        await running(http, job)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        assert (await ended(http, job))["status"] == "cancelled"

    async def test_a_resume_within_the_grace_keeps_it_alive(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=50, settings={"disconnect_grace": 2})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            body = {"prompt": "x", "max_tokens": 180, "stream": True}
            async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body) as stream:
                events = await stream.take(3)
                job = stream.headers["x-penstock-job"]
            async with await open_stream(f"{server.url}/v1/jobs/{job}/events", after=events[-1].id) as stream:
                # Longer than the grace: only the second reader keeps it running.
                events += await stream.rest()
            assert [event.id for event in events] == [str(n) for n in range(1, 182)]
            assert (await ended(http, job))["status"] == "completed"

    async def test_one_of_two_readers_leaving_changes_nothing(self, server: Server, http: httpx.AsyncClient) -> None:
        body = {"model": "paced", "prompt": "x", "max_tokens": 60, "stream": True}
        async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body) as first:
            await first.take(1)
            job = first.headers["x-penstock-job"]
            async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as second:
                await second.take(2)
                await first.__aexit__(None, None, None)
                events = await second.rest()
        assert events[-1].event == "done"
        assert (await ended(http, job))["status"] == "completed"

    async def test_a_submitted_job_runs_on(self, server: Server, http: httpx.AsyncClient) -> None:
        job = await submit(http, model="paced", max_tokens=60)
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            await stream.take(2)
        assert (await ended(http, job))["status"] == "completed"

    async def test_metadata_overrides_the_route(self, server: Server, http: httpx.AsyncClient) -> None:
        body = {
            "model": "paced",
            "prompt": "x",
            "max_tokens": 60,
            "stream": True,
            "metadata": {"on_disconnect": "continue"},
        }
        async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body) as stream:
            await stream.take(2)
            job = stream.headers["x-penstock-job"]
        assert (await ended(http, job))["status"] == "completed"
        job = await submit(http, model="paced", max_tokens=100_000, metadata={"on_disconnect": "cancel"})
        async with await open_stream(f"{server.url}/v1/jobs/{job}/events") as stream:
            await stream.take(2)
        assert (await ended(http, job))["status"] == "cancelled"

    async def test_another_wish_is_refused(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/jobs", json={"prompt": "x", "metadata": {"on_disconnect": "explode"}})
        check_error(reply, 400, "invalid_request", "metadata.on_disconnect")

    async def test_a_complete_stream_cancels_nothing(self, server: Server, http: httpx.AsyncClient) -> None:
        body = {"prompt": "x", "max_tokens": 3, "stream": True}
        async with await open_stream(f"{server.url}/v1/generate", "POST", json_body=body) as stream:
            await stream.rest()
            job = stream.headers["x-penstock-job"]
        assert (await until(http, job, lambda view: view["ended_at"]))["status"] == "completed"


def _endless(route: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "paced", "max_tokens": 100_000, "stream": True}
    if route.endswith("chat/completions"):
        return body | {"messages": [{"role": "user", "content": "x"}]}
    return body | {"prompt": "x"}


async def _job_of(http: httpx.AsyncClient, user: str) -> str:
    async with asyncio.timeout(PATIENCE):
        while True:
            jobs = (await http.get("/v1/jobs", params={"user_id": user})).json()["data"]
            if jobs:
                return str(jobs[0]["id"])
            await asyncio.sleep(0.02)
