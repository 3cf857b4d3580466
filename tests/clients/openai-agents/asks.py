"""openai-agents: runs with tools, handoffs, structures and streams, on chat completions and on the responses API."""

import asyncio
import os

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel

URL, MODEL = os.environ["PENSTOCK_URL"], os.environ["PENSTOCK_MODEL"]
set_tracing_disabled(True)


class User(BaseModel):
    name: str
    age: int


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.fixture(params=["chat", "responses"])
def model(request):
    # A client of each test's own: every run has an event loop of its own.
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    return (OpenAIChatCompletionsModel if request.param == "chat" else OpenAIResponsesModel)(MODEL, client)


def called(result):
    return [item.raw_item.name for item in result.new_items if item.type == "tool_call_item"]


def test_a_text(model):
    result = Runner.run_sync(Agent("brief", instructions="Be brief.", model=model), "Say 'good morning'.")
    assert result.final_output == "good morning"
    assert result.context_wrapper.usage.output_tokens > 0


def test_a_tool_and_what_is_made_of_its_result(model):
    result = Runner.run_sync(Agent("clerk", model=model, tools=[weather]), "What is the weather in Paris?")
    assert called(result) == ["weather"]
    assert result.final_output == "The tool says: sunny in Paris"


def test_two_calls_at_once(model):
    result = Runner.run_sync(Agent("clerk", model=model, tools=[weather]), "What is the weather in Paris and in Rome?")
    assert called(result) == ["weather", "weather"]
    assert result.final_output == "The tool says: sunny in Paris and sunny in Rome"


@pytest.mark.parametrize("choice", ["required", "weather"])
def test_a_tool_that_must_be_called(model, choice):
    agent = Agent("clerk", model=model, tools=[weather], model_settings=ModelSettings(tool_choice=choice))
    result = Runner.run_sync(agent, "Hello in Paris")
    assert called(result) == ["weather"]


def test_a_structure(model):
    result = Runner.run_sync(Agent("clerk", model=model, output_type=User), "Extract: Jason is 25 years old.")
    assert result.final_output == User(name="Jason", age=25)


def test_a_structure_behind_a_tool(model):
    class Report(BaseModel):
        city: str
        sunny: bool

    agent = Agent("clerk", model=model, tools=[weather], output_type=Report)
    result = Runner.run_sync(agent, "Report the weather in Paris.")
    assert called(result) == ["weather"]
    assert result.final_output == Report(city="Paris", sunny=True)


def test_a_handoff(model):
    poet = Agent("poet", handoff_description="Writes poems", model=model)
    clerk = Agent("clerk", model=model, handoffs=[poet])
    result = Runner.run_sync(clerk, "Transfer me to the poet")
    assert result.last_agent is poet


def test_a_run_as_it_comes(model):
    async def read():
        result = Runner.run_streamed(Agent("clerk", model=model, tools=[weather]), "What is the weather in Paris?")
        events = [event async for event in result.stream_events()]
        return result.final_output, events

    output, events = asyncio.run(read())
    assert output == "The tool says: sunny in Paris"
    deltas = [
        e.data.delta for e in events if getattr(getattr(e, "data", None), "type", "") == "response.output_text.delta"
    ]
    assert "".join(deltas) == output
    assert len(deltas) > 1
    assert [e.item.type for e in events if e.type == "run_item_stream_event"] == [
        "tool_call_item",
        "tool_call_output_item",
        "message_output_item",
    ]


def test_a_second_turn_in_a_session(model):
    session = SQLiteSession("one")
    agent = Agent("clerk", model=model, tools=[weather])
    Runner.run_sync(agent, "What is the weather in Paris?", session=session)
    result = Runner.run_sync(agent, "Say 'thanks'.", session=session)
    assert result.final_output == "thanks"


def test_settings(model):
    settings = ModelSettings(temperature=0, top_p=0.5, max_tokens=16, parallel_tool_calls=False, top_logprobs=2)
    agent = Agent("clerk", model=model, tools=[weather], model_settings=settings)
    assert Runner.run_sync(agent, "Say 'one two'.").final_output == "one two"


def test_the_turn_before_by_its_id():
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    agent = Agent("clerk", model=OpenAIResponsesModel(MODEL, client), tools=[weather])
    first = Runner.run_sync(agent, "What is the weather in Paris?")
    second = Runner.run_sync(agent, "Say 'thanks'.", previous_response_id=first.last_response_id)
    assert second.final_output == "thanks"


def test_a_prompt_that_is_too_long_is_an_error_of_the_request(model):
    with pytest.raises(BadRequestError) as caught:
        Runner.run_sync(Agent("clerk", model=model), "word " * 70_000)
    assert caught.value.code == "context_length_exceeded"
