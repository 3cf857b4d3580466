"""LangChain: the standard suites of langchain-tests for its OpenAI and Anthropic classes, with nothing left out."""

import os

import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

URL, MODEL, OTHER, EMBED = (os.environ[f"PENSTOCK_{name}"] for name in ("URL", "MODEL", "OTHER", "EMBED"))


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


class TestChatOpenAI(ChatModelIntegrationTests):
    """Over chat completions."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict:
        return {"model": MODEL, "base_url": f"{URL}/v1", "api_key": "none", "stream_usage": True, "max_retries": 0}

    @property
    def model_override_value(self) -> str:
        return OTHER

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestChatOpenAIResponses(TestChatOpenAI):
    """Over the responses API."""

    @property
    def chat_model_params(self) -> dict:
        return {**super().chat_model_params, "use_responses_api": True}


class TestChatAnthropic(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict:
        return {"model": MODEL, "base_url": URL, "api_key": "none", "max_tokens": 1024, "max_retries": 0}

    @property
    def model_override_value(self) -> str:
        return OTHER

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


class TestOpenAIEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict:
        # Its own counting of tokens knows only OpenAI's models.
        return {"model": EMBED, "base_url": f"{URL}/v1", "api_key": "none", "check_embedding_ctx_length": False}


def test_a_prompt_that_is_too_long_is_known_as_such():
    chat = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", max_retries=0)
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 70_000)


def test_a_prompt_that_is_too_long_for_anthropics_route_is_known_as_such():
    chat = ChatAnthropic(model=MODEL, base_url=URL, api_key="none", max_retries=0)
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 70_000)


def test_log_probabilities():
    chat = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", logprobs=True, top_logprobs=2)
    content = chat.invoke("Say 'one two'.").response_metadata["logprobs"]["content"]
    assert [each["token"] for each in content] == ["one", " two"]


def test_a_model_that_is_not_there():
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(model="nobody", base_url=f"{URL}/v1", api_key="none", max_retries=0).invoke("Hi")


def test_a_thought_before_a_call():
    """By its class for Anthropic: those for OpenAI leave out thoughts that are no summaries, whoever sends them."""
    chat = ChatAnthropic(model=MODEL, base_url=URL, api_key="none", max_tokens=1024, max_retries=0)
    asked = chat.bind_tools([weather])
    question = [("user", "Think 'a river runs'. What is the weather in Paris?")]
    whole = asked.invoke(question)
    streamed = None
    for chunk in asked.stream(question):
        streamed = chunk if streamed is None else streamed + chunk
    for message in (whole, streamed):
        thoughts = [each.get("reasoning", "") for each in message.content_blocks if each["type"] == "reasoning"]
        assert "".join(thoughts) == "a river runs"
        assert [call["args"] for call in message.tool_calls] == [{"city": "Paris"}]
    (call,) = whole.tool_calls
    result = ToolMessage("sunny in Paris", tool_call_id=call["id"])
    assert asked.invoke([*question, whole, result]).text == "The tool says: sunny in Paris"
