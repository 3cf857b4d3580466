"""Masks over real tokenizers: whatever is drawn under them is JSON that obeys the schema."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from tests.support import tiny_models as tiny

from penstock.core.errors import InvalidRequest
from penstock.core.job import Message, Request, ResponseFormat, Sampling, Tool
from penstock.core.schema import FORMATS
from penstock.engines.parts.guide import Guide, Guides, followed
from penstock.engines.parts.sampling import Sampler
from penstock.engines.text.model import TextModel
from penstock.engines.text.reply import Reply
from penstock.models.catalogue import PACKAGED

MODELS = {
    "millrace": TextModel.load(PACKAGED / "millrace"),
    "byte fallback": TextModel(tiny.byte_fallback(), tokenizer_config={"eos_token": "</s>"}),
    "no end": TextModel(tiny.byte_level()),
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}


def guided(schema: dict[str, Any], **fields: Any) -> Request:
    return Request(model="m", prompt="", response_format=ResponseFormat("json_schema", schema), **fields)


def allowed(guide: Guide, size: int) -> np.ndarray[Any, Any]:
    logits = np.zeros(size, np.float32)
    guide.mask(logits)
    return np.flatnonzero(np.isfinite(logits))


def walk(model: TextModel, request: Request, seed: int, limit: int = 400, prefix: list[int] | None = None) -> Reply:
    """A reply drawn evenly from what is allowed."""
    rng = random.Random(seed)
    guide = Guides(model).begin(request)
    assert guide is not None
    reply = model.reply(request, limit, prefix or [], guide)
    while reply.finish is None:
        reply.push(int(rng.choice(allowed(guide, model.vocab_size + 7))))
    assert followed(guide) is None
    return reply


def text_of(model: TextModel, ids: list[int]) -> str:
    detokenizer = model.detokenizer(continuing=True)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("seed", range(8))
def test_any_draw_obeys(model: TextModel, seed: int) -> None:
    reply = walk(model, guided(PERSON), seed)
    value = json.loads(text_of(model, reply.ids))
    assert reply.finish == "stop"
    assert list(value) == ["name", "tags", "age"]
    assert len(value["name"]) <= 8
    assert set(value["tags"]) <= {"a", "é"}
    assert 0 <= value["age"] <= 150


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_a_replayed_prefix_is_where_it_was(model: TextModel) -> None:
    whole = walk(model, guided(PERSON), 5)
    guides = Guides(model)
    for cut in range(len(whole.ids) + 1):
        guide = guides.begin(guided(PERSON))
        reply = model.reply(guided(PERSON), 400, whole.ids[:cut], guide)
        assert reply.finish == (None if cut < len(whole.ids) else "stop")
        if cut < len(whole.ids):
            assert guide is not None
            assert whole.ids[cut] in allowed(guide, model.vocab_size)


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_special_and_unknown_tokens_are_never_allowed(model: TextModel) -> None:
    guide = Guides(model).begin(guided({"type": "object"}))
    assert guide is not None
    silent = {id for id, data in enumerate(model.token_bytes()) if not data}
    reply = model.reply(guided({"type": "object"}), 200, [], guide)
    rng = random.Random(1)
    while reply.finish is None:
        ids = allowed(guide, model.vocab_size + 7)
        assert silent.isdisjoint(ids.tolist())
        assert ids.max() < model.vocab_size
        reply.push(int(rng.choice(ids)))


def test_only_the_end_follows_what_may_end_and_go_on() -> None:
    model = MODELS["millrace"]
    guide = Guides(model).begin(guided({"type": "integer"}))
    assert guide is not None
    (one,) = model.tokenizer.encode("1").ids
    reply = model.reply(guided({"type": "integer"}, sampling=Sampling(ignore_eos=True)), 9, [one], guide)
    ids = set(allowed(guide, model.vocab_size).tolist())
    assert model.eos_ids <= ids
    reply.push(min(model.eos_ids))
    assert reply.finish == "stop", "also where ignore_eos is asked for"


def test_white_space_is_bounded() -> None:
    model = MODELS["millrace"]
    guides = Guides(model)
    for text, fits in (('{"a": 1}', True), ('{"a":1, "b":[1, 2]}', True), ('{"a":  1}', False), ('{\n"a":1}', False)):
        guide = guides.begin(guided({"type": "object"}))
        assert guide is not None
        for token in model.tokenizer.encode(text).ids:
            guide.accept(token)
        assert (guide.error is None) is fits, text


def test_a_log_that_does_not_obey_is_a_failure_not_a_reply() -> None:
    model = MODELS["millrace"]
    guide = Guides(model).begin(guided(PERSON))
    reply = model.reply(guided(PERSON), 50, model.tokenizer.encode("Hello").ids, guide)
    assert reply.finish == "stop"
    error = followed(guide)
    assert error is not None
    assert error.code == "engine_error"


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {}},
        {"type": "nonsense"},
        {"type": "string", "pattern": "("},
        {"$ref": "http://example.com/schema"},
        {"type": "object", "x-guidance": {"lenient": True}, "uniqueItems": True},
    ],
)
def test_what_cannot_be_followed_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="cannot be followed") as caught:
        Guides(MODELS["millrace"]).begin(guided(schema))
    assert caught.value.param == "response_format"
    tool = Tool("f", "", {"properties": {"a": schema}})
    with pytest.raises(InvalidRequest) as caught:
        Guides(MODELS["millrace"]).begin(
            Request(model="m", messages=(Message("user", "?"),), tools=(tool,), tool_choice="required")
        )
    assert caught.value.param == "tools"


def test_the_librarys_words_are_not_cut() -> None:
    with pytest.raises(InvalidRequest, match="look-ahead and look-behind, is not supported"):
        Guides(MODELS["millrace"]).begin(guided({"type": "string", "pattern": "^(?=a)b"}))
    with pytest.raises(InvalidRequest, match='unknown name: "nobody"'):
        Guides(MODELS["millrace"]).begin(formed("grammar", grammar="start: nobody"))
    with pytest.raises(InvalidRequest, match="panic") as caught:
        Guides(MODELS["millrace"]).begin(formed("grammar", grammar="start: <|end|>"))
    assert "unknown>" not in caught.value.message, "where it was in its own code is of no use"


def test_the_formats_that_grammars_know_are_all_that_there_are() -> None:
    """A format that a grammar knows is followed; so every one that is not in `FORMATS` must be unknown to it."""
    others = ("idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex", "uri-reference")
    guides = Guides(MODELS["millrace"])
    for name in (*FORMATS, *others, "uri-template", "relative-json-pointer", "password", "int32"):
        grammar = LLMatcher.grammar_from_json_schema({"type": "string", "format": name})
        error = LLMatcher.validate_grammar(grammar, guides._tokenizer)
        assert (error == "") is (name in FORMATS), (name, error)
        assert guides.begin(guided({"type": "string", "format": name})) is not None


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"type": "regex", "pattern": r"\d{3}-[a-f]+/x"}, r"\d{3}-[a-f]+/x"),
    ({"type": "regex", "pattern": "^(yes|no)$"}, "yes|no"),
    ({"type": "choice", "choices": ("a", "ab", 'b"\\/\n', "🚰 \u2028")}, 'a|ab|b"\\\\/\n|🚰 \u2028'),
    ({"type": "grammar", "grammar": 'start: "x" N\nN: /[0-9]{2}/'}, "x[0-9]{2}"),
    ({"type": "grammar", "grammar": 'root ::= "x" n n\nn ::= [0-9]'}, "x[0-9]{2}"),
    ({"type": "grammar", "grammar": 'start: %json {"const": [1]}'}, r"\[\s*1\s*\]"),
]


def formed(type: Any, **fields: Any) -> Request:
    return Request(model="m", prompt="", response_format=ResponseFormat(type, **fields))


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize(("fields", "right"), FORMS)
def test_any_draw_has_the_form(model: TextModel, fields: dict[str, Any], right: str) -> None:
    for seed in range(4):
        whole = walk(model, formed(**fields), seed, 2000)
        assert whole.finish == "stop"
        assert re.fullmatch(right, text_of(model, whole.ids))
        for cut in (1, len(whole.ids) // 2):
            rest = walk(model, formed(**fields), seed, 2000, whole.ids[:cut])
            assert re.fullmatch(right, text_of(model, rest.ids))


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "regex"},
        {"type": "regex", "pattern": "("},
        {"type": "regex", "pattern": r"\bword\b"},
        {"type": "regex", "pattern": "(a{1000}){1000}"},
        {"type": "regex", "pattern": "a" * 5000},
        {"type": "choice"},
        {"type": "choice", "choices": ("x",) * 2000},
        {"type": "choice", "choices": ("x" * 70_000,)},
        {"type": "grammar"},
        {"type": "grammar", "grammar": "hello"},
        {"type": "grammar", "grammar": "root ::= (" * 2000},
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Guides(MODELS["millrace"]).begin(formed(**fields))
    assert caught.value.param == "response_format"


def test_a_form_that_is_no_json_cannot_be_had_beside_tools() -> None:
    form = ResponseFormat("choice", choices=("a",))
    messages = (Message("user", "?"),)
    with pytest.raises(InvalidRequest, match="tools"):
        Request(model="m", messages=messages, tools=(Tool("f"),), response_format=form)
    Request(model="m", messages=messages, tools=(Tool("f"),), tool_choice="none", response_format=form)


def test_what_nothing_satisfies_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot be followed"):
        Guides(MODELS["millrace"]).begin(guided({"$ref": "#"}))


def test_a_forced_call_with_references() -> None:
    city = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/c"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = (
        Tool("weather", "", {**city, "$defs": {"c": {"enum": ["Ulm", "Rom"]}}}),
        Tool("clock", "", {"maxProperties": 0}),
    )
    request = Request(model="m", messages=(Message("user", "?"),), tools=tools, tool_choice="required")
    model = MODELS["millrace"]
    names = set()
    for seed in range(12):
        reply = walk(model, request, seed)
        assert reply.finish == "tool_calls"
        call = json.loads(text_of(model, reply.ids))
        names.add(call["name"])
        assert call["name"] == "clock" or call["arguments"]["city"] in ("Ulm", "Rom")
    assert names == {"weather", "clock"}


def test_one_schema_is_compiled_once() -> None:
    guides = Guides(MODELS["millrace"])
    first, second = guides.begin(guided(PERSON)), guides.begin(guided(dict(PERSON)))
    assert len(guides._compiled) == 1
    assert first is not None
    assert second is not None
    first.accept(MODELS["millrace"].tokenizer.encode('{"').ids[0])
    assert second.error is None
    assert allowed(second, 4096).size


def test_the_sampler_draws_what_is_allowed_beside_others() -> None:
    model = MODELS["millrace"]
    guide = Guides(model).begin(guided(PERSON))
    assert guide is not None
    sampler = Sampler(2, 4096)
    rng = np.random.default_rng(0)
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5)):
        logits = rng.normal(size=(2, 4096)).astype(np.float32)
        free = logits[1].copy()
        sampler.occupy(0, Sampling(temperature=temperature, top_p=top_p, logprobs=2), 1, guide=guide)
        sampler.occupy(1, Sampling(temperature=0), 2)
        tokens, logprobs = sampler.draw(logits, np.array([0, 1]), np.array([1, 1]))
        assert tokens[0] in allowed(guide, 4096)
        assert tokens[1] == free.argmax(), "a neighbour is not disturbed"
        assert logprobs[0][1][0][0] not in allowed(guide, 4096), "log-probabilities are the model's own"
    sampler.vacate(0)
    assert not sampler._guides
