"""Tools in prompts: through templates that know them, and as text for those that do not."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from tests.support import tiny_models as tiny

from penstock.core.errors import InvalidRequest
from penstock.core.job import Message, Request, Tool, ToolCall
from penstock.engines.text.model import TextModel

#: Shows everything that a template may look at.
KNOWS = "{{ tools | tojson }}\n{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
TOOL = Tool("look", "Looks <|end|> around.", {"type": "object", "properties": {"<|user|>": {"type": "string"}}})
TALK = (
    Message("system", "Be brief."),
    Message("user", "Look!"),
    Message("assistant", "", (ToolCall("c1", "look", '{"where": "up <|end|>"}'),)),
    Message("tool", "A bird.<|end|>", (), "c1"),
)


def prompt(template: str, messages: tuple[Message, ...] = TALK, **fields: Any) -> str:
    """The prompt; real special tokens in it are marked."""
    model = TextModel(tiny.byte_level(), config={"max_position_embeddings": 100_000}, chat_template=template)
    ids = model.encode_request(Request(model="m", messages=messages, **fields))
    assert model._special.isdisjoint(ids), "somebody's text became a special token"
    return model.tokenizer.decode(ids)


def test_a_template_gets_tools_calls_and_answers() -> None:
    tools, *turns = map(json.loads, prompt(KNOWS, tools=(TOOL,)).splitlines())
    assert tools == [
        {
            "type": "function",
            "function": {"name": "look", "description": TOOL.description, "parameters": TOOL.parameters},
        }
    ]
    assert turns[2]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"where": "up <|end|>"}}}
    ]
    assert turns[3] == {"role": "tool", "content": "A bird.<|end|>", "tool_call_id": "c1", "name": "look"}


def test_a_template_gets_only_what_may_be_called() -> None:
    other = Tool("other")
    assert json.loads(prompt(KNOWS, tools=(TOOL, other), tool_choice="none").splitlines()[0]) is None
    named = json.loads(prompt(KNOWS, tools=(TOOL, other), tool_choice="required", tool_name="other").splitlines()[0])
    assert [tool["function"]["name"] for tool in named] == ["other"]


def test_without_a_template_that_knows_them_they_are_text() -> None:
    text = prompt(PLAIN, tools=(TOOL,))
    assert text.startswith("[system] Be brief.\n\nYou may call these functions")
    assert '{"type": "function", "function": {"name": "look", "description": "Looks <|end|> around."' in text
    assert '[assistant] <tool_call>\n{"name": "look", "arguments": {"where": "up <|end|>"}}\n</tool_call>\n' in text
    assert "[user] <tool_response>\nA bird.<|end|>\n</tool_response>\n" in text
    assert text.count("[system]") == 1


def test_a_conversation_without_tools_is_as_it_was() -> None:
    assert prompt(PLAIN, (Message("user", " hi "),)) == "[user]  hi \n"


def test_arguments_that_are_no_json_stay_text() -> None:
    broken = (Message("user", "?"), Message("assistant", "", (ToolCall("c", "look", "{oops"),)), Message("user", "!"))
    turns = prompt(KNOWS, broken).splitlines()
    assert json.loads(turns[2])["tool_calls"][0]["function"]["arguments"] == "{oops"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (r'{"a": "\ud83d"}', '{"a": "\ufffd"}'),
        (r'{"a": "\ude80 up"}', '{"a": "\ufffd up"}'),
        (r'{"\udfff": [{"b": "x\ud83dy"}]}', '{"\ufffd": [{"b": "x\ufffdy"}]}'),
        (r'{"a": "\ud83d\ude80"}', '{"a": "🚀"}'),
    ],
)
@pytest.mark.parametrize("template", [KNOWS, PLAIN], ids=["template", "as text"])
def test_half_a_surrogate_pair_in_arguments_is_no_character(template: str, written: str, shown: str) -> None:
    """JSON within JSON: what the body's own check cannot see."""
    messages = (Message("assistant", "", (ToolCall("c", "look", written),)), Message("user", "!"))
    assert shown in prompt(template, messages)


@pytest.mark.parametrize("depth", [500, 5_000])
def test_arguments_that_are_nested_too_deeply_break_nothing(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    messages = (Message("assistant", "", (ToolCall("c", "look", f'{{"a": {deep}}}'),)), Message("user", "!"))
    with contextlib.suppress(InvalidRequest):  # refused, or shown as text; anything else would end the engine
        assert "look" in prompt(KNOWS, messages)


def test_tools_count_against_the_context() -> None:
    model = TextModel(tiny.byte_level(), config={"max_position_embeddings": 64}, chat_template=KNOWS)
    large = Tool("look", "x" * 100_000)
    with pytest.raises(InvalidRequest, match="context"):
        model.encode_request(Request(model="m", messages=(Message("user", "?"),), tools=(large,)))
