"""schemathesis reads ``/openapi.json`` and asks what it allows, and what it does not: nothing breaks the server, and
every answer is one that the document describes.

What it invents at random is mostly refused. So half of what the document allows is straightened: it names things that
exist and has what the route needs, and some of what was invented besides. Every operation must succeed at times.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.conformance import check_event, document
from tests.support.encoder import encoder
from tests.support.server import PATIENCE, Server, model, wait_for
from tests.support.sse import Parser

OPERATIONS: list[APIOperation[Any, Any, Any, Any, Any]] = [
    found.ok() for found in schemathesis.openapi.from_dict(document()).get_all_operations()
]
#: Streams that never end by themselves.
ENDLESS = {"GET /v1/events", "GET /events"}
#: What this server has no success for: there is no vLLM here, and no compaction anywhere.
REFUSED = {"POST /generate_vllm", "POST /v1/responses/compact"}

CHAT = [{"role": "user", "content": "Hello."}]
PROMPT = {"prompt": "The mill", "max_tokens": 3}
SAMPLE = st.sampled_from(["millrace", "synthetic"]).map(lambda name: {"model": name, "max_tokens": 3})
#: What a body of each route must have; what schemathesis invented besides is kept in part.
NEEDED: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/v1/jobs": st.sampled_from([PROMPT, {"messages": CHAT, "max_tokens": 3}]),
    "/v1/generate": st.sampled_from([PROMPT, {"messages": CHAT, "max_tokens": 3}]),
    "/v1/chat/completions": SAMPLE.map(lambda body: {**body, "messages": CHAT}),
    "/v1/completions": SAMPLE.map(lambda body: {**body, "prompt": "The mill"}),
    "/v1/responses": st.just({"model": "millrace", "input": "Hello.", "max_output_tokens": 3}),
    "/v1/responses/input_tokens": st.just({"model": "millrace", "input": "Hello."}),
    "/v1/embeddings": st.sampled_from(["water", ["water", "mill"], [5, 6]]).map(
        lambda texts: {"model": "encoder", "input": texts}
    ),
    "/tokenize": st.sampled_from([{"prompt": "The mill"}, {"messages": CHAT}]),
    "/detokenize": st.just({"tokens": [5, 6]}),
    "/v1/messages": SAMPLE.map(lambda body: {**body, "messages": CHAT}),
    "/v1/messages/count_tokens": st.just({"model": "millrace", "messages": CHAT}),
    "/v1/files": st.just({"file": b"{}", "purpose": "batch"}),
    "/v1/batches": st.just({"endpoint": "/v1/completions", "completion_window": "24h"}),
    "/v1/models/{model}/load": st.just({}),
    "/v1/models/{model}/unload": st.just({}),
    "/submit_job": st.just(PROMPT),
    "/generate": st.sampled_from([PROMPT, {"prompts": ["The mill", "A fox"], "max_tokens": 3}]),
    "/basic_generate": st.sampled_from([PROMPT, {"prompts": ["The mill", "A fox"], "max_tokens": 3}]),
    "/generate_stream": st.just(PROMPT),
    "/api/v1/req": st.just(PROMPT),
    "/generate_vllm": st.just({"prompts": ["The mill"]}),
}
#: Of which a body has one.
ALTERNATIVES = {"prompt", "prompts", "messages", "input"}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that honours nearly every field, one that refuses many, and one that embeds."""
    folder: Path = tmp_path_factory.mktemp("box")
    embeds = model("encoder", engine="openvino", path=str(encoder(folder / "encoder")))
    models = [model("millrace", engine="openvino"), model(), embeds]
    server = Server(folder, models=models, settings={"disconnect_grace": 0.3})
    try:
        yield server.start()
    finally:
        server.stop()


class Things:
    """What paths may name: of each kind one that has ended, and new ones."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.old = {kind: self.new(kind) for kind in ("jobs", "responses", "files", "batches")}
        for kind, ends in (("jobs", "completed"), ("responses", "incomplete"), ("batches", "completed")):
            path = f"/v1/{kind}/{self.old[kind]}"
            wait_for(lambda path=path, ends=ends: http.get(path).json()["status"] == ends, f"one of the {kind}")

    @staticmethod
    def kind(path: str) -> str:
        return path.split("/")[2] if path.startswith("/v1/") else "jobs"

    def new(self, kind: str) -> str:
        body: dict[str, Any] = {}
        if kind == "files":
            line = (
                b'{"custom_id":"1","method":"POST","url":"/v1/completions","body":{"model":"synthetic","prompt":"a"}}'
            )
            form = {"data": {"purpose": "batch"}, "files": {"file": ("lines.jsonl", line)}}
            return str(self._http.post("/v1/files", **form).raise_for_status().json()["id"])  # type: ignore[arg-type]
        if kind == "jobs":
            body = PROMPT
        elif kind == "responses":
            body = {"model": "millrace", "input": "Hello.", "background": True, "max_output_tokens": 3}
        elif kind == "batches":
            body = {"input_file_id": self.new("files"), "endpoint": "/v1/completions", "completion_window": "24h"}
        return str(self._http.post(f"/v1/{kind}", json=body).raise_for_status().json()["id"])


@pytest.fixture(scope="module")
def things(box: Server) -> Iterator[Things]:
    with httpx.Client(base_url=box.url, trust_env=False, timeout=PATIENCE) as http:
        yield Things(http)


def straighten(case: Case, things: Things, data: st.DataObject) -> None:
    """Make it a request that has what its route needs, and some of what schemathesis invented."""

    def some(invented: Any, most: int) -> dict[str, Any]:
        kept = data.draw(st.sets(st.sampled_from(sorted(invented)), max_size=most)) if invented else ()
        return {name: invented[name] for name in kept}

    path = case.operation.path
    if "id" in case.path_parameters:
        kind = things.kind(path)
        lasting = case.operation.method != "delete" and data.draw(st.booleans())
        case.path_parameters["id"] = things.old[kind] if lasting else things.new(kind)
    if "model" in case.path_parameters:
        case.path_parameters["model"] = data.draw(st.sampled_from(["millrace", "synthetic", "encoder"]))
    case.query = some(case.query, 1)
    case.headers = some(case.headers, 1)
    if path == "/submit_job":
        case.query = {"user_id": "ann"}
    if case.operation.body:
        invented = some(case.body, 3) if isinstance(case.body, dict) else {}
        kept = {name: value for name, value in invented.items() if name not in ALTERNATIVES}
        case.body = {**kept, **data.draw(NEEDED[path])}
        if path == "/v1/batches":
            case.body["input_file_id"] = things.new("files")


def bounded(body: Any) -> None:
    """What schemathesis asks for at random would take hours to generate, or no time at all."""
    if not isinstance(body, dict):
        return
    for field, limit in (("max_tokens", 8), ("max_completion_tokens", 8), ("max_output_tokens", 8), ("n", 2)):
        if type(body.get(field)) in (int, float) and body[field] > limit:
            body[field] = limit
    if type(body.get("deadline")) in (int, float) and 0 < body["deadline"] < PATIENCE:
        body["deadline"] = PATIENCE  # a passed deadline is a 504, and right


def writable(form: Any) -> bool:
    """Whether a form can say it: in one, a list is its items, so that none is no field, and one is no list."""
    return not isinstance(form, dict) or not any(isinstance(value, list) and len(value) < 2 for value in form.values())


def cases() -> Iterator[Any]:
    """Each operation with what its schema allows, and with what it does not (any text is allowed in a path)."""
    for operation in OPERATIONS:
        if operation.label not in ENDLESS:
            yield pytest.param(operation, GenerationMode.POSITIVE, id=operation.label)
            if operation.body or operation.query or operation.headers:
                yield pytest.param(operation, GenerationMode.NEGATIVE, id=f"not {operation.label}")


@pytest.mark.hypothesis  # also with more examples: make test-long
@pytest.mark.parametrize(("operation", "mode"), list(cases()))
def test_every_answer_is_as_described(
    operation: APIOperation[Any, Any, Any, Any, Any], mode: GenerationMode, box: Server, things: Things
) -> None:
    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
        response_schema_conformance, allow_header_conformance,
    ]  # fmt: skip
    if mode is GenerationMode.NEGATIVE:
        checks.append(negative_data_rejection)

    @settings(
        max_examples=max(8, settings().max_examples // 10), derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def ask(case: Case, data: st.DataObject) -> None:
        if mode is GenerationMode.POSITIVE and data.draw(st.booleans()):
            straighten(case, things, data)
        bounded(case.body)
        assume(mode is GenerationMode.POSITIVE or case.media_type != "multipart/form-data" or writable(case.body))
        response = case.call(base_url=box.url, timeout=PATIENCE)
        succeeded.append(response.status_code < 300)
        if response.status_code == 503 and b'"no_vllm_worker"' in response.content:
            return  # there is none
        # A body that is too large is refused before anybody looks into it, which the negative check does not know.
        known = [check for check in checks if response.status_code != 413 or check is not negative_data_rejection]
        case.validate_response(response, checks=known)
        if response.headers["content-type"][0].startswith("text/event-stream"):
            for event in Parser().feed(response.content):
                check_event(operation.method, case.formatted_path, event.event, event.text)

    succeeded: list[bool] = []
    ask()
    assert any(succeeded) or mode is GenerationMode.NEGATIVE or operation.label in REFUSED
