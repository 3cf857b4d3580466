"""The clients' harness: what its perfect model answers, what is pinned, and what is read of the clients' reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from tests.clients import scripted
from tests.clients.__main__ import CLIENTS, Client, Outcome, is_documented, read_report
from tests.clients.scripted import CHAT, CONTEXT, EMBED, Named, instance, matching
from tests.support.compliance import page_rows

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}},
    {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["b"]},
    {"type": "array", "items": {"enum": ["cat", "dog"]}, "minItems": 2},
    {"$defs": {"a": {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"},
    {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 3, "maximum": 4}]},
    {"allOf": [{"type": "object", "properties": {"a": {"const": 1}}}, {"required": ["a"]}]},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "string", "pattern": "^[a-c]{2,}-[0-9]+$"},
]
TOOL = {
    "name": "weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def model() -> TestClient:
    return TestClient(scripted.app)


def talk(model: TestClient, asked: str, **fields: Any) -> dict[str, Any]:
    body = {"model": CHAT, "messages": [{"role": "user", "content": asked}], **fields}
    answer: dict[str, Any] = model.post("/v1/chat/completions", json=body).json()["choices"][0]
    return answer


class TestPerfectModel:
    @pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
    def test_what_it_fills_obeys_the_schema(self, schema: dict[str, Any]) -> None:
        jsonschema.validate(instance(schema, Named("Jason is 25 and has a dog")), schema)

    def test_it_takes_values_from_the_text(self) -> None:
        assert instance(SCHEMAS[0], Named("Extract: Jason is 25 years old.")) == {"name": "Jason", "age": 25}

    @pytest.mark.parametrize("pattern", ["[A-Z]{2}-[0-9]{3}", "(sunny|rainy)", r"[+-]?\d+", "a*b?c", '"[^"]+"'])
    def test_what_it_writes_matches_the_pattern(self, pattern: str) -> None:
        assert re.fullmatch(pattern, matching(pattern))

    def test_it_says_what_it_is_told(self, model: TestClient) -> None:
        answer = talk(model, "Say 'one two three'.")
        assert (answer["message"]["content"], answer["finish_reason"]) == ("one two three", "stop")

    def test_it_calls_the_tool_that_is_asked_for_and_reports_its_result(self, model: TestClient) -> None:
        tools = [
            {"type": "function", "function": {"name": "clock", "parameters": {}}},
            {"type": "function", "function": TOOL},
        ]
        asked = "What is the weather in Paris?"
        message = talk(model, asked, tools=tools)["message"]
        assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"city": "Paris"}']
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
        answer = talk(model, asked, tools=tools, messages=[{"role": "user", "content": asked}, message, result])
        assert answer["message"]["content"] == "The tool says: sunny"

    def test_it_thinks_what_it_is_told_to_think(self, model: TestClient) -> None:
        asked = "Think 'a river runs'. Say 'one two'."
        message = talk(model, asked)["message"]
        assert (message["reasoning"], message["content"]) == ("a river runs", "one two")
        body = {"model": CHAT, "messages": [{"role": "user", "content": asked}], "stream": True}
        lines = model.post("/v1/chat/completions", json=body).text.split("\n\n")
        deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
        assert [each["reasoning"] for each in deltas if "reasoning" in each] == ["a", " river", " runs"]

    def test_it_calls_none_that_has_nothing_to_do_with_it(self, model: TestClient) -> None:
        tools = [{"type": "function", "function": TOOL}]
        assert talk(model, "Say 'hello'.", tools=tools)["finish_reason"] == "stop"

    def test_it_keeps_to_limits(self, model: TestClient) -> None:
        assert talk(model, "Say 'one two three'.", max_tokens=2)["message"]["content"] == "one two"
        assert talk(model, "Say 'one two three'.", stop=[" three"])["stop_reason"] == " three"
        refused = model.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "word " * CONTEXT}], "model": CHAT}
        )
        assert refused.status_code == 400
        assert "maximum context length" in refused.json()["error"]["message"]

    def test_a_stream_says_the_same_token_by_token(self, model: TestClient) -> None:
        body = {"model": CHAT, "messages": [{"role": "user", "content": "Say 'one two three'."}], "stream": True}
        lines = model.post("/v1/chat/completions", json=body).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
        assert texts == ["", "one", " two", " three", None]

    def test_it_finds_the_right_answer_likeliest(self, model: TestClient) -> None:
        question = "What is the capital of Italy?\nAnswer:"
        prompts = [f"{question} {city}" for city in ("Paris", "Rome")]
        body = {"model": CHAT, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 0}
        choices = model.post("/v1/completions", json=body).json()["choices"]
        assert [choice["text"] for choice in choices] == prompts
        paris, rome = (choice["logprobs"]["token_logprobs"] for choice in choices)
        assert paris[0] is None
        assert rome[-1] > paris[-1]

    def test_texts_that_share_words_are_near(self, model: TestClient) -> None:
        inputs = ["the fox of the valley", "a fox in the valley", "quarterly figures"]
        data = model.post("/v1/embeddings", json={"model": EMBED, "input": inputs}).json()["data"]
        fox, same, other = (each["embedding"] for each in data)
        assert sum(map(float.__mul__, fox, same)) > sum(map(float.__mul__, fox, other))


class TestPins:
    @pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
    def test_everything_is_at_one_version(self, client: Client) -> None:
        requirements, package = client.folder / "requirements.txt", client.folder / "package.json"
        assert requirements.exists() or package.exists()
        if requirements.exists():
            lines = [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
            assert [line for line in lines if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.!+-]+", line)] == []
        if package.exists():
            wanted = json.loads(package.read_text())["dependencies"]
            locked = json.loads((client.folder / "package-lock.json").read_text())["packages"]
            assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted

    def test_the_page_has_every_client_at_its_version_and_no_other(self) -> None:
        told = {row[0]: row[1] for row in page_rows() if len(row) == 6 and row[0] not in ("client", "---")}
        assert told == {client.name: client.version for client in CLIENTS}


class TestReports:
    def test_pytests_and_nodes(self, tmp_path: Path) -> None:
        report = tmp_path / "report.xml"
        report.write_text(
            '<testsuites><testsuite><testcase classname="asks.TestChat" name="test_a[x]"/>'
            '<testcase classname="asks" name="test_b"><failure message="assert 1 == 2&#10;more">…</failure></testcase>'
            '<testcase classname="asks" name="test_c"><skipped type="pytest.skip" message="no time"/></testcase>'
            '<testcase classname="asks" name="test_d"><error message="of its fixture"/></testcase>'
            "</testsuite></testsuites>"
        )
        assert read_report("one", report) == [
            Outcome("one", "TestChat::test_a[x]", "passed"),
            Outcome("one", "test_b", "failed", "assert 1 == 2"),
            Outcome("one", "test_c", "skipped", "no time"),
            Outcome("one", "test_d", "failed", "of its fixture"),
        ]
        report.write_text(
            '<testsuites><testcase name="chat: a text" classname="test"/><testcase name="chat: more" classname="test">'
            '<failure type="testCodeFailure" message="Invalid JSON response">…</failure></testcase></testsuites>'
        )
        assert read_report("two", report) == [
            Outcome("two", "chat: a text", "passed"),
            Outcome("two", "chat: more", "failed", "Invalid JSON response"),
        ]

    def test_what_the_page_names_is_by_client_test_and_result(self) -> None:
        named = Outcome("langchain", "TestChatOpenAI::test_pdf_inputs", "skipped")
        assert is_documented(named)
        assert not is_documented(Outcome("langchain", "TestChatOpenAI::test_pdf_inputs", "failed"))
        assert not is_documented(Outcome("litellm", "TestChatOpenAI::test_pdf_inputs", "skipped"))
        assert not is_documented(Outcome("langchain", "TestChatOpenAI::test_invoke", "skipped"))
