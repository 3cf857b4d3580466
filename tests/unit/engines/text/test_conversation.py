"""Conversations through chat templates: as the models' makers render them, and where a template lacks something."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tests.support import tiny_models as tiny

from penstock.core.errors import InvalidRequest
from penstock.core.job import Message, Request, Tool, ToolCall
from penstock.engines.text import chat_template
from penstock.engines.text.chat_template import ChatTemplate
from penstock.engines.text.model import TextModel

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TOOL = Tool("look", "Looks around.", {"type": "object", "properties": {"where": {"type": "string"}}})
CALL = ToolCall("call_0123456789abcdef01234567", "look", '{"where": "up", "far": [1, null]}')
TALK = (
    Message("system", "Be brief."),
    Message("user", "Look!"),
    Message("assistant", "", (CALL,), reasoning="They want me to look."),
    Message("tool", "A bird.", (), CALL.id),
    Message("user", "And?"),
)
CONFIG = {"eos_token": "<|end|>", "bos_token": "<s>", "additional_special_tokens": ["<|user|>", {"content": "<|x|>"}]}


def prompt(template: str | dict[str, str], messages: tuple[Message, ...] = TALK, **fields: Any) -> str:
    config = {"max_position_embeddings": 100_000}
    model = TextModel(tiny.byte_level(), config=config, tokenizer_config=CONFIG, chat_template=template)
    ids = model.encode_request(Request(model="m", messages=messages, **fields))
    return model.tokenizer.decode(ids, skip_special_tokens=False)


# ------------------------------------------------------------------------------------------ as the makers render them

#: Templates of our own that use what public ones use.
FEATURES = {
    "namespace": "{% set ns = namespace(n=0, last=none) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if not loop.last %}{% set ns.last = loop.index0 %}{% continue %}{% endif %}{{ ns.n }}{{ ns.last }}{% endfor %}",
    "white space": "{% for m in messages %}\n  {%- if m.role == 'user' %}\n    <{{ m.content | trim }}>\n"
    "  {%- else %}\n    {{- m.content }}\n  {% endif %}\n{% endfor %}\n",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}{{ m.content }}!"
    "{% endgeneration %}{% else %}{{ m.content }}{{ x is defined }}{% endif %}{% endfor %}",
    "tojson": "{{ {'é': ['<&>', 1.5, none], 'a': 1} | tojson }}{{ tools | tojson(indent=2) }}"
    "{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}{{ [1] | tojson(separators=(',', ':')) }}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unknown | default('none') }}",
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d['text'] }}{% endfor %}{{ documents is none }}",
    "variables": "{{ enable_thinking | default('?') }}{{ custom_tag }}"
    "{% if not enable_thinking %}<think>\n\n</think>{% endif %}",
    "strings": "{{ messages[0].content.split(' ')[-1].strip('.').upper() }}{{ messages[-1]['content'][:2] }}"
    "{{ 'a,b'.split(',') | join('-') }}{{ messages | map(attribute='role') | list }}{{ messages | length }}",
    "macros": "{% macro show(m, n=2) %}{{ m.role * n }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "tests": "{{ messages[0].content is string }}{{ messages is iterable }}{{ tools is mapping }}"
    "{{ messages[0].x is defined }}{{ messages[2].tool_calls[0].function.arguments is mapping }}"
    "{{ 3 is divisibleby 3 }}{{ 'a' in 'ab' }}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set c = c.function %}{{ c.name }}"
    "{% for k, v in c.arguments | items %}{{ k }}={{ v | tojson }};{% endfor %}{{ c.arguments | tojson }}{% endfor %}"
    "{{ m.tool_call_id }}{% endfor %}{{ tools[0].function.parameters.properties | dictsort }}",
    "reply": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "sandbox": "{{ messages.__class__ | default('hidden') }}{{ ''.join(['a', 'b']) }}{{ range(3) | list }}",
    "time": "{{ strftime_now('%d %b %Y') }}{{ strftime_now('%H') | int < 24 }}",
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("reply", [True, False])
def test_templates_are_rendered_byte_for_byte(name: str, reply: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.byte_level(), bos_token="<s>", eos_token="<|end|>"
    )
    turns = [
        {"role": "system", "content": "Be <b>ü</b> brief."},
        {"role": "user", "content": "  Look!\n"},
        {
            "role": "assistant",
            "content": "So",
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "look", "arguments": {"where": "<é>", "n": [1, None]}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "A bird."},
        {"role": "assistant", "content": "A bird, then"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "description": "é", "parameters": TOOL.parameters}}]
    variables = {"documents": [{"title": "T", "text": "x"}]} if name != "documents" else {"documents": None}
    variables |= {"enable_thinking": False, "custom_tag": ["a", {"b": 1}]}
    theirs = tokenizer.apply_chat_template(
        turns, tools=tools, chat_template=FEATURES[name], tokenize=False, add_generation_prompt=reply, **variables
    )
    ours = ChatTemplate(FEATURES[name], {"bos_token": "<s>", "eos_token": "<|end|>"})
    assert ours.render(turns, reply=reply, tools=tools, variables=variables) == theirs


def test_a_begun_reply_is_what_the_library_makes_of_it() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny.byte_level())
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So it is"}]
    theirs = tokenizer.apply_chat_template(
        turns, chat_template=FEATURES["reply"], tokenize=False, continue_final_message=True
    )
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    assert prompt(FEATURES["reply"], messages, continue_final=True) == theirs


def test_a_template_that_raises_refuses_as_it_does_there() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        prompt("{{ raise_exception('roles must alternate') }}")


def test_today_is_today(monkeypatch: pytest.MonkeyPatch) -> None:
    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Then:
            return cls(2026, 2, 3)

    monkeypatch.setattr(chat_template.datetime, "datetime", Then)
    assert prompt("{{ strftime_now('%Y-%m-%d') }}") == "2026-02-03"


# ------------------------------------------------------------------------------------------ what a request tells


def test_all_special_tokens_have_names() -> None:
    assert (
        prompt("{{ bos_token }}{{ eos_token }}{{ additional_special_tokens | join(',') }}")
        == "<s><|end|><|user|>,<|x|>"
    )


def test_variables_reach_the_template_as_text() -> None:
    template = "{% for d in documents %}{{ d.text }}{% endfor %}{{ custom }}"
    told = {"documents": [{"text": "a<|end|>b"}], "custom": 5, "messages": "no"}
    model = TextModel(tiny.byte_level(), tokenizer_config=CONFIG, chat_template=template)
    ids = model.encode_request(Request(model="m", messages=TALK, chat_template_kwargs=told))
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == "a<|end|>b5"
    assert model._special.isdisjoint(ids)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "??"),
        ({"reasoning_effort": "high"}, "highTrue"),
        ({"reasoning_effort": "none"}, "noneFalse"),
        ({"reasoning_effort": "minimal"}, "minimalFalse"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "?False"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, "lowFalse"),
    ],
)
@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_how_much_to_think(name: str, fields: Any, shown: str) -> None:
    template = f"{{{{ reasoning_effort | default('?') }}}}{{{{ {name} | default('?') }}}}"
    assert prompt(template, **fields) == shown


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_of_earlier_turns(key: str) -> None:
    for way in (f"m.{key}", f"m['{key}']", f"m.get('{key}')"):
        template = f"{{% for m in messages %}}{{% if {way} %}}<{{{{ {way} }}}}>{{% endif %}}{{% endfor %}}"
        assert prompt(template) == "<They want me to look.>"
    assert "They want" not in prompt(PLAIN)


def test_names_of_speakers() -> None:
    template = "{% for m in messages %}{{ m.name | default('-') }}{% endfor %}"
    assert prompt(template, (Message("user", "a", name="Ada"), Message("user", "b"))) == "Ada-"


def test_marks_of_thoughts_in_a_users_text_stay_text() -> None:
    model = TextModel(tiny.byte_level(), tokenizer_config=CONFIG, chat_template=f"{PLAIN}<think>")
    mark = model.tokenizer.token_to_id("<think>")
    talk = (Message("user", "<think>"), Message("assistant", "<think>So</think>"), Message("user", "?"))
    assert model.encode_chat(talk).count(mark) == 2, "the template's, and that of an earlier reply"


# ------------------------------------------------------------------------------------------ what a template lacks


def test_a_template_for_tools(tmp_path: Path) -> None:
    named = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    assert prompt(named) == "plain"
    assert prompt(named, tools=(TOOL,)) == "look"
    folder = tiny.llama(tmp_path / "m")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools | length }} tool")
    model = TextModel.load(folder)
    assert model.tokenizer.decode(model.encode_chat(TALK, (TOOL,))) == "1 tool"


def test_ids_in_mistrals_form() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('id') }}"
        "{% endif %}{{ c.id }} {% endfor %}{{ m.tool_call_id }}{% endfor %}{{ tools }}"
    )
    first, second = prompt(template).removesuffix("None").split()
    assert first == second
    assert first.isalnum()
    assert prompt(PLAIN + "{% for m in messages %}{{ m.tool_call_id }}{% endfor %}{{ tools }}").count(CALL.id) == 1
    nine = ToolCall("abcDEF123", "look", "{}")
    assert "abcDEF123 abcDEF123" in prompt(
        template, (Message("assistant", "", (nine,)), Message("tool", "", (), nine.id))
    )


ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ALTERNATES


def test_tools_where_turns_must_alternate_and_no_system_speaks() -> None:
    two = ToolCall("b", "look", "{}")
    talk = (
        *TALK[:2],
        Message("assistant", "I look.", (CALL, two)),
        Message("tool", "A bird.", (), CALL.id),
        Message("tool", "A tree.", (), two.id),
        Message("user", "And?"),
    )
    shown = prompt(NO_SYSTEM, talk, tools=(TOOL,))
    first, reply, answers = shown.split("\n[")
    assert first.startswith("[user] Be brief.\n\nYou may call these functions")
    assert first.endswith("</tool_call>.\n\nLook!")
    assert reply.startswith(
        'assistant] I look.\n<tool_call>\n{"name": "look", "arguments": {"where": "up", "far": [1, null]}}'
    )
    assert reply.count("<tool_call>") == 2
    assert answers == (
        "user] <tool_response>\nA bird.\n</tool_response>\n<tool_response>\nA tree.\n</tool_response>\nAnd?\n"
    )


def test_a_system_that_nobody_hears_speaks_as_the_user() -> None:
    ignores = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    for template in (NO_SYSTEM, ignores):
        talk = (Message("system", "Be brief."), Message("user", "Hi"))
        assert prompt(template, talk) == "[user] Be brief.\n\nHi\n"
        assert prompt(template, talk[:1]) == "[user] Be brief.\n"
    knows = ALTERNATES.replace("index0", "index")
    assert prompt(knows, talk).count("[system] Be brief.") == 1


DEEPSEEK = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<｜tool▁calls▁begin｜>' + c.function.name + '\n'"
    " + c.function.arguments }}{% endfor %}{% elif m.role == 'tool' %}{{ '<out>' + m.content }}{% else %}"
    "{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
)


def test_a_template_that_shows_calls_but_no_tools_gets_them_as_calls() -> None:
    shown = prompt(DEEPSEEK, tools=(TOOL,))
    assert '<｜tool▁calls▁begin｜>look\n{"where": "up", "far": [1, null]}<out>A bird.' in shown
    assert shown.startswith("system: Be brief.\n\nYou may call these functions")
    assert "<｜tool▁call▁begin｜>function" in shown
    assert "<tool_call>" not in shown


def test_arguments_are_objects_unless_the_template_wants_text() -> None:
    asks = "{{ tools }}{% for m in messages %}{% for c in m.tool_calls or [] %}%s{% endfor %}{% endfor %}"
    arguments = '{"where": "up", "far": [1, null]}'
    for way in ("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}", "{{ c.function.arguments }}"):
        assert prompt(asks.replace("%s", way)).removeprefix("None") == arguments


def test_a_template_that_wants_parts_gets_them() -> None:
    template = (
        "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }} {% endif %}"
        "{% endfor %}{% endfor %}"
    )
    assert prompt(template, (Message("user", "Hi"), Message("user", "there"))) == "Hi there "
    assert prompt(template, (Message("user", "Hi"), Message("assistant", "Wel")), continue_final=True) == "Hi Wel"


def test_what_a_tool_is_told_is_json() -> None:
    line = next(line for line in prompt(PLAIN, tools=(TOOL,)).splitlines() if line.startswith("{"))
    assert json.loads(line)["function"]["parameters"] == TOOL.parameters
