"""outlines: replies that obey types, choices, patterns and grammars, by vLLM's fields and by OpenAI's."""

import asyncio
import json
import os
import re
from datetime import date
from typing import Literal

import openai
import outlines
import pytest
from outlines.types import CFG, JsonSchema, Regex
from pydantic import BaseModel

URL, MODEL = os.environ["PENSTOCK_URL"], os.environ["PENSTOCK_MODEL"]


class User(BaseModel):
    name: str
    age: int


ASK = "Extract: Jason is 25 years old."
JASON = User(name="Jason", age=25)
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.fixture
def vllm():
    return outlines.from_vllm(openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), MODEL)


@pytest.fixture
def plain():
    return outlines.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), MODEL)


def test_a_text(vllm):
    assert vllm("Say 'good morning'.", max_tokens=20) == "good morning"


def test_a_structure_by_vllms_field(vllm):
    assert User.model_validate_json(vllm(ASK, User)) == JASON


def test_a_schema_by_vllms_field(vllm):
    assert json.loads(vllm(ASK, JsonSchema(SCHEMA))) == {"age": 25}


def test_a_choice(vllm):
    assert vllm("Is it rainy or not?", Literal["sunny", "rainy"]) in ("sunny", "rainy")


def test_a_number(vllm):
    assert re.fullmatch(r"[+-]?\d+", vllm("How old is Jason?", int))


def test_a_date(vllm):
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", vllm("When was it?", date))


def test_a_pattern(vllm):
    assert re.fullmatch(r"[A-Z]{2}-[0-9]{3}", vllm("Which plate does it have?", Regex(r"[A-Z]{2}-[0-9]{3}")))


def test_a_grammar(vllm):
    assert vllm("Is it so?", CFG('?start: "yes" | "no"')) in ("yes", "no")


def test_a_pattern_as_it_comes(vllm):
    text = "".join(vllm.stream("Which plate does it have?", Regex(r"[A-Z]{2}-[0-9]{3}")))
    assert re.fullmatch(r"[A-Z]{2}-[0-9]{3}", text)


def test_several_choices(vllm):
    texts = vllm("Which plate does it have?", Regex(r"[A-Z]{2}-[0-9]{3}"), n=2)
    assert [bool(re.fullmatch(r"[A-Z]{2}-[0-9]{3}", text)) for text in texts] == [True, True]


def test_a_pattern_that_is_none_is_refused(vllm):
    with pytest.raises(Exception, match="400"):
        vllm("Which plate does it have?", Regex("[A-Z"))


def test_a_structure_by_openais_field(plain):
    assert User.model_validate_json(plain(ASK, User)) == JASON


def test_json_by_openais_field(plain):
    assert isinstance(json.loads(plain("Answer in JSON with the key `answer`.", dict)), dict)


def test_an_asynchronous_client():
    client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    assert User.model_validate_json(asyncio.run(outlines.from_vllm(client, MODEL)(ASK, User))) == JASON
