"""A reply's thoughts, text and calls, token by token: phases, stop strings, ends, guides, resumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support import tiny_models as tiny
from tokenizers import AddedToken

from penstock.core.calls import Call, read_calls
from penstock.core.events import Phase, TokenPhase, phase_of, segments
from penstock.core.job import Message, Request, ResponseFormat, Sampling, Tool
from penstock.engines.parts.guide import Guides
from penstock.engines.text.formats.harmony import MARKS
from penstock.engines.text.model import TextModel
from penstock.engines.text.reply import Reply

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
THINKS = f"{PLAIN}{{# <tool_call> <think> #}}"
OPENS = f"{THINKS}{{% if add_generation_prompt %}}[assistant]<think>\n{{% endif %}}"
CLOCK = Tool("clock", "", {"type": "object", "properties": {"zone": {"type": "string"}}})
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "a\\"b"}}\n</tool_call>'


def model(template: str, *special: str, added: tuple[str, ...] = ()) -> TextModel:
    tokenizer = tiny.byte_level()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.add_tokens([AddedToken(word, special=False) for word in added])
    settings = {"eos_token": "<|end|>"}
    return TextModel(
        tokenizer, config={"max_position_embeddings": 9999}, tokenizer_config=settings, chat_template=template
    )


MODEL = model(THINKS, added=("</think>",))


def request(*, tools: tuple[Tool, ...] = (CLOCK,), content: str = "?", **fields: Any) -> Request:
    fields.setdefault("sampling", Sampling(max_tokens=999))
    return Request(model="m", messages=(Message("user", content),), tools=tools, **fields)


Said = list[tuple[str, TokenPhase]]


def say(reply: Reply, ids: list[int]) -> Said:
    said: Said = []
    for id in ids:
        if reply.finish is None:
            said.append((reply.push(id), reply.phase))
    return said


def folded(said: Said) -> tuple[str, str, list[Call]]:
    """Thoughts, text, calls."""
    parts = dict.fromkeys(Phase, "")
    for text, phase in said:
        for each, part in segments(text, phase):
            parts[each] += part
        assert "".join(part for _, part in segments(text, phase)) == text
    return parts[Phase.REASONING], parts[Phase.TEXT], read_calls(parts[Phase.TOOL])


def ids_of(text: str, model: TextModel = MODEL) -> list[int]:
    return [*model.tokenizer.encode(text, add_special_tokens=False).ids, *sorted(model.eos_ids)]


def test_a_call_in_a_thought_is_a_thought() -> None:
    reply = MODEL.reply(request(), 999)
    assert folded(say(reply, ids_of(f"<think>\nI could {CALL}, no.\n</think>\n\nHello!"))) == (
        f"I could {CALL}, no.",
        "Hello!",
        [],
    )
    assert reply.finish == "stop"


def test_a_call_behind_a_thought_is_a_call() -> None:
    reply = MODEL.reply(request(), 999)
    said = say(reply, ids_of(f"<think>So.</think>\n\nI look.\n{CALL}"))
    assert folded(said) == ("So.", "I look.", [Call("clock", '{"zone": "a\\"b"}')])
    assert reply.finish == "tool_calls"
    thoughts = len(ids_of("<think>So.</think>")) - 1
    assert sum(phase_of(phase) is Phase.REASONING for _, phase in said) == thoughts, "marks are counted"


@pytest.mark.parametrize("text", [f"<think>\nHm.\n</think>\n\nWell.\n{CALL}\n{CALL} so", "a <tool", "<think>a\n\n"])
def test_a_resume_at_every_token_says_the_same(text: str) -> None:
    asked = request(sampling=Sampling(max_tokens=999, stop=("xyz",)))
    ids = ids_of(text)
    whole = MODEL.reply(asked, 999)
    said = say(whole, ids)
    for cut in range(len(said)):
        resumed = MODEL.reply(asked, 999, ids[:cut])
        assert say(resumed, ids[cut:]) == said[cut:]
        assert (resumed.finish, resumed.ids) == (whole.finish, whole.ids)


def test_stop_strings_are_looked_for_in_the_text_alone() -> None:
    asked = request(sampling=Sampling(max_tokens=999, stop=("o w", "zone")))
    reply = MODEL.reply(asked, 999)
    said = say(reply, ids_of(f"<think>so what zone</think>Hi {CALL} then no way"))
    assert folded(said) == ("so what zone", "Hi then n", [Call("clock", '{"zone": "a\\"b"}')])
    assert (reply.finish, reply.stop) == ("tool_calls", "o w")


def test_what_a_stop_string_holds_back_comes_before_a_call() -> None:
    reply = MODEL.reply(request(sampling=Sampling(max_tokens=999, stop=("Hi!",))), 999)
    said = say(reply, ids_of(f"Hi\n{CALL}"))
    assert folded(said)[1:] == ("Hi", [Call("clock", '{"zone": "a\\"b"}')])
    assert phase_of(next(phase for text, phase in said if text)) is Phase.TEXT


def test_a_limit_inside_a_thought() -> None:
    ids = ids_of("<think>So, what is it")
    reply = MODEL.reply(request(), len(ids) - 1)
    said = say(reply, ids)
    assert folded(said) == ("So, what is it", "", [])
    assert reply.finish == "length"
    assert all(phase is Phase.REASONING for _, phase in said)


def test_a_raw_prompt_stays_raw() -> None:
    reply = MODEL.reply(Request(model="m", prompt="?"), 999)
    said = say(reply, ids_of("<think>So.</think>Hi"))
    assert "".join(text for text, _ in said) == "<think>So.</think>Hi"
    assert {phase for _, phase in said} == {Phase.TEXT}


def test_special_tokens_are_seen_where_they_are_marks() -> None:
    harmony = model("<|start|><|channel|>" + PLAIN, *(mark for mark in MARKS if mark != "<|end|>"), "<|fin|>")
    harmony.eos_ids = frozenset({harmony.tokenizer.token_to_id(word) for word in ("<|return|>", "<|call|>")})
    text = (
        "<|channel|>analysis<|message|>The user greets.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.clock <|constrain|>json<|message|>{"zone": "a"}<|call|>'
    )
    ids = harmony.tokenizer.encode(text, add_special_tokens=False).ids
    reply = harmony.reply(request(), 999)
    assert folded(say(reply, ids)) == ("The user greets.", "", [Call("clock", '{"zone": "a"}')])
    assert reply.finish == "tool_calls"
    final = "<|channel|>final<|message|>Hel<|fin|>lo!<|return|>"
    said = say(harmony.reply(request(tools=()), 999), harmony.tokenizer.encode(final, add_special_tokens=False).ids)
    assert folded(said) == ("", "Hello!", [])


class TestWhereTheThoughtBegins:
    def test_the_prompt_has_opened_it(self) -> None:
        opens = model(OPENS, added=("</think>",))
        prompt = opens.encode_request(request())
        reply = opens.reply(request(), 999, prompt=prompt)
        assert folded(say(reply, ids_of("So.\n</think>\nHi", opens))) == ("So.", "Hi", [])

    def test_a_user_cannot_open_it(self) -> None:
        asked = request(content="<think>")
        for template in (THINKS, f"{THINKS}\n"):
            theirs = model(template)
            prompt = theirs.encode_request(asked)
            assert theirs.tokenizer.token_to_id("<think>") not in prompt
            assert not theirs.opens_thought(asked, prompt)

    def test_a_begun_reply_may_be_inside_one(self) -> None:
        for content, text in (("<think>So", ""), ("<think>So</think>He", "llo")):
            talk = (Message("user", "?"), Message("assistant", content))
            asked = Request(model="m", messages=talk, continue_final=True)
            reply = MODEL.reply(asked, 999, prompt=MODEL.encode_request(asked))
            assert folded(say(reply, ids_of("llo")))[1] == text


class TestGuides:
    FORM = ResponseFormat(
        "json_schema", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    )

    def begin(self, model: TextModel, **fields: Any) -> Reply:
        asked = request(**fields)
        guide = Guides(model).begin(asked)
        return model.reply(asked, 999, guide=guide, prompt=model.encode_request(asked))

    def allowed(self, reply: Reply, text: str, model: TextModel = MODEL) -> bool:
        logits = np.zeros(model.vocab_size, np.float32)
        assert reply.mask is not None
        reply.mask.mask(logits)
        return bool(np.isfinite(logits[model.tokenizer.encode(text, add_special_tokens=False).ids[0]]))

    def test_it_holds_behind_a_thought(self) -> None:
        reply = self.begin(MODEL, tools=(), response_format=self.FORM)
        assert self.allowed(reply, "<think>")
        assert self.allowed(reply, "{")
        assert not self.allowed(reply, "H")
        said = say(reply, ids_of("<think>H")[:-1])
        assert self.allowed(reply, "H")
        assert not self.allowed(reply, "<|end|>"), "it must not end before it has its form"
        said += say(reply, ids_of(" {</think>")[:-1])
        assert self.allowed(reply, "{")
        for word in ("H", "<think>", "</think>"):
            assert not self.allowed(reply, word)
        said += say(reply, ids_of('{"a": 5}'))
        assert folded(said) == ("H {", '{"a": 5}', [])
        assert reply.finish == "stop"
        assert reply.guide is not None
        assert reply.guide.error is None

    def test_without_a_thought(self) -> None:
        reply = self.begin(MODEL, tools=(), response_format=self.FORM)
        said = say(reply, ids_of("{")[:-1])
        assert not self.allowed(reply, "<think>")
        assert folded(said + say(reply, ids_of('"a": 5}'))) == ("", '{"a": 5}', [])

    def test_a_call_that_must_be_made(self) -> None:
        reply = self.begin(MODEL, tool_choice="required")
        said = say(reply, ids_of('<think>Hm.</think>{"name": "clock", "arguments": {"zone": "x"}}'))
        assert folded(said) == ("Hm.", "", [Call("clock", '{"zone": "x"}')])
        assert reply.finish == "tool_calls"
        assert reply.guide is not None
        assert reply.guide.error is None

    def test_a_thought_that_the_prompt_opened(self) -> None:
        opens = model(OPENS, added=("</think>",))
        reply = self.begin(opens, tools=(), response_format=self.FORM)
        assert self.allowed(reply, "H", opens)
        said = say(reply, ids_of('So.</think>{"a": 1}', opens))
        assert folded(said) == ("So.", '{"a": 1}', [])

    def test_a_resume_in_the_thought_and_behind_it(self) -> None:
        asked = request(tools=(), response_format=self.FORM)
        ids = ids_of('<think>So.</think>{"a": 1}')
        said = say(MODEL.reply(asked, 999, guide=Guides(MODEL).begin(asked)), ids)
        for cut in range(len(said)):
            reply = MODEL.reply(asked, 999, ids[:cut], Guides(MODEL).begin(asked))
            assert say(reply, ids[cut:]) == said[cut:]
            assert reply.guide is not None
            assert reply.guide.error is None

    def test_text_that_the_guide_did_not_see_fails_the_reply(self) -> None:
        words = model(OPENS)  # </think> is no token of its own
        asked = request(tools=(), response_format=self.FORM)
        reply = words.reply(asked, 999, guide=Guides(words).begin(asked), prompt=words.encode_request(asked))
        end = words.tokenizer.encode("</think>", add_special_tokens=False).ids
        assert reply.guide is not None
        say(reply, [*end[:-1]])
        assert reply.guide.error is None
        reply.push_text = lambda token: ">Hi"
        say(reply, end[-1:])
        assert reply.guide.error == "the text began in the middle of a token"
