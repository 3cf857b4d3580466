"""JSON replies and tools through the official ``openai`` SDK, on the model in the box: its words mean little, their
form is what counts."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from penstock.testing.engine.driver import PERSON, assert_obeys
from tests.support.server import PATIENCE, Server, model

ASK: Any = [{"role": "user", "content": "What is a river?"}]
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
LOOK_UP: Any = {"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": PERSON}}
WAIT: Any = {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "maxProperties": 0}}}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("box"), models=[model("millrace", engine="openvino"), model("synthetic")])
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def sdk(box: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{box.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


class Colour(pydantic.BaseModel):
    name: Literal["red", "green"]
    shades: list[Literal["light", "dark"]] = pydantic.Field(max_length=2)


class Flag(pydantic.BaseModel):
    left: Colour
    right: Colour


def test_a_pydantic_model_is_parsed(sdk: openai.OpenAI) -> None:
    reply = sdk.chat.completions.parse(model="millrace", messages=ASK, response_format=Flag, max_tokens=300)
    assert isinstance(reply.choices[0].message.parsed, Flag)
    assert reply.choices[0].finish_reason == "stop"


def test_a_streamed_schema_with_choices(sdk: openai.OpenAI) -> None:
    texts = ["", ""]
    for chunk in sdk.chat.completions.create(
        model="millrace", messages=ASK, response_format=SCHEMA, n=2, seed=1, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for text in texts:
        assert_obeys(text)


def test_a_json_object(sdk: openai.OpenAI) -> None:
    reply = sdk.chat.completions.create(
        model="millrace", messages=ASK, response_format={"type": "json_object"}, seed=1, max_tokens=64
    )
    assert (reply.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_call_that_must_be_made_and_its_answer(sdk: openai.OpenAI, choice: Any) -> None:
    tools = [LOOK_UP] if choice == "required" else [LOOK_UP, WAIT]
    reply = sdk.chat.completions.create(
        model="millrace", messages=ASK, tools=tools, tool_choice=choice, seed=2, max_tokens=200
    )
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.function.name == "look_up"
    assert_obeys(call.function.arguments)
    answered = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "It is Ann."}]
    last = sdk.chat.completions.create(model="millrace", messages=answered, tools=tools, max_tokens=8)
    assert last.usage is not None
    assert reply.usage is not None
    assert last.usage.prompt_tokens > reply.usage.prompt_tokens


def test_a_streamed_call(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(
        model="millrace", messages=ASK, tools=[LOOK_UP], tool_choice="required", seed=3, max_tokens=200
    ) as stream:
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "content.delta" not in kinds
    assert completion.choices[0].finish_reason == "tool_calls"
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.id.startswith("call_")
    assert_obeys(call.function.arguments)


def blocks(server: Server, body: dict[str, Any], key: str, after: str | None = None) -> list[tuple[str | None, str]]:
    """(id, data) of each event of a streamed chat."""
    headers = {"idempotency-key": key} | ({"last-event-id": after} if after else {})
    reply = httpx.post(
        f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE, trust_env=False
    )
    reply.raise_for_status()
    found = []
    for block in reply.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in lines:
            found.append((lines.get("id"), lines["data"]))
    return found


def joined(events: list[tuple[str | None, str]]) -> tuple[str, str, list[str], str | None]:
    """(content, arguments, ids of calls, finish reason) of what a reader saw."""
    content, arguments, ids, reason = "", "", [], None
    for _, data in events:
        for choice in json.loads(data)["choices"] if data != "[DONE]" else []:
            content += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                ids += [call["id"]] if "id" in call else []
                arguments += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return content, arguments, ids, reason


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_resume_anywhere_in_a_call_is_exact(box: Server, choice: str) -> None:
    body = {"model": "millrace", "messages": ASK, "tools": [LOOK_UP], "tool_choice": choice, "seed": 4, "stream": True}
    body["max_tokens"] = 200
    key = f"resume-{choice}"
    whole = blocks(box, body, key)
    seen = [i for i, (id, _) in enumerate(whole) if id is not None]
    assert len(seen) > 1
    for i in seen[:-1]:
        rest = blocks(box, body, key, after=whole[i][0])
        assert joined(whole[: i + 1] + rest) == joined(whole)
        assert rest[-1] == whole[-1]


def test_the_job_tells_its_calls(box: Server) -> None:
    body = {"messages": ASK, "tools": [LOOK_UP], "tool_choice": "required", "seed": 5, "max_tokens": 200}
    reply = httpx.post(f"{box.url}/v1/generate", json=body, timeout=PATIENCE, trust_env=False).json()
    (call,) = reply["tool_calls"]
    assert_obeys(call["function"]["arguments"])
    job = box.get(f"/v1/jobs/{reply['job_id']}").json()
    assert job["finish_reason"] == "tool_calls"
    assert job["result"]["tool_calls"] == [call]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_request"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_request"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format",
            "invalid_request",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_request"),
        ({"tools": [WAIT, WAIT]}, "tools", "invalid_request"),
        ({"tools": [WAIT] * 129}, "tools", "invalid_request"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_request"),
        (
            {"tools": [WAIT], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "invalid_request",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported"),
        ({"model": "synthetic", "response_format": {"type": "json_object"}}, "response_format", "unsupported"),
        ({"model": "synthetic", "tools": [WAIT]}, "tools", "unsupported"),
    ],
)
def test_what_is_refused(sdk: openai.OpenAI, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(**{"model": "millrace", "messages": ASK, **fields})
    assert (caught.value.param, caught.value.code) == (param, code)


def test_an_engine_that_dies_in_the_middle_leaves_valid_json(box: Server, sdk: openai.OpenAI) -> None:
    items = {"type": "array", "items": {"enum": ["sun", "moon", "star"]}, "minItems": 150, "maxItems": 150}
    schema: Any = {"type": "object", "properties": {"sky": items}, "required": ["sky"], "additionalProperties": False}
    text, killed = "", False
    for chunk in sdk.chat.completions.create(
        model="millrace",
        messages=ASK,
        response_format={"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}},
        max_tokens=900,
        stream=True,
    ):
        text += chunk.choices[0].delta.content or ""
        if not killed and len(text) > 20:
            killed = True
            for pid in box.engine_pids():
                os.kill(pid, signal.SIGKILL)
    assert killed
    value = json.loads(text)
    assert len(value["sky"]) == 150
    assert set(value["sky"]) <= {"sun", "moon", "star"}
