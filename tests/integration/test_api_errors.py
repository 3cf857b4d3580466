"""SPEC 7 and 8: what is refused, with which code, in the one error shape; bounds are checked before any work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.api import check_error, ended, running, submit
from tests.support.http import send
from tests.support.server import PATIENCE, Server

NATIVE = ["/v1/jobs", "/v1/generate"]
OPENAI = ["/v1/chat/completions", "/v1/completions"]
MIB = 1 << 20


def body_for(route: str, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "synthetic", "max_tokens": 2}
    if route == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": "hello"}]
    else:
        body["prompt"] = "hello"
    return body | fields


class TestBodies:
    @pytest.mark.parametrize("route", [*NATIVE, *OPENAI])
    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"   ",
            b"{",
            b"[]",
            b'"text"',
            b"null",
            b"\xff\xfe{}",
            b'{"prompt": "\xff\xfe", "model": "synthetic", "messages": [{"role": "user", "content": "\xc3("}]}',
            b'{"prompt": "x", "temperature": NaN, "model": "s", "messages": [{"role": "user", "content": "x"}]}',
            b'{"prompt": "x", "temperature": Infinity, "model": "s", "messages": [{"role": "u", "content": "x"}]}',
            b'{"prompt": "x", "temperature": 1e999, "model": "s", "messages": [{"role": "u", "content": "x"}]}',
            b'{"prompt": "x", "seed": ' + b"9" * 5000 + b', "model": "s", "messages": [{"role": "u", "content": "x"}]}',
            b'{"prompt": "x"} trailing',
            b"model=synthetic&prompt=x",
            b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"zzz": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        ],
        ids=[
            "empty", "blank", "open", "list", "string", "null", "utf16", "utf8", "nan", "infinity", "overflow",
            "huge-int", "trailing", "form", "nested-lists", "nested-unknown",
        ],
    )  # fmt: skip
    async def test_what_is_no_valid_body_is_a_400(self, http: httpx.AsyncClient, route: str, raw: bytes) -> None:
        reply = await http.post(route, content=raw, headers={"content-type": "application/json"})
        check_error(reply, 400, "invalid_request")

    @pytest.mark.parametrize("route", [*NATIVE, *OPENAI])
    async def test_half_a_surrogate_pair_is_no_text(self, http: httpx.AsyncClient, route: str) -> None:
        raw = json.dumps(body_for(route)).replace("hello", "\\ud800").encode()
        reply = await http.post(route, content=raw)
        assert reply.status_code in (200, 202, 400), reply.text
        raw = json.dumps(body_for(route, user_id="hello")).replace("hello", "\\udfff").encode()
        assert (await http.post(route, content=raw)).status_code in (200, 202, 400)

    async def test_any_content_type_is_json(self, http: httpx.AsyncClient) -> None:
        reply = await http.post(
            "/v1/jobs", content=b'{"prompt":"x","max_tokens":1}', headers={"content-type": "text/plain"}
        )
        assert reply.status_code == 202

    @pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "GZIP", "identity, gzip"])
    @pytest.mark.parametrize("route", ["/v1/jobs", "/v1/chat/completions"])
    async def test_a_coded_body_is_415(self, http: httpx.AsyncClient, route: str, encoding: str) -> None:
        reply = await http.post(route, content=b"{}", headers={"content-encoding": encoding})
        check_error(reply, 415, "unsupported_encoding")

    @pytest.mark.parametrize("route", [*NATIVE, *OPENAI])
    async def test_a_mebibyte_and_one_byte_is_413(self, http: httpx.AsyncClient, route: str) -> None:
        empty = len(json.dumps(body_for(route, user_id="u")).encode())
        fits = json.dumps(body_for(route, user_id="u" + " " * 0)).encode() + b" " * (MIB - empty)
        assert len(fits) == MIB
        assert (await http.post(route, content=fits)).status_code in (200, 202)
        check_error(await http.post(route, content=fits + b" "), 413, "request_too_large")

    async def test_a_chunked_body_is_counted_as_it_comes(self, server: Server) -> None:
        """No length is announced, and the body never ends: the answer comes at the limit."""
        chunks = (b" " * 65536 for _ in range(64))
        async with await send(f"{server.url}/v1/jobs", "POST", chunks=chunks) as answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "request_too_large"

    async def test_a_chunked_body_that_fits_is_taken(self, server: Server) -> None:
        chunks = [b'{"prompt":', b'"x","max_', b'tokens":1}']
        async with await send(f"{server.url}/v1/jobs", "POST", chunks=chunks) as answer:
            assert answer.status == 202


class TestFields:
    @pytest.mark.parametrize("route", NATIVE)
    async def test_an_unknown_field_is_refused_on_native_routes(self, http: httpx.AsyncClient, route: str) -> None:
        error = check_error(await http.post(route, json=body_for(route, temprature=1)), 400, "invalid_request")
        assert "temprature" in error["message"]

    @pytest.mark.parametrize("route", OPENAI)
    async def test_and_ignored_on_openai_routes(self, http: httpx.AsyncClient, route: str) -> None:
        extra = {"store": False, "made_up": {"deep": [1, 2]}, "service_tier": "auto", "prompt_cache_key": "k"}
        assert (await http.post(route, json=body_for(route, **extra))).status_code == 200

    @pytest.mark.parametrize("route", [*NATIVE, *OPENAI])
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**63), ("max_tokens", 10**30), ("max_tokens", 1e300),
            ("max_tokens", "5"), ("max_tokens", 1.5), ("max_tokens", True),
            ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"),
            ("top_p", -0.1), ("top_p", 1.01), ("top_k", -2), ("top_k", 100_001), ("min_p", -0.1), ("min_p", 1.1),
            ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 1.5),
            ("stop", ["x"] * 17), ("stop", "x" * 257), ("stop", 5),
            ("presence_penalty", 2.5), ("frequency_penalty", -2.5), ("repetition_penalty", 0),
            ("logit_bias", {str(i): 1 for i in range(301)}), ("logit_bias", {"1": 101}), ("logit_bias", {"a": 1}),
            ("logit_bias", [1]), ("n", 0), ("n", 9), ("n", 10**9),
            ("user_id", "a\u0000b"), ("user_id", "a\nb"), ("user_id", "x" * 257), ("user_id", 7),
            ("priority", "urgent"), ("priority", 1), ("deadline", 0), ("deadline", -5), ("deadline", 10**9),
            ("request_id", "x" * 257), ("request_id", "a\r\nb"),
            ("metadata", {"k": 1}), ("metadata", {str(i): "v" for i in range(17)}), ("metadata", {"k" * 65: "v"}),
            ("metadata", {"k": "v" * 513}), ("metadata", "text"), ("ignore_eos", "yes"), ("model", 5),
        ],
        ids=lambda value: str(value)[:24],
    )  # fmt: skip
    async def test_out_of_bounds_is_a_400_that_names_the_field(
        self, http: httpx.AsyncClient, route: str, field: str, value: Any
    ) -> None:
        error = check_error(await http.post(route, json=body_for(route, **{field: value})), 400, "invalid_request")
        assert error["type"] == "invalid_request_error"
        assert error["param"] is not None
        assert error["param"].startswith(field), error

    @pytest.mark.parametrize("value", [-1, 21, "all"])
    async def test_logprobs_are_bounded(self, http: httpx.AsyncClient, value: Any) -> None:
        for route in ("/v1/jobs", "/v1/generate", "/v1/completions"):
            check_error(
                await http.post(route, json=body_for(route, logprobs=value)), 400, "invalid_request", "logprobs"
            )
        chat = body_for("/v1/chat/completions", logprobs=True, top_logprobs=value)
        check_error(await http.post("/v1/chat/completions", json=chat), 400, "invalid_request", "top_logprobs")

    @pytest.mark.parametrize("route", [*NATIVE, *OPENAI])
    @pytest.mark.parametrize(
        ("field", "value"), [("logit_bias", {"5": 1}), ("seed", 7), ("stop", ["x"]), ("stop", "x")]
    )
    async def test_a_field_the_engine_cannot_honour_is_unsupported(
        self, http: httpx.AsyncClient, route: str, field: str, value: Any
    ) -> None:
        check_error(await http.post(route, json=body_for(route, **{field: value})), 400, "unsupported", field)

    @pytest.mark.parametrize("route", [*NATIVE, "/v1/completions"])
    async def test_logprobs_too(self, http: httpx.AsyncClient, route: str) -> None:
        check_error(await http.post(route, json=body_for(route, logprobs=1)), 400, "unsupported", "logprobs")

    @pytest.mark.parametrize(
        "extra",
        [
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            {"functions": [{"name": "f"}]},
            {"response_format": {"type": "json_object"}},
            {"modalities": ["audio"]},
        ],
        ids=lambda extra: next(iter(extra)),
    )
    async def test_what_chat_cannot_do_yet_is_unsupported(self, http: httpx.AsyncClient, extra: dict[str, Any]) -> None:
        reply = await http.post("/v1/chat/completions", json=body_for("/v1/chat/completions", **extra))
        check_error(reply, 400, "unsupported")

    async def test_what_completions_cannot_do_is_unsupported(self, http: httpx.AsyncClient) -> None:
        for extra in ({"echo": True}, {"echo": True, "logprobs": 1}, {"suffix": "x"}, {"best_of": 3}):
            check_error(
                await http.post("/v1/completions", json=body_for("/v1/completions", **extra)), 400, "unsupported"
            )

    async def test_neutral_values_of_such_fields_are_fine(self, http: httpx.AsyncClient) -> None:
        for route in [*NATIVE, *OPENAI]:
            neutral = {"logit_bias": {}, "stop": [], "seed": None, "top_p": 1, "n": 1}
            assert (await http.post(route, json=body_for(route, **neutral))).status_code in (200, 202)

    @pytest.mark.parametrize("route", NATIVE)
    @pytest.mark.parametrize(
        "prompts",
        [
            {},
            {"prompt": None},
            {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
            {"messages": []},
            {"prompt": []},
            {"prompt": [-1]},
            {"prompt": [2**31]},
            {"prompt": ["x"]},
            {"messages": [{"content": "x"}]},
            {"messages": [{"role": "", "content": "x"}]},
        ],
        ids=str,
    )
    async def test_exactly_one_kind_of_prompt(
        self, http: httpx.AsyncClient, route: str, prompts: dict[str, Any]
    ) -> None:
        check_error(await http.post(route, json={"max_tokens": 1, **prompts}), 400, "invalid_request")

    @pytest.mark.parametrize("route", [*NATIVE, "/v1/chat/completions"])
    async def test_an_image_is_refused_and_named(self, http: httpx.AsyncClient, route: str) -> None:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        content = [{"type": "text", "text": "What is this?"}, image]
        body = {
            "model": "synthetic",
            "messages": [{"role": "user", "content": "Hello."}, {"role": "user", "content": content}],
        }
        error = check_error(await http.post(route, json=body), 400, "unsupported", "messages[1].content[1]")
        assert "'image_url'" in error["message"]
        assert "text only" in error["message"]

    @pytest.mark.parametrize("route", [*NATIVE, *OPENAI])
    async def test_an_unknown_model_is_404(self, http: httpx.AsyncClient, route: str) -> None:
        for name in ("gpt-5", "../../etc/passwd", "synthetic\u0000", "Synthetic"):
            check_error(await http.post(route, json=body_for(route, model=name)), 404, "model_not_found")

    async def test_a_refused_request_leaves_no_job(self, http: httpx.AsyncClient) -> None:
        user = "refused-user"
        await http.post("/v1/jobs", json=body_for("/v1/jobs", user_id=user, seed=1))
        await http.post("/v1/jobs", json=body_for("/v1/jobs", user_id=user, model="nobody"))
        assert (await http.get("/v1/jobs", params={"user_id": user})).json()["data"] == []


class TestShape:
    async def test_404_and_405(self, http: httpx.AsyncClient) -> None:
        for path in ("/nothing", "/v1", "/v1/jobs/x/y", "/V1/jobs", "/nothing/", "/v1//nothing"):
            reply = await http.get(path, follow_redirects=False)
            check_error(reply, 404, "not_found")
        reply = await http.delete("/v1/jobs")
        check_error(reply, 405, "invalid_request")
        assert set(reply.headers["allow"].replace(" ", "").split(",")) & {"GET", "POST"}
        check_error(await http.get("/v1/generate"), 405, "invalid_request")
        check_error(await http.post("/v1/models", json={}), 405, "invalid_request")

    async def test_x_request_id_is_echoed_or_made(self, http: httpx.AsyncClient) -> None:
        for path in ("/healthz", "/v1/jobs", "/nothing", "/v1/jobs/none", "/metrics"):
            reply = await http.get(path, headers={"x-request-id": "my-id.1:2_3"})
            assert reply.headers.get_list("x-request-id") == ["my-id.1:2_3"]
            made = (await http.get(path)).headers["x-request-id"]
            assert made
            assert made != (await http.get(path)).headers["x-request-id"]

    @pytest.mark.parametrize("bad", ["x" * 129, "a b", "é", "a;b", "<script>"])
    async def test_a_malformed_request_id_is_replaced(self, server: Server, bad: str) -> None:
        async with await send(f"{server.url}/healthz", headers={"x-request-id": bad}) as answer:
            assert answer.headers["x-request-id"] != bad
            assert answer.headers["x-request-id"].isascii()

    @pytest.mark.parametrize(
        ("path", "stored"),
        [
            *(
                (path, "no-store")
                for path in ("/healthz", "/v1/models", "/nothing", "/v1/generate", "/metrics", "/docs")
            ),
            ("/v1/jobs/none/events", "no-store"),
            ("/v1/events?user_id=u", "no-cache, no-store, no-transform"),
            ("/", "no-cache"),
            ("/static/style.css", "no-cache"),
        ],
    )
    async def test_browsers_guess_no_type_and_keep_no_answer(
        self, server: Server, http: httpx.AsyncClient, path: str, stored: str
    ) -> None:
        async with await send(server.url + path) as answer:
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == stored

    async def test_the_request_id_goes_with_the_job(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/jobs", json=body_for("/v1/jobs"), headers={"x-request-id": "trace-me"})
        view = (await http.get(f"/v1/jobs/{reply.json()['id']}")).json()
        assert view["request_id"] == "trace-me"

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "", "localhost@evil"]
    )
    async def test_a_foreign_host_is_refused(self, server: Server, host: str) -> None:
        """A page on evil.example that rebinds its name to 127.0.0.1 must not reach us."""
        for path in ("/v1/jobs", "/healthz", "/metrics", "/nothing"):
            async with await send(server.url + path, headers={"host": host.format(port=server.port)}) as answer:
                assert answer.status in (400, 403, 421)
                assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "localhost:{port}", "[::1]:{port}", "LocalHost:{port}"])
    async def test_the_loopback_names_are_ours(self, server: Server, host: str) -> None:
        async with await send(f"{server.url}/healthz", headers={"host": host.format(port=server.port)}) as answer:
            assert answer.status == 200

    async def test_no_cors(self, server: Server) -> None:
        async with await send(f"{server.url}/v1/jobs", headers={"origin": "https://evil.example"}) as answer:
            assert not [name for name in answer.headers if name.startswith("access-control-")]


class TestAdmission:
    async def test_a_full_queue_is_429_with_a_time_to_come_back(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=20, options={"slots": 1}, settings={"max_queued": 3})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            blocker = await submit(http, max_tokens=100_000)
            await running(http, blocker)
            key = {"idempotency-key": "kept"}
            first = await http.post("/v1/jobs", json=body_for("/v1/jobs"), headers=key)
            waiting = [first.json()["id"], *[await submit(http, max_tokens=1) for _ in range(2)]]
            for route in [*NATIVE, *OPENAI]:
                for stream in (False, True) if route != "/v1/jobs" else (None,):
                    fields = {} if stream is None else {"stream": stream}
                    error = check_error(await http.post(route, json=body_for(route, **fields)), 429, "overloaded")
                    assert error["type"] == "rate_limit_error"
            # The queue's bound is no reason to deny what was accepted already.
            again = await http.post("/v1/jobs", json=body_for("/v1/jobs"), headers=key)
            assert (again.status_code, again.json()["id"]) == (202, waiting[0])
            await http.post(f"/v1/jobs/{blocker}/cancel")
            for job in waiting:
                assert (await ended(http, job))["status"] == "completed"
            assert (await ended(http, await submit(http)))["status"] == "completed"

    async def test_the_bound_holds_against_a_crowd(self, make_server: Callable[..., Server]) -> None:
        server = make_server(rate=20, options={"slots": 1}, settings={"max_queued_per_tenant": 5})
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            blocker = await submit(http, max_tokens=100_000)
            await running(http, blocker)
            replies = await asyncio.gather(*(http.post("/v1/jobs", json=body_for("/v1/jobs")) for _ in range(40)))
            assert sorted(reply.status_code for reply in replies) == [202] * 5 + [429] * 35

    async def test_a_model_that_is_still_loading_is_not_unknown(self, make_server: Callable[..., Server]) -> None:
        """Jobs may be queued before the worker is up."""
        server = make_server(start=False)
        server.spawn()
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            async with asyncio.timeout(PATIENCE):
                while True:
                    try:
                        job = await submit(http, max_tokens=2)
                        break
                    except httpx.TransportError:
                        await asyncio.sleep(0.01)
            assert (await ended(http, job))["status"] == "completed"
