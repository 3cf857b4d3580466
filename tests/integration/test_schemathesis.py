"""schemathesis reads ``/openapi.json`` and asks what it allows, and what it does not: nothing breaks the server, and
every answer is one that the document describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
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

from penstock.gateway import openapi
from tests.support.server import PATIENCE, Server, model, wait_for

OPERATIONS: list[APIOperation[Any, Any, Any, Any, Any]] = [
    found.ok() for found in schemathesis.openapi.from_dict(openapi.document()).get_all_operations()
]
#: Streams that never end by themselves.
ENDLESS = {"GET /v1/events", "GET /events"}
EXAMPLES = 25


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that honours nearly every field, one that refuses many, and one that is on demand."""
    models = [model("millrace", engine="openvino"), model()]
    server = Server(tmp_path_factory.mktemp("box"), models=models, settings={"disconnect_grace": 0.3})
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def things(box: Server) -> dict[str, list[str]]:
    """What paths may name, besides what schemathesis invents."""
    with httpx.Client(base_url=box.url, trust_env=False, timeout=PATIENCE) as http:
        ended = http.post("/v1/jobs", json={"prompt": "a", "max_tokens": 3}).json()["id"]
        cancelled = http.post("/v1/jobs", json={"prompt": "a", "max_tokens": 3}).json()["id"]
        http.post(f"/v1/jobs/{cancelled}/cancel")
        wait_for(lambda: http.get(f"/v1/jobs/{ended}").json()["ended_at"], "the job's end")
    return {"id": [ended, cancelled], "model": ["millrace", "synthetic"]}


def bounded(body: Any) -> None:
    """What schemathesis asks for at random would take hours to generate, or no time at all."""
    if not isinstance(body, dict):
        return
    for field, limit in (("max_tokens", 8), ("max_completion_tokens", 8), ("max_output_tokens", 8), ("n", 2)):
        if isinstance(body.get(field), int) and body[field] > limit:
            body[field] = limit
    if isinstance(body.get("deadline"), int | float) and 0 < body["deadline"] < PATIENCE:
        body["deadline"] = PATIENCE  # a passed deadline is a 504, and right


def cases() -> Iterator[Any]:
    """Each operation with what its schema allows, and with what it does not (any text is allowed in a path)."""
    for operation in OPERATIONS:
        if operation.label not in ENDLESS:
            yield pytest.param(operation, GenerationMode.POSITIVE, id=operation.label)
            if operation.body or operation.query or operation.headers:
                yield pytest.param(operation, GenerationMode.NEGATIVE, id=f"not {operation.label}")


@pytest.mark.parametrize(("operation", "mode"), list(cases()))
def test_every_answer_is_as_described(
    operation: APIOperation[Any, Any, Any, Any, Any], mode: GenerationMode, box: Server, things: dict[str, list[str]]
) -> None:
    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
        response_schema_conformance, allow_header_conformance, negative_data_rejection,
    ]  # fmt: skip

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def ask(case: Case, data: st.DataObject) -> None:
        for name, known in things.items():
            if name in case.path_parameters and mode is GenerationMode.POSITIVE:
                case.path_parameters[name] = data.draw(st.sampled_from([*known, case.path_parameters[name]]))
        bounded(case.body)
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = data.draw(st.sampled_from([*things["model"], case.body["model"]]))
        response = case.call(base_url=box.url, timeout=PATIENCE)
        if response.status_code == 503 and b'"no_vllm_worker"' in response.content:
            return  # there is none
        # A body that is too large is refused before anybody looks into it, which the negative check does not know.
        known = [check for check in checks if response.status_code != 413 or check is not negative_data_rejection]
        case.validate_response(response, checks=known)

    ask()
