"""pydantic-ai: agents with tools, structures and streams, on each of the three dialects; and its embedder."""

import asyncio
import os

import pytest
from pydantic import BaseModel
from pydantic_ai import (
    Agent,
    Embedder,
    ModelHTTPError,
    ModelRetry,
    NativeOutput,
    PartDeltaEvent,
    PromptedOutput,
    ToolOutput,
)
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.messages import ThinkingPart, ThinkingPartDelta, ToolCallPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL = os.environ["PENSTOCK_URL"], os.environ["PENSTOCK_MODEL"]


class User(BaseModel):
    name: str
    age: int


#: Of a model whose name says nothing: that it knows JSON schemas.
PROFILE = {"supports_json_schema_output": True}
JASON = User(name="Jason", age=25)


@pytest.fixture(params=["chat", "responses", "anthropic"])
def model(request):
    if request.param == "anthropic":
        return AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key="none"), profile=PROFILE)
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return kind(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))


def with_weather(model, **options):
    agent = Agent(model, **options)

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    return agent


def calls(result):
    return [part for each in result.all_messages() for part in each.parts if isinstance(part, ToolCallPart)]


def test_a_text(model):
    result = Agent(model, instructions="Be brief.").run_sync("Say 'good morning'.")
    assert result.output == "good morning"
    assert result.usage.input_tokens > 0
    assert result.usage.output_tokens > 0


def test_a_text_as_it_comes(model):
    async def read():
        async with Agent(model).run_stream("Say 'one two three four five six'.") as result:
            return [part async for part in result.stream_text(delta=True, debounce_by=None)]

    parts = asyncio.run(read())
    assert "".join(parts) == "one two three four five six"
    assert len(parts) > 1


def test_a_tool_and_what_is_made_of_its_result(model):
    result = with_weather(model).run_sync("What is the weather in Paris?")
    assert [call.args_as_dict() for call in calls(result)] == [{"city": "Paris"}]
    assert result.output == "The tool says: sunny in Paris"


def test_two_calls_at_once(model):
    result = with_weather(model).run_sync("What is the weather in Paris and in Rome?")
    assert [call.args_as_dict() for call in calls(result)] == [{"city": "Paris"}, {"city": "Rome"}]
    assert result.output == "The tool says: sunny in Paris and sunny in Rome"


def test_a_tool_in_a_stream(model):
    async def read():
        events = []
        async with with_weather(model).iter("What is the weather in Paris?") as run:
            async for node in run:
                if Agent.is_model_request_node(node):
                    async with node.stream(run.ctx) as stream:
                        events += [event async for event in stream]
        return events, run.result

    events, result = asyncio.run(read())
    assert result.output == "The tool says: sunny in Paris"
    assert [call.args_as_dict() for call in calls(result)] == [{"city": "Paris"}]
    assert any(isinstance(event, PartDeltaEvent) for event in events)


def thoughts(result):
    """What is no summary stands in the details where the response API has both."""
    parts = [part for each in result.all_messages() for part in each.parts if isinstance(part, ThinkingPart)]
    return [part.content or "".join((part.provider_details or {})["raw_content"]) for part in parts]


def test_a_thought_before_a_call_and_what_is_made_of_its_result(model):
    result = with_weather(model).run_sync("Think 'a river runs'. What is the weather in Paris?")
    assert thoughts(result) == ["a river runs", "a river runs"]
    assert [call.args_as_dict() for call in calls(result)] == [{"city": "Paris"}]
    assert result.output == "The tool says: sunny in Paris"


def test_a_thought_as_it_comes(model):
    async def read():
        events = []
        async with with_weather(model).iter("Think 'a river runs'. What is the weather in Paris?") as run:
            async for node in run:
                if Agent.is_model_request_node(node):
                    async with node.stream(run.ctx) as stream:
                        events += [event async for event in stream]
        return events, run.result

    events, result = asyncio.run(read())
    assert thoughts(result) == ["a river runs", "a river runs"]
    deltas = [each.delta for each in events if isinstance(each, PartDeltaEvent)]
    assert sum(isinstance(each, ThinkingPartDelta) for each in deltas) > 1
    assert result.output == "The tool says: sunny in Paris"


def test_a_tool_that_asks_to_be_called_again(model):
    agent, tries = Agent(model), []

    @agent.tool_plain
    def lottery(number: int) -> str:
        """Draws a number of the lottery."""
        tries.append(number)
        if len(tries) < 2:
            raise ModelRetry("Not yet. Call the lottery again with number 7")
        return "won"

    result = agent.run_sync("Draw number 7 of the lottery", output_type=[str])
    assert "lottery" in result.output or "Not yet" in result.output or result.output.endswith("won")
    assert tries[0] == 7


@pytest.mark.parametrize("output", [ToolOutput, NativeOutput, PromptedOutput])
def test_a_structure(model, output):
    result = Agent(model, output_type=output(User)).run_sync("Extract: Jason is 25 years old.")
    assert result.output == JASON


def test_a_structure_behind_a_tool(model):
    class Report(BaseModel):
        city: str
        sunny: bool

    result = with_weather(model, output_type=Report).run_sync("Report the weather in Paris.")
    assert result.output == Report(city="Paris", sunny=True)
    assert calls(result)[0].tool_name == "weather"


def test_a_structure_as_it_comes(model):
    async def read():
        async with Agent(model, output_type=User).run_stream("Extract: Jason is 25 years old.") as result:
            return [part async for part in result.stream_output(debounce_by=None)]

    assert asyncio.run(read())[-1] == JASON


def test_a_second_turn(model):
    agent = Agent(model)
    first = agent.run_sync("Say 'one'.")
    second = agent.run_sync("Say 'two'.", message_history=first.all_messages())
    assert second.output == "two"
    assert len(second.all_messages()) == 4


def test_a_second_turn_behind_calls(model):
    agent = with_weather(model)
    first = agent.run_sync("What is the weather in Paris?")
    second = agent.run_sync("Say 'thanks'.", message_history=first.all_messages())
    assert second.output == "thanks"


def test_a_reply_that_is_cut(model):
    result = Agent(model).run_sync("Say 'one two three four'.", model_settings={"max_tokens": 16, "temperature": 0.0})
    assert result.output.startswith("one two")


def test_a_prompt_that_is_too_long_is_an_error_of_the_request(model):
    with pytest.raises(ModelHTTPError) as caught:
        Agent(model).run_sync("word " * 70_000)
    assert caught.value.status_code == 400
    assert "context length" in str(caught.value) or "too long" in str(caught.value)


def test_a_model_that_is_not_there():
    with pytest.raises(ModelHTTPError) as caught:
        Agent(OpenAIChatModel("nobody", provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))).run_sync("Hi")
    assert caught.value.status_code == 404


def test_settings_of_chat():
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))
    result = Agent(model).run_sync(
        "Say 'one two three'.",
        model_settings={"stop_sequences": ["three"], "seed": 1, "openai_logprobs": True, "openai_top_logprobs": 2},
    )
    assert result.output == "one two "
    details = result.response.provider_details
    assert len(details["logprobs"]) == 3
    assert len(details["logprobs"][0]["top_logprobs"]) == 2


def test_embeddings():
    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    embedder = Embedder(OpenAIEmbeddingModel(os.environ["PENSTOCK_EMBED"], provider=provider))
    result = embedder.embed_documents_sync(["a fox", "a river"])
    assert [len(vector) for vector in result.embeddings] == [64, 64]
    assert result.usage.input_tokens > 0
