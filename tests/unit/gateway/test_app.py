"""The app in process: bodies of any kind, tenants apart, who may be called by which name."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.errors import ContextLengthExceeded, InvalidRequest
from penstock.core.job import Job, Priority, Request, ResponseFormat, Sampling, fingerprint
from penstock.core.ports import Append, Finish, ModelInfo, Query, QueuePolicy, WorkerInfo
from penstock.gateway.app import OPERATIONS, create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.dialects.anthropic.bodies import CreateMessage
from penstock.gateway.dialects.native.bodies import Generate, GenerateJob
from penstock.gateway.dialects.openai.bodies import ChatCompletion, TextCompletion
from penstock.gateway.dialects.openai.embeddings import CreateEmbeddings
from penstock.gateway.dialects.responses.bodies import CreateResponse
from penstock.gateway.feed import Cursor
from penstock.gateway.gateway import Gateway
from penstock.gateway.http import decode
from penstock.gateway.identity import Identity
from penstock.observability.metrics import Metrics
from penstock.testing.clock import ManualClock
from tests.support.api import check_error

CHAT = [{"role": "user", "content": "x"}]
KINDS = [GenerateJob, Generate, ChatCompletion, TextCompletion]
FIELDS = ["model", "prompt", "messages", "max_tokens", "stop", "logit_bias", "metadata", "n", "stream", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), inner),
    max_leaves=12,
)


class TestDecode:
    @pytest.mark.parametrize("kind", KINDS)
    @given(raw=st.binary(max_size=200))
    def test_any_bytes_are_a_body_or_an_invalid_request(self, kind: type, raw: bytes) -> None:
        with contextlib.suppress(InvalidRequest):
            assert isinstance(decode(raw, kind), kind)

    @pytest.mark.parametrize("kind", KINDS)
    @given(value=st.dictionaries(st.sampled_from(FIELDS), JSON))
    def test_any_json_too(self, kind: type, value: object) -> None:
        with contextlib.suppress(InvalidRequest):
            assert isinstance(decode(json.dumps(value).encode(), kind), kind)


class TestCursor:
    @given(st.text(max_size=200))
    def test_any_text_is_a_cursor_or_an_invalid_request(self, text: str) -> None:
        with contextlib.suppress(InvalidRequest):
            assert isinstance(Cursor.parse(text), Cursor)

    @given(st.binary(max_size=200))
    def test_any_bytes_in_disguise_too(self, raw: bytes) -> None:
        with contextlib.suppress(InvalidRequest):
            Cursor.parse(base64.urlsafe_b64encode(raw).decode())


class Served(Gateway):
    """A gateway with its broker, for tests that work on it."""

    def __init__(self, broker: EmbeddedBroker, config: GatewayConfig) -> None:
        super().__init__(broker, config)
        self.broker = broker


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Served]:
    broker = EmbeddedBroker(tmp_path)
    await broker.open()
    gateway = Served(broker, GatewayConfig(models=("m",), allowed_hosts=("localhost", "127.0.0.1", "::1")))
    async with gateway.running():
        yield gateway
    await broker.close()


def as_tenant(gateway: Served, tenant: str) -> httpx.AsyncClient:
    """A client whose requests an authenticating layer has marked as *tenant*'s."""
    app = create_app(gateway)

    async def marked(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await app({**scope, "penstock.identity": Identity(tenant)}, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(marked), base_url="http://localhost")


async def work(gateway: Served) -> None:
    """Complete everything that is queued, with two tokens each."""
    for lease in await gateway.broker.claim(WorkerInfo(id="w", slots=50), ["m"], 50, 0):
        await gateway.broker.append([Append(lease.key, 1, [1, 2], ["a", "b"], finish=Finish(("stop",)))])


async def asked(gateway: Served, route: str, body: dict[str, Any]) -> Job:
    """The job that a request becomes."""
    known = {job.id for job in (await gateway.broker.list(Query(tenant="t"))).jobs}
    async with as_tenant(gateway, "t") as http:
        asking = asyncio.create_task(http.post(route, json=body))
        async with asyncio.timeout(30):
            jobs: list[Job] = []
            while not jobs:
                answered = asking.done()  # a refusal: there will be none
                jobs = [job for job in (await gateway.broker.list(Query(tenant="t"))).jobs if job.id not in known]
                if answered:
                    break
                await asyncio.sleep(0.005)
        await work(gateway)
        reply = await asking
    assert reply.status_code in (200, 202), reply.text
    return jobs[0]


BOUNDS: list[tuple[str, Any]] = [
    ("max_tokens", 1), ("max_tokens", 1_000_000), ("temperature", 0), ("temperature", 2), ("top_p", 1e-9),
    ("top_p", 1), ("top_k", 0), ("top_k", 100_000), ("min_p", 0), ("min_p", 1), ("seed", -(2**63)), ("seed", 2**63 - 1),
    ("stop", "x"), ("stop", ["x" * 256] * 16), ("presence_penalty", -2), ("presence_penalty", 2),
    ("frequency_penalty", -2), ("frequency_penalty", 2), ("repetition_penalty", 1e-9), ("repetition_penalty", 10),
    ("logit_bias", {str(token): (-1) ** token * 100 for token in range(300)}), ("logprobs", 0), ("logprobs", 20),
    ("n", 1), ("n", 8), ("model", "m"), ("prompt", ""), ("prompt", [0, 2**31 - 1]), ("user_id", "u" * 256),
    ("priority", "interactive"), ("priority", "normal"), ("priority", "batch"), ("deadline", 604_800),
    ("request_id", "r" * 256), ("metadata", {f"{i:064}": "v" * 512 for i in range(16)}),
]  # fmt: skip


CHAT = [{"role": "user", "content": "x"}]
#: The least that each route which generates is to be asked.
ASKING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/jobs", {"prompt": "x"}),
    ("/v1/generate", {"prompt": "x"}),
    ("/generate", {"prompt": "x"}),
    ("/generate_stream", {"prompt": "x"}),
    ("/v1/completions", {"model": "m", "prompt": "x"}),
    ("/v1/chat/completions", {"model": "m", "messages": CHAT}),
    ("/v1/responses", {"model": "m", "input": "x", "max_output_tokens": 3}),
    ("/v1/messages", {"model": "m", "messages": CHAT, "max_tokens": 3}),
]


ALL = [route for route, _ in ASKING]
CHATS, TEXTS = ["/v1/chat/completions"], ["/v1/completions"]
OTHERS = [route for route in ALL if route != "/v1/messages"]
LIMITED = [route for route in ALL if route != "/v1/responses"]
USERS = [*CHATS, *TEXTS, "/v1/responses"]
#: What clients of OpenAI's and vLLM's servers send for "none" or "all there is", what that is, and where.
NOTHING: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"seed": -1}, {}, ALL), ({"top_k": -1}, {"top_k": 0}, ALL), ({"logit_bias": {}}, {}, ALL), ({"n": 1}, {}, ALL),
    ({"stop": ""}, {}, ALL), ({"stop": [""]}, {}, ALL), ({"stop": []}, {}, ALL),
    ({"stop": ["", "x", ""]}, {"stop": "x"}, OTHERS), ({"stop_sequences": ["", "x"]}, {"stop_sequences": ["x"]},
    ["/v1/messages"]), ({"user": ""}, {}, USERS), ({"user_id": ""}, {}, ALL), ({"request_id": ""}, {}, ALL),
    ({"safety_identifier": ""}, {}, ["/v1/responses"]), ({"metadata": {"user_id": ""}}, {}, ["/v1/messages"]),
    ({"top_logprobs": 0}, {}, CHATS), ({"top_logprobs": 0, "logprobs": False}, {}, CHATS),
    ({"top_logprobs": 0, "logprobs": None}, {}, CHATS), ({"top_logprobs": 0}, {}, ["/v1/responses"]),
    ({"tools": [], "tool_choice": "auto"}, {}, [*CHATS, "/v1/jobs", "/v1/responses"]),
    ({"max_tokens": 2**31 - 1}, {"max_tokens": 1_000_000}, LIMITED),
    ({"max_tokens": 2**63 - 1}, {"max_tokens": 1_000_000}, LIMITED),
    ({"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5}, CHATS),
    ({"max_completion_tokens": 9.0, "max_tokens": 5}, {"max_tokens": 9}, CHATS),
    ({"max_completion_tokens": None, "max_tokens": 5}, {"max_tokens": 5}, CHATS),
    ({"prompt": [[1, 2, 3]]}, {"prompt": [1, 2, 3]}, TEXTS), ({"prompt": ["x"]}, {"prompt": "x"}, TEXTS),
    ({"prompt": [[1.0, 2]]}, {"prompt": [1, 2]}, TEXTS),
]  # fmt: skip


class TestFields:
    @pytest.mark.parametrize(("field", "value"), BOUNDS, ids=lambda value: str(value)[:24])
    async def test_each_reaches_the_job_up_to_its_bounds(self, gateway: Served, field: str, value: Any) -> None:
        """The broker keeps all of a job (contract suite), and the engine is given what the broker has."""
        async with as_tenant(gateway, "t") as http:
            reply = await http.post("/v1/jobs", json={"prompt": "x", field: value})
            assert reply.status_code == 202, reply.text
        job = await gateway.broker.get("t", reply.json()["id"])
        match field:
            case "prompt":
                assert (job.request.prompt, job.request.prompt_ids) in [(value, None), (None, tuple(value))]
            case "n" | "model":
                assert getattr(job.request, field) == value
            case "user_id":
                assert job.user == value
            case "priority":
                assert job.priority.name.lower() == value
            case "deadline":
                assert job.deadline_at == pytest.approx(job.created_at + value, abs=60)
            case "request_id":
                assert job.idempotency_key == value
            case "metadata":
                assert job.metadata == value
            case "stop":
                assert job.request.sampling.stop == ((value,) if isinstance(value, str) else tuple(value))
            case "logit_bias":
                assert {str(token): bias for token, bias in job.request.sampling.logit_bias.items()} == value
            case _:
                assert getattr(job.request.sampling, field) == value

    async def test_openais_names_for_ours(self, gateway: Served) -> None:
        body = {
            "model": "m", "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 5, "user": "ann",
            "service_tier": "flex", "logprobs": True, "top_logprobs": 20,
        }  # fmt: skip
        async with as_tenant(gateway, "t") as http:
            asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            async with asyncio.timeout(30):
                while not (jobs := (await gateway.broker.list(Query(tenant="t"))).jobs):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await work(gateway)
            await asking
        sampling = jobs[0].request.sampling
        assert (sampling.max_tokens, sampling.logprobs) == (5, 20)
        assert (jobs[0].user, jobs[0].priority) == ("ann", Priority.BATCH)

    @pytest.mark.parametrize(
        ("route", "body", "max_tokens", "temperature"),
        [
            ("/v1/jobs", {"prompt": "x"}, 64, 0.7),
            ("/v1/generate", {"prompt": "x"}, 64, 0.7),
            ("/generate", {"prompt": "x"}, 64, 0.7),
            ("/v1/completions", {"model": "m", "prompt": "x"}, 16, 1.0),
            ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]}, 2048, 1.0),
            ("/v1/responses", {"model": "m", "input": "x"}, 2048, 1.0),
        ],
    )
    async def test_the_defaults_of_each_route(
        self, gateway: Served, route: str, body: dict[str, Any], max_tokens: int, temperature: float
    ) -> None:
        async with as_tenant(gateway, "t") as http:
            asking = asyncio.create_task(http.post(route, json=body))
            async with asyncio.timeout(30):
                while not (jobs := (await gateway.broker.list(Query(tenant="t"))).jobs):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            sampling = jobs[0].request.sampling
            await work(gateway)
            assert (await asking).status_code in (200, 202)
        assert (sampling.max_tokens, sampling.temperature) == (max_tokens, temperature)
        neutral = Sampling(max_tokens=max_tokens, temperature=temperature)
        assert sampling == neutral, "all else is off"

    @pytest.mark.parametrize(("route", "body"), ASKING, ids=lambda value: value if isinstance(value, str) else "")
    async def test_null_and_a_float_are_the_job_that_nothing_and_an_integer_are(
        self, gateway: Served, route: str, body: dict[str, Any]
    ) -> None:
        """Whatever the field: those of each body are in test_bodies.py."""
        kind = next(operation.body for operation in OPERATIONS if operation.path == route)
        assert kind is not None
        optional = [field for field in msgspec.structs.fields(kind) if not field.required]
        nulls = {field.encode_name: None for field in optional if field.encode_name not in body}
        assert len(nulls) > 15
        plain = await asked(gateway, route, {**body, "seed": 5, "top_k": 7})
        odd = await asked(gateway, route, {**nulls, **body, "seed": 5.0, "top_k": 7.0})
        assert odd.request == plain.request
        assert (odd.user, odd.priority, odd.metadata) == (plain.user, plain.priority, plain.metadata)

    @pytest.mark.parametrize(
        ("route", "fields", "plain"),
        [(route, fields, plain) for fields, plain, routes in NOTHING for route in routes],
        ids=lambda value: str(value)[:40],
    )
    async def test_what_asks_for_nothing_is_nothing(
        self, gateway: Served, route: str, fields: dict[str, Any], plain: dict[str, Any]
    ) -> None:
        least = dict(ASKING)[route]
        odd = await asked(gateway, route, {**least, **fields})
        same = await asked(gateway, route, {**least, **plain})
        assert odd.request == same.request
        assert (odd.user, odd.idempotency_key) == (None, None)

    async def test_top_p_of_0_is_the_likeliest_token(self, gateway: Served) -> None:
        for route, least in ASKING:
            sampling = (await asked(gateway, route, {**least, "top_p": 0})).request.sampling
            assert 0 < sampling.top_p <= 1e-9
            assert sampling.temperature > 0, "that is another field"

    @pytest.mark.parametrize("path", ["//v1/jobs", "/v1/jobs/", "/v1//jobs", "//v1///jobs//"])
    async def test_slashes_too_many_make_no_difference(self, gateway: Served, path: str) -> None:
        async with as_tenant(gateway, "t") as http:
            url = httpx.URL("http://localhost").copy_with(raw_path=path.encode())
            assert (await http.post(url, json={"prompt": "x"})).status_code == 202
            listed = await http.get(url)
            assert (listed.status_code, len(listed.json()["data"])) == (200, 1)
            models = httpx.URL("http://localhost").copy_with(raw_path=b"/v1/models/")
            assert (await http.get(models)).json()["object"] == "list"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_SCHEMA = ResponseFormat("json_schema", SCHEMA)
AS_REGEX = ResponseFormat("regex", pattern="[a-z]+")
AS_GRAMMAR = ResponseFormat("grammar", grammar='root ::= "a"')
AS_CHOICE = ResponseFormat("choice", choices=("yes", "no"))
CONSTRAINED = ["/v1/jobs", "/v1/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"]
FORMATTED = CONSTRAINED[:-1]


class TestConstraints:
    """What says how the reply has to be, in the words of which server ever, is honoured or refused."""

    @pytest.mark.parametrize("route", CONSTRAINED)
    @pytest.mark.parametrize(
        ("fields", "form"),
        [
            ({"guided_json": SCHEMA}, AS_SCHEMA), ({"guided_json": json.dumps(SCHEMA)}, AS_SCHEMA),
            ({"guided_regex": "[a-z]+"}, AS_REGEX), ({"guided_choice": ["yes", "no"]}, AS_CHOICE),
            ({"guided_grammar": 'root ::= "a"'}, AS_GRAMMAR),
            ({"structured_outputs": {"json": SCHEMA}}, AS_SCHEMA),
            ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, AS_SCHEMA),
            ({"structured_outputs": {"json_object": True}}, ResponseFormat("json_object")),
            ({"structured_outputs": {"regex": "[a-z]+", "json_object": False}}, AS_REGEX),
            ({"structured_outputs": {"choice": ["yes", "no", "yes"]}}, AS_CHOICE),
            ({"structured_outputs": {"grammar": 'root ::= "a"'}}, AS_GRAMMAR),
            ({"json_schema": SCHEMA}, AS_SCHEMA), ({"json_schema": json.dumps(SCHEMA)}, AS_SCHEMA),
            ({"regex": "[a-z]+"}, AS_REGEX), ({"ebnf": 'root ::= "a"'}, AS_GRAMMAR),
            ({"grammar": 'root ::= "a"'}, AS_GRAMMAR), ({"grammar": {"type": "json", "value": SCHEMA}}, AS_SCHEMA),
            ({"grammar": {"type": "regex", "value": "[a-z]+"}}, AS_REGEX),
            ({"guided_json": None, "guided_choice": [], "regex": "", "structured_outputs": {}, "grammar": None}, None),
            ({"structured_outputs": {"whitespace_pattern": None, "disable_any_whitespace": False}}, None),
        ],
        ids=lambda value: str(value)[:40],
    )  # fmt: skip
    async def test_words_of_other_servers(
        self, gateway: Served, route: str, fields: dict[str, Any], form: ResponseFormat | None
    ) -> None:
        job = await asked(gateway, route, {**dict(ASKING)[route], **fields})
        assert job.request.response_format == form

    @pytest.mark.parametrize("route", FORMATTED)
    @pytest.mark.parametrize(
        ("wanted", "form"),
        [
            ({"type": "json_object", "schema": SCHEMA}, AS_SCHEMA),
            ({"type": "json_schema", "schema": SCHEMA}, AS_SCHEMA),
            ({"type": "json_object", "json_schema": {"schema": SCHEMA}}, AS_SCHEMA),
            ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": None}}, AS_SCHEMA),
            ({"type": "regex", "pattern": "[a-z]+"}, AS_REGEX),
            ({"type": "grammar", "grammar": 'root ::= "a"'}, AS_GRAMMAR),
            ({"type": "json_object", "schema": {}}, ResponseFormat("json_object")),
            ({"type": "text"}, None), ({"type": None}, None), ({"type": "text", "json_schema": None}, None),
        ],
        ids=lambda value: str(value)[:40],
    )  # fmt: skip
    async def test_formats(
        self, gateway: Served, route: str, wanted: dict[str, Any], form: ResponseFormat | None
    ) -> None:
        job = await asked(gateway, route, {**dict(ASKING)[route], "response_format": wanted})
        assert job.request.response_format == form

    @pytest.mark.parametrize("route", CONSTRAINED)
    @pytest.mark.parametrize(
        ("fields", "code", "param"),
        [
            ({"guided_json": SCHEMA, "guided_regex": "a"}, "invalid_request", "guided_regex"),
            ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "invalid_request", "structured_outputs.regex"),
            ({"structured_outputs": {"choice": ["a"]}, "regex": "a"}, "invalid_request", "structured_outputs.choice"),
            ({"structured_outputs": {"jason": SCHEMA}}, "invalid_request", "structured_outputs"),
            ({"structured_outputs": {"structural_tag": "x"}}, "unsupported", "structured_outputs.structural_tag"),
            ({"structured_outputs": {"disable_any_whitespace": True}}, "unsupported", "structured_outputs.disable_any"),
            ({"structured_outputs": {"whitespace_pattern": " "}}, "unsupported", "structured_outputs.whitespace"),
            ({"structural_tag": {"begin": "<a>"}}, "unsupported", "structural_tag"),
            ({"guided_whitespace_pattern": " "}, "unsupported", "guided_whitespace_pattern"),
            ({"logits_processors": ["a.B"]}, "unsupported", "logits_processors"),
            ({"allowed_token_ids": [5]}, "unsupported", "allowed_token_ids"),
            ({"stop_regex": "a"}, "unsupported", "stop_regex"), ({"grammar_lazy": True}, "unsupported", "grammar_lazy"),
            ({"custom_logit_processor": "x"}, "unsupported", "custom_logit_processor"),
            ({"guided_json": "{"}, "invalid_request", "guided_json"),
            ({"guided_json": "[]"}, "invalid_request", "guided_json"),
            ({"guided_json": {"x": "y" * 70_000}}, "invalid_request", "guided_json"),
            ({"guided_choice": ["x" * 4096] * 20}, "invalid_request", "guided_choice"),
            ({"guided_choice": [""]}, "invalid_request", "guided_choice"), ({"regex": 5}, "invalid_request", "regex"),
            ({"regex": "x" * 70_000}, "invalid_request", "regex"),
            ({"grammar": {"type": "x"}}, "invalid_request", "grammar"),
            ({"grammar": {"type": "regex", "value": {}}}, "invalid_request", "grammar"),
            ({"min_tokens": 9, "seed": 1}, "invalid_request", "min_tokens"),
            ({"min_tokens": -1}, "invalid_request", "min_tokens"), ({"bad_words": [5]}, "invalid_request", "bad_words"),
            ({"stop_token_ids": [-1]}, "invalid_request", "stop_token_ids"),
        ],
        ids=lambda value: str(value)[:40],
    )  # fmt: skip
    async def test_what_cannot_be_is_refused(
        self, gateway: Served, route: str, fields: dict[str, Any], code: str, param: str
    ) -> None:
        limit = "max_output_tokens" if route == "/v1/responses" else "max_tokens"
        async with as_tenant(gateway, "t") as http:
            reply = await http.post(route, json={**dict(ASKING)[route], limit: 3, **fields})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, code), reply.text
        assert reply.json()["error"]["param"].startswith(param)
        assert not (await gateway.broker.list(Query(tenant="t"))).jobs

    @pytest.mark.parametrize("route", FORMATTED)
    @pytest.mark.parametrize(
        "wanted",
        [
            {"type": "json_schema"}, {"type": "regex"}, {"type": "grammar"}, {"type": "text", "schema": SCHEMA},
            {"type": "json_object", "pattern": "a"}, {"type": "regex", "pattern": "a", "schema": SCHEMA},
            {"type": "structural_tag"}, {"type": "json_object", "value": SCHEMA}, {"type": "regex", "grammar": "a"},
        ],
        ids=str,
    )  # fmt: skip
    async def test_a_format_that_contradicts_itself(self, gateway: Served, route: str, wanted: dict[str, Any]) -> None:
        async with as_tenant(gateway, "t") as http:
            reply = await http.post(route, json={**dict(ASKING)[route], "response_format": wanted})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith("response_format")

    async def test_a_format_and_a_constraint_are_two(self, gateway: Served) -> None:
        both: list[tuple[str, dict[str, Any]]] = [
            *((route, {"response_format": {"type": "json_object"}, "regex": "a"}) for route in FORMATTED),
            ("/v1/responses", {"text": {"format": {"type": "json_object"}}, "regex": "a"}),
        ]
        async with as_tenant(gateway, "t") as http:
            for route, fields in both:
                reply = await http.post(route, json={**dict(ASKING)[route], **fields})
                assert (reply.status_code, reply.json()["error"]["param"]) == (400, "regex")

    async def test_tools_go_with_json_only(self, gateway: Served) -> None:
        tool = {"type": "function", "function": {"name": "f"}}
        least = {**dict(ASKING)["/v1/chat/completions"], "tools": [tool]}
        async with as_tenant(gateway, "t") as http:
            for fields in ({"regex": "a"}, {"guided_choice": ["a"]}, {"ebnf": "a"}):
                reply = await http.post("/v1/chat/completions", json={**least, **fields})
                assert (reply.status_code, reply.json()["error"]["param"]) == (400, "response_format")
        for fields in ({"guided_json": SCHEMA}, {"regex": "a", "tool_choice": "none"}):
            assert (await asked(gateway, "/v1/chat/completions", {**least, **fields})).request.tools

    @pytest.mark.parametrize("route", ALL)
    async def test_when_a_reply_ends_and_what_it_must_not_say(self, gateway: Served, route: str) -> None:
        fields = {"min_tokens": 2.0, "stop_token_ids": [5, 7], "bad_words": ["mill", ""]}
        sampling = (await asked(gateway, route, {**dict(ASKING)[route], **fields})).request.sampling
        assert (sampling.min_tokens, sampling.stop_token_ids, sampling.bad_words) == (2, (5, 7), ("mill",))
        nothing = {"min_tokens": 0, "stop_token_ids": [], "bad_words": [""]}
        sampling = (await asked(gateway, route, {**dict(ASKING)[route], **nothing})).request.sampling
        assert (sampling.min_tokens, sampling.stop_token_ids, sampling.bad_words) == (0, (), ())


def named(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


class TestChat:
    """What OpenAI's clients send on chat completions beside the plain things."""

    ROUTE = "/v1/chat/completions"

    async def request(self, gateway: Served, *messages: dict[str, Any], **fields: Any) -> Request:
        body = {"model": "m", "messages": list(messages) or CHAT, **fields}
        return (await asked(gateway, self.ROUTE, body)).request

    @pytest.mark.parametrize(("mode", "choice"), [("auto", "auto"), ("required", "required")])
    async def test_allowed_tools(self, gateway: Served, mode: str, choice: str) -> None:
        allowed = {"mode": mode, "tools": named("c", "a")}
        found = await self.request(
            gateway, tools=named("a", "b", "c"), tool_choice={"type": "allowed_tools", "allowed_tools": allowed}
        )
        assert [tool.name for tool in found.callable_tools] == ["a", "c"]
        assert (found.tool_choice, found.tool_name) == (choice, None)

    @pytest.mark.parametrize(
        "choice",
        [
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named("d")}},
            {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": named("a")}},
            {"type": "allowed_tools", "mode": "auto", "tools": named("a")},
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}},
            {"type": "function"}, {"type": "custom", "custom": {"name": "a"}}, "any",
        ],
        ids=str,
    )  # fmt: skip
    async def test_other_choices_are_refused(self, gateway: Served, choice: Any) -> None:
        async with as_tenant(gateway, "t") as http:
            body = {"model": "m", "messages": CHAT, "tools": named("a", "b"), "tool_choice": choice}
            reply = await http.post(self.ROUTE, json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith("tool_choice")

    @pytest.mark.parametrize("fields", [{"function_call": "none"}, {"function_call": "auto"}, {"functions": []}])
    async def test_functions_that_ask_for_nothing(self, gateway: Served, fields: dict[str, Any]) -> None:
        assert await self.request(gateway, **fields) == await self.request(gateway)

    @pytest.mark.parametrize("fields", [{"function_call": {"name": "f"}}, {"functions": [{"name": "f"}]}])
    async def test_functions_that_ask_for_some_are_refused(self, gateway: Served, fields: dict[str, Any]) -> None:
        async with as_tenant(gateway, "t") as http:
            reply = await http.post(self.ROUTE, json={"model": "m", "messages": CHAT, **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "functions")

    @pytest.mark.parametrize(
        "said",
        [
            {"content": [{"type": "refusal", "refusal": "No."}]}, {"content": None, "refusal": "No."},
            {"refusal": "No."}, {"content": "No.", "refusal": None}, {"content": "No.", "name": "ann", "audio": None},
        ],
        ids=str,
    )  # fmt: skip
    async def test_a_refusal_is_what_was_said(self, gateway: Served, said: dict[str, Any]) -> None:
        found = await self.request(gateway, *CHAT, {"role": "assistant", **said}, *CHAT)
        assert [message.content for message in found.messages or ()] == ["x", "No.", "x"]

    async def test_and_in_an_input(self, gateway: Served) -> None:
        said = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
        body = {"model": "m", "input": [{"role": "user", "content": "x"}, said, {"role": "user", "content": "y"}]}
        found = (await asked(gateway, "/v1/responses", body)).request
        assert [message.content for message in found.messages or ()] == ["x", "No.", "y"]

    @pytest.mark.parametrize("role", ["developer", "system", "critic"])
    @pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/jobs", "/v1/generate"])
    async def test_roles_pass_as_they_are(self, gateway: Served, route: str, role: str) -> None:
        """What a template makes of them is the engine's to know."""
        messages = [{"role": role, "content": "Be brief."}, *CHAT]
        found = (await asked(gateway, route, {"model": "m", "messages": messages})).request
        assert [(message.role, message.content) for message in found.messages or ()] == [
            (role, "Be brief."), ("user", "x"),
        ]  # fmt: skip

    async def test_a_developers_message_is_no_less_on_responses(self, gateway: Served) -> None:
        body = {
            "model": "m",
            "input": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "x"}],
        }
        found = (await asked(gateway, "/v1/responses", body)).request
        assert [(message.role, message.content) for message in found.messages or ()] == [
            ("system", "Be brief."), ("user", "x"),
        ]  # fmt: skip


PROMPTED = [route for route in ALL if route not in ("/v1/jobs", "/generate")]
STREAMED = [route for route in PROMPTED if route != "/generate_stream"]
TOO_LONG = "x" * 40


async def refuse(gateway: Served, *, tokens: int = 99, limit: int = 20) -> None:
    """Refuse what is queued as an engine does whose context it is too long for."""
    for lease in await gateway.broker.claim(WorkerInfo(id="w", slots=50), ["m"], 50, 0):
        param = "messages" if lease.job.request.messages is not None else "prompt"
        finish = Finish(error=ContextLengthExceeded.of(param, tokens, limit).info)
        await gateway.broker.append([Append(lease.key, 1, [], [], finish=finish)])


async def queued(gateway: Served) -> None:
    async with asyncio.timeout(30):
        while not (await gateway.broker.stats()).queued:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def long(route: str, **fields: Any) -> dict[str, Any]:
    least = {**dict(ASKING)[route], **fields}
    for name in ("prompt", "input"):
        if name in least:
            least[name] = TOO_LONG
    return least | ({"messages": [{"role": "user", "content": TOO_LONG}]} if "messages" in least else {})


class TestTooLong:
    """A prompt that its model's context does not hold, in the words by which each dialect's clients know that."""

    @pytest.fixture
    async def busy(self, tmp_path: Path) -> AsyncIterator[Served]:
        """A gateway whose model has a context of 20 tokens and no slot free; streams' headers wait for nothing else."""
        broker = EmbeddedBroker(tmp_path)
        await broker.open()
        gateway = Served(broker, GatewayConfig(models=("m",), first_event_wait=0.0))
        async with gateway.running():
            info = ModelInfo(name="m", engine="synthetic", context_length=20)
            await broker.register(WorkerInfo(id="w", models=(info,)))
            await gateway.catalogue.refresh()
            yield gateway
        await broker.close()

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("route", PROMPTED)
    async def test_is_a_400_in_the_dialects_words(self, busy: Served, route: str, stream: bool) -> None:
        """Also of a stream that had to wait for a slot."""
        async with as_tenant(busy, "t") as http:
            body = long(route, stream=stream) if route in STREAMED else long(route)
            asking = asyncio.create_task(http.post(route, json=body))
            await queued(busy)
            await refuse(busy)
            reply = await asking
            job = (await busy.broker.list(Query(tenant="t"))).jobs[0]
            view = (await http.get(f"/v1/jobs/{job.id}")).json()
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["type"]) == (
            400, "context_length_exceeded", "invalid_request_error",
        )  # fmt: skip
        field = {"/v1/responses": "input", "/v1/chat/completions": "messages", "/v1/messages": "messages"}
        assert error["param"] == field.get(route, "prompt")
        if route == "/v1/messages":
            assert error["message"] == "prompt is too long: 99 tokens > 19 maximum"
        elif route in field:
            assert error["message"].startswith(
                "This model's maximum context length is 20 tokens. However, your messages resulted in 99 tokens. "
                "Please reduce the length of the messages"
            )
        else:
            assert error["message"].startswith(
                "This model's maximum context length is 20 tokens. However, you requested 100 tokens (99 in the prompt"
            )
        assert set(error) == set(view["error"]) == {"message", "type", "param", "code"}

    @pytest.mark.parametrize("route", STREAMED)
    async def test_what_fits_does_not_wait_for_a_slot(self, busy: Served, route: str) -> None:
        """The headers have gone by the time that it fails."""
        async with as_tenant(busy, "t") as http:
            asking = asyncio.create_task(http.post(route, json={**dict(ASKING)[route], "stream": True}))
            await queued(busy)
            async with asyncio.timeout(30):
                while not len(busy.streams):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await refuse(busy)
            reply = await asking
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert "context_length_exceeded" in reply.text
        assert '"limit"' not in reply.text
        assert ("prompt is too long" in reply.text) == (route == "/v1/messages")

    async def test_what_may_not_fit_streams_once_it_has_begun(self, busy: Served) -> None:
        async with as_tenant(busy, "t") as http:
            asking = asyncio.create_task(http.post("/v1/generate", json=long("/v1/generate", stream=True)))
            await queued(busy)
            await work(busy)
            reply = await asking
        assert reply.status_code == 200
        assert "event: done" in reply.text

    async def test_a_drain_does_not_wait_for_it(self, busy: Served) -> None:
        async with as_tenant(busy, "t") as http:
            asking = asyncio.create_task(http.post("/v1/generate", json=long("/v1/generate", stream=True)))
            await queued(busy)
            busy.drain()
            async with asyncio.timeout(busy.config.first_event_wait_long_prompt / 2):
                reply = await asking
        assert reply.status_code == 200
        assert reply.text.startswith("retry: ")

    @pytest.mark.parametrize(
        ("body", "most"),
        [
            ({"prompt": "é" * 10}, 20), ({"prompt": [1] * 20}, 20), ({"prompt": "x" * 19}, 19),
            ({"messages": [{"role": "user", "content": "x" * 12}, {"role": "assistant", "content": "é" * 4}]}, 20),
        ],
        ids=["bytes", "ids", "fits", "messages"],
    )  # fmt: skip
    async def test_only_what_has_as_many_bytes_as_the_context_tokens(
        self, busy: Served, body: dict[str, Any], most: int
    ) -> None:
        async with as_tenant(busy, "t") as http:
            asking = asyncio.create_task(http.post("/v1/generate", json={**body, "stream": True}))
            await queued(busy)
            if most < 20:
                async with asyncio.timeout(30):
                    while not len(busy.streams):  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
            await refuse(busy)
            assert (await asking).status_code == (400 if most >= 20 else 200)

    async def test_an_error_without_numbers_keeps_its_message(self, busy: Served) -> None:
        """An upstream server's: it has been said in that server's words."""
        async with as_tenant(busy, "t") as http:
            for route, said in (("/v1/messages", "prompt is too long: Too much."), ("/v1/completions", "Too much.")):
                asking = asyncio.create_task(http.post(route, json=long(route)))
                await queued(busy)
                for lease in await busy.broker.claim(WorkerInfo(id="w", slots=50), ["m"], 50, 0):
                    finish = Finish(error=ContextLengthExceeded("Too much.").info)
                    await busy.broker.append([Append(lease.key, 1, [], [], finish=finish)])
                assert (await asking).json()["error"]["message"] == said


async def test_a_request_that_is_repeated_behind_an_update_is_known_again() -> None:
    """The digests of version 0.1.0 as it was before these bodies had the fields that they have now."""
    message = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    flat = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    part = [{"type": "input_text", "text": "x"}]
    before: list[tuple[str, type, dict[str, Any], str]] = [
        ("/v1/jobs", GenerateJob, {"prompt": "x", "max_tokens": 5, "stop": ["a"]}, "a54f59e9ad7d6584"),
        ("/v1/generate", Generate, {"messages": message, "tools": [tool], "response_format": form}, "141c4589f64e5e28"),
        ("/v1/chat/completions", ChatCompletion,
         {"model": "m", "messages": message, "tools": [tool], "response_format": form, "stream": True},
         "29e3430720f551de"),
        ("/v1/completions", TextCompletion, {"model": "m", "prompt": [1, 2]}, "0a5472707cac7c16"),
        ("/v1/chat/completions", ChatCompletion,
         {"model": "m", "messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}],
          "tool_choice": {"type": "function", "function": {"name": "f"}}},
         "10f23084a0258105"),
        ("/v1/responses", CreateResponse,
         {"model": "m", "input": [{"role": "user", "content": part}], "tools": [flat],
          "tool_choice": {"type": "function", "name": "f"}, "text": {"format": {"type": "json_object"}}},
         "e9e4c4b9c0eef062"),
        ("/v1/messages", CreateMessage,
         {"model": "m", "max_tokens": 5, "messages": message, "system": [{"type": "text", "text": "x"}],
          "tools": [{"name": "f", "input_schema": {"type": "object"}}]},
         "05975853ff359c92"),
        ("/v1/messages", CreateMessage,
         {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}],
          "thinking": {"type": "adaptive"}},
         "03b8a607d081855c"),
        ("/v1/embeddings", CreateEmbeddings, {"model": "m", "input": ["x"]}, "a5be4abed8b0d3a0"),
    ]  # fmt: skip
    for route, kind, body, digest in before:
        assert fingerprint([route, decode(json.dumps(body).encode(), kind)]).hex().startswith(digest), route


class TestTenants:
    async def test_a_foreign_job_does_not_exist(self, gateway: Served) -> None:
        async with as_tenant(gateway, "one") as one, as_tenant(gateway, "two") as two:
            for state in ("queued", "ended"):
                id = (await one.post("/v1/jobs", json={"prompt": "x", "user_id": "u"})).json()["id"]
                if state == "ended":
                    await work(gateway)
                nothing = (await two.get("/v1/jobs/job_" + "0" * 32)).json()
                for method, path, headers in (
                    ("GET", "", {}),
                    ("POST", "/cancel", {}),
                    ("GET", "/events", {}),
                    ("GET", "/events", {"last-event-id": "1"}),
                ):
                    reply = await two.request(method, f"/v1/jobs/{id}{path}", headers=headers)
                    assert reply.status_code == 404
                    assert reply.json() == nothing, "a foreign id must look like one that never was"
                assert (await one.get(f"/v1/jobs/{id}")).status_code == 200
                assert (await one.get(f"/v1/jobs/{id}")).json()["status"] in ("queued", "completed")

    async def test_lists_and_cursors_stay_apart(self, gateway: Served) -> None:
        async with as_tenant(gateway, "one") as one, as_tenant(gateway, "two") as two:
            mine = [(await one.post("/v1/jobs", json={"prompt": "x", "user_id": "u"})).json()["id"] for _ in range(3)]
            theirs = (await two.post("/v1/jobs", json={"prompt": "x", "user_id": "u"})).json()["id"]
            page = (await one.get("/v1/jobs", params={"limit": 1})).json()
            assert [job["id"] for job in page["data"]] == mine[-1:]
            rest = (await two.get("/v1/jobs", params={"cursor": page["next_cursor"], "user_id": "u"})).json()
            assert {job["id"] for job in rest["data"]} <= {theirs}
            assert [job["id"] for job in (await two.get("/v1/jobs")).json()["data"]] == [theirs]

    async def test_the_same_key_is_another_job(self, gateway: Served) -> None:
        async with as_tenant(gateway, "one") as one, as_tenant(gateway, "two") as two:
            headers = {"idempotency-key": "k"}
            first = await one.post("/v1/jobs", json={"prompt": "x"}, headers=headers)
            second = await two.post("/v1/jobs", json={"prompt": "another body"}, headers=headers)
            assert (first.status_code, second.status_code) == (202, 202)
            assert first.json()["id"] != second.json()["id"]
            assert (await one.post("/v1/jobs", json={"prompt": "x"}, headers=headers)).json()["id"] == first.json()[
                "id"
            ]

    async def test_a_client_cannot_name_its_tenant(self, gateway: Served) -> None:
        async with as_tenant(gateway, "one") as one, as_tenant(gateway, "two") as two:
            headers = {"x-tenant": "two", "penstock.tenant": "two", "x-penstock-tenant": "two"}
            id = (await one.post("/v1/jobs", json={"prompt": "x"}, headers=headers)).json()["id"]
            assert (await two.get(f"/v1/jobs/{id}")).status_code == 404


class TestHosts:
    @pytest.mark.parametrize(
        ("host", "known"),
        [
            ("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:1", True), ("[::1]", True), ("[::1]:8000", True),
            ("evil.example", False), ("localhost.evil.example", False), ("evil.example:8000", False), ("", False),
            ("127.0.0.1.nip.io", False), ("localhost:8000@evil", False), ("[::2]:8000", False), ("127.0.0.2", False),
        ],
    )  # fmt: skip
    async def test_only_our_own_names(self, gateway: Served, host: str, known: bool) -> None:
        transport = httpx.ASGITransport(create_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            reply = await http.get("/healthz", headers={"host": host})
        assert reply.status_code == (200 if known else 400)


class TestBugs:
    async def test_a_bug_is_a_500_in_the_one_shape(self, gateway: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """And nothing of it is told: its text could be anybody's data."""

        async def broken(*arguments: object) -> None:
            raise RuntimeError("secret detail")

        monkeypatch.setattr(gateway.broker, "get", broken)
        transport = httpx.ASGITransport(create_app(gateway), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            reply = await http.get("/v1/jobs/x")
        assert reply.status_code == 500
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"]

    async def test_a_body_that_never_ends_is_given_up_when_the_client_goes(self, gateway: Served) -> None:
        sent: list[object] = []
        messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> object:
            return messages.pop(0)

        async def send(message: object) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/jobs", "raw_path": b"/v1/jobs", "query_string": b"",
            "headers": [(b"host", b"localhost")], "scheme": "http", "server": ("localhost", 80), "root_path": "",
        }  # fmt: skip
        async with asyncio.timeout(30):
            await create_app(gateway)(scope, receive, send)  # type: ignore[arg-type]
        assert (await gateway.broker.stats()).queued == 0


class TestRepeats:
    """A request that is sent again under its key finds its job, also when it could not be accepted anew by now."""

    @pytest.fixture
    async def broker(self, tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
        broker = EmbeddedBroker(tmp_path, clock=ManualClock(), policy=QueuePolicy(result_ttl=100))
        await broker.open()
        yield broker
        await broker.close()

    @contextlib.asynccontextmanager
    async def client(
        self, broker: EmbeddedBroker, *models: str
    ) -> AsyncIterator[tuple[Served, httpx.AsyncClient, dict[str, str]]]:
        gateway = Served(broker, GatewayConfig(models=models))
        async with gateway.running(), as_tenant(gateway, "t") as http:
            yield gateway, http, {"idempotency-key": "k"}

    @pytest.mark.parametrize("stream", [False, True])
    async def test_when_the_response_before_it_has_expired(self, broker: EmbeddedBroker, stream: bool) -> None:
        clock: Any = broker._clock
        async with self.client(broker, "m") as (gateway, http, key):
            route = "/v1/responses"
            first = (await http.post(route, json={"model": "m", "input": "x", "background": True})).json()["id"]
            await work(gateway)
            clock.advance(60)
            body = {"model": "m", "input": "y", "previous_response_id": first, "stream": stream}
            asking = asyncio.create_task(http.post(route, json=body, headers=key))
            async with asyncio.timeout(30):
                while not (await broker.stats()).queued:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await work(gateway)
            second = await asking
            clock.advance(60)
            await broker.sweep()
            assert (await http.get(f"{route}/{first}")).json()["error"]["code"] == "expired_result"

            again = await http.post(route, json=body, headers=key)
            assert (again.status_code, again.text) == (200, second.text)
            assert again.headers["x-penstock-job"] == second.headers["x-penstock-job"]
            for other, headers, status, code in (
                (body | {"input": "z"}, key, 422, "idempotency_mismatch"),
                (body, {"idempotency-key": "new"}, 400, "previous_response_not_found"),
                (body, {}, 400, "previous_response_not_found"),
            ):
                refused = await http.post(route, json=other, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert len((await broker.list(Query(tenant="t"))).jobs) == 1

    async def test_when_its_model_is_served_no_more(self, broker: EmbeddedBroker) -> None:
        body = {"model": "m", "prompt": "x"}
        async with self.client(broker, "m") as (_, http, key):
            job = (await http.post("/v1/jobs", json=body, headers=key)).json()["id"]
        async with self.client(broker, "other") as (_, http, key):
            again = await http.post("/v1/jobs", json=body, headers=key)
            assert (again.status_code, again.json()["id"]) == (202, job)
            mismatch = await http.post("/v1/jobs", json=body | {"prompt": "y"}, headers=key)
            assert mismatch.status_code == 422
            unknown = await http.post("/v1/jobs", json=body, headers={"idempotency-key": "new"})
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


class TestOrigins:
    async def ask(self, gateway: Served, method: str = "POST", **headers: str) -> httpx.Response:
        async with as_tenant(gateway, "one") as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(
                method, "/v1/jobs", json={"prompt": "x"} if method == "POST" else None, headers=named
            )

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"sec_fetch_site": "same-origin", "origin": "http://localhost"},
            {"sec_fetch_site": "none"},
            {"origin": "http://localhost"},
            # Behind a proxy that changes Host, a browser's own word counts.
            {"sec_fetch_site": "same-origin", "origin": "https://llm.example"},
        ],
    )
    async def test_its_own_pages_and_other_clients_may(self, gateway: Served, headers: dict[str, str]) -> None:
        assert (await self.ask(gateway, **headers)).status_code == 202

    @pytest.mark.parametrize(
        "headers",
        [
            {"sec_fetch_site": "cross-site"},
            {"sec_fetch_site": "same-site", "origin": "http://localhost"},
            {"origin": "https://elsewhere.example"},
            {"origin": "http://localhost:3000"},
            {"origin": "null"},
        ],
    )
    async def test_pages_of_others_may_change_nothing(self, gateway: Served, headers: dict[str, str]) -> None:
        reply = await self.ask(gateway, **headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
        reading = await self.ask(gateway, "GET", **headers)
        assert reading.status_code == 200
        assert reading.json()["data"] == []
        assert "access-control-allow-origin" not in reading.headers

    async def test_those_that_are_allowed_may(self, gateway: Served) -> None:
        gateway.config = msgspec.structs.replace(gateway.config, allowed_origins=("https://app.example",))
        headers = {"sec_fetch_site": "cross-site", "origin": "https://app.example"}
        reply = await self.ask(gateway, **headers)
        assert reply.status_code == 202
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-penstock-job" in reply.headers["access-control-expose-headers"].lower()
        asked = await self.ask(gateway, "OPTIONS", access_control_request_method="DELETE", **headers)
        assert asked.status_code == 200
        assert "DELETE" in asked.headers["access-control-allow-methods"]
        other = {"sec_fetch_site": "cross-site", "origin": "https://app.example.evil"}
        assert (await self.ask(gateway, **other)).status_code == 403

    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    @pytest.mark.parametrize("allowed", ["https://app.example", "*"])
    async def test_those_of_public_addresses_may_reach_a_local_one(
        self, gateway: Served, allowed: str, method: str
    ) -> None:
        """Chrome asks for it in the preflight (Private Network Access)."""
        gateway.config = msgspec.structs.replace(gateway.config, allowed_origins=(allowed,))
        asking = {
            "origin": "https://app.example",
            "access_control_request_method": method,
            "access_control_request_headers": "content-type, x-api-key",
        }
        reply = await self.ask(gateway, "OPTIONS", access_control_request_private_network="true", **asking)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-private-network"] == "true"
        assert reply.headers["access-control-allow-origin"] == allowed
        assert "x-api-key" in reply.headers["access-control-allow-headers"]
        plain = await self.ask(gateway, "OPTIONS", **asking)
        assert "access-control-allow-private-network" not in plain.headers

    @pytest.mark.parametrize(
        ("origin", "method", "says"),
        [
            ("https://evil.example", "POST", "origin"),
            ("null", "GET", "origin"),
            ("https://app.example", "PATCH", "method"),
        ],
    )
    async def test_a_refused_preflight_has_the_one_error_shape(
        self, gateway: Served, origin: str, method: str, says: str
    ) -> None:
        gateway.config = msgspec.structs.replace(gateway.config, allowed_origins=("https://app.example",))
        headers = {"access-control-request-method": method, "access-control-request-private-network": "true"}
        metrics = Metrics()
        app = create_app(gateway, middleware=[metrics.http])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            reply = await http.options("/v1/jobs", headers={"origin": origin, **headers})
        error = check_error(reply, 403, "forbidden")
        assert says in error["message"]
        assert "allowed_origins" in error["message"]
        assert "access-control-allow-private-network" not in reply.headers
        assert b'llm_gateway_errors_total{code="forbidden"} 1.0' in metrics.render()[0]


class TestContentFilter:
    """An upstream server's filter ended the reply: every API has its word for it."""

    @pytest.mark.parametrize(
        ("path", "body", "says"),
        [
            ("/v1/generate", {"prompt": "x"}, lambda told: told["finish_reason"]),
            ("/v1/completions", {"prompt": "x"}, lambda told: told["choices"][0]["finish_reason"]),
            ("/v1/chat/completions", {"messages": CHAT}, lambda told: told["choices"][0]["finish_reason"]),
            ("/v1/responses", {"input": "x"}, lambda told: told["incomplete_details"]["reason"]),
        ],
    )
    async def test_it_is_told(self, gateway: Served, path: str, body: Any, says: Any) -> None:
        told = await self._ask(gateway, path, body)
        assert says(json.loads(told)) == "content_filter"
        assert b"content_filter" in await self._ask(gateway, path, {**body, "stream": True})

    async def test_anthropic_calls_it_refusal(self, gateway: Served) -> None:
        body = {"messages": CHAT, "max_tokens": 5}
        assert json.loads(await self._ask(gateway, "/v1/messages", body))["stop_reason"] == "refusal"
        assert b'"stop_reason":"refusal"' in await self._ask(gateway, "/v1/messages", {**body, "stream": True})

    async def test_a_response_is_incomplete(self, gateway: Served) -> None:
        told = json.loads(await self._ask(gateway, "/v1/responses", {"input": "x"}))
        assert told["status"] == "incomplete"
        assert b"event: response.incomplete" in await self._ask(
            gateway, "/v1/responses", {"input": "x", "stream": True}
        )

    async def _ask(self, gateway: Served, path: str, body: dict[str, Any]) -> bytes:
        async with as_tenant(gateway, "t") as http:
            asking = asyncio.create_task(http.post(path, json={"model": "m", **body}))
            (lease,) = await gateway.broker.claim(WorkerInfo(id="w", slots=1), ["m"], 1, 30)
            finish = Finish(("content_filter",))
            await gateway.broker.append([Append(lease.key, 1, [1, 2], ["a", "b"], finish=finish)])
            reply = await asking
            assert reply.status_code == 200, reply.text
            return reply.content
