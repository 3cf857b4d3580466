"""Thoughts and calls of many families, as the official SDKs read them from one server: streamed and in one piece, on
every dialect, and sent back in the next turn."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.support.families import ANSWER, CALL, FAMILIES, JSON, TEXT, THOUGHT, TOOLS
from tests.support.server import PATIENCE, Server, model
from tests.support.tools import NODE_PROJECT, node

#: Of each way to write thoughts and calls one.
NAMES = ("qwen3", "glm", "mistral", "deepseek", "command-r", "gpt-oss")
PROGRAM = Path(__file__).with_name("reasoning_node.test.js")
NODE_TESTS = re.findall(r'^test\("(.+)",', PROGRAM.read_text(), re.MULTILINE)

ASK: Any = [{"role": "user", "content": CALL}]
CHAT_TOOLS: Any = [
    {"type": "function", "function": {"name": each.name, "parameters": each.parameters}} for each in TOOLS
]
RESPONSE_TOOLS: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in CHAT_TOOLS]
MESSAGE_TOOLS: Any = [{"name": each.name, "input_schema": each.parameters} for each in TOOLS]
#: Nothing is required: what a schema leaves no choice in is not the model's to write.
SCHEMA = {"type": "object", "properties": {"turns": {"type": "boolean"}, "why": {"type": "string"}}}
LIMIT = 300
#: So few tokens that the thought is not over.
CUT = 8


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("families")
    made = {name: FAMILIES[name].make(folder / name).folder for name in NAMES}
    server = Server(
        tmp_path_factory.mktemp("box"),
        models=[model(name, engine="openvino", path=str(path), slots=4) for name, path in made.items()],
    )
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def chats(box: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{box.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


@pytest.fixture
def messages(box: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=box.url, api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


def called(family: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls that it makes."""
    return FAMILIES[family].called


@pytest.mark.parametrize("family", NAMES)
class TestChat:
    def test_in_one_piece(self, chats: openai.OpenAI, family: str) -> None:
        reply = chats.chat.completions.create(model=family, messages=ASK, tools=CHAT_TOOLS, max_tokens=LIMIT)
        (choice,) = reply.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.model_extra == {"reasoning": THOUGHT, "reasoning_content": THOUGHT}
        assert (choice.message.content or "").strip() == TEXT
        functions = [call.function for call in choice.message.tool_calls or [] if call.type == "function"]
        assert [(each.name, json.loads(each.arguments)) for each in functions] == called(family)
        assert reply.usage is not None
        assert reply.usage.completion_tokens_details is not None
        assert 1 < (reply.usage.completion_tokens_details.reasoning_tokens or 0) < reply.usage.completion_tokens

    def test_as_it_comes(self, chats: openai.OpenAI, family: str) -> None:
        """Thought, then text, then calls; the SDK gathers the calls."""
        kinds: list[str] = []
        thought = ""
        with chats.chat.completions.stream(model=family, messages=ASK, tools=CHAT_TOOLS, max_tokens=LIMIT) as stream:
            for event in stream:
                if event.type == "chunk" and event.chunk.choices:
                    delta = event.chunk.choices[0].delta
                    said = (delta.model_extra or {}).get("reasoning") or ""
                    thought += said
                    kinds += (
                        ["thought"] * bool(said) + ["text"] * bool(delta.content) + ["call"] * bool(delta.tool_calls)
                    )
            choice = stream.get_final_completion().choices[0]
        assert thought == THOUGHT
        assert kinds == sorted(kinds, key=["thought", "text", "call"].index)
        assert (choice.message.content or "").strip() == TEXT
        functions = [call.function for call in choice.message.tool_calls or []]
        assert [(each.name, json.loads(each.arguments)) for each in functions] == called(family)
        assert choice.finish_reason == "tool_calls"

    def test_the_next_turn_takes_it_back(self, chats: openai.OpenAI, family: str) -> None:
        first = chats.chat.completions.create(model=family, messages=ASK, tools=CHAT_TOOLS, max_tokens=LIMIT)
        message = first.choices[0].message
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "It turns."} for call in message.tool_calls or []
        ]
        told = message.model_dump(exclude_none=True)
        thoughtless = {key: value for key, value in told.items() if not key.startswith("reasoning")}
        counts = []
        for turn in (told, thoughtless):
            turns: Any = [*ASK, turn, *results]
            again = chats.chat.completions.create(model=family, messages=turns, tools=CHAT_TOOLS, max_tokens=CUT)
            assert again.usage is not None
            counts.append(again.usage.prompt_tokens)
        assert first.usage is not None
        assert counts[0] > counts[1] > first.usage.prompt_tokens

    def test_a_limit_within_the_thought(self, chats: openai.OpenAI, family: str) -> None:
        reply = chats.chat.completions.create(model=family, messages=ASK, tools=CHAT_TOOLS, max_tokens=CUT)
        (choice,) = reply.choices
        assert choice.finish_reason == "length"
        assert not choice.message.content
        assert not choice.message.tool_calls
        assert THOUGHT.startswith((choice.message.model_extra or {})["reasoning"].rstrip("\ufffd"))

    def test_a_form_holds_behind_the_thought(self, chats: openai.OpenAI, family: str) -> None:
        form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
        reply = chats.chat.completions.create(
            model=family, messages=[{"role": "user", "content": JSON}], response_format=form, max_tokens=LIMIT
        )
        message = reply.choices[0].message
        assert (message.model_extra or {})["reasoning"] == THOUGHT
        assert json.loads(message.content or "") == ANSWER


@pytest.mark.parametrize("family", NAMES)
class TestResponses:
    def test_in_one_piece(self, chats: openai.OpenAI, family: str) -> None:
        reply = chats.responses.create(model=family, input=CALL, tools=RESPONSE_TOOLS, max_output_tokens=LIMIT)
        assert _said(reply) == (THOUGHT, TEXT, called(family))
        assert reply.status == "completed"
        assert reply.usage is not None
        assert 1 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens

    def test_as_it_comes(self, chats: openai.OpenAI, family: str) -> None:
        thought, text, arguments = "", "", ""
        with chats.responses.stream(model=family, input=CALL, tools=RESPONSE_TOOLS, max_output_tokens=LIMIT) as stream:
            for event in stream:
                if event.type == "response.reasoning_text.delta":
                    thought += event.delta
                elif event.type == "response.output_text.delta":
                    text += event.delta
                elif event.type == "response.function_call_arguments.delta":
                    arguments += event.delta
            reply = stream.get_final_response()
        assert (thought, text.strip()) == (THOUGHT, TEXT)
        assert _said(reply) == (THOUGHT, TEXT, called(family))
        assert arguments == "".join(item.arguments for item in reply.output if item.type == "function_call")

    def test_the_next_turn_takes_it_back(self, chats: openai.OpenAI, family: str) -> None:
        """By its id, and as what was given out: the same prompt."""
        first = chats.responses.create(model=family, input=CALL, tools=RESPONSE_TOOLS, max_output_tokens=LIMIT)
        results: Any = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "It turns."}
            for item in first.output
            if item.type == "function_call"
        ]
        told: Any = [*ASK, *(item.to_dict() for item in first.output), *results]
        thoughtless: Any = [item for item in told if item.get("type") != "reasoning"]
        asked: Any = {"model": family, "tools": RESPONSE_TOOLS, "max_output_tokens": LIMIT}
        by_id, whole, less = (
            chats.responses.create(**asked, **turn)
            for turn in ({"input": results, "previous_response_id": first.id}, {"input": told}, {"input": thoughtless})
        )
        counts = [each.usage.input_tokens for each in (by_id, whole, less, first) if each.usage is not None]
        assert counts[0] == counts[1] > counts[2] > counts[3]


@pytest.mark.parametrize("family", NAMES)
class TestMessages:
    def test_in_one_piece(self, messages: anthropic.Anthropic, family: str) -> None:
        reply = messages.messages.create(model=family, messages=ASK, tools=MESSAGE_TOOLS, max_tokens=LIMIT)
        assert _blocks(reply) == (THOUGHT, TEXT, called(family))
        assert reply.stop_reason == "tool_use"

    def test_as_it_comes(self, messages: anthropic.Anthropic, family: str) -> None:
        """What the SDK gathers is the reply in one piece; each thought comes before its signature."""
        thoughts: list[str] = []
        signed = False
        with messages.messages.stream(model=family, messages=ASK, tools=MESSAGE_TOOLS, max_tokens=LIMIT) as stream:
            for event in stream:
                if event.type == "thinking":
                    assert not signed
                    thoughts.append(event.thinking)
                signed = signed or event.type == "signature"
            reply = stream.get_final_message()
        assert "".join(thoughts) == THOUGHT
        assert signed
        assert _blocks(reply) == (THOUGHT, TEXT, called(family))
        assert reply.stop_reason == "tool_use"

    def test_the_next_turn_takes_it_back(self, messages: anthropic.Anthropic, family: str) -> None:
        first = messages.messages.create(model=family, messages=ASK, tools=MESSAGE_TOOLS, max_tokens=LIMIT)
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "It turns."}
            for block in first.content
            if block.type == "tool_use"
        ]
        counts = [_prompt(first.usage)]
        for content in ([block for block in first.content if block.type != "thinking"], first.content):
            turns: Any = [*ASK, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
            again = messages.messages.create(model=family, messages=turns, tools=MESSAGE_TOOLS, max_tokens=CUT)
            counts.append(_prompt(again.usage))
        assert counts[0] < counts[1] < counts[2]


def _said(reply: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """Thought, text and calls of a response, in whose output they come in this order."""
    kinds = [item.type for item in reply.output]
    assert kinds == sorted(kinds, key=["reasoning", "message", "function_call"].index)
    thoughts = [part.text for item in reply.output if item.type == "reasoning" for part in item.content]
    calls = [(item.name, json.loads(item.arguments)) for item in reply.output if item.type == "function_call"]
    return "".join(thoughts), reply.output_text.strip(), calls


def _blocks(reply: anthropic.types.Message) -> tuple[str, str, list[tuple[str, Any]]]:
    kinds = [block.type for block in reply.content]
    assert kinds == sorted(kinds, key=["thinking", "text", "tool_use"].index)
    thoughts = [block.thinking for block in reply.content if block.type == "thinking"]
    texts = [block.text for block in reply.content if block.type == "text"]
    calls = [(block.name, block.input) for block in reply.content if block.type == "tool_use"]
    return "".join(thoughts), "".join(texts).strip(), calls


def _prompt(usage: anthropic.types.Usage) -> int:
    """All tokens of it: Anthropic counts those that were cached apart."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


@pytest.fixture(scope="module")
def report(box: Server) -> dict[str, str]:
    """By test what node reports of it (TAP), from one run of all."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "OPENAI_"))}
    expected = {name: [list(call) for call in called(name)] for name in NAMES}
    says = {"thought": THOUGHT, "text": TEXT, "ask": CALL, "tools": CHAT_TOOLS, "calls": expected}
    done = subprocess.run(
        [node(), "--test", "--test-reporter=tap", str(PROGRAM)],
        cwd=NODE_PROJECT,
        env={**environment, "PENSTOCK_URL": box.url, "PENSTOCK_SAYS": json.dumps(says), "NO_PROXY": "127.0.0.1"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    parts = re.split(r"^# Subtest: (.+)\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", NODE_TESTS)
def test_openai_node(report: dict[str, str], name: str) -> None:
    assert re.match(r"ok \d+ - ", report[name]), report[name]
