"""instructor: structures out of text, by tools and by JSON, from OpenAI's and Anthropic's routes."""

import os
from collections.abc import Iterable

import anthropic
import instructor
import openai
import pytest
from pydantic import BaseModel, Field, field_validator

URL, MODEL = os.environ["PENSTOCK_URL"], os.environ["PENSTOCK_MODEL"]
ASK = [{"role": "user", "content": "Extract: Jason is 25 years old."}]
JASON = {"name": "Jason", "age": 25}


class User(BaseModel):
    name: str
    age: int


class Pet(BaseModel):
    """A pet and its owner."""

    kind: str = Field(json_schema_extra={"enum": ["cat", "dog"]})
    owner: User


def openai_client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), mode=mode)


OPENAI_MODES = [
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON,
    instructor.Mode.JSON_SCHEMA,
    instructor.Mode.MD_JSON,
    instructor.Mode.RESPONSES_TOOLS,
    instructor.Mode.RESPONSES_TOOLS_WITH_INBUILT_TOOLS,
]


@pytest.mark.parametrize("mode", OPENAI_MODES, ids=lambda mode: mode.name)
def test_a_structure(mode):
    user = openai_client(mode).chat.completions.create(model=MODEL, messages=ASK, response_model=User, max_retries=0)
    assert user.model_dump() == JASON


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=lambda mode: mode.name)
def test_a_structure_in_a_structure(mode):
    ask = [{"role": "user", "content": "Extract: the dog of Jason, who is 25 years old."}]
    pet = openai_client(mode).chat.completions.create(model=MODEL, messages=ask, response_model=Pet, max_retries=0)
    assert pet.model_dump() == {"kind": "dog", "owner": JASON}


def test_a_structure_as_it_comes():
    parts = list(
        openai_client(instructor.Mode.TOOLS).chat.completions.create_partial(
            model=MODEL, messages=ASK, response_model=User
        )
    )
    assert len(parts) > 1
    assert (parts[-1].name, parts[-1].age) == ("Jason", 25)


def test_several_structures_as_they_come():
    users = openai_client(instructor.Mode.TOOLS).chat.completions.create_iterable(
        model=MODEL, messages=ASK, response_model=User
    )
    assert [user.model_dump() for user in users] == [JASON]


def test_several_calls_at_once():
    class Weather(BaseModel):
        """The weather in a city."""

        city: str

    calls = openai_client(instructor.Mode.PARALLEL_TOOLS).chat.completions.create(
        model=MODEL, response_model=Iterable[Weather],
        messages=[{"role": "user", "content": "What is the weather in Paris and in Rome?"}],
    )  # fmt: skip
    assert [call.city for call in calls] == ["Paris", "Rome"]


def test_a_reply_that_is_not_taken_is_asked_for_again():
    tries = []

    class Fussy(User):
        @field_validator("name")
        @classmethod
        def second_time_only(cls, name):
            tries.append(name)
            if len(tries) < 2:
                raise ValueError("not yet")
            return name

    user = openai_client(instructor.Mode.TOOLS).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Fussy, max_retries=2
    )
    assert (user.age, len(tries)) == (25, 2)


def test_usage_is_told():
    user, completion = openai_client(instructor.Mode.TOOLS).chat.completions.create_with_completion(
        model=MODEL, messages=ASK, response_model=User
    )
    assert user.name == "Jason"
    assert completion.usage.prompt_tokens > 0
    assert completion.usage.completion_tokens > 0


@pytest.mark.parametrize(
    "mode", [instructor.Mode.ANTHROPIC_TOOLS, instructor.Mode.ANTHROPIC_JSON], ids=lambda mode: mode.name
)
def test_a_structure_from_anthropics_route(mode):
    client = instructor.from_anthropic(anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0), mode=mode)
    user = client.messages.create(model=MODEL, max_tokens=200, messages=ASK, response_model=User, max_retries=0)
    assert user.model_dump() == JASON
